"""DAPO's over-long penalty and Kimi's brevity, against their formulas written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.api import RewardInput, RewardOutput
from rewards.length import LengthReward, overlong_penalty
from rl.errors import ConfigError


def group(*lengths: int) -> list[RewardInput]:
    return [RewardInput(prompt="", response="x" * n, answer="", ground_truth=None, num_tokens=n) for n in lengths]


@given(st.integers(0, 300), st.integers(1, 200), st.data())
def test_overlong_is_equation_13(length: int, max_tokens: int, data: st.DataObject) -> None:
    cache = data.draw(st.integers(1, max_tokens))
    if length <= max_tokens - cache:
        expected = 0.0
    elif length <= max_tokens:
        expected = ((max_tokens - cache) - length) / cache
    else:
        expected = -1.0
    assert overlong_penalty(length, max_tokens, cache) == pytest.approx(expected)


def test_brevity_rewards_short_right_answers_and_spares_short_wrong_ones() -> None:
    outputs = LengthReward(brevity=2.0).score_group(group(10, 20, 30, 20), [1.0, 1.0, 1.0, 0.0])
    assert outputs == [
        RewardOutput(1.0, {"brevity": 0.5}),
        RewardOutput(0.0, {"brevity": 0.0}),
        RewardOutput(-1.0, {"brevity": -0.5}),
        RewardOutput(0.0, {"brevity": 0.0}),
    ]
    [short_wrong, long_wrong] = LengthReward(brevity=1.0).score_group(group(10, 30), [0.0, 0.0])
    assert short_wrong == RewardOutput(0.0, {"brevity": 0.0})
    assert long_wrong == RewardOutput(-0.5, {"brevity": -0.5})


def test_equal_lengths_and_single_responses_get_no_brevity() -> None:
    for lengths in ((7, 7), (7,)):
        outputs = LengthReward(brevity=1.0).score_group(group(*lengths), [1.0] * len(lengths))
        assert {output.reward for output in outputs if isinstance(output, RewardOutput)} == {0.0}


def test_both_parts_add_up() -> None:
    reward = LengthReward(max_tokens=100, buffer_tokens=50, brevity=1.0)
    [short, long] = reward.score_group(group(50, 75), [1.0, 1.0])
    assert short == RewardOutput(0.5, {"overlong": 0.0, "brevity": 0.5})
    assert long == RewardOutput(-1.0, {"overlong": -0.5, "brevity": -0.5})


def test_a_missing_token_count_is_an_error_of_its_row_only() -> None:
    missing = RewardInput(prompt="", response="words", answer="", ground_truth=None)
    outputs = LengthReward(brevity=1.0).score_group([*group(10, 20), missing], [1.0, 1.0, 1.0])
    assert isinstance(outputs[2], ValueError)
    assert outputs[0] == RewardOutput(0.5, {"brevity": 0.5})


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({}, "nothing to do"),
        ({"max_tokens": 10}, "together"),
        ({"max_tokens": 10, "buffer_tokens": 11}, r"must be in 1\.\.max_tokens 10"),
        ({"brevity": -1.0}, "must not be negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            LengthReward(**options)  # type: ignore[arg-type]

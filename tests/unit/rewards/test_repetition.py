"""Loops cost, honest text does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.api import RewardInput
from rewards.repetition import RepetitionReward, repeated_share
from rl.errors import ConfigError


def reward(text: str, n: int = 4, free: float = 0.1, mask_digits: bool = False) -> float:
    sample = RewardInput(prompt="", response=text, answer="", ground_truth=None)
    return RepetitionReward(n=n, free=free, mask_digits=mask_digits)(sample).reward


def test_share_of_repeated_ngrams() -> None:
    assert repeated_share("a b a b a b", 2) == pytest.approx(3 / 5)
    assert repeated_share("A b, a B, a b,", 3) == pytest.approx(1 - 3 / 7)
    assert repeated_share("a b", 3) == 0.0
    assert repeated_share("", 1) == 0.0


def test_by_default_n_is_8_and_a_tenth_is_free() -> None:
    words = [str(i) for i in range(8)]
    sample = RewardInput(prompt="", response=" ".join(words * 2), answer="", ground_truth=None)
    repeated = 1 / 9  # of the 9 8-grams the last is the first
    assert RepetitionReward()(sample).reward == pytest.approx(-(repeated - 0.1) / 0.9)


def test_scripts_without_spaces_count_by_character() -> None:
    assert repeated_share("待って待って待って", 3) == pytest.approx(1 - 3 / 7)
    assert repeated_share("答えは四十二です", 3) == 0.0
    assert repeated_share("値xは値xは値xは", 3) > 0.4


def test_loops_cost_and_honest_text_does_not() -> None:
    honest = (
        "First we add both numbers. Then we halve the sum. The result is five, which we check by doubling it again."
    )
    assert reward(honest) == 0.0
    assert reward("Wait, let me check that again. " * 50) < -0.95
    assert -0.7 < reward(honest + " no no no no no no no no no no no no no no no no no no no no no no") < -0.2


def test_counters_hide_a_loop_unless_digits_are_masked() -> None:
    loop = " ".join(f"step {i} ." for i in range(200))
    assert reward(loop, n=6) == 0.0
    assert reward(loop, n=6, mask_digits=True) < -0.9


@given(st.text(), st.integers(1, 5))
def test_any_text_has_a_share(text: str, n: int) -> None:
    assert 0.0 <= repeated_share(text, n) < 1.0
    assert -1.0 <= reward(text, n=n) <= 0.0


def test_wrong_options_are_refused() -> None:
    for n, free in ((0, 0.1), (3, 1.0), (3, -0.1)):
        with pytest.raises(ConfigError, match="needs n >= 1 and 0 <= free < 1"):
            RepetitionReward(n=n, free=free)

"""The order of prompts, and resuming at any position."""

import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.batch import Prompt
from rl.config import CurriculumConfig
from rl.data_shaping import PassRateCurriculum
from rl.errors import CheckpointError, DataError
from rl.prompts import CurriculumSource, PromptSource


def make_prompts(count: int, ground_truth: str = "1") -> tuple[Prompt, ...]:
    return tuple(Prompt(f"train:{i}", (i,), f"question {i}", ground_truth) for i in range(count))


def ids(source: PromptSource | CurriculumSource, *counts: int) -> list[str]:
    return [p.prompt_id.removeprefix("train:") for count in counts for p in source.draw(count)]


def test_without_shuffling_draws_walk_the_dataset_and_wrap():
    source = PromptSource(make_prompts(3), shuffle=False, seed=0)
    assert [ids(source, 2) for _ in range(4)] == [["0", "1"], ["2", "0"], ["1", "2"], ["0", "1"]]


def test_a_dataset_smaller_than_a_draw_wraps_more_than_once():
    source = PromptSource(make_prompts(2), shuffle=False, seed=0)
    assert ids(source, 5) == ["0", "1", "0", "1", "0"]


counts_drawn = st.lists(st.integers(0, 25), max_size=12)


@given(count=st.integers(1, 20), counts=counts_drawn, seed=st.integers(-(2**31), 2**31))
def test_every_epoch_draws_every_prompt_once(count: int, counts: list[int], seed: int):
    source = PromptSource(make_prompts(count), shuffle=True, seed=seed)
    drawn = ids(source, *counts)
    for epoch in range(len(drawn) // count):
        assert Counter(drawn[epoch * count : (epoch + 1) * count]) == Counter(str(i) for i in range(count))


@given(count=st.integers(1, 20), counts=counts_drawn, seed=st.integers(0, 2**63), shuffle=st.booleans())
def test_resuming_anywhere_continues_exactly(count: int, counts: list[int], seed: int, shuffle: bool):
    straight = PromptSource(make_prompts(count), shuffle=shuffle, seed=seed)
    ids(straight, *counts)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = PromptSource(make_prompts(count), shuffle=shuffle, seed=seed)
    ids(resumed, 3)  # a position of its own is forgotten
    resumed.load_state_dict(state)
    assert ids(resumed, 30) == ids(straight, 30)


def test_the_order_depends_on_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[str]:
        return ids(PromptSource(make_prompts(50), shuffle=True, seed=seed), 50 * (epoch + 1))[-50:]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_changed_data_are_refused_with_both_counts():
    state = PromptSource(make_prompts(5), shuffle=True, seed=0).state_dict()
    with pytest.raises(CheckpointError, match=r"it had 5 prompts .* now 6 "):
        PromptSource(make_prompts(6), shuffle=True, seed=0).load_state_dict(state)
    with pytest.raises(CheckpointError, match="training data changed"):
        PromptSource(make_prompts(5, ground_truth="2"), shuffle=True, seed=0).load_state_dict(state)


@pytest.mark.parametrize("change", [{"reward": "math"}, {"extra": {"tests": "b"}}])
def test_rows_that_are_rewarded_otherwise_are_other_data(change):
    before = tuple(dataclasses.replace(p, reward="exact", extra={"tests": "a"}) for p in make_prompts(2))
    state = PromptSource(before, shuffle=False, seed=0).state_dict()
    PromptSource(before, shuffle=False, seed=0).load_state_dict(state)
    after = tuple(dataclasses.replace(p, **change) for p in before)
    with pytest.raises(CheckpointError):
        PromptSource(after, shuffle=False, seed=0).load_state_dict(state)


def test_changed_seed_or_shuffling_is_refused_with_the_remedy():
    state = PromptSource(make_prompts(5), shuffle=True, seed=7).state_dict()
    with pytest.raises(CheckpointError, match="set seed=7 to resume"):
        PromptSource(make_prompts(5), shuffle=True, seed=8).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"set data\.shuffle=True to resume"):
        PromptSource(make_prompts(5), shuffle=False, seed=7).load_state_dict(state)


def test_no_prompts_are_an_error():
    with pytest.raises(DataError, match="no prompts"):
        PromptSource((), shuffle=True, seed=0)


# Curriculum


def curriculum_source(count: int, rates: dict[str, float] | None = None, *, seed: int = 0) -> CurriculumSource:
    curriculum = PassRateCurriculum(CurriculumConfig(floor=0.1), {f"train:{i}": r for i, r in (rates or {}).items()})
    return CurriculumSource(PromptSource(make_prompts(count), shuffle=True, seed=seed), curriculum, seed=seed)


def test_with_unknown_pass_rates_the_curriculum_keeps_the_order():
    assert ids(curriculum_source(7), 20) == ids(PromptSource(make_prompts(7), shuffle=True, seed=0), 20)


def test_prompts_are_drawn_as_often_as_their_pass_rate_says():
    drawn = Counter(ids(curriculum_source(4, {"0": 0.0, "1": 1.0, "2": 0.5, "3": 0.8}), 4000))
    total = 0.1 + 0.1 + 1.0 + 0.64
    for prompt, weight in (("0", 0.1), ("1", 0.1), ("2", 1.0), ("3", 0.64)):
        assert drawn[prompt] == pytest.approx(4000 * weight / total, rel=0.15)


@given(
    rates=st.dictionaries(st.integers(0, 9).map(str), st.floats(0, 1)), counts=counts_drawn, seed=st.integers(-5, 2**63)
)
def test_a_curriculum_resumes_exactly(rates: dict[str, float], counts: list[int], seed: int):
    straight = curriculum_source(10, rates, seed=seed)
    ids(straight, *counts)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = curriculum_source(10, {"3": 0.9}, seed=seed)  # its own pass rates are forgotten
    resumed.load_state_dict(state)
    assert ids(resumed, 30) == ids(straight, 30)


def test_a_curriculum_can_be_switched_on_and_off_when_resuming():
    plain = PromptSource(make_prompts(5), shuffle=True, seed=0)
    ids(plain, 3)
    added = curriculum_source(5, {"1": 0.0})
    added.load_state_dict(plain.state_dict())
    assert ids(added, 10) == ids(plain, 10)
    plain.load_state_dict(added.state_dict())
    assert ids(plain, 10) == ids(added, 10)

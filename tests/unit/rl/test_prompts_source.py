"""The order of prompts, and resuming at any position."""

import itertools
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.batch import Prompt
from rl.errors import CheckpointError, DataError
from rl.prompts import PromptSource


def make_prompts(count: int, ground_truth: str = "1") -> tuple[Prompt, ...]:
    return tuple(Prompt(f"train:{i}", (i,), f"question {i}", ground_truth) for i in range(count))


def ids(source: PromptSource, steps: int) -> list[str]:
    return [p.prompt_id.removeprefix("train:") for step in itertools.islice(source, steps) for p in step]


def test_without_shuffling_steps_walk_the_dataset_and_wrap():
    source = PromptSource(make_prompts(3), 2, shuffle=False, seed=0)
    assert [ids(source, 1) for _ in range(4)] == [["0", "1"], ["2", "0"], ["1", "2"], ["0", "1"]]


def test_a_dataset_smaller_than_a_step_wraps_more_than_once():
    source = PromptSource(make_prompts(2), 5, shuffle=False, seed=0)
    assert ids(source, 1) == ["0", "1", "0", "1", "0"]
    assert source.epoch == 2


@given(
    count=st.integers(1, 20), per_step=st.integers(1, 25), seed=st.integers(-(2**31), 2**31), epochs=st.integers(1, 4)
)
def test_every_epoch_draws_every_prompt_once(count: int, per_step: int, seed: int, epochs: int):
    source = PromptSource(make_prompts(count), per_step, shuffle=True, seed=seed)
    drawn = ids(source, -(-count * epochs // per_step))
    for epoch in range(epochs):
        assert Counter(drawn[epoch * count : (epoch + 1) * count]) == Counter(str(i) for i in range(count))


@given(
    count=st.integers(1, 20),
    per_step=st.integers(1, 25),
    steps=st.integers(0, 12),
    seed=st.integers(0, 2**63),
    shuffle=st.booleans(),
)
def test_resuming_anywhere_continues_exactly(count: int, per_step: int, steps: int, seed: int, shuffle: bool):
    straight = PromptSource(make_prompts(count), per_step, shuffle=shuffle, seed=seed)
    ids(straight, steps)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = PromptSource(make_prompts(count), per_step, shuffle=shuffle, seed=seed)
    ids(resumed, 3)  # a position of its own is forgotten
    resumed.load_state_dict(state)
    assert resumed.epoch == straight.epoch
    assert ids(resumed, 5) == ids(straight, 5)


def test_the_order_depends_on_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[str]:
        return ids(PromptSource(make_prompts(50), 50, shuffle=True, seed=seed), epoch + 1)[-50:]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_prompts_per_step_may_change_on_resume():
    source = PromptSource(make_prompts(10), 4, shuffle=True, seed=3)
    expected = ids(PromptSource(make_prompts(10), 1, shuffle=True, seed=3), 10)
    assert ids(source, 1) == expected[:4]
    wider = PromptSource(make_prompts(10), 6, shuffle=True, seed=3)
    wider.load_state_dict(source.state_dict())
    assert ids(wider, 1) == expected[4:]


def test_changed_data_are_refused_with_both_counts():
    state = PromptSource(make_prompts(5), 2, shuffle=True, seed=0).state_dict()
    with pytest.raises(CheckpointError, match=r"it had 5 prompts .* now 6 "):
        PromptSource(make_prompts(6), 2, shuffle=True, seed=0).load_state_dict(state)
    with pytest.raises(CheckpointError, match="training data changed"):
        PromptSource(make_prompts(5, ground_truth="2"), 2, shuffle=True, seed=0).load_state_dict(state)


def test_changed_seed_or_shuffling_is_refused_with_the_remedy():
    state = PromptSource(make_prompts(5), 2, shuffle=True, seed=7).state_dict()
    with pytest.raises(CheckpointError, match="set seed=7 to resume"):
        PromptSource(make_prompts(5), 2, shuffle=True, seed=8).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"set data\.shuffle=True to resume"):
        PromptSource(make_prompts(5), 2, shuffle=False, seed=7).load_state_dict(state)


def test_no_prompts_and_no_step_are_errors():
    with pytest.raises(DataError, match="no prompts"):
        PromptSource((), 2, shuffle=True, seed=0)
    with pytest.raises(ValueError, match="prompts_per_step is 0"):
        PromptSource(make_prompts(1), 0, shuffle=True, seed=0)

"""Dynamic sampling, over-long penalty, repetition and curriculum, on batches small enough to read."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.advantages import estimate
from rl.batch import Annotations, FinishReason, Prompt, RewardStatus, Rollout, RolloutBatch, Score, ScoredBatch
from rl.config import AlgorithmConfig
from rl.data_shaping import (
    DynamicSampling,
    PassRateCurriculum,
    concatenate,
    groups_with_signal,
    overlong_penalty,
    penalize_overlong,
    reject_degenerate,
    select_groups,
    trailing_repetition,
)
from rl.errors import ConfigError


def scored_batch(groups: dict[str, list[float]], *, tokens: int = 4) -> ScoredBatch:
    """One group a prompt; the response of sample j of prompt i holds i and j."""
    prompts = tuple(Prompt(name, (1,), name) for name in groups)
    rollouts, scores = [], []
    for i, rewards in enumerate(groups.values()):
        for j, reward in enumerate(rewards):
            ids = np.array([i, j] * (tokens // 2), dtype=np.int32)
            rollouts.append(
                Rollout(i, i, j, ids, np.zeros(len(ids), np.float32), FinishReason.STOP, 0, f"{list(groups)[i]}{j}", "")
            )
            scores.append(Score(reward))
    return ScoredBatch(RolloutBatch(prompts, tuple(rollouts), 1.0), tuple(scores), 0.5)


def texts(scored: ScoredBatch) -> list[str]:
    return [r.text for r in scored.batch.rollouts]


def test_group_without_signal_is_all_equal_among_valid_samples() -> None:
    scored = scored_batch({"a": [1, 1], "b": [0, 1], "c": [0, 0], "d": [1, 0]})
    scores = list(scored.scores)
    scores[7] = Score(0.0, status=RewardStatus.TIMEOUT)
    scores[0] = Score(0.3, unshaped_reward=1.0)  # a length penalty is no signal
    assert groups_with_signal(ScoredBatch(scored.batch, tuple(scores))) == {0: False, 1: True, 2: False, 3: False}


def test_selected_and_concatenated_batches_are_numbered_anew() -> None:
    scored = scored_batch({"a": [1, 0], "b": [0, 1], "c": [0, 0]})
    part = select_groups(scored, [2, 0])
    assert texts(part) == ["a0", "a1", "c0", "c1"]
    assert [p.prompt_id for p in part.batch.prompts] == ["a", "c"]
    both = concatenate([part, scored])
    assert texts(both) == ["a0", "a1", "c0", "c1", *texts(scored)]
    assert [r.group_id for r in both.batch.rollouts] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [both.batch.prompt_of(r).prompt_id for r in both.batch.rollouts] == [t[0] for t in texts(both)]
    assert [s.reward for s in both.scores[:4]] == [1, 0, 0, 0]
    assert both.batch.seconds == 2.0


def test_dynamic_sampling_replaces_groups_without_signal() -> None:
    sampling = DynamicSampling(num_groups=2, max_rounds=5)
    sampling.add(scored_batch({"a": [1, 1], "b": [0, 1]}))
    assert sampling.missing == 1
    sampling.add(scored_batch({"c": [0, 0]}))
    assert sampling.missing == 1
    sampling.add(scored_batch({"d": [1, 0], "e": [0, 1]}))
    assert sampling.missing == 0
    batch, metrics = sampling.take()
    assert texts(batch) == ["b0", "b1", "d0", "d1"]
    assert metrics == {
        "shaping/rounds": 3.0,
        "shaping/groups_generated": 5.0,
        "shaping/groups_without_signal": 2.0,
        "shaping/groups_filled_up": 0.0,
    }
    assert sampling.missing == 1  # e is kept for the next step
    advantages = estimate(batch, Annotations(), AlgorithmConfig()).advantages
    assert all(row.abs().min() > 0 for row in advantages)


def test_dynamic_sampling_fills_up_at_the_cap() -> None:
    sampling = DynamicSampling(num_groups=3, max_rounds=2)
    sampling.add(scored_batch({"a": [1, 1], "b": [0, 1], "c": [1, 1]}))
    with pytest.raises(ValueError, match="2 of 3 groups are missing"):
        sampling.take()
    sampling.add(scored_batch({"d": [0, 0], "e": [0, 0]}))
    assert sampling.missing == 0
    batch, metrics = pickle.loads(pickle.dumps(sampling)).take()
    assert texts(batch) == ["b0", "b1", "a0", "a1", "c0", "c1"]
    assert metrics["shaping/groups_filled_up"] == 2.0


def test_dynamic_sampling_needs_room() -> None:
    with pytest.raises(ConfigError, match="max_rounds 0"):
        DynamicSampling(num_groups=1, max_rounds=0)


def test_overlong_penalty_is_dapos() -> None:
    """arXiv 2503.14476, eq. 13."""
    values = [overlong_penalty(n, max_length=100, buffer=20) for n in (0, 80, 85, 90, 100, 130)]
    assert values == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    with pytest.raises(ConfigError, match="buffer is 0"):
        overlong_penalty(1, max_length=100, buffer=0)


def test_penalty_shapes_the_reward_and_keeps_the_task_reward() -> None:
    scored = scored_batch({"a": [1, 1]}, tokens=18)
    scores = (scored.scores[0], Score(0.0, status=RewardStatus.TIMEOUT))
    shaped = penalize_overlong(ScoredBatch(scored.batch, scores), max_length=20, buffer=4, weight=0.5)
    assert shaped.scores[0].reward == 0.75
    assert shaped.scores[0].unshaped_reward == 1.0
    assert shaped.scores[0].breakdown == {"overlong": -0.5}
    assert shaped.scores[1] == scores[1]
    assert groups_with_signal(shaped) == {0: False}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7, 1, 2, 1, 2, 1, 2], (2, 6)),
        ([5, 5, 5, 5], (1, 4)),
        ([1, 2, 3, 4], (0, 0)),
        ([1, 2, 1, 2, 9], (0, 0)),
        ([3, 1, 2, 3, 1, 2, 3], (3, 7)),
        ([], (0, 0)),
        ([1], (0, 0)),
    ],
)
def test_trailing_repetition_examples(tokens: list[int], expected: tuple[int, int]) -> None:
    assert trailing_repetition(np.array(tokens, dtype=np.int32)) == expected


@given(st.lists(st.integers(0, 2), max_size=24))
def test_trailing_repetition_equals_its_definition(tokens: list[int]) -> None:
    """The longest suffix of at least two blocks in which every token equals the one a period before it."""
    best = (0, 0)
    for period in range(1, len(tokens) // 2 + 1):
        for length in range(2 * period, len(tokens) + 1):
            tail = tokens[len(tokens) - length :]
            if all(tail[i] == tail[i - period] for i in range(period, length)) and length > best[1]:
                best = (period, length)
    assert trailing_repetition(np.array(tokens, dtype=np.int32)) == best


def test_endless_repetition_is_taken_out_of_loss_and_statistics() -> None:
    scored = scored_batch({"a": [0, 1, 0]}, tokens=64)
    ids = np.arange(64, dtype=np.int32)
    healthy = tuple(
        r if i == 2 else Rollout(0, 0, i, ids, r.rollout_logprobs, FinishReason.STOP, 0, "", "")
        for i, r in enumerate(scored.batch.rollouts)
    )
    scored = ScoredBatch(RolloutBatch(scored.batch.prompts, healthy), scored.scores)
    kept, count = reject_degenerate(scored, min_tokens=32, min_repeats=8)
    assert count == 1
    assert [s.status for s in kept.scores] == [RewardStatus.OK, RewardStatus.OK, RewardStatus.SKIPPED]
    assert "64 tokens that repeat a block of 2" in kept.scores[2].error
    assert reject_degenerate(scored, min_tokens=65)[1] == 0
    advantages = estimate(kept, Annotations(), AlgorithmConfig(advantage="dr_grpo")).advantages
    assert [row[0].item() for row in advantages] == [-0.5, 0.5, 0.0]


def test_curriculum_prefers_prompts_that_are_solved_sometimes() -> None:
    curriculum = PassRateCurriculum(decay=0.5, floor=0.1)
    curriculum.update(scored_batch({"easy": [1, 1, 1, 1], "hard": [0, 0, 0, 0], "right": [1, 0, 1, 0]}))
    assert [curriculum.weight(p) for p in ("easy", "hard", "right", "new")] == [0.1, 0.1, 1.0, 1.0]
    curriculum.update(scored_batch({"hard": [1, 1, 1, 1]}))
    assert curriculum.rates["hard"] == 0.5
    curriculum = pickle.loads(pickle.dumps(curriculum))
    prompts = [Prompt(name, (1,), name) for name in ("easy", "right")]
    drawn = [curriculum.choose(prompts, 1, seed)[0].prompt_id for seed in range(400)]
    assert drawn == [curriculum.choose(prompts, 1, seed)[0].prompt_id for seed in range(400)]
    assert 320 < drawn.count("right") < 400  # 10 of 11 expected: 364
    assert curriculum.choose(prompts, 2, 0) == tuple(prompts)
    with pytest.raises(ValueError, match="cannot choose 3 of 2"):
        curriculum.choose(prompts, 3, 0)
    with pytest.raises(ConfigError, match=r"floor 0\.0"):
        PassRateCurriculum(floor=0.0)

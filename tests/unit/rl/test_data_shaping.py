"""Dynamic sampling, repetition and pass rates, on batches small enough to read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.advantages import estimate
from rl.batch import Annotations, FinishReason, Prompt, RewardStatus, Rollout, RolloutBatch, Score, ScoredBatch
from rl.config import AlgorithmConfig, CurriculumConfig, DynamicSamplingConfig, RejectDegenerateConfig
from rl.data_shaping import (
    PassRateCurriculum,
    StepGroups,
    concatenate,
    groups_with_signal,
    reject_degenerate,
    select_groups,
    trailing_repetition,
)


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
    return ScoredBatch(RolloutBatch(prompts, tuple(rollouts), 1.0), tuple(scores))


def texts(scored: ScoredBatch) -> list[str]:
    return [r.text for r in scored.batch.rollouts]


def test_group_without_signal_is_all_equal_among_valid_samples() -> None:
    scored = scored_batch({"a": [1, 1], "b": [0, 1], "c": [0.1 + 0.2, 0.3], "d": [1, 0]})
    scores = list(scored.scores)
    scores[7] = Score(0.0, status=RewardStatus.TIMEOUT)
    scores[0] = Score(0.3, unshaped_reward=1.0)  # a length penalty is no signal
    assert groups_with_signal(ScoredBatch(scored.batch, tuple(scores))) == {0: False, 1: True, 2: False, 3: False}
    shaped = groups_with_signal(ScoredBatch(scored.batch, tuple(scores)), of_task=False)
    assert shaped == {0: True, 1: True, 2: False, 3: False}
    groups = step_groups(4, 2)
    groups.add(ScoredBatch(scored.batch, tuple(scores)))
    assert groups.missing == 3


def test_selected_and_concatenated_batches_are_numbered_anew() -> None:
    scored = scored_batch({"a": [1, 0], "b": [0, 1], "c": [0, 0]})
    part = select_groups(scored, [2, 0])
    assert texts(part) == ["a0", "a1", "c0", "c1"]
    assert [p.prompt_id for p in part.batch.prompts] == ["a", "c"]
    assert part.batch.seconds == pytest.approx(2 / 3)
    both = concatenate([part, scored])
    assert texts(both) == ["a0", "a1", "c0", "c1", *texts(scored)]
    assert [r.group_id for r in both.batch.rollouts] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [both.batch.prompt_of(r).prompt_id for r in both.batch.rollouts] == [t[0] for t in texts(both)]
    assert [s.reward for s in both.scores[:4]] == [1, 0, 0, 0]
    assert both.batch.seconds == pytest.approx(5 / 3)


def step_groups(num_groups: int, max_rounds: int) -> StepGroups:
    return StepGroups(num_groups, dynamic_sampling=DynamicSamplingConfig(max_rounds=max_rounds))


def test_without_dynamic_sampling_one_round_is_the_step_untouched() -> None:
    groups = StepGroups(2)
    assert (groups.missing, groups.generated) == (2, 0)
    scored = scored_batch({"a": [1, 1], "b": [0, 1]})
    groups.add(scored)
    assert (groups.missing, groups.generated) == (0, 2)
    batch, metrics = groups.take()
    assert batch is scored
    assert metrics == {}


def test_dynamic_sampling_replaces_groups_without_signal() -> None:
    groups = step_groups(2, 5)
    groups.add(scored_batch({"a": [1, 1], "b": [0, 1]}))
    assert (groups.missing, groups.generated) == (1, 2)
    groups.add(scored_batch({"c": [0, 0]}))
    assert (groups.missing, groups.generated) == (1, 3)
    groups.add(scored_batch({"d": [1, 0]}))
    assert groups.missing == 0
    batch, metrics = groups.take()
    assert texts(batch) == ["b0", "b1", "d0", "d1"]
    assert metrics == {
        "rollout/dynamic_sampling_rounds": 3.0,
        "rollout/dynamic_sampling_generated_groups": 4.0,
        "rollout/dynamic_sampling_dropped_groups": 2.0,
        "rollout/dynamic_sampling_filled_groups": 0.0,
        "reward/generated_mean": 0.5,
    }
    assert batch.batch.seconds == 1.5  # half of the first round's tokens, none of the second's, all of the third's
    advantages = estimate(batch, Annotations(), AlgorithmConfig()).advantages
    assert all(row.abs().min() > 0 for row in advantages)


def test_the_mean_reward_of_what_was_generated_leaves_out_failures() -> None:
    groups = step_groups(2, 2)
    scored = scored_batch({"a": [1, 1], "b": [0, 1]})
    failed = Score(float("nan"), status=RewardStatus.TIMEOUT)
    groups.add(ScoredBatch(scored.batch, (failed, *scored.scores[1:])))
    assert groups.take()[1]["reward/generated_mean"] == pytest.approx(2 / 3)


def test_dynamic_sampling_fills_up_at_the_cap_in_the_order_of_generation() -> None:
    groups = step_groups(3, 2)
    groups.add(scored_batch({"a": [1, 1], "b": [0, 1], "c": [1, 1]}))
    assert groups.missing == 2
    groups.add(scored_batch({"d": [0, 0], "e": [0, 0]}))
    assert groups.missing == 0
    batch, metrics = groups.take()
    assert texts(batch) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert metrics["rollout/dynamic_sampling_filled_groups"] == 2.0
    assert metrics["rollout/dynamic_sampling_dropped_groups"] == 2.0


@given(st.data(), st.integers(1, 5), st.integers(2, 4))
def test_a_step_has_its_size_and_every_group_with_a_signal(
    data: st.DataObject, num_groups: int, max_rounds: int
) -> None:
    groups, useful, name = step_groups(num_groups, max_rounds), [], 0
    while groups.missing:
        rewards = data.draw(
            st.lists(st.sampled_from([[0, 0], [0, 1], [1, 1]]), min_size=groups.missing, max_size=groups.missing)
        )
        named = {f"{name + i}-": pair for i, pair in enumerate(rewards)}
        name += len(named)
        useful += [key for key, pair in named.items() if pair == [0, 1]]
        groups.add(scored_batch(named))
    batch, metrics = groups.take()
    prompts = [p.prompt_id for p in batch.batch.prompts]
    assert len(prompts) == num_groups == len(set(prompts))
    assert [p for p in prompts if p in useful] == useful
    assert [r.group_id for r in batch.batch.rollouts] == [i // 2 for i in range(2 * num_groups)]
    assert len(useful) == num_groups or metrics["rollout/dynamic_sampling_rounds"] == max_rounds
    assert name == metrics["rollout/dynamic_sampling_generated_groups"] == groups.generated


def test_degenerate_responses_are_rejected_before_groups_are_judged() -> None:
    """A group that differs only by a rejected response has no signal; the rejected do not count as failed either."""
    scored = scored_batch({"a": [1, 0], "b": [0, 1]}, tokens=8)
    honest = [
        r if i == 1 else replace(r, token_ids=np.arange(8, dtype=np.int32)) for i, r in enumerate(scored.batch.rollouts)
    ]
    scored = ScoredBatch(replace(scored.batch, rollouts=tuple(honest)), scored.scores)
    curriculum = PassRateCurriculum(CurriculumConfig())
    groups = StepGroups(
        2, DynamicSamplingConfig(max_rounds=2), RejectDegenerateConfig(min_tokens=8, min_repeats=4), curriculum
    )
    groups.add(scored)
    assert groups.missing == 1
    assert curriculum.rates == {"a": 1.0, "b": 0.5}
    groups.add(scored_batch({"c": [1, 0]}))
    batch, metrics = groups.take()
    assert texts(batch) == ["b0", "b1", "c0", "c1"]
    assert metrics["rollout/degenerate_frac"] == 1 / 6
    assert metrics["curriculum/seen_prompts"] == 3.0
    assert metrics["curriculum/pass_rate_mean"] == pytest.approx(2 / 3)


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


def test_a_block_longer_than_the_longest_is_not_looked_for() -> None:
    tokens = np.array([1, 2, 3, 1, 2, 3], dtype=np.int32)
    assert [trailing_repetition(tokens, max_period=period) for period in (2, 3)] == [(0, 0), (3, 6)]


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
    kept, count = reject_degenerate(scored, RejectDegenerateConfig(min_tokens=32, min_repeats=8))
    assert count == 1
    assert [s.status for s in kept.scores] == [RewardStatus.OK, RewardStatus.OK, RewardStatus.SKIPPED]
    assert "64 tokens that repeat a block of 2" in kept.scores[2].error
    assert reject_degenerate(scored, RejectDegenerateConfig(min_tokens=65))[1] == 0
    failed = ScoredBatch(scored.batch, (*scored.scores[:2], Score(0.0, status=RewardStatus.TIMEOUT)))
    assert reject_degenerate(failed, RejectDegenerateConfig(min_tokens=32, min_repeats=8)) == (failed, 0)
    advantages = estimate(kept, Annotations(), AlgorithmConfig(advantage="dr_grpo")).advantages
    assert [row[0].item() for row in advantages] == [-0.5, 0.5, 0.0]


def test_curriculum_prefers_prompts_that_are_solved_sometimes() -> None:
    curriculum = PassRateCurriculum(CurriculumConfig(decay=0.75, floor=0.1))
    curriculum.update(scored_batch({"easy": [1, 1, 1, 1], "hard": [0, 0, 0, 0], "right": [1, 0, 1, 0]}))
    assert [curriculum.weight(p) for p in ("easy", "hard", "right", "new")] == [0.1, 0.1, 1.0, 1.0]
    curriculum.update(scored_batch({"hard": [1, 1, 1, 1]}))
    assert curriculum.rates["hard"] == 0.25
    unscored = scored_batch({"lost": [1, 0]})
    curriculum.update(ScoredBatch(unscored.batch, (Score(0.0, status=RewardStatus.TIMEOUT),) * 2))
    assert curriculum.weight("lost") == 1.0
    shaped = scored_batch({"long": [0]})
    curriculum.update(ScoredBatch(shaped.batch, (Score(-0.1, unshaped_reward=1.0),)))
    assert curriculum.rates["long"] == 1.0


def test_a_short_loop_that_meets_the_limits_is_not_hidden_by_a_longer_one_that_does_not() -> None:
    block = [*range(10, 70), *[1] * 40]  # twice: 200 tokens of 2 blocks, and 40 of one token at the end
    tokens = np.array(block * 2, dtype=np.int32)
    assert trailing_repetition(tokens, max_period=512) == (100, 200)
    assert trailing_repetition(tokens, max_period=512, min_tokens=32, min_repeats=4) == (1, 40)

"""Which samples a step learns from, and how their rewards are shaped: pure functions and small picklable states.

Dynamic sampling, the over-long penalty, rejection of endless repetition, and a curriculum by pass rate. Left out:
generation and scoring (the controller asks for more when told to), and the estimators (`rl.advantages`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rl.batch import FinishReason, IntArray, Prompt, RewardStatus, RolloutBatch, Score, ScoredBatch
from rl.errors import ConfigError


def task_reward(score: Score) -> float:
    """The reward before shaping: what says whether the task was solved."""
    return score.reward if score.unshaped_reward is None else score.unshaped_reward


def groups_with_signal(scored: ScoredBatch) -> dict[int, bool]:
    """group_id -> whether its valid samples have unequal task rewards, in order of appearance.

    DAPO, arXiv 2503.14476, eq. 11: a group that is all right or all wrong has advantage 0. Task rewards, because a
    length penalty would make every group look unequal.
    """
    rewards: dict[int, set[float]] = {}
    for rollout, score in zip(scored.batch.rollouts, scored.scores, strict=True):
        group = rewards.setdefault(rollout.group_id, set())
        if score.ok and rollout.finish_reason is not FinishReason.ABORT:
            group.add(task_reward(score))
    return {group_id: len(values) > 1 for group_id, values in rewards.items()}


def select_groups(scored: ScoredBatch, group_ids: Iterable[int]) -> ScoredBatch:
    """The batch of these groups alone, in the batch's order; prompts and groups are numbered anew from 0."""
    wanted = set(group_ids)
    kept = [i for i, rollout in enumerate(scored.batch.rollouts) if rollout.group_id in wanted]
    prompts: dict[int, int] = {}
    groups: dict[int, int] = {}
    rollouts = []
    for i in kept:
        rollout = scored.batch.rollouts[i]
        prompt = prompts.setdefault(rollout.prompt_index, len(prompts))
        rollouts.append(
            replace(rollout, prompt_index=prompt, group_id=groups.setdefault(rollout.group_id, len(groups)))
        )
    batch = RolloutBatch(tuple(scored.batch.prompts[p] for p in prompts), tuple(rollouts), scored.batch.seconds)
    return ScoredBatch(batch, tuple(scored.scores[i] for i in kept), scored.seconds)


def concatenate(parts: Sequence[ScoredBatch]) -> ScoredBatch:
    """One batch of all parts in order; prompts and groups are numbered anew, seconds add up."""
    prompts: list[Prompt] = []
    rollouts = []
    next_group = 0
    for part in parts:
        groups: dict[int, int] = {}
        for rollout in part.batch.rollouts:
            group = groups.setdefault(rollout.group_id, next_group + len(groups))
            rollouts.append(replace(rollout, prompt_index=rollout.prompt_index + len(prompts), group_id=group))
        prompts.extend(part.batch.prompts)
        next_group += len(groups)
    batch = RolloutBatch(tuple(prompts), tuple(rollouts), sum(part.batch.seconds for part in parts))
    return ScoredBatch(batch, tuple(s for part in parts for s in part.scores), sum(part.seconds for part in parts))


@dataclass(slots=True)
class DynamicSampling:
    """Collects groups with a signal until a step is full, or the cap on rounds is reached.

    Use: `add` each scored batch; while `missing` is not 0, generate that many more prompts. At the cap the step is
    filled up with groups without a signal, so that its size, which divides into mini-batches and ranks, stays the
    same.
    """

    num_groups: int  # groups a step
    max_rounds: int  # generations a step, the first included
    rounds: int = 0
    generated: int = 0  # groups
    useful: list[ScoredBatch] = field(default_factory=list)  # one group each
    idle: list[ScoredBatch] = field(default_factory=list)  # one group each, without a signal

    def __post_init__(self) -> None:
        if self.num_groups < 1 or self.max_rounds < 1:
            raise ConfigError(
                f"dynamic sampling needs num_groups {self.num_groups} and max_rounds {self.max_rounds} of at least 1"
            )

    def add(self, scored: ScoredBatch) -> None:
        """Take in one round."""
        self.rounds += 1
        for group_id, signal in groups_with_signal(scored).items():
            self.generated += 1
            (self.useful if signal else self.idle).append(select_groups(scored, [group_id]))

    @property
    def missing(self) -> int:
        """Groups still to be generated; 0 when the step is full or the cap is reached."""
        if self.rounds >= self.max_rounds and len(self.useful) + len(self.idle) >= self.num_groups:
            return 0
        return max(self.num_groups - len(self.useful), 0)

    def take(self) -> tuple[ScoredBatch, dict[str, float]]:
        """The step's batch and its counts. Surplus groups with a signal stay for the next step (they age by one)."""
        if self.missing:
            raise ValueError(f"{self.missing} of {self.num_groups} groups are missing after {self.rounds} rounds")
        step, self.useful = self.useful[: self.num_groups], self.useful[self.num_groups :]
        filled = self.num_groups - len(step)
        metrics = {
            "shaping/rounds": float(self.rounds),
            "shaping/groups_generated": float(self.generated),
            "shaping/groups_without_signal": float(len(self.idle)),
            "shaping/groups_filled_up": float(filled),
        }
        batch = concatenate(step + self.idle[:filled])
        self.rounds, self.generated, self.idle = 0, 0, []
        return batch, metrics


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """Soft over-long punishment: 0 up to max_length - buffer, then linear to -1 at max_length (DAPO, eq. 13).

    Example: max_length 100, buffer 20: 80 tokens 0, 90 tokens -0.5, 100 and more -1.
    """
    if not 0 < buffer <= max_length:
        raise ConfigError(f"over-long penalty: buffer is {buffer}; it must lie between 1 and max_length {max_length}")
    return -min(max(length - (max_length - buffer), 0) / buffer, 1.0)


def penalize_overlong(scored: ScoredBatch, *, max_length: int, buffer: int, weight: float = 1.0) -> ScoredBatch:
    """Add `weight` times the over-long penalty to the reward; the task reward is kept as the unshaped one."""
    scores = []
    for rollout, score in zip(scored.batch.rollouts, scored.scores, strict=True):
        penalty = overlong_penalty(rollout.length, max_length=max_length, buffer=buffer)
        scores.append(
            replace(
                score,
                reward=score.reward + weight * penalty,
                unshaped_reward=task_reward(score),
                breakdown={**score.breakdown, "overlong": penalty},
            )
            if score.ok
            else score
        )
    return ScoredBatch(scored.batch, tuple(scores), scored.seconds)


def trailing_repetition(token_ids: IntArray, *, max_period: int = 64) -> tuple[int, int]:
    """(period, tokens) of the longest stretch at the end that repeats a block of at most `max_period` tokens.

    A stop token after the loop is not looked past: a response that ends by itself did leave its loop. (0, 0) without
    one. Example: [7, 1, 2, 1, 2, 1, 2] gives (2, 6).
    """
    best = (0, 0)
    for period in range(1, min(max_period, len(token_ids) // 2) + 1):
        differs = np.flatnonzero(token_ids[period:] != token_ids[:-period])
        matching = len(token_ids) - period - (int(differs[-1]) + 1 if len(differs) else 0)
        if matching >= period and matching + period > best[1]:
            best = (period, matching + period)
    return best


def reject_degenerate(
    scored: ScoredBatch, *, min_tokens: int = 256, min_repeats: int = 8, max_period: int = 64
) -> tuple[ScoredBatch, int]:
    """Exclude responses that end in endless repetition; the batch and how many.

    Degenerate: at least `min_tokens` at the end, and at least `min_repeats` times the same block. Such a sample is
    taken out of the loss and of its group's statistics (status skipped), because its reward says nothing about the
    problem.
    """
    scores, count = [], 0
    for rollout, score in zip(scored.batch.rollouts, scored.scores, strict=True):
        period, tokens = trailing_repetition(rollout.token_ids, max_period=max_period)
        degenerate = score.ok and period > 0 and tokens >= max(min_tokens, min_repeats * period)
        count += degenerate
        scores.append(
            replace(
                score, status=RewardStatus.SKIPPED, error=f"ends in {tokens} tokens that repeat a block of {period}"
            )
            if degenerate
            else score
        )
    return ScoredBatch(scored.batch, tuple(scores), scored.seconds), count


@dataclass(slots=True)
class PassRateCurriculum:
    """Prefers prompts that are solved sometimes: the running pass rate of each prompt decides how likely it is drawn.

    The chance of a group of n to carry a signal is 1 - p^n - (1-p)^n, largest at p = 1/2; a prompt's weight is its
    variance 4 p (1 - p), at least `floor`, so that none is lost for good. A prompt never seen weighs 1.
    """

    decay: float = 0.5  # weight of the old rate in the running mean
    floor: float = 0.05
    solved_above: float = 0.0  # a task reward over this counts as a pass
    rates: dict[str, float] = field(default_factory=dict)  # prompt_id -> running pass rate

    def __post_init__(self) -> None:
        if not (0.0 <= self.decay < 1.0 and 0.0 < self.floor <= 1.0):
            raise ConfigError(f"curriculum: decay {self.decay} must lie in [0, 1) and floor {self.floor} in (0, 1]")

    def update(self, scored: ScoredBatch) -> None:
        """Take in the pass rates of a step."""
        passes: dict[str, list[bool]] = {}
        for rollout, score in zip(scored.batch.rollouts, scored.scores, strict=True):
            if score.ok:
                prompt = scored.batch.prompt_of(rollout)
                passes.setdefault(prompt.prompt_id, []).append(task_reward(score) > self.solved_above)
        for prompt_id, outcomes in passes.items():
            rate = sum(outcomes) / len(outcomes)
            old = self.rates.get(prompt_id)
            self.rates[prompt_id] = rate if old is None else self.decay * old + (1.0 - self.decay) * rate

    def weight(self, prompt_id: str) -> float:
        """Relative chance of being drawn, from `floor` to 1."""
        rate = self.rates.get(prompt_id)
        return 1.0 if rate is None else max(4.0 * rate * (1.0 - rate), self.floor)

    def choose(self, candidates: Sequence[Prompt], count: int, seed: int) -> tuple[Prompt, ...]:
        """`count` different candidates drawn by weight, in their own order. The same seed gives the same choice.

        Exponential keys: Efraimidis and Spirakis 2006, weighted sampling without replacement.
        """
        if count > len(candidates):
            raise ValueError(f"cannot choose {count} of {len(candidates)} prompts")
        draw = random.Random(seed)
        keys = [draw.expovariate(1.0) / self.weight(prompt.prompt_id) for prompt in candidates]
        chosen = sorted(sorted(range(len(candidates)), key=keys.__getitem__)[:count])
        return tuple(candidates[i] for i in chosen)

"""Which samples a step learns from: pure functions over scored batches, and the little state that they need.

Dynamic sampling, rejection of endless repetition, and pass rates for the curriculum. Left out: generation and scoring
(the controller asks `StepGroups` whether it needs more), the curriculum's draw (`rl.prompts.curriculum`), penalties on
the reward (`rewards.length`), and the estimators (`rl.advantages`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rl.batch import EQUAL_REWARDS, IntArray, Prompt, RewardStatus, RolloutBatch, ScoredBatch
from rl.config import CurriculumConfig, DynamicSamplingConfig, RejectDegenerateConfig


def groups_with_signal(scored: ScoredBatch, *, of_task: bool = True) -> dict[int, bool]:
    """group_id -> whether its valid samples have unequal rewards, in order of appearance.

    DAPO, arXiv 2503.14476, eq. 11: a group with only right or only wrong responses has advantage 0. `of_task` looks at
    the task rewards alone, because a length penalty would make every group look unequal.
    """
    rewards: dict[int, list[float]] = {}
    for rollout, score, valid in zip(scored.batch.rollouts, scored.scores, scored.valid, strict=True):
        reward = score.task_reward if of_task else score.reward
        rewards.setdefault(rollout.group_id, []).extend([reward] if valid else [])
    return {group: bool(values) and max(values) - min(values) > EQUAL_REWARDS for group, values in rewards.items()}


def select_groups(scored: ScoredBatch, group_ids: Iterable[int]) -> ScoredBatch:
    """The batch reduced to these groups, in the batch's order; prompts and groups are renumbered from 0.

    The generation's seconds are scaled by the groups' share of its tokens, so that tokens per second stay the same.
    """
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
    share = sum(r.length for r in rollouts) / max(scored.batch.num_tokens, 1)
    batch = RolloutBatch(tuple(scored.batch.prompts[p] for p in prompts), tuple(rollouts), scored.batch.seconds * share)
    return ScoredBatch(batch, tuple(scored.scores[i] for i in kept))


def concatenate(parts: Sequence[ScoredBatch]) -> ScoredBatch:
    """One batch of all parts in order; prompts and groups are renumbered, and seconds are added up."""
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
    return ScoredBatch(batch, tuple(s for part in parts for s in part.scores))


def trailing_repetition(
    token_ids: IntArray, *, max_period: int = 64, min_tokens: int = 0, min_repeats: int = 2
) -> tuple[int, int]:
    """(period, tokens) of the longest stretch at the end that repeats a block of at most `max_period` tokens and has at
    least `min_tokens` tokens and `min_repeats` blocks; (0, 0) if there is none.

    A stop token after the loop counts as its end: a response that ends by itself did leave its loop.

    Example: [7, 1, 2, 1, 2, 1, 2] gives (2, 6).
    """
    best = (0, 0)
    for period in range(1, min(max_period, len(token_ids) // 2) + 1):
        differs = np.flatnonzero(token_ids[period:] != token_ids[:-period])
        matching = len(token_ids) - period - (int(differs[-1]) + 1 if len(differs) else 0)
        tokens = matching + period
        if tokens >= max(min_repeats * period, min_tokens) and tokens > best[1]:
            best = (period, tokens)
    return best


def reject_degenerate(scored: ScoredBatch, limits: RejectDegenerateConfig) -> tuple[ScoredBatch, int]:
    """Exclude responses that end in endless repetition; returns the batch and their number.

    A response is degenerate if `min_tokens` or more tokens at its end repeat one block at least `min_repeats` times. It
    is taken out of the loss and of its group's statistics (status skipped), because its reward says nothing about the
    problem.
    """
    scores, count = [], 0
    for rollout, score in zip(scored.batch.rollouts, scored.scores, strict=True):
        period, tokens = trailing_repetition(
            rollout.token_ids,
            max_period=limits.max_period,
            min_tokens=limits.min_tokens,
            min_repeats=limits.min_repeats,
        )
        degenerate = score.ok and period > 0
        count += degenerate
        scores.append(
            replace(
                score,
                status=RewardStatus.SKIPPED,
                error=f"ends in {tokens} tokens that repeat a block of {period} tokens",
            )
            if degenerate
            else score
        )
    return ScoredBatch(scored.batch, tuple(scores)), count


@dataclass(slots=True)
class PassRateCurriculum:
    """The running pass rate p of each prompt, and how much generating from it is worth.

    A group of n carries a signal with probability 1 - p^n - (1-p)^n, which is largest at p = 1/2. A prompt's weight is
    its variance scaled to a maximum of 1, 4 p (1 - p), but at least `floor`, so that none is lost for good. A prompt
    that was never seen weighs 1.
    """

    config: CurriculumConfig
    rates: dict[str, float] = field(default_factory=dict)  # prompt_id -> running pass rate

    def update(self, scored: ScoredBatch) -> None:
        """Update the pass rates with one round of groups."""
        passes: dict[str, list[bool]] = {}
        for rollout, score in zip(scored.batch.rollouts, scored.scores, strict=True):
            if score.ok:
                prompt = scored.batch.prompt_of(rollout)
                passes.setdefault(prompt.prompt_id, []).append(score.task_reward > self.config.right_above)
        for prompt_id, outcomes in passes.items():
            rate = sum(outcomes) / len(outcomes)
            old = self.rates.get(prompt_id, rate)
            self.rates[prompt_id] = self.config.decay * old + (1.0 - self.config.decay) * rate

    def weight(self, prompt_id: str) -> float:
        """The prompt's relative chance to be generated from, between `floor` and 1."""
        rate = self.rates.get(prompt_id)
        return 1.0 if rate is None else max(4.0 * rate * (1.0 - rate), self.config.floor)


@dataclass(slots=True)
class StepGroups:
    """Collects the groups of one step.

    Without `dynamic_sampling` a step is one round. With it, further rounds, each of as many prompts as groups are
    missing, follow until all `num_groups` groups have a signal, or `max_rounds` is reached. Then groups without a
    signal fill up the step, so that its size, which divides into mini-batches and ranks, stays the same. No group with
    a signal is ever left over.
    """

    num_groups: int
    dynamic_sampling: DynamicSamplingConfig | None = None
    reject_degenerate: RejectDegenerateConfig | None = None
    curriculum: PassRateCurriculum | None = None  # outlives the step, and learns from all its groups
    _rounds: list[ScoredBatch] = field(default_factory=list)
    _signals: list[dict[int, bool]] = field(default_factory=list)  # per round: group_id -> whether it has a signal
    _num_degenerate: int = 0

    def add(self, scored: ScoredBatch) -> None:
        """Add one round."""
        if self.reject_degenerate is not None:
            scored, count = reject_degenerate(scored, self.reject_degenerate)
            self._num_degenerate += count
        if self.curriculum is not None:
            self.curriculum.update(scored)
        self._rounds.append(scored)
        self._signals.append(groups_with_signal(scored))

    @property
    def generated(self) -> int:
        """Groups added so far."""
        return sum(len(signals) for signals in self._signals)

    @property
    def missing(self) -> int:
        """Groups still to be generated; 0 when the step is full or the cap is reached."""
        max_rounds = 1 if self.dynamic_sampling is None else self.dynamic_sampling.max_rounds
        return 0 if len(self._rounds) >= max_rounds else self.num_groups - self._num_with_signal

    def take(self) -> tuple[ScoredBatch, dict[str, float]]:
        """The step's batch, groups in the order of generation, and metrics on how it was chosen."""
        scored = self._rounds[0] if self.dynamic_sampling is None else self._selected()
        return scored, self._metrics()

    @property
    def _num_with_signal(self) -> int:
        return sum(sum(signals.values()) for signals in self._signals)

    def _selected(self) -> ScoredBatch:
        """Every group with a signal and, if they do not fill the step, the first ones without."""
        to_fill = self.num_groups - self._num_with_signal
        parts = []
        for scored, signals in zip(self._rounds, self._signals, strict=True):
            idle = [group_id for group_id, signal in signals.items() if not signal]
            dropped = set(idle[to_fill:])
            to_fill -= len(idle) - len(dropped)
            parts.append(select_groups(scored, [group_id for group_id in signals if group_id not in dropped]))
        return concatenate([part for part in parts if part.scores])

    def _metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        scores = [score for scored in self._rounds for score in scored.scores]
        if self.dynamic_sampling is not None:
            rewards = [score.reward for score in scores if score.ok]
            metrics |= {
                "rollout/dynamic_sampling_rounds": float(len(self._rounds)),
                "rollout/dynamic_sampling_generated_groups": float(self.generated),
                "rollout/dynamic_sampling_dropped_groups": float(self.generated - self.num_groups),
                "rollout/dynamic_sampling_filled_groups": float(self.num_groups - self._num_with_signal),
                # The kept groups' mean says little about the policy: it lacks the groups with only right responses.
                "reward/generated_mean": float(np.mean(rewards)) if rewards else float("nan"),
            }
        if self.reject_degenerate is not None:
            metrics["rollout/degenerate_frac"] = self._num_degenerate / len(scores)
        if self.curriculum is not None:
            rates = list(self.curriculum.rates.values())
            metrics["curriculum/seen_prompts"] = float(len(rates))
            metrics["curriculum/pass_rate_mean"] = float(np.mean(rates)) if rates else float("nan")
        return metrics

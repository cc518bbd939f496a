"""Evaluation: avg@n, unbiased pass@k and maj@n over a scored batch, and the evaluator that produces the batch.

Left out: training, and displaying results.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from rl.batch import FinishReason, OnGroup, Prompt, Rollout, RolloutBatch, Score, ScoredBatch
from rl.controller import RewardPool
from rl.samples import write_samples

Surviving = Callable[[Callable[[], RolloutBatch]], RolloutBatch]


class EvaluationPool(Protocol):
    """The part of the rollout pool that evaluation uses."""

    def generate_eval(self, prompts: Sequence[Prompt], *, on_group: OnGroup) -> RolloutBatch:
        """samples_per_prompt responses per prompt, with the evaluation's own sampling parameters."""
        ...


@dataclass(frozen=True, slots=True)
class EvalSet:
    """A named set of held-out prompts."""

    name: str
    prompts: tuple[Prompt, ...]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is correct (Chen et al. 2021, arXiv 2107.03374,
    eq. 1): 1 - C(n-c, k) / C(n, k).

    Example: `pass_at_k(4, 1, 2)` is 0.5.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct in {num_samples} samples is not defined")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def eval_metrics(name: str, scored: ScoredBatch, pass_at: Sequence[int]) -> dict[str, float]:
    """`eval/NAME/...`: avg@n, pass@k and maj@n of the reward before shaping, and length, truncation and failures; if
    the rows name several data sources, also `eval/NAME/SOURCE/...`.

    A sample passes if it has full marks in every task part that has a weight, and no gate is closed. maj@n is the
    reward of the commonest extracted answer (the first one in a tie); it is absent for n = 1 and if no reward extracts
    answers. Samples without an extracted answer do not vote. A sample whose reward is unknown is left out of its
    prompt's n; a prompt with fewer than k samples left does not count in pass@k, and a prompt with none in none of
    these.
    """
    samples = list(zip(scored.batch.rollouts, scored.scores, strict=True))
    metrics = _summary(f"eval/{name}", samples, pass_at)
    sources = [prompt.data_source for prompt in scored.batch.prompts]
    for source in sorted(set(sources)) if len(set(sources)) > 1 else ():
        own = [(rollout, score) for rollout, score in samples if sources[rollout.prompt_index] == source]
        metrics |= _summary(f"eval/{name}/{source or 'none'}", own, pass_at)
    return metrics


def _summary(prefix: str, samples: Sequence[tuple[Rollout, Score]], pass_at: Sequence[int]) -> dict[str, float]:
    groups: dict[int, list[Score]] = {}
    for rollout, score in samples:
        group = groups.setdefault(rollout.prompt_index, [])
        if score.ok:
            group.append(score)
    scored_groups = [g for g in groups.values() if g]
    n = max(Counter(rollout.prompt_index for rollout, _ in samples).values(), default=0)
    metrics = {
        f"{prefix}/prompts": float(len(groups)),
        f"{prefix}/unscored_count": float(sum(1 for _, score in samples if not score.ok)),
        f"{prefix}/length_mean": float(np.mean([rollout.length for rollout, _ in samples])),
        f"{prefix}/truncated_frac": float(np.mean([r.finish_reason is FinishReason.LENGTH for r, _ in samples])),
    }
    if not scored_groups:
        return metrics
    metrics[f"{prefix}/avg@{n}"] = float(np.mean([np.mean([s.task_reward for s in g]) for g in scored_groups]))
    for k in pass_at:
        values = [pass_at_k(len(g), sum(s.solved for s in g), k) for g in scored_groups if len(g) >= k]
        if values:
            metrics[f"{prefix}/pass@{k}"] = float(np.mean(values))
    if n > 1 and any(s.extracted is not None for g in scored_groups for s in g):
        metrics[f"{prefix}/maj@{n}"] = float(np.mean([_majority_reward(g) for g in scored_groups]))
    return metrics


def _majority_reward(group: Sequence[Score]) -> float:
    voters = [score for score in group if score.extracted is not None] or group
    commonest, _ = Counter(score.extracted for score in voters).most_common(1)[0]
    return next(score.task_reward for score in voters if score.extracted == commonest)


class Evaluator:
    """Generates, scores and summarises every evaluation set, and writes the samples to disk.

    `surviving` runs the generation, repeating it after a rollout worker was lost (`Controller.surviving_losses`).
    """

    def __init__(
        self,
        sets: Sequence[EvalSet],
        rollout_pool: EvaluationPool,
        reward_pool: RewardPool,
        *,
        pass_at: Sequence[int],
        surviving: Surviving = lambda generate: generate(),
    ) -> None:
        self.sets = tuple(sets)
        self._rollouts = rollout_pool
        self._rewards = reward_pool
        self._pass_at = tuple(pass_at)
        self._surviving = surviving

    def evaluate(self, samples_dir: Path, label: str) -> dict[str, float]:
        """Metrics of all sets; samples are written to `samples_dir/eval_NAME_LABEL.jsonl`."""
        metrics: dict[str, float] = {}
        for eval_set in self.sets:
            generate = partial(self._rollouts.generate_eval, eval_set.prompts, on_group=self._rewards.begin)
            scored = self._rewards.score(self._surviving(generate))
            write_samples(samples_dir / f"eval_{eval_set.name}_{label}.jsonl", scored)
            metrics |= eval_metrics(eval_set.name, scored, self._pass_at)
        return metrics

"""From a scored batch to advantages, and on to the batch of one update. Left out: the estimators themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rl.advantages.api import AdvantageInputs, Advantages
from rl.advantages.registry import advantage_spec
from rl.advantages.whitening import whiten
from rl.batch import Annotations, FinishReason, FloatArray, ScoredBatch, TrainBatch, TrainSample
from rl.errors import ConfigError
from rl.losses.kl import kl_penalty
from rl.plugins import check_options

if TYPE_CHECKING:
    from rl.config import AlgorithmConfig


def estimate(
    scored: ScoredBatch,
    annotations: Annotations,
    config: AlgorithmConfig,
) -> Advantages:
    """Advantages of a whole global batch, by the estimator `config.advantage`.

    The metrics say how much of the batch carries a signal. Raises ConfigError for an unknown estimator or option, or
    when the batch lacks annotations that the estimator needs.
    """
    spec = advantage_spec(config.advantage)
    check_options(
        f"advantage {config.advantage!r} (algorithm.advantage_options)", spec.function, config.advantage_options
    )
    if spec.needs_critic and annotations.values is None:
        raise ConfigError(f"advantage {config.advantage!r} needs a critic's values; choose another or train a critic")
    inputs = AdvantageInputs(
        rewards=torch.tensor(
            [score.reward if ok else 0.0 for score, ok in zip(scored.scores, scored.valid, strict=True)],
            dtype=torch.float64,
        ),
        group_ids=torch.tensor([rollout.group_id for rollout in scored.batch.rollouts], dtype=torch.int64),
        lengths=torch.tensor([rollout.length for rollout in scored.batch.rollouts], dtype=torch.int64),
        valid=torch.tensor(scored.valid, dtype=torch.bool),
        in_loss=torch.tensor(_in_loss(scored, config), dtype=torch.bool),
        token_rewards=_kl_rewards(annotations, config) if config.kl.placement == "reward" else None,
        values=None if annotations.values is None else tuple(_float64(v) for v in annotations.values),
        reward_parts=_reward_parts(scored),
    )
    result = spec.function(inputs, **config.advantage_options)
    advantages = whiten(result.advantages, inputs.in_loss) if config.whiten_advantages else result.advantages
    theirs = {name: float(value) for name, value in result.metrics.items()}  # a plugin may return tensors
    return Advantages(advantages, result.returns, {**_metrics(inputs, advantages), **theirs})


def _in_loss(scored: ScoredBatch, config: AlgorithmConfig) -> list[bool]:
    """Whether the tokens of each sample count in the loss."""
    return [
        valid and not (config.mask_truncated and rollout.finish_reason is FinishReason.LENGTH)
        for rollout, valid in zip(scored.batch.rollouts, scored.valid, strict=True)
    ]


def _reward_parts(scored: ScoredBatch) -> dict[str, Tensor]:
    """Name -> [N] float64, 0 where a sample lacks the part."""
    names = sorted({name for score in scored.scores for name in score.breakdown})
    return {
        name: torch.tensor([score.breakdown.get(name, 0.0) for score in scored.scores], dtype=torch.float64)
        for name in names
    }


def _kl_rewards(annotations: Annotations, config: AlgorithmConfig) -> tuple[Tensor, ...]:
    """N x [R]: -coefficient x KL(old || ref) of each token. The learner supplies the coefficient, because it may
    adapt."""
    coefficient = annotations.kl_coefficient
    if annotations.old_logprobs is None or annotations.ref_logprobs is None or coefficient is None:
        missing = [n for n in ("old_logprobs", "ref_logprobs", "kl_coefficient") if getattr(annotations, n) is None]
        raise ConfigError(
            f"kl.placement is reward, which needs {' and '.join(missing)} among the learner's annotations"
        )
    pairs = zip(annotations.old_logprobs, annotations.ref_logprobs, strict=True)
    return tuple(-coefficient * kl_penalty(_float64(old), _float64(ref), config.kl.estimator) for old, ref in pairs)


def _float64(array: FloatArray) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64))


def _metrics(inputs: AdvantageInputs, advantages: tuple[Tensor, ...]) -> dict[str, float]:
    used = [row for row, in_loss in zip(advantages, inputs.in_loss.tolist(), strict=True) if in_loss]
    tokens = torch.cat(used) if used else torch.zeros(0, dtype=torch.float64)
    count = max(len(advantages), 1)
    return {
        "advantage/valid_frac": float(inputs.valid.sum()) / count,
        "advantage/signal_frac": sum(bool(row.any()) for row in used) / count,
        "advantage/mean": tokens.mean().item() if len(tokens) else 0.0,
        "advantage/std": tokens.std(correction=0).item() if len(tokens) else 0.0,
    }


def build_train_batch(
    scored: ScoredBatch,
    advantages: Advantages,
    annotations: Annotations,
    *,
    policy_version: int,
    config: AlgorithmConfig,
) -> TrainBatch:
    """The batch of one update: `samples[i]` is made from `scored.batch.rollouts[i]`.

    Every response token of a valid sample counts in the loss, except that `config.mask_truncated` excludes responses
    cut at the token limit (they still count in their group's statistics, because their rewards are known). A sample
    that does not count stays in the batch with an all-False mask. `policy_version` is the learner's current version,
    from which each sample's lag is computed.
    """

    def row(source: tuple[Any, ...] | None, i: int) -> FloatArray | None:
        return None if source is None else np.asarray(source[i], dtype=np.float32)

    samples = []
    for i, (rollout, in_loss) in enumerate(zip(scored.batch.rollouts, _in_loss(scored, config), strict=True)):
        samples.append(
            TrainSample(
                prompt_ids=np.asarray(scored.batch.prompt_of(rollout).token_ids, dtype=np.int32),
                response_ids=rollout.token_ids,
                loss_mask=np.full(rollout.length, in_loss, dtype=np.bool_),
                advantages=advantages.advantages[i].numpy().astype(np.float32),
                rollout_logprobs=rollout.rollout_logprobs,
                old_logprobs=row(annotations.old_logprobs, i),
                ref_logprobs=row(annotations.ref_logprobs, i),
                values=row(annotations.values, i),
                returns=row(advantages.returns, i),
                routed_experts=rollout.routed_experts,
                policy_lag=policy_version - rollout.policy_version,
            )
        )
    return TrainBatch.from_samples(tuple(samples), advantages.metrics)

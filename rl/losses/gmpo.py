"""Geometric-mean policy optimisation: a sequence's ratio is the geometric mean of its tokens' clipped ratios.

Zhao et al. 2025, arXiv 2507.20673, the clipped objective of section 3. Left out: aggregation.
"""

from __future__ import annotations

import torch

from rl.errors import ConfigError
from rl.losses.api import LossInputs, PolicyLossOutput, clip_metrics, register_policy_loss


@register_policy_loss(
    "gmpo",
    default_aggregation="sequence_mean_token_mean",
    allowed_aggregations=("sequence_mean_token_mean",),
)
def gmpo(inputs: LossInputs, *, clip_low: float = 0.4, clip_high: float | None = None) -> PolicyLossOutput:
    """-A exp(mean_t c_t), c_t the log-ratio clipped to [-clip_low, clip_high] on the side that the sign of A selects.

    The bounds are distances in log space (0.4: ratios from 0.67 to 1.49), and `clip_high` None means equal to
    `clip_low`. Every token carries its sequence's value, and the rollout weights multiply it token by token, so that an
    excluded token does not silence its sequence (verl's `geo_mean` takes the geometric mean of the weights).
    """
    upper = clip_low if clip_high is None else clip_high
    if not clip_low >= 0.0 or not upper >= 0.0:  # NaN too
        raise ConfigError(
            f"algorithm.loss_options: clip_low is {clip_low} and clip_high is {upper}; both must be at least 0"
        )
    log_ratio = inputs.log_ratio()
    clipped = log_ratio.clamp(-clip_low, upper)
    sign = inputs.advantages.sign()
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * clipped)
    ratio = inputs.sequence_mean(pessimistic).exp()[inputs.sequence_index]
    metrics = clip_metrics((pessimistic != log_ratio) & (sign != 0), log_ratio > 0.0, ratio, log_ratio)
    return PolicyLossOutput(inputs.weighted(-inputs.advantages * ratio), metrics)

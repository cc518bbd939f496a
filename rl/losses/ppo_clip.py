"""Clipped surrogate of PPO: symmetric, asymmetric ("clip-higher") and dual clip. Left out: aggregation.

Schulman et al. 2017, arXiv 1707.06347, eq. 7; clip-higher: DAPO, arXiv 2503.14476, eq. 10; dual clip: Ye et al. 2020,
arXiv 1912.09729, eq. 5.
"""

from __future__ import annotations

import torch

from rl.errors import ConfigError
from rl.losses.api import LossInputs, PolicyLossOutput, clip_metrics, register_policy_loss


@register_policy_loss("ppo_clip")
def ppo_clip(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None
) -> PolicyLossOutput:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with dual clip at most -dual_clip A where A < 0.

    `clip_high` None means equal to `clip_low`. Raises ConfigError for bounds that make no sense.
    """
    upper = clip_low if clip_high is None else clip_high
    check_clip_range(clip_low, upper)
    if dual_clip is not None and dual_clip <= 1.0:
        raise ConfigError(
            f"algorithm.loss_options: dual_clip is {dual_clip}; it bounds the ratio from above and must exceed 1"
        )
    advantages = inputs.advantages
    log_ratio = inputs.log_ratio()
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + upper)
    loss = torch.maximum(unclipped, clipped)
    metrics = clip_metrics(clipped > unclipped, ratio > 1.0, ratio, log_ratio)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        metrics["dual_clip_frac"] = ((advantages < 0) & (loss > ceiling)).to(ratio.dtype)
        loss = torch.where(advantages < 0, torch.minimum(loss, ceiling), loss)
    return PolicyLossOutput(inputs.weighted(loss), metrics)


def check_clip_range(low: float, high: float) -> None:
    """Raise ConfigError unless 0 <= low <= 1 and high >= 0."""
    if not 0.0 <= low <= 1.0 or not high >= 0.0:  # NaN too
        raise ConfigError(
            f"algorithm.loss_options: clip_low is {low} and clip_high is {high}; they are distances from ratio 1, "
            "clip_low from 0 to 1 and clip_high at least 0"
        )

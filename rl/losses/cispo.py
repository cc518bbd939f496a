"""Clipped importance-sampling weights: the weight is clipped, the token's gradient never is. Left out: aggregation.

MiniMax 2025 (MiniMax-M1), arXiv 2506.13585, eq. 4 and 5.
"""

from __future__ import annotations

from rl.losses.api import LossInputs, PolicyLossOutput, clip_metrics, register_policy_loss
from rl.losses.ppo_clip import check_clip_range


@register_policy_loss("cispo")
def cispo(inputs: LossInputs, *, clip_low: float = 1.0, clip_high: float = 4.0) -> PolicyLossOutput:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi. clip_low 1 means no lower bound, as in the paper.

    The paper gives no number for the upper bound. The default allows weights up to 5, as its users train with; verl's
    default allows 1.2.
    """
    check_clip_range(clip_low, clip_high)
    log_ratio = inputs.log_ratio()
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    metrics = clip_metrics(weight != ratio, ratio > 1.0, ratio, log_ratio)
    return PolicyLossOutput(inputs.weighted(-weight * inputs.advantages * inputs.logprobs), metrics)

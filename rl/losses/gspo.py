"""Group sequence policy optimisation: one ratio per sequence, clipped as a whole. Left out: aggregation.

Zheng et al. 2025, arXiv 2507.18071, eq. 5 to 7, in the GSPO-token form, which equals GSPO when a sequence has one
advantage and stays right when advantages differ from token to token.
"""

from __future__ import annotations

import torch

from rl.losses.api import LossInputs, PolicyLossOutput, clip_metrics, register_policy_loss
from rl.losses.ppo_clip import check_clip_range


@register_policy_loss(
    "gspo",
    default_aggregation="sequence_mean_token_mean",
    allowed_aggregations=("sequence_mean_token_mean",),
)
def gspo(inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> PolicyLossOutput:
    """-min(s A, clip(s) A), s = (pi / pi_old)^(1/R): the geometric mean of the sequence's ratios. The bounds are the
    paper's.

    Only the mean within each sequence, then over sequences, is the paper's objective; any other aggregation would weigh
    a sequence's single ratio by its length.
    """
    check_clip_range(clip_low, clip_high)
    log_ratio = inputs.log_ratio()
    sequence_ratio = inputs.sequence_mean(log_ratio.detach()).exp()[inputs.sequence_index]
    # The value is the sequence's ratio; the gradient is that of the token's log-probability.
    ratio = sequence_ratio * (log_ratio - log_ratio.detach()).exp()
    unclipped = -inputs.advantages * ratio
    clipped = -inputs.advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    metrics = clip_metrics(clipped > unclipped, ratio > 1.0, ratio, log_ratio)
    return PolicyLossOutput(inputs.weighted(torch.maximum(unclipped, clipped)), metrics)

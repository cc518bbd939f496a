"""The clipped loss under the names that papers gave it: one function with each paper's bounds and aggregation.

`clip_high` None means equal to `clip_low`. Left out: everything else in a paper's recipe (advantages, dynamic sampling,
penalties).
"""

from __future__ import annotations

from rl.losses.api import LossInputs, PolicyLossOutput, register_policy_loss
from rl.losses.ppo_clip import ppo_clip


@register_policy_loss("grpo", default_aggregation="sequence_mean_token_mean")
def grpo(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None
) -> PolicyLossOutput:
    """Shao et al. 2024, arXiv 2402.03300, eq. 3: symmetric clipping, mean over each sequence, then over sequences."""
    return ppo_clip(inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


@register_policy_loss("dr_grpo", default_aggregation="fixed_length")
def dr_grpo(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None
) -> PolicyLossOutput:
    """Liu et al. 2025, arXiv 2503.20783, section 3: symmetric clipping, every token divided by the same constant."""
    return ppo_clip(inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


@register_policy_loss("dapo", default_aggregation="token_mean")
def dapo(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = None
) -> PolicyLossOutput:
    """Yu et al. 2025, arXiv 2503.14476, eq. 8: clip-higher, mean over all tokens of the batch."""
    return ppo_clip(inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)

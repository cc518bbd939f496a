"""GRPO without the division by the group's standard deviation. Left out: Dr. GRPO's other half, the loss aggregation.

Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv 2503.20783, section 3. Use it with `aggregation:
fixed_length`, which removes the length bias (the `dr_grpo` loss does so by default).
"""

from __future__ import annotations

from rl.advantages.api import AdvantageInputs, Advantages, register_advantage, spread
from rl.advantages.groups import group_statistics, where_signal


@register_advantage("dr_grpo")
def dr_grpo(inputs: AdvantageInputs) -> Advantages:
    """A_i = r_i - mean(r) over the group. A group of one gets 0."""
    group = group_statistics(inputs)
    return Advantages(spread(where_signal(group, group.rewards - group.mean), inputs.lengths))

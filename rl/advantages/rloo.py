"""REINFORCE leave-one-out: each response against the mean of the others. Left out: the loss.

Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740, section 2 (RLOO estimator).
"""

from __future__ import annotations

from rl.advantages.api import AdvantageInputs, Advantages, register_advantage, spread
from rl.advantages.groups import group_statistics, where_signal


@register_advantage("rloo")
def rloo(inputs: AdvantageInputs) -> Advantages:
    """A_i = r_i - mean of r_j, j != i, over the group: an unbiased baseline. A group of one gets 0.

    It equals n/(n-1) (r_i - mean(r)), so it differs from Dr. GRPO's advantage only by a factor.
    """
    group = group_statistics(inputs)
    leave_one_out = group.count / (group.count - 1.0).clamp_min(1.0)
    return Advantages(spread(where_signal(group, leave_one_out * (group.rewards - group.mean)), inputs.lengths))

"""Group-relative advantages: the reward against its group, in units of the group's spread. Left out: the loss.

Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, section 4.1.2.
"""

from __future__ import annotations

from rl.advantages.api import AdvantageInputs, Advantages, register_advantage, spread
from rl.advantages.groups import group_statistics, where_signal


@register_advantage("grpo")
def grpo(inputs: AdvantageInputs, *, epsilon: float = 1e-6) -> Advantages:
    """A_i = (r_i - mean(r)) / (std(r) + epsilon) over the group, the same for every token of response i.

    std is the unbiased one, as in verl and TRL (the paper does not say). A group of one and a group with equal rewards
    get 0: they say nothing about which response is better (verl gives a group of one its raw reward).
    """
    group = group_statistics(inputs)
    advantages = (group.rewards - group.mean) / (group.std + epsilon)
    return Advantages(spread(where_signal(group, advantages), inputs.lengths))

"""Group-relative advantages: the reward against its group, in units of the group's spread. Left out: the loss.

Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, section 4.1.2.
"""

from __future__ import annotations

import torch

from rl.advantages.api import AdvantageInputs, Advantages, register_advantage, spread
from rl.advantages.groups import group_statistics
from rl.errors import ConfigError


@register_advantage("grpo")
def grpo(inputs: AdvantageInputs, *, epsilon: float = 1e-6) -> Advantages:
    """A_i = (r_i - mean(r)) / (std(r) + epsilon) over the group, the same for every token of response i.

    std is the unbiased one, as in verl and TRL (the paper does not say). A group of one and a group with equal rewards
    get 0: they say nothing about which response is better (verl gives a group of one its raw reward). That holds with
    the KL in the reward too: divided by its own spread it would get the size of a right answer's advantage.
    """
    if not epsilon >= 0.0:
        raise ConfigError(f"grpo: epsilon is {epsilon}; it is added to the standard deviation, and must be at least 0")
    group = group_statistics(inputs)
    advantages = (group.rewards - group.mean) / (group.std + epsilon)
    signal = group.has_signal & group.has_task_signal
    return Advantages(spread(torch.where(signal, advantages, 0.0), inputs.lengths))

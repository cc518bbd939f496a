"""Group-relative advantages: reward minus the group's mean, over the group's standard deviation. Left out: the loss.

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
    get 0: they do not tell which response is better (verl gives a group of one its raw reward). Equal task rewards give
    0 even with the KL in the reward: divided by its own spread, the KL would weigh as much as a right answer.
    """
    if not epsilon >= 0.0:
        raise ConfigError(f"grpo: epsilon is {epsilon}; it is added to the standard deviation, and must be at least 0")
    group = group_statistics(inputs)
    advantages = (group.rewards - group.mean) / (group.std + epsilon)
    signal = group.has_signal & group.has_task_signal
    return Advantages(spread(torch.where(signal, advantages, 0.0), inputs.lengths))

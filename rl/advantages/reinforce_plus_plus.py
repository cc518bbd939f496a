"""REINFORCE++ and its baseline form: no critic, normalised over the whole batch instead of the group.

Hu et al. 2025, arXiv 2501.03262. Left out: the clipped loss that the paper pairs it with (`ppo_clip`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl.advantages.api import AdvantageInputs, Advantages, register_advantage, spread
from rl.advantages.groups import group_statistics, where_signal
from rl.advantages.whitening import whiten
from rl.errors import ConfigError


@register_advantage("reinforce_plus_plus", needs_groups=False)
def reinforce_plus_plus(inputs: AdvantageInputs, *, gamma: float = 1.0) -> Advantages:
    """The return of each token, whitened over the batch.

    A token's return is the discounted sum of its own KL reward and everything after it, with the sequence reward on the
    last token. No groups are needed: one response per prompt is enough. A batch with equal returns gets 0.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ConfigError(f"reinforce_plus_plus: gamma is {gamma}; it must lie between 0 and 1")
    returns = tuple(discounted_sum(rewards, gamma) for rewards in inputs.reward_to_tokens())
    return Advantages(whiten(returns, inputs.in_loss))


@register_advantage("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> Advantages:
    """Reward minus the group's mean, whitened over all tokens of the batch.

    A group of one, or with equal rewards, has 0 before the whitening, which then shifts it like all others.
    """
    group = group_statistics(inputs)
    centred = where_signal(group, group.rewards - group.mean)
    return Advantages(whiten(spread(centred, inputs.lengths), inputs.in_loss))


def discounted_sum(values: Tensor, factor: float) -> Tensor:
    """[R] -> [R]: y_t = x_t + factor y_{t+1}, from the end. Example: [0, 0, 1] at 0.5 gives [0.25, 0.5, 1]."""
    out, running = [], 0.0
    for value in reversed(values.tolist()):
        running = value + factor * running
        out.append(running)
    return torch.tensor(out[::-1], dtype=values.dtype)

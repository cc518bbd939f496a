"""Generalised advantage estimation with a critic. Left out: the critic and its loss (`rl.losses.value`).

Schulman et al. 2015, arXiv 1506.02438, eq. 16; as used in PPO, arXiv 1707.06347, eq. 11 and 12.
"""

from __future__ import annotations

import torch

from rl.advantages.api import AdvantageInputs, Advantages, register_advantage
from rl.advantages.reinforce_plus_plus import discounted_sum
from rl.errors import ConfigError


@register_advantage("gae", needs_groups=False, needs_critic=True)
def gae(inputs: AdvantageInputs, *, gamma: float = 1.0, lam: float = 0.95) -> Advantages:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t; returns A_t + V_t.

    The value after the last token is 0, even when the response was cut at the token limit: the episode ends there for
    the reward too. The result is not whitened; PPO usually whitens (`algorithm.whiten_advantages`), and verl's
    estimator always does. Samples that are not valid get advantage 0, and their values as returns, so that they do not
    move the critic.
    """
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ConfigError(f"gae: gamma is {gamma} and lam is {lam}; both must lie between 0 and 1")
    if inputs.values is None:
        raise ConfigError("gae needs a critic's values, and the batch has none")
    advantages, returns = [], []
    rows = zip(inputs.reward_to_tokens(), inputs.values, inputs.valid.tolist(), strict=True)
    for rewards, values, valid in rows:
        following = torch.cat([values[1:], values.new_zeros(min(len(values), 1))])
        delta = rewards + gamma * following - values
        advantage = discounted_sum(delta, gamma * lam) if valid else torch.zeros_like(values)
        advantages.append(advantage)
        returns.append(advantage + values)
    return Advantages(tuple(advantages), tuple(returns))

"""Statistics over the valid samples of each group. Left out: how an estimator uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.advantages.api import AdvantageInputs
from rl.batch import EQUAL_REWARDS


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Group statistics, repeated for each sample ([N]). Only valid samples count."""

    rewards: Tensor  # [N] float64, token rewards included, 0 where not valid
    count: Tensor  # [N] float64
    mean: Tensor  # [N] float64
    std: Tensor  # [N] float64, unbiased (n - 1); 0 for a group of one
    has_signal: Tensor  # [N] bool: valid, in a group of at least two with unequal rewards
    has_task_signal: Tensor  # [N] bool: has_signal with the token rewards left out


def group_statistics(inputs: AdvantageInputs) -> GroupStatistics:
    """Count, mean and standard deviation of the total reward in each group.

    Equal rewards are recognised by the group's extremes, not by its standard deviation, which rounding makes nonzero:
    three rewards of 0.1 have a mean of 0.10000000000000002. Rewards within EQUAL_REWARDS of each other count as equal.
    """
    rewards = inputs.total_rewards()
    unique, index = torch.unique(inputs.group_ids, return_inverse=True)
    valid = inputs.valid.to(torch.float64)
    zeros = torch.zeros(len(unique), dtype=torch.float64)
    count = zeros.index_add(0, index, valid)
    mean = zeros.index_add(0, index, rewards * valid) / count.clamp_min(1.0)
    deviation = (rewards - mean[index]) * valid
    std = (zeros.index_add(0, index, deviation.square()) / (count - 1.0).clamp_min(1.0)).sqrt()
    return GroupStatistics(
        rewards,
        count[index],
        mean[index],
        std[index],
        has_signal=_differ(rewards, inputs.valid, index, len(unique)),
        has_task_signal=_differ(inputs.rewards, inputs.valid, index, len(unique)),
    )


def _differ(rewards: Tensor, valid: Tensor, index: Tensor, count: int) -> Tensor:
    """[N] bool: the sample is valid, and the valid rewards of its group are not all equal.

    `index` [N] numbers the groups from 0 to `count` - 1.
    """
    infinity, zeros = torch.full_like(rewards, torch.inf), rewards.new_zeros(count)
    high = zeros.scatter_reduce(0, index, torch.where(valid, rewards, -infinity), "amax", include_self=False)
    low = zeros.scatter_reduce(0, index, torch.where(valid, rewards, infinity), "amin", include_self=False)
    return valid & (high - low > EQUAL_REWARDS)[index]


def where_signal(statistics: GroupStatistics, per_sequence: Tensor) -> Tensor:
    """[N] -> [N]: `per_sequence`, but exactly 0 for a sample without a signal (invalid, alone, or equal rewards)."""
    return torch.where(statistics.has_signal, per_sequence, torch.zeros_like(per_sequence))

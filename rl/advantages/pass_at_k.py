"""The gradient of the best of k rewards instead of their mean: a response earns what it adds to k - 1 others.

Walder and Karkhanis 2025, "Pass@K Policy Optimization", arXiv 2505.15201, the leave-one-out-minus-one estimator (eq.
33). Left out: pass@k as a metric (`fledge eval`).
"""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor

from rl.advantages.api import AdvantageInputs, Advantages, register_advantage, spread
from rl.advantages.groups import group_statistics, where_signal
from rl.errors import ConfigError


@register_advantage("pass_at_k")
def pass_at_k(inputs: AdvantageInputs, *, k: int = 4) -> Advantages:
    """A_i = n / C(n, k) x sum over subsets I of size k with i in I of (max r_I - max r_{I without i}).

    The mean over the group of A_i grad log pi(y_i) is an unbiased gradient of E[max of k rewards], which is pass@k for
    rewards 0 and 1. Advantages are never negative; they are 0 for a whole group with equal rewards, and for all but the
    best response when k = n. A group with fewer than k valid samples gets 0.

    Raises ConfigError for k < 2 (for k = 1 use rloo), and for a k larger than every group.
    """
    if k < 2:
        raise ConfigError(f"pass_at_k: k is {k}; it must be at least 2 (for k = 1 use rloo)")
    largest = int(torch.unique(inputs.group_ids, return_counts=True)[1].max()) if len(inputs.group_ids) else k
    if largest < k:
        raise ConfigError(
            f"pass_at_k: k is {k}, but groups have at most {largest} samples; lower k or raise group_size"
        )
    rewards = inputs.total_rewards()
    out = torch.zeros_like(rewards)
    too_small = 0
    for group in torch.unique(inputs.group_ids[inputs.valid]).tolist():
        members = torch.nonzero((inputs.group_ids == group) & inputs.valid).flatten()
        if len(members) < k:
            too_small += 1
            continue
        out[members] = len(members) * _marginal_gain(rewards[members], k)
    out = where_signal(group_statistics(inputs), out)
    return Advantages(spread(out, inputs.lengths), metrics={"advantage/groups_under_k": float(too_small)})


def _marginal_gain(rewards: Tensor, k: int) -> Tensor:
    """[n] -> [n]: 1 / C(n, k) x sum over the (k-1)-subsets J of the others of max(r_i - max r_J, 0).

    In ascending order the maximum of J is r_p for C(p, k - 2) of the subsets, and only those with r_p < r_i count, so
    with c_p = C(p, k - 2) the sum for rank q is r_q sum_{p<q} c_p - sum_{p<q} c_p r_p.
    """
    count = len(rewards)
    ordered, order = torch.sort(rewards)
    share = torch.tensor([comb(p, k - 2) / comb(count, k) for p in range(count)], dtype=rewards.dtype)
    before = torch.cumsum(share, 0) - share
    weighted = torch.cumsum(share * ordered, 0) - share * ordered
    gain = torch.empty_like(rewards)
    gain[order] = ordered * before - weighted
    return gain.clamp_min(0.0)  # rounding

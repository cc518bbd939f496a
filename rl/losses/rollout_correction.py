"""Importance correction between the sampler's distribution and the learner's.

vLLM and the learner give slightly different probabilities to the same token (kernels, precision, stale weights), so
even "on-policy" data is off-policy. The ratio here is old / rollout. Left out: the ratio current / old, which belongs
to the policy loss.

Sources: truncated (TIS): Yao et al. 2025, fengyao.notion.site/off-policy-rl; masked (MIS), and the sequence and
geometric levels: Liu, Li et al. 2025, richardli.xyz/rl-collapse; both bounds: IcePop, arXiv 2510.18855.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl.losses.api import LOG_RATIO_BOUND, FlatTokens

if TYPE_CHECKING:
    from rl.config import RolloutCorrectionConfig


@torch.no_grad()
def rollout_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    loss_mask: Tensor,
    sequence_index: Tensor,
    num_sequences: int,
    config: RolloutCorrectionConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights [T], and sums for the metrics.

    The ratio is that of the token, of the sequence (the product over its loss tokens), or the sequence's geometric
    mean. The weight depends on the mode:

    - none: weight 1; the metrics are still measured;
    - truncate: weight min(ratio, upper);
    - mask: weight = ratio where lower <= ratio <= upper, else 0;
    - reject: weight 1 where lower <= ratio <= upper, else 0.

    Weights are 0 for tokens that are not kept and outside the loss mask. Pass them to the loss as
    `LossInputs.rollout_weights` and leave `loss_mask` as it is: an excluded token weighs 0 but stays in the
    denominators, which were fixed before any forward pass.

    Metrics are plain sums over loss tokens, to be added up over micro-batches and ranks and then passed to
    `rollout_metrics`: `num_tokens`, `k1_sum` and `k3_sum` (of KL(rollout || old)), `weight_sum`, `weight_square_sum`,
    `touched` (tokens whose weight the bounds changed: cut, masked or rejected), `above` and `below` (tokens outside the
    bounds).
    """
    tokens = FlatTokens(loss_mask=loss_mask, sequence_index=sequence_index, num_sequences=num_sequences)
    log_ratio = tokens.masked(old_logprobs - rollout_logprobs)
    ratio = _at_level(log_ratio, tokens, config.level).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    above, below = ratio > config.upper, ratio < config.lower
    match config.mode:
        case "none":
            weights, touched = torch.ones_like(ratio), torch.zeros_like(loss_mask)
        case "truncate":
            weights, touched = ratio.clamp(max=config.upper), above
        case "mask":
            weights, touched = ratio, above | below
        case "reject":
            weights, touched = torch.ones_like(ratio), above | below
    keep = loss_mask if config.mode in ("none", "truncate") else loss_mask & ~touched
    weights = torch.where(keep, weights, torch.zeros_like(weights))
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    metrics = {
        "num_tokens": loss_mask.sum(),
        "k1_sum": -log_ratio.sum(),
        "k3_sum": (bounded.expm1() - bounded).sum(),
        "weight_sum": weights.sum(),
        "weight_square_sum": weights.square().sum(),
        "touched": (touched & loss_mask).sum(),
        "above": (above & loss_mask).sum(),
        "below": (below & loss_mask).sum(),
    }
    return weights, {name: value.to(torch.float64) for name, value in metrics.items()}


def _at_level(log_ratio: Tensor, tokens: FlatTokens, level: str) -> Tensor:
    if level == "token":
        return log_ratio
    per_sequence = tokens.sequence_sum(log_ratio) if level == "sequence" else tokens.sequence_mean(log_ratio)
    return per_sequence[tokens.sequence_index]


def rollout_metrics(sums: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Metrics of one step from the sums over all its micro-batches and ranks.

    The effective sample size is (sum w)^2 / (n sum w^2), from 0 to 1: the share of the tokens that, equally weighted,
    would carry as much information.
    """
    total = {name: float(value) for name, value in sums.items()}
    count = max(total["num_tokens"], 1.0)
    square = total["weight_square_sum"]
    return {
        "learner/kl_rollout_k1": total["k1_sum"] / count,
        "learner/kl_rollout_k3": total["k3_sum"] / count,
        "learner/rollout_weight_mean": total["weight_sum"] / count,
        "learner/rollout_effective_sample_size": total["weight_sum"] ** 2 / (count * square) if square > 0 else 0.0,
        "learner/rollout_touched_frac": total["touched"] / count,
        "learner/rollout_ratio_above_frac": total["above"] / count,
        "learner/rollout_ratio_below_frac": total["below"] / count,
    }

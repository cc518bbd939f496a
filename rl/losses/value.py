"""Squared error of the critic, with PPO's clipping of the value. Left out: aggregation and the critic itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.errors import ConfigError
from rl.losses.api import FlatTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueInputs(FlatTokens):
    """One micro-batch of response tokens in one flat row, as the critic sees it."""

    values: Tensor  # [T] float, requires grad
    old_values: Tensor  # [T] float, the critic's before the update
    returns: Tensor  # [T] float, its target


def value_loss(inputs: ValueInputs, *, clip: float | None = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token [T], and metrics per token [T].

    1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2); `clip` None turns clipping off. Source: the PPO
    reference code (Schulman et al. 2017; Engstrom et al. 2020, arXiv 2005.12729, section 3), as in verl.
    """
    error = (inputs.values - inputs.returns).square()
    metrics = {"value_mean": inputs.values.detach(), "value_error": error.detach()}
    if clip is None:
        return 0.5 * error, metrics
    if clip <= 0.0:
        raise ConfigError(f"value_loss: clip is {clip}; it must be above 0, or None for no clipping")
    bounded = torch.clamp(inputs.values, inputs.old_values - clip, inputs.old_values + clip)
    clipped = (bounded - inputs.returns).square()
    metrics["clip_frac"] = (clipped > error).to(error.dtype)
    return 0.5 * torch.maximum(error, clipped), metrics

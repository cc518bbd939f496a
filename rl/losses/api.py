"""What a policy loss is, and the registry of them. A new loss is one file that calls `register_policy_loss`.

A loss sees flat response tokens, never padding or packing: T tokens of S sequences in one micro-batch. It returns a
loss *per token*; `rl.losses.aggregation` turns that into the scalar, with denominators that were fixed for the whole
global batch before any forward pass, so the result is the same under any split into micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rl.errors import ConfigError

LOG_RATIO_BOUND = 20.0  # exp(20) is 5e8: beyond any ratio that carries a signal, and far from overflow in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatTokens:
    """T response tokens of S sequences in one flat row, and reductions over each sequence."""

    loss_mask: Tensor  # [T] bool
    sequence_index: Tensor  # [T] int64, 0..S-1, non-decreasing
    num_sequences: int  # S of this micro-batch

    def masked(self, values: Tensor) -> Tensor:
        """[T] -> [T]: 0 outside the loss mask, whatever stands there (NaN included)."""
        return torch.where(self.loss_mask, values, torch.zeros_like(values))

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[T] -> [S]: sum of `values` over the loss tokens of each sequence."""
        out = torch.zeros(self.num_sequences, dtype=values.dtype, device=values.device)
        return out.index_add(0, self.sequence_index, self.masked(values))

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[T] -> [S]: mean of `values` over the loss tokens of each sequence (0 for a sequence without any)."""
        counts = self.sequence_sum(torch.ones_like(values))
        return self.sequence_sum(values) / counts.clamp_min(1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs(FlatTokens):
    """One micro-batch of response tokens in one flat row.

    There are four log-probabilities: `logprobs` (the current policy's, carries the gradient), `old_logprobs` (the
    learner's before the update), `rollout_logprobs` (the sampler's) and `ref_logprobs` (the frozen reference's).
    """

    logprobs: Tensor  # [T] float, requires grad
    old_logprobs: Tensor  # [T] float
    rollout_logprobs: Tensor  # [T] float
    advantages: Tensor  # [T] float
    entropy: Tensor | None = None  # [T] float, requires grad; None unless the config needs it
    ref_logprobs: Tensor | None = None  # [T]; None without a KL term
    rollout_weights: Tensor | None = None  # [T] detached importance weights (rollout correction); None means all 1

    def log_ratio(self) -> Tensor:
        """[T]: log(pi_current / pi_old), 0 outside the loss mask, clamped to +-20 so that its exponential is finite.

        The mask is applied first: the exponential of padding or of a rejected token could overflow, and 0 * inf is NaN
        in the gradient. Beyond the bound the gradient is 0.
        """
        return self.masked(self.logprobs - self.old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)

    def weighted(self, per_token: Tensor) -> Tensor:
        """[T] -> [T]: multiply by the rollout-correction weights. Every policy loss passes its result through this."""
        return per_token if self.rollout_weights is None else per_token * self.rollout_weights


@dataclass(frozen=True, slots=True)
class PolicyLossOutput:
    """Loss per token, with rollout weights applied, and quantities to average over loss tokens for the metrics."""

    loss: Tensor  # [T], meaningful where loss_mask holds
    token_metrics: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # name -> [T] detached, e.g. clip_frac, ratio_mean


def clip_metrics(clipped: Tensor, above: Tensor, ratio: Tensor, log_ratio: Tensor) -> dict[str, Tensor]:
    """The metrics of losses that clip. `clipped` [T]: where the bound took effect; `above`: where it was the upper one
    if so."""
    return {
        "clip_frac": clipped.to(ratio.dtype),
        "clip_high_frac": (clipped & above).to(ratio.dtype),
        "ratio_mean": ratio.detach(),
        "kl_old": -log_ratio.detach(),
    }


Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed_length"]

PolicyLoss = Callable[..., PolicyLossOutput]  # (inputs: LossInputs, **options) -> PolicyLossOutput


@dataclass(frozen=True, slots=True)
class PolicyLossSpec:
    """A registered loss and what the learner and the checks at start-up must know about it."""

    name: str
    function: PolicyLoss
    default_aggregation: Aggregation = "token_mean"
    allowed_aggregations: tuple[Aggregation, ...] | None = None  # None: every one
    needs_entropy: bool = False
    split_invariant: bool = True  # False: it looks across sequences, so one micro-batch must hold the whole mini-batch


_REGISTRY: dict[str, PolicyLossSpec] = {}


def register_policy_loss(
    name: str,
    *,
    default_aggregation: Aggregation = "token_mean",
    allowed_aggregations: tuple[Aggregation, ...] | None = None,
    needs_entropy: bool = False,
) -> Callable[[PolicyLoss], PolicyLoss]:
    """Decorator: register a loss as `algorithm.loss: NAME`.

    The function takes `inputs: LossInputs` and keyword-only options with defaults, which `algorithm.loss_options` may
    set.
    """

    def wrap(function: PolicyLoss) -> PolicyLoss:
        if name in _REGISTRY and _REGISTRY[name].function is not function:
            raise ConfigError(f"policy loss {name!r} is registered twice; choose another name")
        _REGISTRY[name] = PolicyLossSpec(name, function, default_aggregation, allowed_aggregations, needs_entropy)
        return function

    return wrap


def registered_policy_losses() -> dict[str, PolicyLossSpec]:
    """Name -> spec of every registered loss."""
    return dict(_REGISTRY)

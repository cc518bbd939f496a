"""What a policy loss must guarantee, checked on a small batch before anything expensive starts. Left out: the losses.

A user's loss that forgets the mask, the rollout weights or the split into micro-batches would silently give a wrong
number; the check turns that into an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rl.errors import ConfigError, FledgeError
from rl.losses.aggregation import aggregate
from rl.losses.api import Aggregation, LossInputs, PolicyLossOutput, PolicyLossSpec
from rl.plugins import check_options

_LENGTHS = (1, 3, 4, 2)
_TOLERANCE = 1e-6  # absolute, in float64, on losses of order 1


def resolve_aggregation(spec: PolicyLossSpec, requested: Aggregation | None) -> Aggregation:
    """The aggregation to use: the requested one, or the loss's default. Raises ConfigError if the loss does not allow
    it."""
    mode = spec.default_aggregation if requested is None else requested
    if spec.allowed_aggregations is not None and mode not in spec.allowed_aggregations:
        raise ConfigError(
            f"algorithm.aggregation {mode} contradicts algorithm.loss {spec.name}, which is defined only with "
            f"{' or '.join(spec.allowed_aggregations)}; leave aggregation out or choose another loss"
        )
    return mode


def check_policy_loss(
    spec: PolicyLossSpec, options: Mapping[str, Any], aggregation: Aggregation | None, *, accumulates: bool
) -> None:
    """Raise ConfigError unless the loss accepts its options and aggregation, and respects masks, weights and the split.

    `accumulates` says whether a mini-batch may be split, into micro-batches or over ranks.
    """
    check_options(f"algorithm.loss {spec.name}", spec.function, options)
    mode = resolve_aggregation(spec, aggregation)
    if accumulates and not spec.split_invariant:
        raise ConfigError(
            f"algorithm.loss {spec.name} looks across sequences, so its result depends on how a mini-batch is split; "
            "use one learner worker and a learner.max_tokens_per_microbatch that holds a whole mini-batch, or another "
            "loss"
        )
    batch = _probe_batch()
    whole, gradient = _value(spec, options, mode, [batch])
    if spec.split_invariant:
        _same(spec, "the split into micro-batches", (whole, gradient), _value(spec, options, mode, _split(batch)))
    half = dataclasses.replace(batch, rollout_weights=torch.full_like(batch.advantages, 0.5))
    value, halved = _value(spec, options, mode, [half])
    _same(spec, "the rollout weights (return inputs.weighted(loss))", (0.5 * whole, 0.5 * gradient), (value, halved))
    far = torch.where(batch.loss_mask, batch.old_logprobs, torch.full_like(batch.old_logprobs, -1e4))
    hidden = _value(spec, options, mode, [dataclasses.replace(batch, old_logprobs=far)])
    _same(
        spec, "tokens outside loss_mask (use inputs.log_ratio, sequence_sum, sequence_mean)", (whole, gradient), hidden
    )


def _probe_batch() -> LossInputs:
    """Ten tokens of four sequences near the old policy, both signs of the advantage, one token outside the mask."""
    generator = torch.Generator().manual_seed(0)
    index = torch.repeat_interleave(torch.arange(len(_LENGTHS)), torch.tensor(_LENGTHS))

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(len(index), generator=generator, dtype=torch.float64)

    old = -1.0 - noise(0.3).abs()
    mask = torch.ones(len(index), dtype=torch.bool)
    mask[2] = False
    return LossInputs(
        logprobs=old + noise(0.1),
        old_logprobs=old,
        rollout_logprobs=old + noise(0.01),
        advantages=noise(1.0),
        loss_mask=mask,
        sequence_index=index,
        num_sequences=len(_LENGTHS),
        entropy=1.0 + noise(0.1),
        ref_logprobs=old + noise(0.1),
    )


def _split(batch: LossInputs) -> list[LossInputs]:
    """One micro-batch per sequence."""
    parts = []
    for i in range(batch.num_sequences):
        here = batch.sequence_index == i
        fields: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        changed: dict[str, Any] = {name: value[here] for name, value in fields.items() if isinstance(value, Tensor)}
        changed |= {"sequence_index": torch.zeros_like(changed["sequence_index"]), "num_sequences": 1}
        parts.append(dataclasses.replace(batch, **changed))
    return parts


def _value(
    spec: PolicyLossSpec, options: Mapping[str, Any], mode: Aggregation, parts: list[LossInputs]
) -> tuple[Tensor, Tensor]:
    """The loss summed over micro-batches, and its gradient [T] with respect to the log-probabilities."""
    total = torch.zeros((), dtype=torch.float64)
    gradients = []
    for part in parts:
        inputs = dataclasses.replace(part, logprobs=part.logprobs.clone().requires_grad_())
        with torch.random.fork_rng(devices=[]):  # a loss that draws at random must draw the same each time
            torch.manual_seed(0)
            try:
                output = spec.function(inputs, **options)
            except FledgeError:
                raise
            except Exception as error:  # a plugin's own code, or an option of the wrong type
                raise ConfigError(
                    f"algorithm.loss {spec.name} with options {dict(options)} fails on a small batch: {error!r}"
                ) from error
        loss = output.loss if isinstance(output, PolicyLossOutput) else None
        if not isinstance(loss, Tensor) or loss.shape != inputs.logprobs.shape:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(output).__name__
            raise ConfigError(
                f"algorithm.loss {spec.name} must return PolicyLossOutput with one loss per token, shape "
                f"{tuple(inputs.logprobs.shape)}; it returned {shape}"
            )
        loss = aggregate(loss, inputs, mode, num_loss_tokens=9, num_sequences=len(_LENGTHS), fixed_length=8)
        if not loss.requires_grad:
            raise ConfigError(f"algorithm.loss {spec.name} has no gradient for the log-probabilities")
        loss.backward()
        assert inputs.logprobs.grad is not None
        gradients.append(inputs.logprobs.grad)
        total = total + loss.detach()
    return total, torch.cat(gradients)


def _same(spec: PolicyLossSpec, what: str, expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> None:
    for name, a, b in zip(("loss", "gradient"), expected, found, strict=True):
        difference = (a - b).abs().max().item()
        if not difference <= _TOLERANCE:  # NaN too
            raise ConfigError(
                f"algorithm.loss {spec.name} does not handle {what} correctly: on a small batch the {name} is off by "
                f"{difference:.3g}; see docs/adding-an-algorithm.md"
            )

"""Random ragged batches for the tests of advantages and losses. Left out: tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl.advantages.api import AdvantageInputs
from rl.losses.aggregation import aggregate
from rl.losses.api import LossInputs, PolicyLossSpec

AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed_length")
FIXED_LENGTH = 16


def loss_batch(
    seed: int,
    *,
    lengths: Sequence[int] = (3, 1, 7, 4, 5),
    spread: float = 0.4,
    masked: float = 0.2,
    weights: bool = False,
) -> LossInputs:
    """A float64 micro-batch far enough from the old policy that all clips are hit; the first token always counts."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    total = len(index)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(total, generator=generator, dtype=torch.float64)

    old = -0.1 - normal(1.0).abs()
    mask = torch.rand(total, generator=generator) >= masked
    mask[0] = True
    return LossInputs(
        logprobs=(old + normal(spread)).clamp_max(-1e-3),
        old_logprobs=old,
        rollout_logprobs=old + normal(0.1),
        advantages=normal(1.0),
        loss_mask=mask,
        sequence_index=index,
        num_sequences=len(lengths),
        ref_logprobs=old + normal(spread),
        rollout_weights=normal(1.0).abs() if weights else None,
    )


def with_sequence_advantages(batch: LossInputs) -> LossInputs:
    """Every token of a sequence has the same advantage, as outcome rewards give it."""
    first = torch.tensor([batch.advantages[batch.sequence_index == i][0] for i in range(batch.num_sequences)])
    return dataclasses.replace(batch, advantages=first[batch.sequence_index])


def denominators(batch: LossInputs) -> dict[str, int]:
    counts = batch.sequence_sum(torch.ones_like(batch.logprobs))
    return {
        "num_loss_tokens": int(batch.loss_mask.sum()),
        "num_sequences": int((counts > 0).sum()),
        "fixed_length": FIXED_LENGTH,
    }


def loss_and_gradient(
    spec: PolicyLossSpec, batch: LossInputs, mode: str, *, parts: Sequence[Sequence[int]] | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The aggregated loss and its gradient [T] by the log-probabilities, in micro-batches of the given sequences."""
    whole = denominators(batch)
    logprobs = batch.logprobs.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for part in [range(batch.num_sequences)] if parts is None else parts:
        piece = select(dataclasses.replace(batch, logprobs=logprobs), part)
        total = total + aggregate(spec.function(piece, **options).loss, piece, mode, **whole)
    (gradient,) = torch.autograd.grad(total, logprobs)
    return total.detach(), gradient


def select(batch: LossInputs, sequences: Sequence[int]) -> LossInputs:
    """The micro-batch of these sequences, renumbered from 0 in this order."""
    tokens = [torch.nonzero(batch.sequence_index == i).flatten() for i in sequences]
    order = torch.cat(tokens)
    changed: dict[str, Any] = {
        f.name: getattr(batch, f.name)[order]
        for f in dataclasses.fields(batch)
        if isinstance(getattr(batch, f.name), Tensor)
    }
    index = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor([len(t) for t in tokens]))
    return dataclasses.replace(batch, **changed | {"sequence_index": index, "num_sequences": len(tokens)})


def padded(batch: LossInputs, values: Tensor) -> Tensor:
    """[T] -> [S, longest], 0 in the padding."""
    rows = [values[batch.sequence_index == i] for i in range(batch.num_sequences)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def advantage_batch(
    seed: int, *, groups: Sequence[int] = (4, 3, 5), binary: bool = False, token_rewards: bool = False
) -> AdvantageInputs:
    """Groups of the given sizes with lengths from 1 to 6, all valid, in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(groups)
    ids = torch.repeat_interleave(torch.arange(len(groups)) + 10, torch.tensor(groups))
    ids = ids[torch.randperm(count, generator=generator)]
    lengths = torch.randint(1, 7, (count,), generator=generator)
    rewards = torch.rand(count, generator=generator, dtype=torch.float64)
    if binary:
        rewards = (rewards > 0.5).to(torch.float64)

    def rows(scale: float) -> tuple[Tensor, ...]:
        return tuple(scale * torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths.tolist())

    return AdvantageInputs(
        rewards=rewards,
        group_ids=ids,
        lengths=lengths,
        valid=torch.ones(count, dtype=torch.bool),
        in_loss=torch.ones(count, dtype=torch.bool),
        token_rewards=rows(0.1) if token_rewards else None,
        values=rows(0.5),
    )

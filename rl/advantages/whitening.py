"""Whitening of advantages across the whole batch. Left out: group statistics (`rl.advantages.groups`)."""

from __future__ import annotations

import torch
from torch import Tensor


def whiten(rows: tuple[Tensor, ...], in_loss: Tensor) -> tuple[Tensor, ...]:
    """N x [R] -> N x [R]: mean 0 and variance 1 over all tokens of samples in the loss; 0 for other samples.

    (x - mean) / sqrt(var + 1e-8) with the unbiased variance, as in verl's masked_whiten. With fewer than two tokens, or
    with all values equal, the result is 0, because there is no spread to divide by.
    """
    keep = in_loss.tolist()
    used = [row for row, ok in zip(rows, keep, strict=True) if ok]
    tokens = torch.cat(used) if used else torch.zeros(0, dtype=torch.float64)
    if len(tokens) < 2 or bool(tokens.max() == tokens.min()):
        return tuple(torch.zeros_like(row) for row in rows)
    mean, scale = tokens.mean(), (tokens.var() + 1e-8).rsqrt()
    return tuple((row - mean) * scale if ok else torch.zeros_like(row) for row, ok in zip(rows, keep, strict=True))

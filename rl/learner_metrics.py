"""Sums that become metrics: added up over micro-batches and then over ranks, and divided once at the end.

Left out: what is measured (`rl.objectives`, `rl.learner`) and where metrics are written (`rl.metrics`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

Number = Tensor | float


class MetricSums:
    """Means (sum and weight), plain sums, and maxima by name.

    A mean over tokens is independent of the split only if numerator and denominator are added up separately; a mean of
    means is not. Tensors stay on their device until `reduce`, so that nothing waits for a GPU earlier.
    """

    def __init__(self) -> None:
        self._means: dict[str, list[tuple[Number, Number]]] = {}
        self._sums: dict[str, list[Number]] = {}
        self._maxima: dict[str, list[Number]] = {}

    def add_mean(self, name: str, total: Number, weight: Number) -> None:
        """`total` is a sum over `weight` items."""
        self._means.setdefault(name, []).append((total, weight))

    def add_masked_mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add the mean of `values` [T] where `mask` [T] holds."""
        values = values.detach()
        self.add_mean(name, torch.where(mask, values, torch.zeros_like(values)).double().sum(), mask.sum())

    def add_sum(self, name: str, value: Number) -> None:
        self._sums.setdefault(name, []).append(value)

    def add_max(self, name: str, value: Number) -> None:
        self._maxima.setdefault(name, []).append(value)

    def reduce(self) -> tuple[dict[str, float], dict[str, float]]:
        """(means and maxima, plain sums) over all ranks. A collective: every rank calls it and gets the same numbers.

        Ranks may have different names (a rank without work has few). A mean with weight 0 is left out.
        """
        mine = (
            {n: (_total(t for t, _ in pairs), _total(w for _, w in pairs)) for n, pairs in self._means.items()},
            {n: _total(values) for n, values in self._sums.items()},
            {n: float(np.max([float(v) for v in values])) for n, values in self._maxima.items()},
        )
        everyone = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        means: dict[str, list[float]] = {}
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        for rank_means, rank_sums, rank_maxima in everyone:
            for name, (total, weight) in rank_means.items():
                entry = means.setdefault(name, [0.0, 0.0])
                entry[0] += total
                entry[1] += weight
            for name, value in rank_sums.items():
                sums[name] = sums.get(name, 0.0) + value
            for name, value in rank_maxima.items():
                maxima[name] = float(np.maximum(maxima.get(name, value), value))  # NaN is the largest
        return {n: t / w for n, (t, w) in means.items() if w > 0} | maxima, sums


def _total(values: Iterable[Number]) -> float:
    return sum(float(v) for v in values)

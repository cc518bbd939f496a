"""What the ranks measured, as one: sums are added up, means divided once, and a mean over nothing left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rl.learner_metrics import MetricSums


def test_every_rank_gets_the_same_numbers_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []

    def gather(everyone: list[Any], mine: Any) -> None:
        heard.append(mine)
        everyone[:] = heard[:2]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    first, second = MetricSums(), MetricSums()
    for rank, total, weight in ((first, 2.0, 4.0), (second, 8.0, 1.0)):
        for _ in range(2):  # micro-batches
            rank.add_mean("mean", total, weight)
            rank.add_sum("sum", weight)
        rank.add_max("largest", total)
        rank.add_max("largest", -total)
        rank.add_mean("of nothing", 0.0, 0)
    second.add_masked_mean("of one", torch.tensor([5.0, 9.0]), torch.tensor([True, False]))
    first.reduce()  # is heard first
    expected = {"mean": 20.0 / 10.0, "of one": 5.0, "largest": 8.0}, {"sum": 10.0}
    assert second.reduce() == first.reduce() == expected


@pytest.mark.parametrize("values", [(1.0, math.nan), (math.nan, 1.0)])
def test_a_maximum_hides_no_value_that_is_not_a_number(values, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(everyone: list[Any], mine: Any) -> None:
        everyone[:] = [({}, {}, {"largest": values[0]}), ({}, {}, {"largest": values[1]})]

    sums = MetricSums()
    for value in values:
        sums.add_max("largest", value)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda everyone, mine: None)
    assert math.isnan(sums.reduce()[0]["largest"])
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert math.isnan(sums.reduce()[0]["largest"])

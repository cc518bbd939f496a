"""What the critic measures. Its model and its ranks are in tests/stack/test_critic.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl.batch import TrainSample
from rl.batching import MiniBatchShare
from rl.config import CriticConfig
from rl.critic import Critic, _explained_variance
from rl.layouts import MicroBatch
from rl.learner_metrics import MetricSums


def explained(returns: list[float], mask: list[bool], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Of a response whose values were 0.5, 1 and so on before the update, and are 9 now."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda everyone, mine: None)
    count = len(returns)
    zeros, places = np.zeros(count, np.float32), torch.arange(count)
    sample = TrainSample(
        *(np.zeros(count, np.int32),) * 2,
        np.array(mask),
        *(zeros,) * 2,
        values=np.arange(1, count + 1, dtype=np.float32) / 2,
        returns=np.array(returns, np.float32),
    )
    micro = MicroBatch({}, places, places, 0 * places, (count,), torch.ones(count).bool())
    critic = object.__new__(Critic)  # without a model
    critic.config = CriticConfig()
    sums = MetricSums()
    current = torch.full((count,), 9.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        critic._loss(current, [sample], micro, MiniBatchShare((sample,), 1, 1), sums), current
    )
    assert gradient.isfinite().all() and not gradient[~torch.tensor(mask)].any()
    return _explained_variance(sums.reduce()[1])


def test_the_explained_variance_is_what_the_values_before_the_update_leave_of_the_returns(monkeypatch) -> None:
    found = explained([1.0, 2.0, 77.0, 5.0], [True, True, False, True], monkeypatch)
    returns, errors = np.array([1.0, 2.0, 5.0]), np.array([0.5, 1.0, 3.0])
    assert found == {"critic/explained_variance": pytest.approx(1.0 - errors.var() / returns.var())}


def test_whatever_stands_outside_the_mask_changes_nothing(monkeypatch) -> None:
    mask = [True, True, False, True]
    assert explained([1.0, 2.0, np.nan, 5.0], mask, monkeypatch) == explained([1.0, 2.0, 77.0, 5.0], mask, monkeypatch)


@pytest.mark.parametrize(("returns", "mask"), [([1.0, 2.0], [False, False]), ([2.0, 2.0], [True, True])])
def test_nothing_is_explained_without_tokens_or_where_all_returns_are_equal(returns, mask, monkeypatch) -> None:
    assert explained(returns, mask, monkeypatch) == {}

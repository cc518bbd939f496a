"""Importance correction between sampler and learner: modes, levels, sums, and silence when there is nothing to
correct."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from algorithm_batches import loss_batch, select
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.config import RolloutCorrectionConfig
from rl.losses.api import LossInputs
from rl.losses.rollout_correction import rollout_metrics, rollout_weights

MODES = ("none", "truncate", "mask", "reject")
LEVELS = ("token", "sequence", "geometric")


def correct(batch: LossInputs, *, mode: str, lower: float = 0.0, **config: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    config |= {"mode": mode, "lower": lower if mode in ("mask", "reject") else 0.0}
    return rollout_weights(
        batch.old_logprobs,
        batch.rollout_logprobs,
        batch.loss_mask,
        batch.sequence_index,
        batch.num_sequences,
        RolloutCorrectionConfig(**config),
    )


def reference_ratios(batch: LossInputs, level: str) -> list[float]:
    """old / rollout: of the token, the product over its sequence's loss tokens, or their geometric mean."""
    out = []
    for i in range(len(batch.logprobs)):
        peers = [
            (batch.old_logprobs[j] - batch.rollout_logprobs[j]).item()
            for j in range(len(batch.logprobs))
            if batch.sequence_index[j] == batch.sequence_index[i] and batch.loss_mask[j]
        ]
        if level == "token":
            out.append(math.exp((batch.old_logprobs[i] - batch.rollout_logprobs[i]).item()))
        else:
            out.append(math.exp(sum(peers) / (len(peers) if level == "geometric" and peers else 1)))
    return out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_weights_equal_the_definition(mode: str, level: str) -> None:
    for seed in range(5):
        batch = loss_batch(seed)
        weights, sums = correct(batch, mode=mode, level=level, upper=1.08, lower=0.95)
        touched = 0
        for i, r in enumerate(reference_ratios(batch, level)):
            inside = 0.95 <= r <= 1.08
            expected = {"none": 1.0, "truncate": min(r, 1.08), "mask": r * inside, "reject": float(inside)}[mode]
            assert weights[i].item() == pytest.approx(expected if batch.loss_mask[i] else 0.0, abs=1e-12)
            out = {"none": False, "truncate": r > 1.08}.get(mode, not inside)
            touched += bool(batch.loss_mask[i]) and out
        assert sums["touched"].item() == touched
        assert not weights.requires_grad


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_without_lag_the_ratio_is_one_and_nothing_is_touched(mode: str, level: str) -> None:
    """Policy lag 0 in float32: sampler and learner agree bit for bit."""
    batch = loss_batch(0)
    same = batch.old_logprobs.float()
    weights, sums = rollout_weights(
        same,
        same.clone(),
        batch.loss_mask,
        batch.sequence_index,
        batch.num_sequences,
        RolloutCorrectionConfig(mode=mode, level=level),
    )
    assert torch.equal(weights, batch.loss_mask.float())
    assert rollout_metrics(sums) == {
        "learner/kl_rollout_k1": 0.0,
        "learner/kl_rollout_k3": 0.0,
        "learner/rollout_weight_mean": 1.0,
        "learner/rollout_effective_sample_size": 1.0,
        "learner/rollout_touched_frac": 0.0,
        "learner/rollout_ratio_above_frac": 0.0,
        "learner/rollout_ratio_below_frac": 0.0,
    }


def test_metrics_equal_their_formulas() -> None:
    batch = loss_batch(1)
    weights, sums = correct(batch, mode="truncate", upper=1.05)
    mask = batch.loss_mask
    log_ratio = (batch.old_logprobs - batch.rollout_logprobs)[mask]
    metrics = rollout_metrics(sums)
    w = weights[mask]
    assert metrics["learner/kl_rollout_k1"] == pytest.approx(-log_ratio.mean().item())
    assert metrics["learner/kl_rollout_k3"] == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item())
    assert metrics["learner/rollout_effective_sample_size"] == pytest.approx(
        (w.sum() ** 2 / (len(w) * (w**2).sum())).item()
    )
    assert 0 < metrics["learner/rollout_touched_frac"] < 1
    _, sums = correct(batch, mode="mask", upper=1.05, lower=0.95)
    metrics, ratio = rollout_metrics(sums), log_ratio.exp()
    assert metrics["learner/rollout_ratio_above_frac"] == pytest.approx((ratio > 1.05).double().mean().item())
    assert metrics["learner/rollout_ratio_below_frac"] == pytest.approx((ratio < 0.95).double().mean().item())
    assert metrics["learner/rollout_ratio_above_frac"] > 0 and metrics["learner/rollout_ratio_below_frac"] > 0


@pytest.mark.parametrize("bounds", [{"upper": 1.0}, {"lower": 1.0}])
@pytest.mark.parametrize("mode", ["mask", "reject"])
def test_a_ratio_on_a_bound_is_within_it(mode: str, bounds: dict[str, float]) -> None:
    batch = loss_batch(0)
    same = dataclasses.replace(batch, rollout_logprobs=batch.old_logprobs)
    weights, _ = correct(same, mode=mode, **bounds)
    assert torch.equal(weights, batch.loss_mask.double())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    cut=st.integers(1, 5),
    mode=st.sampled_from(MODES),
    level=st.sampled_from(LEVELS),
)
def test_weights_and_sums_do_not_depend_on_the_split(
    seed: int, lengths: list[int], cut: int, mode: str, level: str
) -> None:
    batch = loss_batch(seed, lengths=lengths)
    cut = min(cut, len(lengths) - 1)
    parts = [
        correct(select(batch, p), mode=mode, level=level, upper=1.05, lower=0.97)
        for p in (range(cut), range(cut, len(lengths)))
    ]
    weights, sums = correct(batch, mode=mode, level=level, upper=1.05, lower=0.97)
    assert torch.allclose(torch.cat([p[0] for p in parts]), weights, rtol=0, atol=1e-12)
    added = {name: sum(p[1][name] for p in parts) for name in sums}
    assert rollout_metrics(added) == pytest.approx(rollout_metrics(sums), abs=1e-9)


def test_absurd_differences_stay_finite() -> None:
    batch = loss_batch(0)
    for shift in (-1e4, 1e4):
        for mode in MODES:
            weights, sums = rollout_weights(
                batch.old_logprobs + shift,
                batch.rollout_logprobs,
                batch.loss_mask,
                batch.sequence_index,
                batch.num_sequences,
                RolloutCorrectionConfig(mode=mode, level="sequence"),
            )
            assert torch.isfinite(weights).all()
            assert all(math.isfinite(v) for v in rollout_metrics(sums).values())

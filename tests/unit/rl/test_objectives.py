"""From samples to the objective: what is added to the policy loss, where old log-probabilities are missing, and what is
measured. The ranks and the model are in tests/stack/test_learner.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rl.batch import TrainBatch, TrainSample
from rl.batching import MiniBatchShare
from rl.config import AlgorithmConfig, KLConfig, RolloutCorrectionConfig
from rl.errors import LearnerError
from rl.layouts import MicroBatch
from rl.learner_metrics import MetricSums
from rl.losses.api import PolicyLossOutput, PolicyLossSpec, register_policy_loss, registered_policy_losses
from rl.losses.kl import kl_penalty
from rl.objectives import PolicyObjective, SupervisedObjective, correction_metrics

LENGTHS = (3, 2)
MASK = torch.tensor([True, True, False, True, True])
LOGPROBS = torch.tensor([-1.0, -0.5, -2.0, -0.3, -0.8])
ENTROPY = torch.tensor([0.5, 0.4, 9.0, 0.3, 0.2])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda everyone, mine: None)


def samples(**fields: Any) -> list[TrainSample]:
    """Two samples of 3 and 2 tokens; `fields` are [5] tensors, or one value a sample."""
    values = {
        "loss_mask": MASK,
        "rollout_logprobs": LOGPROBS - 0.1,
        "advantages": torch.tensor([1.0, 1.0, 5.0, -1.0, -1.0]),
    } | fields
    result = []
    for i, part in enumerate((slice(0, 3), slice(3, 5))):
        mine = {
            name: value[part].numpy() if isinstance(value, Tensor) else value[i]
            for name, value in values.items()
            if value is not None
        }
        ids = np.ones(LENGTHS[i], dtype=np.int32)
        result.append(TrainSample(prompt_ids=ids, response_ids=ids, **mine))
    return result


def micro_batch(part: Sequence[int]) -> MicroBatch:
    lengths = tuple(LENGTHS[i] for i in part)
    index = torch.repeat_interleave(torch.arange(len(part)), torch.tensor(lengths))
    return MicroBatch({}, torch.arange(len(index)), torch.arange(len(index)), index, lengths, torch.ones(5).bool())


def run(
    algorithm: AlgorithmConfig | PolicyObjective,
    batch: list[TrainSample],
    *,
    logprobs: Tensor = LOGPROBS,
    entropy: Tensor = ENTROPY,
    parts: Sequence[Sequence[int]] = ((0, 1),),
) -> tuple[float, Tensor, dict[str, float]]:
    """(the loss, its gradient by the log-probabilities, means and correction metrics) of the parts' sum"""
    objective = PolicyObjective(algorithm, 8) if isinstance(algorithm, AlgorithmConfig) else algorithm
    whole = TrainBatch.from_samples(tuple(batch))
    share = MiniBatchShare(whole.samples, whole.num_loss_tokens, whole.num_sequences)
    sums, current, loss = MetricSums(), logprobs.clone().requires_grad_(), torch.zeros(())
    for part in parts:
        rows = [torch.cat([values.split(LENGTHS)[i] for i in part]) for values in (current, entropy)]
        loss = loss + objective(*rows, [batch[i] for i in part], micro_batch(part), share, sums)
    (gradient,) = torch.autograd.grad(loss, current)
    means, totals = sums.reduce()
    return loss.item(), gradient, means | correction_metrics(totals)


OFF = RolloutCorrectionConfig(mode="none")


def test_without_old_logprobs_the_gradient_is_the_policy_gradient() -> None:
    """One optimizer step a batch: the ratio is 1, and its gradient is that of the log-probability."""
    loss, gradient, metrics = run(AlgorithmConfig(rollout_correction=OFF), samples())
    assert loss == pytest.approx(0.0)
    torch.testing.assert_close(gradient, torch.tensor([-0.25, -0.25, 0.0, 0.25, 0.25]))
    assert metrics["learner/ratio_mean"] == 1.0


def test_with_old_logprobs_the_ratio_is_to_them() -> None:
    old = LOGPROBS - torch.tensor([0.1, 0.0, 9.0, 0.0, 0.0])
    loss, _, metrics = run(AlgorithmConfig(rollout_correction=OFF), samples(old_logprobs=old))
    assert loss == pytest.approx((1.0 - math.exp(0.1)) / 4, abs=1e-6)
    assert metrics["learner/ratio_mean"] == pytest.approx((math.exp(0.1) + 3.0) / 4)
    tight = AlgorithmConfig(rollout_correction=OFF, loss_options={"clip_high": 0.05})
    assert run(tight, samples(old_logprobs=old))[0] == pytest.approx((1.0 - 1.05) / 4, abs=1e-6)


@pytest.mark.parametrize("parts", [[(0, 1)], [(0,), (1,)]])
@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        (None, -1 / 5),  # the default of ppo_clip
        ("token_mean", -1 / 5),
        ("sequence_mean_token_mean", 0.0),
        ("sequence_mean_token_sum", -1 / 2),
        ("fixed_length", -1 / (2 * 8)),
    ],
)
def test_the_aggregation_is_the_one_that_is_asked_for_over_all_parts_of_a_mini_batch(
    aggregation, expected, parts
) -> None:
    algorithm = AlgorithmConfig(aggregation=aggregation, rollout_correction=OFF)
    batch = samples(loss_mask=torch.ones(5).bool(), advantages=torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]))
    assert run(algorithm, batch, parts=parts)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_divergence_from_the_reference_is_measured_and_added_to_the_loss_only_where_it_is_said(
    placement, estimator
) -> None:
    kl = KLConfig(placement=placement, coefficient=0.5, estimator=estimator)
    ref = LOGPROBS + torch.tensor([0.1, -0.2, 7.0, 0.3, 0.4])
    plain, plain_gradient, _ = run(AlgorithmConfig(rollout_correction=OFF), samples())
    loss, gradient, metrics = run(AlgorithmConfig(rollout_correction=OFF, kl=kl), samples(ref_logprobs=ref))
    current = LOGPROBS.clone().requires_grad_()
    penalty = kl_penalty(current, ref, estimator)[MASK].mean()
    (slope,) = torch.autograd.grad(penalty, current)
    weight = 0.5 if placement == "loss" else 0.0
    assert metrics["learner/kl_ref"] == pytest.approx(penalty.item(), abs=1e-6)
    assert loss - plain == pytest.approx(weight * penalty.item(), abs=1e-6)
    torch.testing.assert_close(gradient - plain_gradient, weight * slope, rtol=0, atol=1e-6)


LOSSES = ("ppo_clip", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "gmpo", "reinforce")


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, -1e30])
@pytest.mark.parametrize(
    ("loss", "estimator"),
    [*((loss, "k3") for loss in LOSSES), *(("grpo", f"k{kind}") for kind in ("1", "2", "1_straight_through"))],
)
def test_whatever_stands_outside_the_mask_changes_nothing(loss, estimator, poison) -> None:
    algorithm = AlgorithmConfig(loss=loss, kl=KLConfig(placement="loss", coefficient=0.5, estimator=estimator))
    fields = {
        "rollout_logprobs": LOGPROBS - 0.1,
        "old_logprobs": LOGPROBS + 0.05,
        "ref_logprobs": LOGPROBS - 0.3,
        "advantages": torch.tensor([1.0, 1.0, 5.0, -1.0, -1.0]),
    }
    poisoned = {name: torch.where(MASK, values, torch.tensor(poison)) for name, values in fields.items()}
    expected, expected_gradient, expected_metrics = run(algorithm, samples(**fields))
    found, gradient, metrics = run(algorithm, samples(**poisoned))
    assert found == expected and metrics == expected_metrics
    assert torch.equal(gradient, expected_gradient) and gradient[2] == 0.0 and gradient.abs().max() > 0


def test_the_penalty_weighs_as_much_as_the_coefficient_has_adapted_to() -> None:
    kl = KLConfig(placement="loss", coefficient=0.5, adaptive_target=0.2, adaptive_horizon=77)
    objective = PolicyObjective(AlgorithmConfig(rollout_correction=OFF, kl=kl), 8)
    assert (objective.kl.target, objective.kl.horizon) == (0.2, 77)
    batch = samples(ref_logprobs=LOGPROBS - 0.3)
    configured, _, _ = run(objective, batch)
    objective.kl.coefficient *= 2
    assert run(objective, batch)[0] == pytest.approx(2 * configured) != 0.0


def test_the_entropy_bonus_is_subtracted_where_the_mask_holds() -> None:
    plain, _, metrics = run(AlgorithmConfig(rollout_correction=OFF), samples())
    loss, _, _ = run(AlgorithmConfig(rollout_correction=OFF, entropy_coefficient=0.5), samples())
    assert metrics["learner/entropy"] == pytest.approx(0.35)
    assert loss - plain == pytest.approx(-0.5 * 0.35)


def test_the_correction_weighs_tokens_and_is_measured() -> None:
    config = RolloutCorrectionConfig(mode="truncate", upper=1.2)
    rollout = LOGPROBS - torch.tensor([math.log(1.1), math.log(4.0), 3.0, 0.0, math.log(0.5)])
    _, gradient, metrics = run(AlgorithmConfig(rollout_correction=config), samples(rollout_logprobs=rollout))
    torch.testing.assert_close(gradient, torch.tensor([-1.1, -1.2, 0.0, 1.0, 0.5]) / 4)
    assert metrics["learner/rollout_weight_mean"] == pytest.approx((1.1 + 1.2 + 1.0 + 0.5) / 4)
    assert metrics["learner/rollout_touched_frac"] == metrics["learner/rollout_ratio_above_frac"] == 0.25
    old = samples(rollout_logprobs=rollout, old_logprobs=LOGPROBS)
    _, _, later = run(AlgorithmConfig(rollout_correction=config), old, logprobs=LOGPROBS - 0.1)
    assert later["learner/rollout_weight_mean"] == metrics["learner/rollout_weight_mean"]  # not the current policy's


def test_the_samplers_difference_is_of_loss_tokens_under_the_learners_own_weights() -> None:
    rollout = LOGPROBS - torch.tensor([0.1, -0.3, 8.0, 5.0, 6.0])
    _, _, metrics = run(AlgorithmConfig(), samples(rollout_logprobs=rollout, policy_lag=(0, 1)))
    assert metrics["rollout/logprob_diff_mean"] == pytest.approx(0.2)
    assert metrics["rollout/logprob_diff_max"] == pytest.approx(0.3)


def test_a_loss_that_needs_the_entropy_gets_it_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.losses.api._REGISTRY", registered_policy_losses())  # what is registered here ends with it
    seen = []

    @register_policy_loss("sees_entropy", needs_entropy=True)
    def sees_entropy(inputs):
        seen.append(inputs.entropy)
        return PolicyLossOutput(inputs.weighted(-inputs.logprobs))

    run(AlgorithmConfig(loss="sees_entropy"), samples())
    assert torch.equal(seen[0], ENTROPY)
    assert [PolicyObjective(AlgorithmConfig(loss=name), 8).entropy_grad for name in ("sees_entropy", "ppo_clip")] == [
        True,
        False,
    ]
    assert PolicyObjective(AlgorithmConfig(entropy_coefficient=0.01), 8).entropy_grad


def test_a_loss_that_looks_across_sequences_asks_for_the_whole_mini_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    across = PolicyLossSpec("across", lambda inputs: PolicyLossOutput(-inputs.logprobs), split_invariant=False)
    monkeypatch.setattr("rl.losses.api._REGISTRY", registered_policy_losses() | {"across": across})
    found = [PolicyObjective(AlgorithmConfig(loss=name), 8).split_invariant for name in ("across", "ppo_clip")]
    assert found == [False, True]


def test_samples_that_lack_what_the_objective_reads_are_refused() -> None:
    kl = AlgorithmConfig(kl=KLConfig(placement="loss", coefficient=0.1))
    with pytest.raises(LearnerError, match="samples carry no ref_logprobs; annotate them first"):
        run(kl, samples())
    with pytest.raises(LearnerError, match="1 of 2 samples have no old_logprobs; all or none must have it"):
        run(AlgorithmConfig(), samples(old_logprobs=(LOGPROBS[:3].numpy(), None)))


def test_the_supervised_objective_is_the_mean_likelihood_of_the_loss_tokens() -> None:
    batch, sums = samples(), MetricSums()
    micro: Any = None
    loss = SupervisedObjective()(LOGPROBS, ENTROPY, batch, micro, MiniBatchShare(tuple(batch), 4, 2), sums)
    assert loss.item() == pytest.approx((1.0 + 0.5 + 0.3 + 0.8) / 4)
    assert sums.reduce() == ({"learner/entropy": pytest.approx(0.35)}, {})

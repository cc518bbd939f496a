"""Each loss against its paper's formula, written out here sequence by sequence in plain Python."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable

import pytest
import torch
from algorithm_batches import AGGREGATIONS, FIXED_LENGTH, loss_and_gradient, loss_batch, select
from algorithm_batches import with_sequence_advantages as sequence_advantages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl.errors import ConfigError, LearnerError
from rl.losses import policy_loss_spec
from rl.losses.aggregation import aggregate
from rl.losses.api import LossInputs, PolicyLossOutput, PolicyLossSpec, registered_policy_losses
from rl.losses.contract import check_policy_loss, resolve_aggregation
from rl.losses.kl import KLController, kl_penalty
from rl.losses.value import ValueInputs, value_loss

BUILTIN = ("ppo_clip", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "gmpo", "reinforce")
SEEDS = range(8)


def sequences(batch: LossInputs) -> list[LossInputs]:
    """The loss tokens of each sequence that has any."""
    out = []
    for i in range(batch.num_sequences):
        one = select(batch, [i])
        keep = torch.nonzero(one.loss_mask).flatten()
        if len(keep):
            fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
            tensors = {k: v[keep] for k, v in fields.items() if isinstance(v, Tensor)}
            out.append(dataclasses.replace(one, **tensors))
    return out


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(torch.maximum(x, torch.full_like(x, low)), torch.full_like(x, high))


def ratio(s: LossInputs) -> Tensor:
    return (s.logprobs - s.old_logprobs).exp()


# Each formula gives the objective (to maximise) of one sequence, token by token [R].


def ppo_eq7(s: LossInputs, low: float = 0.2, high: float = 0.2) -> Tensor:
    """arXiv 1707.06347, eq. 7; with high over low: arXiv 2503.14476, eq. 10."""
    r = ratio(s)
    return torch.minimum(r * s.advantages, clip(r, 1 - low, 1 + high) * s.advantages)


def dual_clip(s: LossInputs) -> Tensor:
    """arXiv 1912.09729, "dual-clip PPO": max(min(r A, clip(r) A), c A) where A < 0, here c = 1.5."""
    return torch.where(s.advantages < 0, torch.maximum(ppo_eq7(s), 1.5 * s.advantages), ppo_eq7(s))


def gspo_eq5(s: LossInputs) -> Tensor:
    """arXiv 2507.18071, eq. 5 and 7: one ratio s_i = exp(mean of log-ratios), clipped; sequence advantages."""
    si = (s.logprobs - s.old_logprobs).mean().exp()
    advantage = s.advantages[0]
    value = torch.minimum(si * advantage, clip(si, 1 - 0.05, 1 + 0.08) * advantage)
    return value.expand(len(s.logprobs))


def cispo_eq4(s: LossInputs) -> Tensor:
    """arXiv 2506.13585, eq. 4 and 5: sg(clip(r)) A log pi."""
    return clip(ratio(s), 1 - 0.3, 1 + 0.25).detach() * s.advantages * s.logprobs


def gmpo_objective(s: LossInputs) -> Tensor:
    """arXiv 2507.20673, section 3: (prod of |min(r A, clip(r, e^-0.3, e^0.2) A)|)^(1/R) sgn(A), sequence advantages."""
    r, a = ratio(s), s.advantages
    product = torch.minimum(r * a, clip(r, math.exp(-0.3), math.exp(0.2)) * a).abs().log().mean().exp()
    return (product * a[0].sign()).expand(len(a))


def reinforce_eq11(s: LossInputs) -> Tensor:
    """Williams 1992: A log pi."""
    return s.advantages * s.logprobs


CASES: list[tuple[str, dict[str, float], Callable[[LossInputs], Tensor], bool]] = [
    ("ppo_clip", {}, ppo_eq7, False),
    ("ppo_clip", {"clip_high": 0.28}, lambda s: ppo_eq7(s, 0.2, 0.28), False),
    ("ppo_clip", {"dual_clip": 1.5}, dual_clip, False),
    ("grpo", {}, ppo_eq7, False),
    ("dr_grpo", {}, ppo_eq7, False),
    ("dapo", {}, lambda s: ppo_eq7(s, 0.2, 0.28), False),
    *((name, {"clip_high": 0.2, "dual_clip": 1.5}, dual_clip, False) for name in ("grpo", "dr_grpo", "dapo")),
    *(
        (name, {"clip_low": 0.1, "clip_high": 0.3}, lambda s: ppo_eq7(s, 0.1, 0.3), False)
        for name in ("grpo", "dr_grpo")
    ),
    ("gspo", {"clip_low": 0.05, "clip_high": 0.08}, gspo_eq5, True),
    ("cispo", {"clip_low": 0.3, "clip_high": 0.25}, cispo_eq4, False),
    ("gmpo", {"clip_low": 0.3, "clip_high": 0.2}, gmpo_objective, True),
    ("reinforce", {}, reinforce_eq11, False),
]


def reference(batch: LossInputs, mode: str, objective: Callable[[LossInputs], Tensor]) -> Tensor:
    """The papers' aggregations, written out: one sequence after another."""
    rows = [-objective(s) for s in sequences(batch)]
    if mode == "token_mean":  # arXiv 2503.14476, eq. 8
        return sum(r.sum() for r in rows) / sum(len(r) for r in rows)
    if mode == "sequence_mean_token_mean":  # arXiv 2402.03300, eq. 3
        return sum(r.sum() / len(r) for r in rows) / len(rows)
    if mode == "sequence_mean_token_sum":
        return sum(r.sum() for r in rows) / len(rows)
    return sum(r.sum() for r in rows) / (len(rows) * FIXED_LENGTH)  # arXiv 2503.20783, section 3


@pytest.mark.parametrize(("name", "options", "objective", "per_sequence"), CASES)
def test_loss_and_gradient_equal_the_papers_formula(name, options, objective, per_sequence) -> None:
    spec = policy_loss_spec(name)
    for seed in SEEDS:
        batch = loss_batch(seed)
        batch = sequence_advantages(batch) if per_sequence else batch
        for mode in spec.allowed_aggregations or AGGREGATIONS:
            logprobs = batch.logprobs.clone().requires_grad_()
            expected = reference(dataclasses.replace(batch, logprobs=logprobs), mode, objective)
            (expected_gradient,) = torch.autograd.grad(expected, logprobs)
            loss, gradient = loss_and_gradient(spec, batch, mode, **options)
            assert abs(loss - expected.detach()) < 1e-9
            assert (gradient - expected_gradient).abs().max() < 1e-7


def test_random_batches_reach_every_clip() -> None:
    for name in ("ppo_clip", "gspo", "cispo", "gmpo"):
        options = {"dual_clip": 1.5} if name == "ppo_clip" else {"clip_low": 0.05, "clip_high": 0.05}
        metrics = [policy_loss_spec(name).function(loss_batch(seed), **options).token_metrics for seed in SEEDS]
        for key in metrics[0]:
            if key.endswith("frac"):
                assert any(m[key].any() for m in metrics), (name, key)
                assert not all(m[key].all() for m in metrics), (name, key)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=7),
    order=st.randoms(use_true_random=False),
    name=st.sampled_from(BUILTIN),
    weights=st.booleans(),
)
def test_any_split_into_micro_batches_and_ranks_gives_the_same(seed, lengths, order, name, weights) -> None:
    spec = policy_loss_spec(name)
    batch = loss_batch(seed, lengths=lengths, masked=0.4, weights=weights)
    indices = list(range(len(lengths)))
    order.shuffle(indices)
    cuts = sorted(order.sample(range(1, len(indices)), order.randint(0, len(indices) - 1))) if len(indices) > 1 else []
    parts = [indices[a:b] for a, b in zip([0, *cuts], [*cuts, len(indices)], strict=True)]
    for mode in spec.allowed_aggregations or AGGREGATIONS:
        whole, gradient = loss_and_gradient(spec, batch, mode)
        split, split_gradient = loss_and_gradient(spec, batch, mode, parts=parts)
        assert abs(whole - split) < 1e-9
        assert (gradient - split_gradient).abs().max() < 1e-9


@pytest.mark.parametrize("name", BUILTIN)
def test_values_outside_the_mask_never_matter(name) -> None:
    spec, batch = policy_loss_spec(name), loss_batch(3, masked=0.5)
    wild = {
        key: torch.where(batch.loss_mask, getattr(batch, key), torch.tensor(value))
        for key, value in {"old_logprobs": -1e4, "rollout_logprobs": math.nan, "advantages": 1e9}.items()
    }
    for mode in spec.allowed_aggregations or AGGREGATIONS:
        clean = loss_and_gradient(spec, batch, mode)
        dirty = loss_and_gradient(spec, dataclasses.replace(batch, **wild), mode)
        assert torch.equal(clean[0], dirty[0])
        assert torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize("name", BUILTIN)
def test_rollout_weights_multiply_each_token(name) -> None:
    spec, batch = policy_loss_spec(name), loss_batch(5, weights=True)
    plain = spec.function(dataclasses.replace(batch, rollout_weights=None)).loss
    assert torch.allclose(spec.function(batch).loss, plain * batch.rollout_weights, rtol=0, atol=1e-12)


def test_ratio_far_outside_float_range_stays_finite() -> None:
    batch = loss_batch(0)
    batch = dataclasses.replace(batch, old_logprobs=batch.old_logprobs - 2000.0)
    for name in BUILTIN:
        spec = policy_loss_spec(name)
        loss, gradient = loss_and_gradient(spec, batch, spec.default_aggregation)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_at_the_old_policy_every_clipped_loss_has_the_policy_gradient() -> None:
    """Ratio 1: the gradient is that of -A log pi, and nothing is clipped."""
    batch = sequence_advantages(loss_batch(1, spread=0.0))
    batch = dataclasses.replace(batch, old_logprobs=batch.logprobs.clone())
    mode = "sequence_mean_token_mean"
    _, expected = loss_and_gradient(policy_loss_spec("reinforce"), batch, mode)
    for name in ("ppo_clip", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "gmpo"):
        _, gradient = loss_and_gradient(policy_loss_spec(name), batch, mode)
        assert (gradient - expected).abs().max() < 1e-12
        metrics = policy_loss_spec(name).function(batch).token_metrics
        assert metrics["clip_frac"].sum() == 0
        assert torch.equal(metrics["ratio_mean"], torch.ones_like(batch.logprobs))


def test_a_token_without_an_advantage_is_not_clipped() -> None:
    batch = dataclasses.replace(loss_batch(3), advantages=torch.zeros(len(loss_batch(3).advantages)))
    for name in ("ppo_clip", "grpo", "dr_grpo", "dapo", "gspo", "gmpo"):
        assert policy_loss_spec(name).function(batch).token_metrics["clip_frac"].sum() == 0, name


def test_aggregation_example_of_the_docstring() -> None:
    batch = loss_batch(0, lengths=(1, 3), masked=0.0)
    values = {
        mode: aggregate(torch.ones(4), batch, mode, num_loss_tokens=4, num_sequences=2, fixed_length=8).item()
        for mode in AGGREGATIONS
    }
    assert values == {
        "token_mean": 1.0,
        "sequence_mean_token_mean": 1.0,
        "sequence_mean_token_sum": 2.0,
        "fixed_length": 0.25,
    }


def test_aggregating_a_batch_without_loss_tokens_is_an_error() -> None:
    with pytest.raises(LearnerError, match="num_loss_tokens 0"):
        aggregate(torch.ones(4), loss_batch(0), "token_mean", num_loss_tokens=0, num_sequences=0, fixed_length=8)


def test_micro_batch_without_loss_tokens_adds_nothing() -> None:
    batch = loss_batch(0)
    empty = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    for name in BUILTIN:
        spec = policy_loss_spec(name)
        loss = spec.function(dataclasses.replace(empty, logprobs=empty.logprobs.clone().requires_grad_())).loss
        total = aggregate(loss, empty, spec.default_aggregation, num_loss_tokens=9, num_sequences=2, fixed_length=8)
        assert total.item() == 0.0
        total.backward()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ppo_clip", {"clip_low": -0.1}, "clip_low is -0.1"),
        ("ppo_clip", {"clip_low": 1.5}, "clip_low is 1.5"),
        ("ppo_clip", {"dual_clip": 0.5}, "must exceed 1"),
        ("gspo", {"clip_high": -1.0}, "clip_high is -1"),
        ("cispo", {"clip_low": 1.5}, "clip_low is 1.5"),
        ("gmpo", {"clip_low": -0.4}, "at least 0"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(name, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_loss_spec(name).function(loss_batch(0), **options)


@pytest.mark.parametrize("name", BUILTIN)
def test_metrics_are_measured_per_token_and_carry_no_gradient(name) -> None:
    batch = loss_batch(0)
    metrics = policy_loss_spec(name).function(dataclasses.replace(batch, logprobs=batch.logprobs.requires_grad_()))
    found = metrics.token_metrics
    assert set(found) == {"ratio_mean", "kl_old"} | (set() if name == "reinforce" else {"clip_frac", "clip_high_frac"})
    assert not any(values.requires_grad for values in found.values())
    torch.testing.assert_close(found["kl_old"], batch.masked(batch.old_logprobs - batch.logprobs.detach()))


def responses_of_one_token(ratios: list[float], advantages: list[float]) -> LossInputs:
    count = len(ratios)
    batch = loss_batch(0, lengths=(1,) * count, masked=0.0)
    old = torch.full((count,), -3.0)
    return dataclasses.replace(
        batch, logprobs=torch.tensor(ratios).log() + old, old_logprobs=old, advantages=torch.tensor(advantages)
    )


def test_the_dual_clip_is_counted_where_it_binds() -> None:
    batch = responses_of_one_token([2.0, 0.5, 2.0, 0.5], [-1.0, -1.0, 0.5, 0.5])
    metrics = policy_loss_spec("ppo_clip").function(batch, dual_clip=1.5).token_metrics
    assert metrics["dual_clip_frac"].tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", [name for name in BUILTIN if name != "reinforce"])
def test_a_token_counts_as_clipped_where_the_bound_takes_effect(name) -> None:
    """CISPO bounds a weight, whatever the advantage; the others only what would move further away."""
    batch = responses_of_one_token([2.0, 2.0, 0.5, 0.5, 1.1], [1.0, -1.0, 1.0, -1.0, 1.0])
    metrics = policy_loss_spec(name).function(batch, clip_low=0.2, clip_high=0.3).token_metrics
    assert metrics["clip_frac"].tolist() == ([1, 1, 1, 1, 0] if name == "cispo" else [1, 0, 0, 1, 0])
    assert metrics["clip_high_frac"].tolist() == ([1, 1, 0, 0, 0] if name == "cispo" else [1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("grpo", 0.2, None),  # symmetric
        ("dr_grpo", 0.2, None),
        ("dapo", 0.2, 0.28),
        ("gspo", 3e-4, 4e-4),
        ("cispo", 1.0, 4.0),
        ("gmpo", 0.4, None),
    ],
)
def test_default_bounds_are_those_of_the_paper(name, low, high) -> None:
    options = inspect.signature(policy_loss_spec(name).function).parameters
    assert (options["clip_low"].default, options["clip_high"].default) == (low, high)


# KL


def test_kl_estimators_equal_schulmans() -> None:
    """joschu.net/blog/kl-approx.html, with r = pi_ref / pi: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r."""
    batch = loss_batch(2)
    logprobs, ref = batch.logprobs.clone().requires_grad_(), batch.ref_logprobs
    log_r = (ref - logprobs).detach()
    values = {"k1": -log_r, "k2": log_r.square() / 2, "k3": log_r.exp() - 1 - log_r}
    gradients = {"k1": torch.ones_like(log_r), "k2": -log_r, "k3": 1 - log_r.exp()}
    for name, value in values.items():
        for suffix in ("", "_straight_through"):
            if name + suffix == "k2_straight_through":
                continue
            found = kl_penalty(logprobs, ref, name + suffix)
            (gradient,) = torch.autograd.grad(found.sum(), logprobs)
            assert (found - value).abs().max() < 1e-9
            assert (gradient - gradients["k2" if suffix else name]).abs().max() < 1e-9


def test_k3_of_a_small_difference_survives_float32() -> None:
    difference = torch.tensor([1e-3, -1e-4, 1e-5, -1e-6])
    found = kl_penalty(difference, torch.zeros(4), "k3")
    torch.testing.assert_close(found, difference.square() / 2, rtol=1e-2, atol=2e-11)


def test_k3_still_pulls_far_from_the_reference() -> None:
    logprobs = torch.tensor([-5.0], dtype=torch.float64, requires_grad=True)
    kl_penalty(logprobs, torch.tensor([-0.1], dtype=torch.float64), "k3").backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(1 - math.exp(4.9))


def test_k3_pulls_as_it_should_wherever_its_exponential_is_held() -> None:
    differences = torch.tensor([21.0, 40.0, -19.0, -21.0], dtype=torch.float64, requires_grad=True)
    kl_penalty(differences, torch.zeros(4, dtype=torch.float64), "k3").sum().backward()
    assert differences.grad.tolist() == pytest.approx([1.0, 1.0, 1.0 - math.exp(19.0), 0.0])


@pytest.mark.parametrize("estimator", ["k3", "k3_straight_through"])
def test_k3_far_outside_float_range_stays_finite(estimator) -> None:
    logprobs = torch.tensor([-2000.0, -0.1], requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([-0.1, -2000.0]), estimator)
    penalty.sum().backward()
    assert logprobs.grad is not None
    assert torch.isfinite(penalty).all() and torch.isfinite(logprobs.grad).all()


def test_estimators_agree_with_the_exact_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(5, generator=generator, dtype=torch.float64), 0)
    q = torch.softmax(torch.randn(5, generator=generator, dtype=torch.float64), 0)
    exact = (p * (p / q).log()).sum()
    for name in ("k1", "k3"):
        expectation = (p * kl_penalty(p.log(), q.log(), name)).sum()
        assert abs(expectation - exact) < 1e-12


def test_adaptive_coefficient_follows_the_paper_and_survives_a_checkpoint() -> None:
    """arXiv 1909.08593, section 2.2: e = clip(KL / target - 1, -0.2, 0.2), beta <- beta (1 + K e)."""
    controller = KLController(0.1, target=0.5, horizon=1000)
    assert controller.update(5.0, 100) == pytest.approx(0.1 * (1 + 0.2 * 100 / 1000))
    resumed = KLController(0.1, target=0.5, horizon=1000)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.update(0.55, 100) == controller.update(0.55, 100)
    for later, state in (
        (KLController(0.3), controller.state_dict()),
        (KLController(0.3, target=0.5), KLController(0.3).state_dict()),
        (KLController(0.3, target=0.5), controller.state_dict()),  # configured to another value since
    ):
        later.load_state_dict(state)
        assert later.coefficient == 0.3
    assert KLController(0.1).update(99.0, 100) == 0.1
    before = controller.coefficient
    assert controller.update(math.nan, 1) == controller.update(math.inf, 1) == before  # of a step that is skipped


# Critic


def value_batch(seed: int) -> ValueInputs:
    batch = loss_batch(seed)
    return ValueInputs(
        values=batch.logprobs.clone().requires_grad_(),
        old_values=batch.old_logprobs,
        returns=batch.advantages,
        loss_mask=batch.loss_mask,
        sequence_index=batch.sequence_index,
        num_sequences=batch.num_sequences,
    )


def test_value_loss_is_the_larger_of_two_squared_errors() -> None:
    """PPO reference code: 1/2 max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2)."""
    inputs = value_batch(0)
    loss, metrics = value_loss(inputs)  # clip 0.2
    for i, (v, old, target) in enumerate(zip(inputs.values.tolist(), inputs.old_values, inputs.returns, strict=True)):
        bounded = old.item() + max(-0.2, min(0.2, v - old.item()))
        expected = 0.5 * max((v - target.item()) ** 2, (bounded - target.item()) ** 2)
        assert loss[i].item() == pytest.approx(expected, abs=1e-12)
    assert 0 < metrics["clip_frac"].sum() < len(loss)
    torch.testing.assert_close(metrics["value_error"], (inputs.values.detach() - inputs.returns).square())
    assert not any(values.requires_grad for values in metrics.values())
    plain, _ = value_loss(inputs, clip=None)
    assert torch.allclose(plain, 0.5 * (inputs.values - inputs.returns) ** 2)
    aggregate(loss, inputs, "token_mean", num_loss_tokens=9, num_sequences=3, fixed_length=8).backward()
    with pytest.raises(ConfigError, match="clip is 0"):
        value_loss(inputs, clip=0.0)


# Registry and contract


def test_unknown_loss_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean ppo_clip"):
        policy_loss_spec("ppo_clipp")


@pytest.mark.parametrize("name", BUILTIN)
def test_every_built_in_loss_keeps_the_contract(name) -> None:
    spec = policy_loss_spec(name)
    assert name in registered_policy_losses()
    for mode in spec.allowed_aggregations or AGGREGATIONS:
        check_policy_loss(spec, {}, mode, accumulates=True)


def test_aggregation_that_contradicts_the_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"token_mean contradicts algorithm\.loss gspo"):
        resolve_aggregation(policy_loss_spec("gspo"), "token_mean")
    assert resolve_aggregation(policy_loss_spec("gspo"), None) == "sequence_mean_token_mean"
    with pytest.raises(ConfigError, match="does not take clip_lo; it takes clip_low"):
        check_policy_loss(policy_loss_spec("ppo_clip"), {"clip_lo": 0.1}, None, accumulates=True)
    for value in ("abc", math.nan):
        with pytest.raises(ConfigError, match="clip_low"):
            check_policy_loss(policy_loss_spec("ppo_clip"), {"clip_low": value}, None, accumulates=True)


def scaled_by_batch(inputs: LossInputs) -> PolicyLossOutput:
    return PolicyLossOutput(inputs.weighted(-inputs.log_ratio().exp() * inputs.advantages / inputs.loss_mask.sum()))


def without_weights(inputs: LossInputs) -> PolicyLossOutput:
    return PolicyLossOutput(-inputs.log_ratio().exp() * inputs.advantages)


def without_mask(inputs: LossInputs) -> PolicyLossOutput:
    mean = torch.zeros(inputs.num_sequences, dtype=torch.float64)
    mean = mean.index_add(0, inputs.sequence_index, (inputs.logprobs - inputs.old_logprobs).clamp(-20, 20))
    return PolicyLossOutput(inputs.weighted(-inputs.advantages * mean[inputs.sequence_index]))


def without_gradient(inputs: LossInputs) -> PolicyLossOutput:
    return PolicyLossOutput(inputs.weighted(-inputs.advantages * inputs.logprobs.detach()))


def scalar(inputs: LossInputs) -> PolicyLossOutput:
    return PolicyLossOutput((-inputs.advantages * inputs.logprobs).mean())


def raising(inputs: LossInputs) -> PolicyLossOutput:
    raise ZeroDivisionError("oh")


def empty(inputs: LossInputs) -> PolicyLossOutput:
    return PolicyLossOutput(None)  # type: ignore[arg-type]


def bare(inputs: LossInputs) -> Tensor:
    return inputs.weighted(-inputs.advantages * inputs.logprobs)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (scaled_by_batch, "split into micro-batches"),
        (without_weights, "rollout weights"),
        (without_mask, "outside loss_mask"),
        (without_gradient, "no gradient"),
        (scalar, "one loss per token"),
        (raising, r"with options \{\} fails on a small batch: ZeroDivisionError"),
        (empty, "must return PolicyLossOutput .*; it returned PolicyLossOutput"),
        (bare, "must return PolicyLossOutput .*; it returned Tensor"),
    ],
)
def test_contract_finds_the_usual_mistakes(function, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_policy_loss(PolicyLossSpec("mine", function), {}, None, accumulates=True)


def test_the_check_leaves_the_random_state_of_the_run_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    check_policy_loss(policy_loss_spec("ppo_clip"), {}, None, accumulates=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_loss_that_looks_across_sequences_is_refused_under_accumulation() -> None:
    spec = PolicyLossSpec("mine", scaled_by_batch, split_invariant=False)
    check_policy_loss(spec, {}, None, accumulates=False)
    with pytest.raises(ConfigError, match="depends on how a mini-batch is split"):
        check_policy_loss(spec, {}, None, accumulates=True)

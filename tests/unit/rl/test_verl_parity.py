"""Our numbers against verl's, verl through the bridge against verl itself, and verl's own numbers, frozen.

One file, because `import verl` takes seconds.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from algorithm_batches import (
    AGGREGATIONS,
    FIXED_LENGTH,
    advantage_batch,
    denominators,
    loss_and_gradient,
    loss_batch,
    padded,
    with_sequence_advantages,
)
from torch import Tensor

from rl.advantages import advantage_spec
from rl.advantages.api import AdvantageInputs
from rl.advantages.whitening import whiten
from rl.config import RolloutCorrectionConfig
from rl.errors import ConfigError, LearnerError
from rl.losses import policy_loss_spec
from rl.losses.api import LossInputs
from rl.losses.contract import check_policy_loss
from rl.losses.kl import KLController, kl_penalty
from rl.losses.rollout_correction import rollout_metrics, rollout_weights
from rl.losses.value import ValueInputs, value_loss
from rl.verl_bridge import core_algos

SEEDS = range(4)


@pytest.fixture(scope="module", autouse=True)
def root_logger_after_import() -> tuple[list[logging.Handler], int]:
    """The root logger's handlers and level after the first import of verl; there was no handler, and the level was
    17."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        root.handlers[:] = []
        root.setLevel(17)
        core_algos()
        return list(root.handlers), root.level
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


VERL_MODE = {
    "token_mean": "token-mean",
    "sequence_mean_token_mean": "seq-mean-token-mean",
    "sequence_mean_token_sum": "seq-mean-token-sum",
    "fixed_length": "seq-mean-token-sum-norm",
}
LOSS_OPTIONS = {
    "vanilla": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5},
    "dppo_tv": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1, "clip_ratio_c": 1.5},
    "dppo_kl": {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 1.5},
    "gspo": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08},
    "sapo": {"tau_pos": 1.1, "tau_neg": 1.3},
    "gpg": {},
    "clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.01, "clip_cov_ub": 2.0},
    "kl_cov": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.5},
    "geo_mean": {"clip_ratio_low": 0.3, "clip_ratio_high": 0.2},
    "dro": {"dro_beta": 0.3},
    "cispo": {"clip_ratio_low": 0.3, "clip_ratio_high": 0.25},
}
OURS = {  # our loss -> verl's, and our options for the same
    "ppo_clip": ("vanilla", {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.5}),
    "gspo": ("gspo", {"clip_low": 0.05, "clip_high": 0.08}),
    "cispo": ("cispo", {"clip_low": 0.3, "clip_high": 0.25}),
    "gmpo": ("geo_mean", {"clip_low": 0.3, "clip_high": 0.2}),
}


def verl_loss(name: str, batch: LossInputs, mode: str, options: dict[str, float]) -> tuple[Tensor, Tensor]:
    """verl's function called as verl's trainer calls it, in one micro-batch; the loss and its gradient [T]."""
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig

    policy = {k: v for k, v in options.items() if hasattr(PolicyLossConfig, k)}
    actor = {k: v for k, v in options.items() if k not in policy}
    config = ActorConfig(
        strategy="x", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=PolicyLossConfig(**policy), **actor
    )
    whole = denominators(batch)
    config.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=whole["num_loss_tokens"],
        global_batch_size=whole["num_sequences"],
        loss_scale_factor=FIXED_LENGTH,
    )
    logprobs = batch.logprobs.clone().requires_grad_()
    weights = None if batch.rollout_weights is None else padded(batch, batch.rollout_weights)
    loss, _ = core_algos().POLICY_LOSS_REGISTRY[name](
        old_log_prob=padded(batch, batch.old_logprobs),
        log_prob=padded(batch, logprobs),
        advantages=padded(batch, batch.advantages),
        response_mask=padded(batch, batch.loss_mask.to(torch.float64)),
        loss_agg_mode=VERL_MODE[mode],
        config=config,
        rollout_is_weights=weights,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient


def full_sequences(seed: int, **options: Any) -> LossInputs:
    """A batch in which every sequence has a loss token: verl's geo_mean counts the others in its mean."""
    return loss_batch(seed, masked=0.0, **options)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("ours", OURS)
def test_our_loss_equals_verls(ours: str, weights: bool) -> None:
    theirs, options = OURS[ours]
    spec = policy_loss_spec(ours)
    for seed in SEEDS:
        batch = loss_batch(seed, weights=weights)
        if ours == "gmpo":  # verl deviates from ours with weights: it takes their geometric mean
            batch = with_sequence_advantages(full_sequences(seed))
        for mode in spec.allowed_aggregations or AGGREGATIONS:
            loss, gradient = loss_and_gradient(spec, batch, mode, **options)
            expected, expected_gradient = verl_loss(theirs, batch, mode, LOSS_OPTIONS[theirs])
            # verl adds 1e-8 to the length of a sequence, a relative 1e-8 off the mean that its papers ask for.
            slack = 1e-8 if mode == "sequence_mean_token_mean" else 1e-9
            assert abs(loss - expected) < slack
            assert (gradient - expected_gradient).abs().max() < 1e-7


def test_reinforce_equals_verls() -> None:
    from verl.workers.config import ActorConfig

    batch = loss_batch(0, weights=True)
    config = ActorConfig(strategy="x", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    whole = denominators(batch)
    config.global_batch_info.update(batch_num_tokens=whole["num_loss_tokens"], global_batch_size=whole["num_sequences"])
    loss, gradient = loss_and_gradient(policy_loss_spec("reinforce"), batch, "sequence_mean_token_sum")
    logprobs = batch.logprobs.clone().requires_grad_()
    expected, _ = core_algos().compute_policy_loss_reinforce(
        rollout_log_prob=padded(batch, batch.rollout_logprobs),
        log_prob=padded(batch, logprobs),
        advantages=padded(batch, batch.advantages),
        response_mask=padded(batch, batch.loss_mask.to(torch.float64)),
        config=config,
        rollout_is_weights=padded(batch, batch.rollout_weights),
    )
    (expected_gradient,) = torch.autograd.grad(expected, logprobs)
    assert abs(loss - expected.detach()) < 1e-9
    assert (gradient - expected_gradient).abs().max() < 1e-7


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_bridge_equals_verl_for_every_loss(name: str) -> None:
    """Taken apart into tokens and aggregated by us, the loss is the one that verl returns."""
    spec = policy_loss_spec(f"verl:{name}")
    options = LOSS_OPTIONS[name]
    for seed in SEEDS:
        batch = full_sequences(seed) if name == "geo_mean" else loss_batch(seed)
        for mode in spec.allowed_aggregations or AGGREGATIONS:
            torch.manual_seed(seed)  # clip_cov draws
            loss, gradient = loss_and_gradient(spec, batch, mode, **options)
            torch.manual_seed(seed)
            expected, expected_gradient = verl_loss(name, batch, mode, options)
            assert abs(loss - expected) < (1e-8 if mode == "sequence_mean_token_mean" else 1e-9)
            assert (gradient - expected_gradient).abs().max() < 1e-7


@pytest.mark.parametrize("name", sorted(set(LOSS_OPTIONS) - {"geo_mean", "kl_cov", "clip_cov"}))
def test_bridged_loss_is_split_invariant_and_keeps_the_contract(name: str) -> None:
    spec = policy_loss_spec(f"verl:{name}")
    check_policy_loss(spec, LOSS_OPTIONS[name], None, accumulates=True)
    batch = loss_batch(1, masked=0.4, weights=True)
    mode = spec.default_aggregation
    whole = loss_and_gradient(spec, batch, mode, **LOSS_OPTIONS[name])
    split = loss_and_gradient(spec, batch, mode, parts=[[3], [1, 0], [4, 2]], **LOSS_OPTIONS[name])
    assert abs(whole[0] - split[0]) < 1e-8
    assert (whole[1] - split[1]).abs().max() < 1e-7


# Traps


@pytest.mark.parametrize("name", ["geo_mean", "kl_cov", "clip_cov"])
def test_losses_that_look_across_sequences_are_refused_under_accumulation(name: str) -> None:
    spec = policy_loss_spec(f"verl:{name}")
    with pytest.raises(ConfigError, match="depends on how a mini-batch is split"):
        check_policy_loss(spec, LOSS_OPTIONS[name], None, accumulates=True)
    check_policy_loss(spec, LOSS_OPTIONS[name], None, accumulates=False)


def test_verls_geo_mean_grows_with_the_number_of_micro_batches() -> None:
    """Why it is refused: it takes the mean over its own micro-batch, so four of them give about four times the loss."""
    batch = with_sequence_advantages(full_sequences(0, lengths=(4, 4, 4, 4)))
    spec = policy_loss_spec("verl:geo_mean")
    whole, _ = loss_and_gradient(spec, batch, "sequence_mean_token_mean")
    total, _ = verl_loss("geo_mean", batch, "sequence_mean_token_mean", {})
    from algorithm_batches import select

    pieces = [verl_loss("geo_mean", select(batch, [i]), "sequence_mean_token_mean", {})[0] for i in range(4)]
    assert abs(whole - total) < 1e-8
    assert sum(pieces).item() == pytest.approx(4 * total.item(), rel=1e-6)


def test_aggregation_that_verl_would_ignore_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"token_mean contradicts algorithm\.loss verl:sapo"):
        check_policy_loss(policy_loss_spec("verl:sapo"), {}, "token_mean", accumulates=True)


def test_the_default_aggregation_is_verls_or_the_one_that_the_loss_makes_itself() -> None:
    from verl.workers.config import ActorConfig

    for name in LOSS_OPTIONS:
        default = policy_loss_spec(f"verl:{name}").default_aggregation
        own = name in ("gspo", "sapo", "geo_mean")
        assert VERL_MODE[default] == ("seq-mean-token-mean" if own else ActorConfig.loss_agg_mode), name


def test_bypass_mode_and_estimators_without_their_data_are_refused() -> None:
    with pytest.raises(ConfigError, match="rollout_correction"):
        policy_loss_spec("verl:bypass_mode")
    with pytest.raises(ConfigError, match="greedy response"):
        advantage_spec("verl:remax")
    for name in ("optimal_token_baseline", "tir_optimal_token_baseline"):
        with pytest.raises(ConfigError, match="squared probabilities"):
            advantage_spec(f"verl:{name}")
    with pytest.raises(ConfigError, match="did you mean grpo"):
        advantage_spec("verl:grpoo")
    with pytest.raises(ConfigError, match="did you mean cispo"):
        policy_loss_spec("verl:cisp")


def test_options_are_only_those_that_verl_reads() -> None:
    for loss, option in (("vanilla", "clip_ratio"), ("gpg", "clip_ratio_low"), ("cispo", "clip_ratio_c")):
        with pytest.raises(ConfigError, match=f"does not take {option}"):
            check_policy_loss(policy_loss_spec(f"verl:{loss}"), {option: 0.3}, None, accumulates=True)


def test_micro_batch_without_loss_tokens_gives_zero_not_nan() -> None:
    batch = loss_batch(0)
    batch = dataclasses.replace(
        batch, loss_mask=torch.zeros_like(batch.loss_mask), logprobs=batch.logprobs.clone().requires_grad_()
    )
    for name, options in LOSS_OPTIONS.items():
        loss = policy_loss_spec(f"verl:{name}").function(batch, **options).loss
        assert loss.sum().item() == 0.0
        loss.sum().backward()


def test_root_logger_is_as_it_was(root_logger_after_import: tuple[list[logging.Handler], int]) -> None:
    """`import verl` calls logging.basicConfig, which adds a handler where there is none; the bridge undoes it."""
    assert root_logger_after_import == ([], 17)


# Users' own registrations


def test_users_registrations_in_verl_are_reached() -> None:
    verl = core_algos()

    @verl.register_policy_loss("mine")
    def mine(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="", config=None, rollout_is_weights=None):
        losses = -advantages * torch.exp(log_prob - old_log_prob)
        losses = losses if rollout_is_weights is None else losses * rollout_is_weights
        return verl.agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info), {}

    @verl.register_policy_loss("mean_of_micro_batch")
    def wrong(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="", config=None, rollout_is_weights=None
    ):
        return (-advantages * torch.exp(log_prob - old_log_prob) * rollout_is_weights * response_mask).mean(), {}

    @verl.register_policy_loss("without_weights")
    def unweighted(log_prob, advantages, response_mask, loss_agg_mode="", config=None, **kwargs):
        return verl.agg_loss(-advantages * log_prob, response_mask, loss_agg_mode, **config.global_batch_info), {}

    @verl.register_adv_est("half_reward")
    def half(token_level_rewards, response_mask, share=0.5, config=None, **kwargs):
        advantages = share * token_level_rewards.sum(-1, keepdim=True) * response_mask
        return advantages, advantages

    batch = loss_batch(0)
    loss, _ = loss_and_gradient(policy_loss_spec("verl:mine"), batch, "token_mean")
    ratio = (batch.logprobs - batch.old_logprobs).exp()
    assert loss.item() == pytest.approx(-(ratio * batch.advantages)[batch.loss_mask].mean().item())
    with pytest.raises(LearnerError, match=r"does not divide by config\.global_batch_info"):
        policy_loss_spec("verl:mean_of_micro_batch").function(batch)
    with pytest.raises(LearnerError, match="ignores rollout_is_weights"):
        policy_loss_spec("verl:without_weights").function(batch)
    inputs = advantage_batch(0)
    rows = advantage_spec("verl:half_reward").function(inputs, share=0.25).advantages
    assert rows[2][0].item() == pytest.approx(0.25 * inputs.rewards[2].item())


# Advantages


def whitened(name: str, **options: float) -> Callable[[AdvantageInputs], tuple[Tensor, ...]]:
    return lambda inputs: whiten(advantage_spec(name).function(inputs, **options).advantages, inputs.valid)


def ours(name: str, **options: float) -> Callable[[AdvantageInputs], tuple[Tensor, ...]]:
    return lambda inputs: advantage_spec(name).function(inputs, **options).advantages


def best_of_group(inputs: AdvantageInputs) -> tuple[Tensor, ...]:
    """pass_at_k with k = n is n (max - second) for the best; verl's grpo_passk divides by the group's std instead of
    n."""
    rows = list(advantage_spec("pass_at_k").function(inputs, k=4).advantages)
    for i, row in enumerate(rows):
        group = inputs.rewards[inputs.group_ids == inputs.group_ids[i]]
        rows[i] = row / 4 / (group.std() + 1e-6)
    return tuple(rows)


# verl computes the vectorised GRPO in float32; everything else in the dtype it is given.
ADVANTAGES: list[tuple[str, dict[str, Any], Callable[[AdvantageInputs], tuple[Tensor, ...]], float]] = [
    ("grpo", {}, ours("grpo"), 1e-9),
    ("grpo", {"norm_adv_by_std_in_grpo": False}, ours("dr_grpo"), 1e-9),
    ("grpo_vectorized", {}, ours("grpo"), 1e-4),
    ("rloo", {}, ours("rloo"), 1e-9),
    ("rloo_vectorized", {}, ours("rloo"), 1e-9),
    ("reinforce_plus_plus", {"gamma": 0.9}, ours("reinforce_plus_plus", gamma=0.9), 1e-8),
    ("reinforce_plus_plus_baseline", {}, ours("reinforce_plus_plus_baseline"), 1e-8),
    ("gae", {"gamma": 0.97, "lam": 0.9}, whitened("gae", gamma=0.97, lam=0.9), 1e-8),  # verl always whitens
    ("grpo_passk", {}, best_of_group, 1e-9),
]


@pytest.mark.parametrize(("name", "options", "expected", "tolerance"), ADVANTAGES)
def test_our_advantage_equals_verls(name, options, expected, tolerance) -> None:
    for seed in SEEDS:
        inputs = advantage_batch(seed, groups=(4, 4, 4), token_rewards=name not in ("grpo_passk",))
        found = advantage_spec(f"verl:{name}").function(inputs, **options)
        for row, other in zip(found.advantages, expected(inputs), strict=True):
            # verl's masked mean adds 1e-8 to its count: its whitening is off by that much, hence 1e-8 there.
            assert (row - other).abs().max() < tolerance
        if name == "gae":
            mine = advantage_spec("gae").function(inputs, **options).returns
            assert all((a - b).abs().max() < 1e-9 for a, b in zip(found.returns, mine, strict=True))


def test_verls_group_of_one_is_left_out() -> None:
    """verl deviates from GRPO here: the only sample of a group gets its raw reward as advantage."""
    mask = torch.ones(1, 2, dtype=torch.float64)
    raw, _ = core_algos().get_adv_estimator_fn("grpo")(0.7 * mask / 2, mask, [0])
    assert raw[0, 0].item() == pytest.approx(0.7, abs=1e-5)
    inputs = advantage_batch(0, groups=(1, 4))
    alone = (inputs.group_ids == 10).nonzero().item()
    for name in ("grpo", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline"):
        rows = advantage_spec(f"verl:{name}").function(inputs).advantages
        assert rows[alone].eq(0.0).all()
        assert sum(row.abs().sum() for row in rows) > 0
        assert advantage_spec(f"verl:{name}").needs_groups
    lonely = advantage_batch(0, groups=(1, 1))
    assert all(row.eq(0.0).all() for row in advantage_spec("verl:grpo").function(lonely).advantages)


def test_invalid_samples_never_reach_verl() -> None:
    inputs = advantage_batch(2, groups=(4, 4))
    valid = inputs.valid.clone()
    valid[1] = False
    rest = [i for i in range(8) if i != 1]
    changed = dataclasses.replace(inputs, valid=valid, in_loss=valid)
    without = dataclasses.replace(
        inputs,
        rewards=inputs.rewards[rest],
        group_ids=inputs.group_ids[rest],
        lengths=inputs.lengths[rest],
        valid=valid[rest],
        in_loss=valid[rest],
        values=tuple(inputs.values[i] for i in rest) if inputs.values else None,
    )
    for name in ("grpo", "reinforce_plus_plus", "gae"):
        found = advantage_spec(f"verl:{name}").function(changed).advantages
        assert found[1].eq(0.0).all()
        for i, row in zip(rest, advantage_spec(f"verl:{name}").function(without).advantages, strict=True):
            assert torch.equal(found[i], row)


def test_gdpo_normalises_each_part_of_the_reward() -> None:
    """arXiv 2601.05242: GRPO on every part, weighted sum, whitened over the batch (verl in float32)."""
    inputs = advantage_batch(3, groups=(4, 4))
    parts = {"right": inputs.rewards, "format": advantage_batch(9, groups=(4, 4)).rewards}
    inputs = dataclasses.replace(inputs, reward_parts=parts)
    options = {"gdpo_reward_keys": ["right", "format"], "gdpo_reward_weights": [1.0, 0.5]}
    found = advantage_spec("verl:gdpo").function(inputs, **options).advantages
    each = [
        advantage_spec("grpo").function(dataclasses.replace(inputs, rewards=parts[key])).advantages
        for key in options["gdpo_reward_keys"]
    ]
    total = tuple(a + 0.5 * b for a, b in zip(*each, strict=True))
    for row, expected in zip(found, whiten(total, inputs.valid), strict=True):
        assert (row - expected).abs().max() < 1e-4
    for bad in ({}, {"gdpo_reward_keys": ["speed"]}):
        with pytest.raises(ConfigError, match=r"the breakdown has \['format', 'right'\]"):
            advantage_spec("verl:gdpo").function(inputs, **bad)


# Around the losses


def test_kl_value_loss_and_controller_equal_verls() -> None:
    batch = loss_batch(0)
    mine = {"k1": "k1", "k2": "k2", "k3": "k3", "k1+": "k1_straight_through", "k3+": "k3_straight_through"}
    for theirs, name in mine.items():
        logprobs = batch.logprobs.clone().requires_grad_()
        a = core_algos().kl_penalty(logprobs, batch.ref_logprobs, theirs)
        b = kl_penalty(logprobs, batch.ref_logprobs, name)
        assert (a - b).abs().max() < 1e-9
        (ga,), (gb,) = (torch.autograd.grad(x.sum(), logprobs, retain_graph=True) for x in (a, b))
        assert (ga - gb).abs().max() < 1e-7
    far = torch.tensor([-5.0]), torch.tensor([-0.1])
    assert core_algos().kl_penalty(*far, "k3").item() == 10.0  # verl deviates from Schulman's k3: it is cut at 10
    assert kl_penalty(*far, "k3").item() > 100.0
    theirs, ours_ = core_algos().AdaptiveKLController(0.1, 0.5, 1000), KLController(0.1, 0.5, 1000)
    for kl in (0.1, 0.6, 9.0):
        theirs.update(kl, 64)
        assert ours_.update(kl, 64) == pytest.approx(theirs.value, abs=1e-15)
    inputs = ValueInputs(
        values=batch.logprobs,
        old_values=batch.old_logprobs,
        returns=batch.advantages,
        loss_mask=batch.loss_mask,
        sequence_index=batch.sequence_index,
        num_sequences=batch.num_sequences,
    )
    loss, metrics = value_loss(inputs, clip=0.2)
    expected, clip_frac = core_algos().compute_value_loss(
        *(padded(batch, x) for x in (batch.logprobs, batch.advantages, batch.old_logprobs)),
        padded(batch, batch.loss_mask.to(torch.float64)),
        0.2,
    )
    assert abs(loss[batch.loss_mask].mean() - expected) < 1e-9
    assert metrics["clip_frac"][batch.loss_mask].mean().item() == pytest.approx(clip_frac.item(), abs=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("mode", "threshold"), [("truncate", 1.1), ("mask", "0.9_1.1")])
def test_rollout_weights_equal_verls(mode: str, threshold: float | str, level: str) -> None:
    from verl.trainer.ppo.rollout_corr_helper import compute_offpolicy_metrics, compute_rollout_correction_weights

    batch = loss_batch(0)
    mask = padded(batch, batch.loss_mask.to(torch.float64))
    difference = padded(batch, batch.old_logprobs - batch.rollout_logprobs)
    expected, _ = compute_rollout_correction_weights(difference, mask, level, threshold)
    config = RolloutCorrectionConfig(mode=mode, level=level, upper=1.1, lower=0.9 if mode == "mask" else 0.0)
    weights, sums = rollout_weights(
        batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, batch.sequence_index, batch.num_sequences, config
    )
    assert (padded(batch, weights) - expected).abs().max() < 1e-9
    theirs = compute_offpolicy_metrics(padded(batch, batch.old_logprobs), padded(batch, batch.rollout_logprobs), mask)
    assert rollout_metrics(sums)["learner/kl_rollout_k1"] == pytest.approx(theirs["kl"], abs=1e-6)
    assert rollout_metrics(sums)["learner/kl_rollout_k3"] == pytest.approx(theirs["k3_kl"], abs=1e-6)


def test_rejection_equals_verls_with_the_bounds_turned_round() -> None:
    """verl bounds rollout / learner, the inverse of the importance ratio: [1/upper, 1/lower] of ours."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_rejection_mask

    batch = loss_batch(0)
    mask = padded(batch, batch.loss_mask.to(torch.float64))
    difference = padded(batch, batch.old_logprobs - batch.rollout_logprobs)
    for level, option in (("token", "token_k1"), ("sequence", "seq_sum_k1"), ("geometric", "seq_mean_k1")):
        expected, _ = compute_rollout_rejection_mask(difference, mask, option, f"{1 / 1.12}_{1 / 0.95}")
        config = RolloutCorrectionConfig(mode="reject", level=level, upper=1.12, lower=0.95)
        weights, _ = rollout_weights(
            batch.old_logprobs,
            batch.rollout_logprobs,
            batch.loss_mask,
            batch.sequence_index,
            batch.num_sequences,
            config,
        )
        assert torch.equal(padded(batch, (weights > 0).to(torch.float64)), expected)


# verl's own numbers: they have moved under an unchanged signature before (gspo, 0.9.0 to 0.9.1).

GOLDEN_LOSSES = {
    "vanilla": -0.207052301329,
    "dppo_tv": 0.299243106886,
    "dppo_kl": 0.299243106886,
    "gspo": -0.23940980625,
    "sapo": -0.539838305126,
    "gpg": 0.312,
    "clip_cov": -0.203340080677,
    "kl_cov": -0.213309511949,
    "geo_mean": -0.25333744053,
    "dro": 0.3237,
    "cispo": 0.284953308369,
}
GOLDEN_ADVANTAGES = {
    "gae": -5.088085679,
    "grpo": -8.584793445,
    "grpo_vectorized": -8.584807805,
    "grpo_passk": 80.240370268,
    "rloo": -6.15,
    "rloo_vectorized": -6.15,
    "opo": -4.0,
    "gpg": -4.920000196,
    "reinforce_plus_plus": 1.779887793,
    "reinforce_plus_plus_baseline": 8.546005146,
}


def fixed_batch() -> LossInputs:
    old = torch.tensor([-0.5, -1.0, -0.2, -0.9, -0.4, -1.5], dtype=torch.float64)
    return LossInputs(
        logprobs=old + torch.tensor([0.3, -0.4, 0.1, 0.5, -0.3, 0.2], dtype=torch.float64),
        old_logprobs=old,
        rollout_logprobs=old,
        advantages=torch.tensor([1.0, 1.0, -0.7, -0.7, -0.7, 0.4], dtype=torch.float64),
        loss_mask=torch.tensor([True, True, True, False, True, True]),
        sequence_index=torch.tensor([0, 0, 1, 1, 1, 2]),
        num_sequences=3,
    )


def fixed_rewards() -> AdvantageInputs:
    return AdvantageInputs(
        rewards=torch.tensor([1.0, 0.0, 0.5, 0.2, 0.9, 0.3], dtype=torch.float64),
        group_ids=torch.tensor([0, 0, 0, 1, 1, 1]),
        lengths=torch.tensor([1, 2, 3, 1, 2, 3]),
        valid=torch.ones(6, dtype=torch.bool),
        in_loss=torch.ones(6, dtype=torch.bool),
        values=tuple(torch.arange(n, dtype=torch.float64) / 10 for n in (1, 2, 3, 1, 2, 3)),
    )


def test_a_single_token_leaves_the_critic_as_it_is() -> None:
    """verl would whiten it, and the token is in the critic's loss."""
    first = torch.tensor([True] + [False] * 5)
    alone = dataclasses.replace(fixed_rewards(), valid=first, in_loss=first)
    result = advantage_spec("verl:gae").function(alone)
    assert all(row.eq(0.0).all() for row in result.advantages)
    assert result.returns == alone.values


@pytest.mark.parametrize("name", [*GOLDEN_ADVANTAGES, "gdpo"])
def test_what_is_not_in_the_loss_counts_in_its_group_and_not_in_whitening(name: str) -> None:
    """Sample 2, three tokens long, is out of the loss: verl is asked with its mask at 0."""
    whole = fixed_rewards()
    options = {"gdpo_reward_keys": ["reward"]} if name == "gdpo" else {}
    whole = dataclasses.replace(whole, reward_parts={"reward": whole.rewards})
    part = dataclasses.replace(whole, in_loss=torch.tensor([True, True, False, True, True, True]))
    function = advantage_spec(f"verl:{name}").function
    expected, found = (function(inputs, **options).advantages for inputs in (whole, part))
    counted = torch.cat([row for i, row in enumerate(found) if i != 2])
    if name in ("gae", "gdpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        assert counted.mean().item() == pytest.approx(0.0, abs=1e-6)
        assert counted.std().item() == pytest.approx(1.0, abs=1e-4)
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_verls_losses_have_not_moved(name: str) -> None:
    torch.manual_seed(0)
    mode = (policy_loss_spec(f"verl:{name}").allowed_aggregations or ("token_mean",))[0]
    loss, _ = verl_loss(name, fixed_batch(), mode, LOSS_OPTIONS[name])
    assert loss.item() == pytest.approx(GOLDEN_LOSSES[name], abs=1e-9)


@pytest.mark.parametrize("name", GOLDEN_ADVANTAGES)
def test_verls_advantages_have_not_moved(name: str) -> None:
    rows = advantage_spec(f"verl:{name}").function(fixed_rewards()).advantages
    weighted = sum((i + 1) ** 2 * row.sum().item() for i, row in enumerate(rows))
    assert weighted == pytest.approx(GOLDEN_ADVANTAGES[name], abs=1e-6)

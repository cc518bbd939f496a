"""Each estimator against its paper's formula, the edge cases that are defined, and the way into a TrainBatch."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from algorithm_batches import advantage_batch
from torch import Tensor

from rl.advantages import advantage_spec, build_train_batch, estimate
from rl.advantages.api import AdvantageInputs, Advantages, register_advantage, registered_advantages, spread
from rl.advantages.whitening import whiten
from rl.batch import (
    Annotations,
    FinishReason,
    Prompt,
    RewardStatus,
    Rollout,
    RolloutBatch,
    Score,
    ScoredBatch,
)
from rl.config import AlgorithmConfig, KLConfig
from rl.errors import ConfigError

SEEDS = range(6)
GROUP_BASED = ("grpo", "dr_grpo", "rloo", "pass_at_k")


def run(name: str, inputs: AdvantageInputs, **options: float) -> Advantages:
    return advantage_spec(name).function(inputs, **options)


def groups_of(inputs: AdvantageInputs) -> list[list[int]]:
    """Indices of the valid samples of each group."""
    valid = [i for i in range(len(inputs.rewards)) if inputs.valid[i]]
    keys = sorted({int(inputs.group_ids[i]) for i in valid})
    return [[i for i in valid if int(inputs.group_ids[i]) == key] for key in keys]


def totals(inputs: AdvantageInputs) -> list[float]:
    extra = (
        [0.0] * len(inputs.rewards) if inputs.token_rewards is None else [t.sum().item() for t in inputs.token_rewards]
    )
    return [r + e for r, e in zip(inputs.rewards.tolist(), extra, strict=True)]


def per_sequence(inputs: AdvantageInputs, formula) -> list[float]:
    out = [0.0] * len(inputs.rewards)
    for group in groups_of(inputs):
        values = formula([totals(inputs)[i] for i in group])
        for i, value in zip(group, values, strict=True):
            out[i] = value
    return out


def grpo_formula(r: list[float]) -> list[float]:
    """arXiv 2402.03300, section 4.1.2: (r - mean(r)) / std(r), with the unbiased std and epsilon 1e-6."""
    mean = sum(r) / len(r)
    std = math.sqrt(sum((x - mean) ** 2 for x in r) / (len(r) - 1))
    return [(x - mean) / (std + 1e-6) for x in r]


def dr_grpo_formula(r: list[float]) -> list[float]:
    """arXiv 2503.20783, section 3: r - mean(r)."""
    return [x - sum(r) / len(r) for x in r]


def rloo_formula(r: list[float]) -> list[float]:
    """arXiv 2402.14740: r_i - 1/(k-1) sum of r_j, j != i."""
    return [x - (sum(r) - x) / (len(r) - 1) for x in r]


def pass_at_k_formula(k: int):
    """arXiv 2505.15201, eq. 33, by enumeration of the subsets; times n, because the policy gradient takes a mean."""

    def formula(r: list[float]) -> list[float]:
        n, out = len(r), [0.0] * len(r)
        if n < k:
            return out
        for subset in itertools.combinations(range(n), k):
            for i in subset:
                out[i] += max(r[j] for j in subset) - max(r[j] for j in subset if j != i)
        return [n * x / math.comb(n, k) for x in out]

    return formula


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("grpo", {}, grpo_formula),
        ("dr_grpo", {}, dr_grpo_formula),
        ("rloo", {}, rloo_formula),
        ("pass_at_k", {"k": 2}, pass_at_k_formula(2)),
        ("pass_at_k", {"k": 3}, pass_at_k_formula(3)),
        ("pass_at_k", {"k": 4}, pass_at_k_formula(4)),
    ],
)
def test_outcome_advantage_equals_the_papers_formula(name, options, formula) -> None:
    for seed, token_rewards in itertools.product(SEEDS, (False, True)):
        inputs = advantage_batch(seed, token_rewards=token_rewards, binary=seed % 2 == 0 and not token_rewards)
        expected = per_sequence(inputs, formula)
        found = run(name, inputs, **options).advantages
        for i, row in enumerate(found):
            assert row.dtype == torch.float64
            assert len(row) == inputs.lengths[i]
            assert (row - expected[i]).abs().max() < 1e-9


def reference_returns(inputs: AdvantageInputs, i: int, gamma: float) -> list[float]:
    n = int(inputs.lengths[i])
    rewards = [0.0] * n if inputs.token_rewards is None else inputs.token_rewards[i].tolist()
    rewards[-1] += inputs.rewards[i].item()
    return [sum(gamma ** (u - t) * rewards[u] for u in range(t, n)) for t in range(n)]


def reference_whitening(rows: list[list[float]]) -> list[list[float]]:
    tokens = [x for row in rows for x in row]
    mean = sum(tokens) / len(tokens)
    variance = sum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_whitens_returns_over_the_batch(gamma) -> None:
    """arXiv 2501.03262: A_t = r - beta sum of KL from t on, then (A - mean) / std over all tokens of the batch."""
    for seed in SEEDS:
        inputs = advantage_batch(seed, token_rewards=True)
        rows = [reference_returns(inputs, i, gamma) for i in range(len(inputs.rewards))]
        found = run("reinforce_plus_plus", inputs, gamma=gamma).advantages
        for row, expected in zip(found, reference_whitening(rows), strict=True):
            assert (row - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-9


def test_reinforce_plus_plus_baseline_whitens_centred_rewards() -> None:
    """arXiv 2501.03262, the baseline form: r - mean of the group, then whitened over all tokens of the batch."""
    for seed in SEEDS:
        inputs = advantage_batch(seed, token_rewards=True)
        centred = per_sequence(inputs, dr_grpo_formula)
        rows = [[c] * int(n) for c, n in zip(centred, inputs.lengths, strict=True)]
        for row, expected in zip(
            run("reinforce_plus_plus_baseline", inputs).advantages, reference_whitening(rows), strict=True
        ):
            assert (row - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-9


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (1.0, 0.0)])
def test_gae_equals_its_sum_of_discounted_errors(gamma, lam) -> None:
    """arXiv 1506.02438, eq. 16, as a double sum; the value after the last token is 0."""
    for seed in SEEDS:
        inputs = advantage_batch(seed, token_rewards=True)
        result = run("gae", inputs, gamma=gamma, lam=lam)
        assert inputs.values is not None
        assert inputs.token_rewards is not None
        assert result.returns is not None
        for i, n in enumerate(inputs.lengths.tolist()):
            values = [*inputs.values[i].tolist(), 0.0]
            rewards = inputs.token_rewards[i].tolist()
            rewards[-1] += inputs.rewards[i].item()
            delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
            for t in range(n):
                expected = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
                assert result.advantages[i][t].item() == pytest.approx(expected, abs=1e-9)
                assert result.returns[i][t].item() == pytest.approx(expected + values[t], abs=1e-9)


def test_pass_at_k_is_an_unbiased_gradient_of_the_best_of_k() -> None:
    """A policy over three answers with logits: the mean over all draws of n = 3 equals the exact gradient for k = 2."""
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    log_p = torch.log_softmax(logits, 0)
    pairs = list(itertools.product(range(3), repeat=2))
    best = sum((log_p[a] + log_p[b]).exp() * max(rewards[a], rewards[b]) for a, b in pairs)
    (expected,) = torch.autograd.grad(best, logits, retain_graph=True)
    surrogate = torch.zeros((), dtype=torch.float64)
    for draw in itertools.product(range(3), repeat=3):
        inputs = AdvantageInputs(
            rewards=rewards[list(draw)],
            group_ids=torch.zeros(3, dtype=torch.int64),
            lengths=torch.ones(3, dtype=torch.int64),
            valid=torch.ones(3, dtype=torch.bool),
            in_loss=torch.ones(3, dtype=torch.bool),
        )
        advantages = torch.cat(run("pass_at_k", inputs, k=2).advantages)
        probability = log_p[list(draw)].sum().exp().detach()
        surrogate = surrogate + probability * (advantages * log_p[list(draw)]).mean()
    (found,) = torch.autograd.grad(surrogate, logits)
    assert (found - expected).abs().max() < 1e-12


# Defined behaviour at the edges


@pytest.mark.parametrize("equal", [0.1, -0.1])
@pytest.mark.parametrize("name", GROUP_BASED)
def test_group_of_one_and_group_with_equal_rewards_get_exactly_zero(name, equal) -> None:
    inputs = AdvantageInputs(
        rewards=torch.tensor([equal, equal + 1e-16, equal, 0.7, 0.2, 0.9], dtype=torch.float64),
        group_ids=torch.tensor([0, 0, 0, 1, 2, 2]),
        lengths=torch.tensor([2, 1, 3, 2, 1, 1]),
        valid=torch.ones(6, dtype=torch.bool),
        in_loss=torch.ones(6, dtype=torch.bool),
    )
    found = run(name, inputs, **({"k": 2} if name == "pass_at_k" else {})).advantages
    assert all(row.eq(0.0).all() for row in found[:4])
    assert found[5].item() > found[4].item()


@pytest.mark.parametrize("name", [*GROUP_BASED, "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"])
def test_invalid_sample_gets_zero_and_changes_nobody_else(name) -> None:
    inputs = advantage_batch(4, groups=(4, 5))
    valid = inputs.valid.clone()
    valid[3] = False
    options = {"k": 2} if name == "pass_at_k" else {}
    found = run(
        name,
        dataclasses.replace(inputs, valid=valid, in_loss=valid, rewards=torch.where(valid, inputs.rewards, 0.0)),
        **options,
    )
    assert found.advantages[3].eq(0.0).all()
    rest = [i for i in range(9) if i != 3]
    without = AdvantageInputs(
        rewards=inputs.rewards[rest],
        group_ids=inputs.group_ids[rest],
        lengths=inputs.lengths[rest],
        valid=valid[rest],
        in_loss=valid[rest],
        values=tuple(inputs.values[i] for i in rest) if inputs.values else None,
    )
    for i, expected in zip(rest, run(name, without, **options).advantages, strict=True):
        assert (found.advantages[i] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", GROUP_BASED)
def test_an_empty_batch_has_no_advantages(name) -> None:
    none = torch.zeros(0, dtype=torch.float64)
    empty, flags = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    inputs = AdvantageInputs(rewards=none, group_ids=empty, lengths=empty, valid=flags, in_loss=flags)
    assert run(name, inputs).advantages == ()


def test_k_over_every_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="k is 6, but groups have at most 5 samples"):
        run("pass_at_k", advantage_batch(0, groups=(2, 5)), k=6)


def test_group_smaller_than_k_is_counted() -> None:
    result = run("pass_at_k", advantage_batch(0, groups=(2, 5)), k=3)
    assert result.metrics == {"advantage/groups_under_k": 1.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {"epsilon": -1}),
        ("gae", {"gamma": 1.5}),
        ("gae", {"lam": -0.1}),
        ("reinforce_plus_plus", {"gamma": 2.0}),
        ("pass_at_k", {"k": 1}),
    ],
)
def test_options_out_of_range_are_refused(name, options) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        run(name, advantage_batch(0), **options)


def test_whitening_without_a_spread_gives_zero() -> None:
    rows = (torch.full((3,), 0.1, dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64))
    assert all(row.eq(0.0).all() for row in whiten(rows, torch.tensor([True, True])))
    single = (torch.ones(1, dtype=torch.float64),)
    assert whiten(single, torch.tensor([True]))[0].item() == 0.0
    assert whiten(single, torch.tensor([False]))[0].item() == 0.0


def test_unknown_estimator_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean grpo or "):
        advantage_spec("grpoo")
    assert set(GROUP_BASED) < set(registered_advantages())


# From the currency and back


def scored_batch(
    rewards: list[float],
    *,
    status: dict[int, RewardStatus] | None = None,
    finish: dict[int, FinishReason] | None = None,
    group_size: int = 4,
) -> ScoredBatch:
    prompts = tuple(Prompt(f"p{i}", (1, 2, 3), "q") for i in range(len(rewards) // group_size))
    rollouts = tuple(
        Rollout(
            prompt_index=i // group_size,
            group_id=i // group_size,
            sample_index=i % group_size,
            token_ids=np.arange(i % 3 + 1, dtype=np.int32),
            rollout_logprobs=np.full(i % 3 + 1, -0.5, dtype=np.float32),
            finish_reason=(finish or {}).get(i, FinishReason.STOP),
            policy_version=7,
            text="",
            answer="",
        )
        for i in range(len(rewards))
    )
    scores = tuple(Score(r, status=(status or {}).get(i, RewardStatus.OK)) for i, r in enumerate(rewards))
    return ScoredBatch(RolloutBatch(prompts, rollouts), scores)


def test_failed_and_aborted_samples_are_not_valid() -> None:
    scored = scored_batch(
        [1.0, 0.0, 1.0, 0.0], status={1: RewardStatus.TIMEOUT}, finish={2: FinishReason.ABORT, 3: FinishReason.LENGTH}
    )
    assert scored.valid == (True, False, False, True)
    empty = dataclasses.replace(
        scored.batch.rollouts[0], token_ids=np.zeros(0, np.int32), rollout_logprobs=np.zeros(0, np.float32)
    )
    rollouts = (empty, *scored.batch.rollouts[1:])
    scored = ScoredBatch(RolloutBatch(scored.batch.prompts, rollouts), scored.scores)
    assert scored.valid == (False, False, False, True)
    advantages = estimate(scored, Annotations(), AlgorithmConfig())
    assert [len(row) for row in advantages.advantages] == [0, 2, 3, 1]
    assert (
        build_train_batch(scored, advantages, Annotations(), policy_version=7, config=AlgorithmConfig()).num_sequences
        == 1
    )


def test_what_is_learned_from_is_the_reward_with_its_shaping() -> None:
    scored = scored_batch([0.5, 1.0], group_size=2)
    shaped = ScoredBatch(scored.batch, (Score(0.5, unshaped_reward=1.0), Score(1.0)))
    rows = estimate(shaped, Annotations(), AlgorithmConfig(advantage="dr_grpo")).advantages
    assert [row[0].item() for row in rows] == [-0.25, 0.25]


def test_train_batch_holds_masks_lags_and_global_denominators() -> None:
    scored = scored_batch(
        [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0],
        status={1: RewardStatus.PLUGIN_ERROR},
        finish={4: FinishReason.LENGTH},
    )
    old = tuple(np.full(r.length, -0.4, dtype=np.float32) for r in scored.batch.rollouts)
    for mask_truncated in (False, True):
        config = AlgorithmConfig(mask_truncated=mask_truncated)
        advantages = estimate(scored, Annotations(), config)
        batch = build_train_batch(scored, advantages, Annotations(old_logprobs=old), policy_version=9, config=config)
        counted = [i for i in range(8) if i != 1 and not (mask_truncated and i == 4)]
        assert [i for i, s in enumerate(batch.samples) if s.loss_mask.all()] == counted
        assert [i for i, s in enumerate(batch.samples) if not s.loss_mask.any()] == sorted(set(range(8)) - set(counted))
        assert batch.num_sequences == len(counted)
        assert batch.num_loss_tokens == sum(scored.batch.rollouts[i].length for i in counted)
        assert {s.policy_lag for s in batch.samples} == {2}
        assert batch.samples[0].advantages.dtype == np.float32
        for sample, annotated in zip(batch.samples, old, strict=True):
            np.testing.assert_array_equal(sample.old_logprobs, annotated)
        assert batch.samples[0].ref_logprobs is None
        # The truncated response still belongs to its group's mean: 2 of 4 are right.
        assert batch.samples[4].advantages[0] == pytest.approx(0.5 / math.sqrt(1 / 3), abs=1e-5)
    tokens = torch.cat([row for i, row in enumerate(advantages.advantages) if i not in (1, 4)])
    assert batch.metrics["advantage/mean"] == pytest.approx(tokens.mean().item())
    assert batch.metrics["advantage/std"] == pytest.approx(tokens.std(correction=0).item())
    assert batch.metrics["advantage/valid_frac"] == 7 / 8
    assert batch.metrics["advantage/signal_frac"] == 6 / 8


def test_kl_in_the_reward_is_taken_from_every_token() -> None:
    scored = scored_batch([1.0, 0.0, 1.0, 0.0])
    lengths = [r.length for r in scored.batch.rollouts]
    old = tuple(np.full(n, -0.5, dtype=np.float32) for n in lengths)
    ref = tuple(np.full(n, -0.75, dtype=np.float32) for n in lengths)
    config = AlgorithmConfig(advantage="dr_grpo", kl=KLConfig(placement="reward", coefficient=0.1, estimator="k1"))
    annotations = Annotations(old_logprobs=old, ref_logprobs=ref, kl_coefficient=0.1)
    rewards = [r - 0.1 * 0.25 * n for r, n in zip((1.0, 0.0, 1.0, 0.0), lengths, strict=True)]
    for row, expected in zip(estimate(scored, annotations, config).advantages, dr_grpo_formula(rewards), strict=True):
        assert row[0].item() == pytest.approx(expected, abs=1e-9)
    adapted = dataclasses.replace(annotations, kl_coefficient=0.2)
    stronger = estimate(scored, adapted, config).advantages[2][0].item()
    assert stronger == pytest.approx(
        dr_grpo_formula([r - 0.05 * n for r, n in zip((1.0, 0.0, 1.0, 0.0), lengths, strict=True)])[2]
    )
    in_loss = config.model_copy(update={"kl": KLConfig(placement="loss", coefficient=0.1)})
    assert [row[0].item() for row in estimate(scored, annotations, in_loss).advantages] == [0.5, -0.5, 0.5, -0.5]
    with pytest.raises(ConfigError, match="needs ref_logprobs among the learner's annotations"):
        estimate(scored, Annotations(old_logprobs=old, kl_coefficient=0.1), config)


def test_whitening_is_an_option_of_every_estimator() -> None:
    scored = scored_batch([1.0, 0.0, 0.2, 0.0])
    rows = estimate(scored, Annotations(), AlgorithmConfig(advantage="rloo", whiten_advantages=True)).advantages
    tokens: Tensor = torch.cat(rows)
    assert tokens.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert tokens.std().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "whitens"), [("reinforce_plus_plus", True), ("reinforce_plus_plus_baseline", True), ("rloo", False)]
)
def test_whitening_counts_only_the_tokens_that_are_learned_from(name, whitens) -> None:
    """A response that was cut stays in its group's statistics: with it out of the loss the others' advantages are the
    same but for the whitening, whose mean and variance are theirs alone."""
    scored = scored_batch([1.0, 0.0, 0.2, 0.0], finish={1: FinishReason.LENGTH})
    kept = [0, 2, 3]
    plain = estimate(scored, Annotations(), AlgorithmConfig(advantage=name))
    config = AlgorithmConfig(advantage=name, mask_truncated=True, whiten_advantages=not whitens)
    result = estimate(scored, Annotations(), config)
    tokens = torch.cat([result.advantages[i] for i in kept])
    assert tokens.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert tokens.std().item() == pytest.approx(1.0, abs=1e-6)
    assert result.metrics["advantage/std"] == pytest.approx(tokens.std(correction=0).item())
    before = torch.cat([plain.advantages[i] for i in kept])
    torch.testing.assert_close(tokens, (before - before.mean()) / before.std(), rtol=0, atol=1e-6)


def test_grpo_makes_nothing_of_the_kl_where_the_rewards_are_equal() -> None:
    """Its own spread would blow it up: two responses that differ by a KL of 1e-3 would get -0.7 and 0.7."""
    scored = scored_batch([1.0, 1.0, 0.0, 1.0], group_size=2)
    old = tuple(np.full(r.length, -0.5, dtype=np.float32) for r in scored.batch.rollouts)
    ref = tuple(o - np.float32(0.01 * i) for i, o in enumerate(old))
    kl = KLConfig(placement="reward", coefficient=0.1, estimator="k1")
    annotations = Annotations(old_logprobs=old, ref_logprobs=ref, kl_coefficient=0.1)
    rows = estimate(scored, annotations, AlgorithmConfig(advantage="grpo", kl=kl)).advantages
    assert rows[0].eq(0.0).all() and rows[1].eq(0.0).all()
    assert rows[2][0] < -0.7 < 0.7 < rows[3][0]
    rows = estimate(scored, annotations, AlgorithmConfig(advantage="rloo", kl=kl)).advantages
    assert rows[0][0].item() == pytest.approx(0.1 * 0.01 * 2, abs=1e-6)  # the KL of two tokens, as it is


def test_values_go_into_gae_and_come_back_with_returns_in_the_samples() -> None:
    """Hand-computed: reward 1 on the last of two tokens, gamma 1 and lambda 0.5."""
    scored = scored_batch([1.0, 0.0, 1.0, 0.0])
    values = tuple(np.linspace(0.1, 0.4, r.length).astype(np.float32) for r in scored.batch.rollouts)
    config = AlgorithmConfig(advantage="gae", advantage_options={"gamma": 1.0, "lam": 0.5})
    annotations = Annotations(values=values)
    advantages = estimate(scored, annotations, config)
    batch = build_train_batch(scored, advantages, annotations, policy_version=2, config=config)
    for sample, rollout, score, own in zip(batch.samples, scored.batch.rollouts, scored.scores, values, strict=True):
        following = [*own[1:], 0.0]
        expected, rest = [], 0.0
        for t in reversed(range(rollout.length)):
            reward = score.reward if t == rollout.length - 1 else 0.0
            rest = reward + following[t] - own[t] + 0.5 * rest
            expected.insert(0, rest)
        assert sample.values is not None
        assert sample.returns is not None
        np.testing.assert_array_equal(sample.values, own)
        np.testing.assert_allclose(sample.advantages, expected, atol=1e-6)
        np.testing.assert_allclose(sample.returns, np.array(expected) + own, atol=1e-6)


def test_an_estimator_sees_the_parts_of_the_reward_and_its_own_metrics_are_kept(monkeypatch) -> None:
    monkeypatch.setattr("rl.advantages.api._REGISTRY", registered_advantages())  # what is registered here ends with it
    seen = {}

    @register_advantage("sees_parts")
    def sees_parts(inputs: AdvantageInputs) -> Advantages:
        seen.update({name: part.tolist() for name, part in inputs.reward_parts.items()})
        return Advantages(spread(inputs.rewards, inputs.lengths), metrics={"advantage/mine": torch.tensor(2.0)})

    scored = scored_batch([1.0, 0.0, 1.0, 0.0])
    parts = [{"math": 1.0, "format": 0.5}, {"math": 0.0}, {"math": 1.0, "format": 1.0}, {}]
    scores = tuple(dataclasses.replace(s, breakdown=b) for s, b in zip(scored.scores, parts, strict=True))
    result = estimate(ScoredBatch(scored.batch, scores), Annotations(), AlgorithmConfig(advantage="sees_parts"))
    assert seen == {"math": [1.0, 0.0, 1.0, 0.0], "format": [0.5, 0.0, 1.0, 0.0]}
    assert result.metrics["advantage/mine"] == 2.0 and type(result.metrics["advantage/mine"]) is float


def test_parts_of_the_currency_that_do_not_fit_together_are_refused() -> None:
    scored = scored_batch([1.0, 0.0, 1.0, 0.0])
    first = scored.batch.rollouts[1]
    with pytest.raises(ValueError, match="rollout has 2 tokens but 1 rollout_logprobs"):
        dataclasses.replace(first, rollout_logprobs=first.rollout_logprobs[:1])
    with pytest.raises(ValueError, match="3 scores for 4 rollouts"):
        ScoredBatch(scored.batch, scored.scores[:3])
    advantages = estimate(scored, Annotations(), AlgorithmConfig())
    batch = build_train_batch(scored, advantages, Annotations(), policy_version=7, config=AlgorithmConfig())
    for name in ("loss_mask", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "returns"):
        with pytest.raises(ValueError, match=f"train sample has 2 response tokens but 5 {name}"):
            dataclasses.replace(batch.samples[1], **{name: np.zeros(5, dtype=np.float32)})


def test_estimator_errors_name_the_key() -> None:
    scored = scored_batch([1.0, 0.0, 1.0, 0.0])
    with pytest.raises(ConfigError, match="does not take epsilonn; it takes epsilon"):
        estimate(scored, Annotations(), AlgorithmConfig(advantage_options={"epsilonn": 1.0}))
    with pytest.raises(ConfigError, match="needs a critic's values"):
        estimate(scored, Annotations(), AlgorithmConfig(advantage="gae"))

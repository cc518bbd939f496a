"""The learner on two real ZeRO-3 ranks equals a plain single-process torch model, whatever the split."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import ADAM, ALGORITHM, OTHER_REFERENCE, TEMPERATURE, samples
from mxfp4 import write_mxfp4
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig

from launch.tiny_models import FAMILIES, build_tiny_model
from rl.batch import TrainSample
from rl.config import ModelConfig
from rl.learner_checkpoint import export_checkpoint
from rl.moe import Routers

pytestmark = pytest.mark.stack
dense_only = pytest.mark.parametrize("family", ["qwen3"], indirect=True)
moe_only = pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"], indirect=True)


class Family:
    """One model family: its checkpoint, and what the two ranks saved."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.out_dir = directory
        self.checkpoint = directory / "model"
        self.results: dict[str, Any] = torch.load(directory / "rank0.pt", weights_only=False)
        self.rank1: dict[str, Any] = torch.load(directory / "rank1.pt", weights_only=False)

    def model(self, path: Path | None = None) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path or self.checkpoint, dtype=torch.float32, attn_implementation="eager"
        )

    def gradients(self, name: str) -> dict[str, Tensor]:
        """The step of plain SGD at rate 1 is minus the gradient."""
        before = checkpoint_weights(self.model())
        after = self.results[name]["weights"]
        assert before.keys() == after.keys()
        return {key: before[key] - after[key] for key in before}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks ran every scenario."""
    out_dir = tmp_path_factory.mktemp("learner")
    for name in FAMILIES:
        build_tiny_model(name, out_dir / name / "model")
    write_mxfp4(out_dir / "gpt_oss" / "model", out_dir / "gpt_oss" / "mxfp4")
    build_unusual_model(out_dir / "qwen3_moe" / "unusual")
    run_ranks("learner_ranks.py", out_dir)
    for count in (3, 1):
        run_ranks("learner_ranks.py", out_dir, ranks=count)
    return out_dir


def build_unusual_model(path: Path) -> None:
    """A mixture of experts whose routing bias is a buffer, with dropout, and with a generation configuration that
    transformers reads but refuses to write."""
    build_tiny_model("qwen3_moe", path)
    config = Glm4MoeConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        attention_dropout=0.5,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.arange(4.0))
    model.save_pretrained(path)
    (path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, ranks: Path) -> Family:
    return Family(request.param, ranks / request.param)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stored(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The tensors of a checkpoint folder by their names."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(path / "model.safetensors").items()}


def checkpoint_weights(model: Any) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, {n: p.detach().clone() for n, p in model.named_parameters()})


def reference_distribution(model: Any, sample: TrainSample) -> tuple[Tensor, Tensor]:
    """(log-probabilities [R] of the response, entropies [R]) at the rollout's temperature, one sequence, all logits."""
    tokens = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long()
    logits = model(input_ids=tokens[None]).logits[0, len(sample.prompt_ids) - 1 : -1]
    logprobs = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    response = tokens[len(sample.prompt_ids) :, None]
    return logprobs.gather(-1, response)[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def reference_loss(model: Any, batch: list[TrainSample], routers: Routers | None = None) -> Tensor:
    """The objective of the two ranks in textbook form: arXiv 1707.06347 eq. 7 and k3 of the reference, token mean."""
    total = torch.zeros(())
    for sample in batch:
        if routers is None:
            logprobs, entropy = reference_distribution(model, sample)
        else:
            experts = torch.from_numpy(sample.routed_experts).long()  # type: ignore[arg-type]
            padded = torch.cat([experts, experts[-1:]])  # the reference reads the last token too
            with routers.forward_pass(torch.ones(len(padded), dtype=torch.bool), experts=padded):
                logprobs, entropy = reference_distribution(model, sample)
        old, rollout, ref, advantages = (
            torch.from_numpy(getattr(sample, name))
            for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages")
        )
        ratio = (logprobs - old).exp()
        surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)
        weights = (old - rollout).exp().clamp(max=ALGORITHM.rollout_correction.upper)
        kl = (ref - logprobs).exp() - 1 - (ref - logprobs)
        per_token = surrogate * weights + 0.1 * kl - 0.02 * entropy
        total = total + per_token[torch.from_numpy(sample.loss_mask)].sum()
    return total / sum(s.num_loss_tokens for s in batch)


def reference_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    loss.backward()
    return revert_weight_conversion(model, {n: p.grad for n, p in model.named_parameters()})


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def test_gradients_equal_single_process_torch_under_every_split(family: Family) -> None:
    model = family.model()
    loss = reference_loss(model, samples())
    expected = reference_gradients(model, loss)
    assert max(float(g.abs().max()) for g in expected.values()) > 0.05  # so that 1e-5 means something
    splits = {"one", "many", "packed", "shared", "one_sided"} & family.results.keys()
    assert len(splits) == {"qwen3": 5, "qwen3_moe": 4, "gpt_oss": 3}[family.name]
    for split in sorted(splits):
        assert_close(family.gradients(split), expected)
        assert family.results[split]["metrics"]["learner/loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_metrics_do_not_depend_on_the_split(family: Family) -> None:
    one = family.results["one"]["metrics"]
    for split in {"many", "packed", "shared"} & family.results.keys():
        other = family.results[split]["metrics"]
        assert one.keys() == other.keys()
        for name in one.keys() - {"learner/tokens_per_s", "learner/memory_peak_gib"}:
            if split == "shared" and "router" in name:
                continue  # a shared prompt is routed once
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


@dense_only
def test_a_long_gradient_is_clipped_to_the_norm_that_is_allowed(family: Family) -> None:
    whole, clipped = family.gradients("one"), family.gradients("clipped")
    norm = sum(float((g**2).sum()) for g in whole.values()) ** 0.5
    assert norm > 0.1
    assert_close(clipped, {name: g * (0.01 / norm) for name, g in whole.items()}, atol=1e-6)
    assert family.results["clipped"]["metrics"]["learner/grad_norm"] == pytest.approx(norm, rel=1e-3)


@dense_only
def test_two_epochs_are_two_updates_with_the_same_batch(family: Family) -> None:
    assert_close(family.results["epochs"]["weights"], family.results["updates"]["weights"], atol=1e-6)


@dense_only
def test_the_reference_may_be_another_checkpoint(family: Family) -> None:
    model = family.model(family.out_dir.parent / OTHER_REFERENCE / "model")
    for sample, found in zip(samples(), family.results["other_reference"], strict=False):
        with torch.no_grad():
            np.testing.assert_allclose(found, reference_distribution(model, sample)[0].numpy(), rtol=0, atol=1e-5)


@dense_only
def test_metrics_are_those_of_the_batch(family: Family) -> None:
    metrics = family.results["one"]["metrics"]
    batch, model = samples(), family.model()
    with torch.no_grad():
        pairs = [reference_distribution(model, s) for s in batch]
    mask = np.concatenate([s.loss_mask for s in batch])
    old, rollout, ref = (
        np.concatenate([getattr(s, name) for s in batch])[mask]
        for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")
    )
    logprobs = torch.cat([p[0] for p in pairs]).numpy()[mask]
    advantages = np.concatenate([s.advantages for s in batch])[mask]
    bound = ALGORITHM.loss_options["clip_low"]
    ratio = np.exp(logprobs - old)
    high, low = (advantages > 0) & (ratio > 1 + bound), (advantages < 0) & (ratio < 1 - bound)
    assert high.any() and low.any()
    expected = {
        "learner/clip_frac": (high | low).mean(),
        "learner/clip_high_frac": high.mean(),
        "rollout/logprob_diff_mean": np.abs(old - rollout).mean(),
        "rollout/logprob_diff_max": np.abs(old - rollout).max(),
        "learner/entropy": torch.cat([p[1] for p in pairs]).numpy()[mask].mean(),
        "learner/ratio_mean": np.exp(logprobs - old).mean(),
        "learner/kl_ref": (np.exp(ref - logprobs) - 1 - (ref - logprobs)).mean(),
        "learner/lr": 1.0,
        "learner/skipped_steps": 0.0,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4), name
    norm = torch.sqrt(sum((g**2).sum() for g in family.gradients("one").values()))  # type: ignore[arg-type]
    assert metrics["learner/grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert metrics["learner/tokens_per_s"] > 0
    assert metrics["learner/memory_peak_gib"] > 0.05


def test_annotations_come_back_in_order_and_the_reference_starts_equal_to_the_policy(family: Family) -> None:
    found = family.results["annotate"]
    model = family.model()
    for index, sample in enumerate(samples()):
        with torch.no_grad():
            expected = reference_distribution(model, sample)[0].numpy()
        np.testing.assert_allclose(found["old"][index], expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(found["ref"][index], found["old"][index])


def test_the_probe_scores_at_temperature_one(family: Family) -> None:
    model = family.model()
    sample = samples()[0]
    tokens = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long()
    with torch.no_grad():
        logprobs = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(-1, tokens[1:, None])[len(sample.prompt_ids) - 1 :, 0].numpy()
    np.testing.assert_allclose(family.results["annotate"]["probe"][0], expected, rtol=0, atol=1e-5)


def test_the_same_run_writes_the_same_weights_bit_for_bit(family: Family) -> None:
    assert_equal(family.results["run"]["weights"], family.results["again"]["weights"])
    assert not all(
        torch.equal(a, b)
        for a, b in zip(
            family.results["run"]["weights"].values(), family.results["saved"]["weights"].values(), strict=True
        )
    )


def test_a_resumed_run_writes_the_same_weights_bit_for_bit(family: Family) -> None:
    assert_equal(family.results["loaded"]["weights"], family.results["saved"]["weights"])
    assert family.results["loaded"]["version"] == family.results["saved"]["version"] == 1
    assert_equal(family.results["resumed"]["weights"], family.results["run"]["weights"])
    assert family.results["resumed"]["metrics"]["learner/lr"] == family.results["run"]["metrics"]["learner/lr"]


def test_a_checkpoint_resumes_on_other_sub_groups_bit_for_bit(family: Family) -> None:
    found = family.results["other sub-groups"]
    assert_equal(found["loaded"], family.results["saved"]["weights"])
    assert_equal(found["resumed"], family.results["run"]["weights"])
    if family.name != "qwen3":  # whose routers are not trained
        assert_equal(family.results["frozen in other sub-groups"], family.results["frozen saved"])


@pytest.mark.parametrize("count", [3, 1])
def test_a_checkpoint_resumes_on_another_number_of_ranks(family: Family, count: int) -> None:
    """Two wrote what three have read, who wrote what one has read; only the order of sums differs."""
    results = torch.load(family.out_dir / f"rank0_of_{count}.pt", weights_only=False)
    found = results["checkpoint"]
    assert_equal(found["loaded"], family.results["saved"]["weights"])
    assert_close(found["resumed"], family.results["run"]["weights"], atol=1e-5)
    assert found["metrics"]["learner/lr"] == family.results["run"]["metrics"]["learner/lr"]
    if family.name == "qwen3":  # bfloat16, with the optimizer in host memory
        assert_equal(results["half_checkpoint"]["loaded"], family.results["sft"]["weights"])
    else:
        assert_equal(results["frozen_checkpoint"]["loaded"], family.results["frozen saved"])


def test_the_learning_rate_follows_its_schedule(family: Family) -> None:
    """The mean over the last two of four steps, in a schedule of six steps whose first warms up."""
    decay = [0.5 * (1 + math.cos(math.pi * progress)) for progress in (1 / 5, 2 / 5)]
    assert family.results["run"]["metrics"]["learner/lr"] == pytest.approx(ADAM.lr * sum(decay) / 2)


def test_a_resumed_run_has_the_learning_rate_that_its_configuration_says(family: Family) -> None:
    rate = family.results["resumed"]["metrics"]["learner/lr"]
    assert family.results["slower"]["learner/lr"] == pytest.approx(rate / 4)


def test_a_damaged_checkpoint_is_named_with_the_remedy(family: Family) -> None:
    assert f"the learner checkpoint {family.out_dir / 'damaged'} cannot be read" in family.results["damaged"]
    assert "to resume from the one before it" in family.results["damaged"]


def test_the_export_and_the_offline_export_load_with_from_pretrained(family: Family) -> None:
    offline = family.out_dir / "offline"
    export_checkpoint(family.out_dir / "checkpoint", ModelConfig(path=str(family.checkpoint), dtype="float32"), offline)
    for path in (family.out_dir / "export", offline):
        assert stored(path) == stored(family.checkpoint), "vLLM loads what it loaded before"
        assert_equal(checkpoint_weights(family.model(path)), family.results["saved"]["weights"])
        for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
            assert (path / name).is_file(), name
        settings = [json.loads((folder / "config.json").read_text()) for folder in (path, family.checkpoint)]
        assert settings[0].get("use_cache") == settings[1].get("use_cache")
        assert (path / "generation_config.json").read_text() == (
            family.checkpoint / "generation_config.json"
        ).read_text()


@dense_only
def test_a_step_that_is_not_finite_is_left_out_and_counted_on_every_rank(family: Family) -> None:
    found = family.results["non_finite"]
    assert "learner/loss" not in found["empty"], "a batch that is all masked has nothing to learn, and does no harm"
    assert found["empty"]["learner/skipped_steps"] == 0
    assert_equal(found["before"], found["after"])
    assert found["skipped"]["learner/skipped_steps"] == 1
    assert "learner/loss" not in found["skipped"]  # a loss that is not a number would spoil every mean
    assert found["recovered"]["learner/skipped_steps"] == 0
    assert np.isfinite(found["recovered"]["learner/loss"])
    for results in (family.results, family.rank1):
        assert "2 optimizer steps in a row" in results["non_finite"]["error"]


@dense_only
def test_supervised_steps_learn_in_bfloat16_with_offloaded_master_weights(family: Family) -> None:
    losses = family.results["sft"]["losses"]
    assert family.results["sft"]["dtype"] == "torch.bfloat16"
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


def dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, out, in/32, 16] bytes of two FP4 (e2m1) numbers, low half first, and exponents biased by 127 -> [E, in, out]
    (OCP Microscaling Formats 1.0)."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([magnitudes, -magnitudes])
    pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1).flatten(-2)
    return (pairs * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)


@pytest.mark.parametrize("family", ["qwen3_moe"], indirect=True)
def test_buffers_and_generation_settings_are_exported_and_dropout_is_off(family: Family) -> None:
    metrics = family.results["unusual"]
    assert metrics["learner/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["learner/clip_frac"] == 0.0
    source = load_file(family.out_dir / "unusual" / "model.safetensors")
    offline = family.out_dir / "unusual_offline"
    model = ModelConfig(path=str(family.out_dir / "unusual"), dtype="float32")
    export_checkpoint(family.out_dir / "unusual_checkpoint", model, offline)
    for path in (family.out_dir / "unusual_export", offline):
        exported = load_file(path / "model.safetensors")
        assert exported.keys() == source.keys()
        assert all(torch.equal(exported[name], source[name]) for name in source)
        assert any(name.endswith("e_score_correction_bias") for name in exported)
        assert json.loads((path / "generation_config.json").read_text())["temperature"] == 0.6
        assert json.loads((path / "config.json").read_text())["attention_dropout"] == 0.5


@pytest.mark.parametrize("family", ["gpt_oss"], indirect=True)
def test_mxfp4_checkpoints_are_dequantised_and_exported_whole(family: Family) -> None:
    quantized = load_file(family.out_dir / "mxfp4" / "model.safetensors")
    offline = family.out_dir / "mxfp4_offline"
    source = ModelConfig(path=str(family.out_dir / "mxfp4"), dtype="float32")
    export_checkpoint(family.out_dir / "mxfp4_checkpoint", source, offline)
    for path in (family.out_dir / "mxfp4_export", offline):
        assert "quantization_config" not in json.loads((path / "config.json").read_text())
        weights = checkpoint_weights(family.model(path))
        for name in [n for n in quantized if n.endswith("_blocks")]:
            base = name.removesuffix("_blocks")
            assert torch.equal(weights[base], dequantized(quantized[name], quantized[base + "_scales"])), base
        assert torch.equal(weights["lm_head.weight"], quantized["lm_head.weight"].float())


@moe_only
def test_gradients_with_replayed_experts_equal_single_process_torch(family: Family) -> None:
    model = family.model()
    batch = samples(layers=2)
    loss = reference_loss(model, batch, Routers(model, "cpu"))
    expected = reference_gradients(model, loss)
    assert_close(family.gradients("replay"), expected)
    assert loss.item() != pytest.approx(family.results["one"]["metrics"]["learner/loss"], abs=1e-3)


@moe_only
def test_frozen_routers_stay_and_everything_else_moves(family: Family) -> None:
    for name, gradient in family.gradients("frozen").items():
        router = "mlp.gate." in name or "mlp.router." in name
        assert bool((gradient == 0).all()) == router, name


@moe_only
def test_the_auxiliary_loss_moves_the_routers(family: Family) -> None:
    metrics = family.results["balanced"]["metrics"]
    assert metrics["learner/router_aux_loss"] >= 1.9  # E * sum f P is about K = 2 when balanced
    with_aux, without = family.gradients("balanced"), family.gradients("one")
    router = next(n for n in with_aux if "mlp.gate.weight" in n or "mlp.router.weight" in n)
    assert float((with_aux[router] - without[router]).abs().max()) > 1e-3


def test_router_load_and_entropy_are_measured(family: Family) -> None:
    metrics = family.results["one"]["metrics"]
    if family.name == "qwen3":
        assert "learner/router_entropy" not in metrics
        return
    assert 1.0 <= metrics["learner/router_load_max_over_mean"] <= 4.0
    assert 0.0 < metrics["learner/router_entropy"] <= np.log(4)

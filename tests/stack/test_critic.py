"""The critic on two real ZeRO-3 ranks equals a plain single-process torch model; beside a policy it warms up first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from critic_ranks import CLIP, FAMILIES, SPLITS, value_samples
from learner_ranks import samples
from ranks import run_ranks
from torch import Tensor
from transformers import AutoConfig, AutoModelForTokenClassification
from transformers.core_model_loading import revert_weight_conversion

from launch.tiny_models import build_tiny_model
from rl.batch import TrainSample

pytestmark = pytest.mark.stack


def build_value_model(policy: Path, target: Path) -> None:
    config = AutoConfig.from_pretrained(policy)
    config.num_labels, config.classifier_dropout = 1, 0.0
    model = AutoModelForTokenClassification.from_pretrained(policy, config=config)
    torch.manual_seed(2)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    torch.nn.init.constant_(model.score.bias, 0.1)
    model.save_pretrained(target)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which two ranks ran every scenario."""
    out_dir = tmp_path_factory.mktemp("critic")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for family in FAMILIES:
        build_tiny_model(family, out_dir / family / "model")
        build_value_model(out_dir / family / "model", out_dir / family / "value_model")
    run_ranks("critic_ranks.py", out_dir)
    yield out_dir
    torch.set_num_threads(threads)


def results(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(directory / "rank0.pt", weights_only=False)
    return loaded


@pytest.fixture(scope="module")
def found(ranks: Path) -> dict[str, Any]:
    return results(ranks / "qwen3")


def plain_model(path: Path) -> Any:
    return AutoModelForTokenClassification.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def plain_values(model: Any, sample: TrainSample) -> Tensor:
    """[R] the value of each token, from the position before it; the sequence is read alone and whole."""
    tokens = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long()
    values: Tensor = model(input_ids=tokens[None]).logits[0, len(sample.prompt_ids) - 1 : -1, 0]
    return values


def plain_loss(model: Any) -> Tensor:
    """1/2 max of the two squared errors, token mean over the batch (PPO reference code)."""
    total = torch.zeros(())
    for sample in value_samples():
        values = plain_values(model, sample)
        old, returns = torch.from_numpy(sample.values), torch.from_numpy(sample.returns)
        clipped = old + (values - old).clamp(-CLIP, CLIP)
        per_token = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
        total = total + per_token[torch.from_numpy(sample.loss_mask)].sum()
    return total / sum(s.num_loss_tokens for s in value_samples())


def in_checkpoint_names(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return converted


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_single_process_torch_under_every_split(family: str, ranks: Path) -> None:
    model = plain_model(ranks / family / "value_model")
    before = in_checkpoint_names(model, {n: p.detach().clone() for n, p in model.named_parameters()})
    loss = plain_loss(model)
    loss.backward()
    expected = in_checkpoint_names(model, {n: p.grad for n, p in model.named_parameters()})
    assert float(expected["score.weight"].abs().max()) > 0.05  # so that 1e-5 means something
    assert float(expected["model.embed_tokens.weight"].abs().max()) > 0.005
    norm = float(torch.sqrt(sum((g**2).sum() for g in expected.values())))  # type: ignore[arg-type]
    found_steps = results(ranks / family)
    for split in FAMILIES[family]:
        step = found_steps[split]
        assert step["weights"].keys() == expected.keys()
        for name, gradient in expected.items():
            found = before[name] - step["weights"][name]
            assert float((found - gradient).abs().max()) < 1e-5, (split, name)
        assert step["metrics"]["critic/loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert step["metrics"]["critic/grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_metrics_are_those_of_the_batch_under_every_split(found: dict[str, Any], ranks: Path) -> None:
    batch, model = value_samples(), plain_model(ranks / "qwen3" / "value_model")
    mask = np.concatenate([s.loss_mask for s in batch])
    old, returns = (np.concatenate([getattr(s, name) for s in batch])[mask] for name in ("values", "returns"))
    with torch.no_grad():
        values = torch.cat([plain_values(model, s) for s in batch]).numpy()[mask]
    clipped = old + np.clip(values - old, -CLIP, CLIP)
    expected = {
        "critic/value_mean": values.mean(),
        "critic/return_mean": returns.mean(),
        "critic/value_error": ((values - returns) ** 2).mean(),
        "critic/clip_frac": ((clipped - returns) ** 2 > (values - returns) ** 2).mean(),
        "critic/explained_variance": 1 - (returns - old).var() / returns.var(),
        "critic/lr": 1.0,
        "critic/skipped_steps": 0.0,
    }
    assert 0.1 < expected["critic/clip_frac"] < 0.9
    for split in SPLITS:
        metrics = found[split]["metrics"]
        assert metrics.keys() == expected.keys() | {"critic/loss", "critic/grad_norm"}
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), (split, name)


def test_values_come_back_in_order_from_the_position_before_each_token(found: dict[str, Any], ranks: Path) -> None:
    model = plain_model(ranks / "qwen3" / "value_model")
    for index, sample in enumerate(value_samples()):
        with torch.no_grad():
            expected = plain_values(model, sample).numpy()
        if index == 1:  # this sample has no response
            expected = expected[:0]
        np.testing.assert_allclose(found["values"][index], expected, rtol=0, atol=1e-5)
    assert "samples have no values and returns" in found["no_values"]


def test_a_fresh_critic_says_zero_and_learns_in_bfloat16(found: dict[str, Any]) -> None:
    regression = found["regression"]
    assert all((values == 0).all() for values in regression["fresh"])
    assert regression["losses"][-1] < 0.7 * regression["losses"][0]
    assert regression["dtype"] == np.float32


def test_the_warm_up_trains_the_critic_alone_and_the_version_counts_on(found: dict[str, Any]) -> None:
    start, warmup, straight = found["start"], found["warmup"], found["straight"]
    assert different(start["policy"], warmup["policy"]) == []
    assert different(start["critic"], warmup["critic"])
    assert (warmup["version"], straight["version"]) == (1, 2)
    assert not any(name.startswith("learner/") for name in warmup["metrics"])
    assert different(warmup["policy"], straight["policy"])
    assert {"learner/loss", "critic/loss"} <= straight["metrics"].keys()
    # The policy's schedule starts after the critic's warm-up: the first of its two rates is half of the full rate.
    assert straight["metrics"]["learner/lr"] == pytest.approx(warmup["metrics"]["critic/lr"])


def test_a_resumed_critic_and_policy_arrive_at_the_same_weights_bit_for_bit(found: dict[str, Any]) -> None:
    for name in ("policy", "critic"):
        assert different(found["straight"][name], found["resumed"][name]) == []
    assert found["straight"]["version"] == found["resumed"]["version"]
    annotations = found["annotations"]
    lengths = [len(s.response_ids) for s in samples()]
    assert [len(v) for v in annotations.values] == lengths
    assert [len(v) for v in annotations.old_logprobs] == lengths


def test_an_exported_critic_is_a_checkpoint_for_the_next(found: dict[str, Any], ranks: Path) -> None:
    directory = ranks / "qwen3" / "export"
    assert different(found["exported"], found["warmup"]["critic"]) == []
    plain = plain_model(directory)
    assert different({n: p.detach() for n, p in plain.named_parameters()}, found["warmup"]["critic"]) == []
    assert (directory / "tokenizer.json").is_file()

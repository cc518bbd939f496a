"""verl's own workers, on two real ZeRO-3 ranks, compute what our learner computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import samples
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.tiny_models import build_tiny_model

pytestmark = pytest.mark.stack
TOLERANCE = 1e-6
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks ran every scenario."""
    directory = tmp_path_factory.mktemp("verl")
    build_tiny_model("qwen3", directory / "model")
    run_ranks("verl_ranks.py", directory)
    return directory


@pytest.fixture(scope="module")
def ranks(out_dir: Path) -> list[dict[str, Any]]:
    return [torch.load(out_dir / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    assert worst <= tolerance


def test_infer_batch_gives_the_learners_log_probs(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for found in (rank["actor"]["old"], rank["reference"]):
            for values, expected in zip(found, rank["learner"]["old"], strict=True):
                np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE)


def test_infer_batch_gives_the_entropies_of_the_plain_model(ranks: list[dict[str, Any]], out_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out_dir / "model", dtype=torch.float32, attn_implementation="eager")
    for number, rank in enumerate(ranks):
        for values, sample in zip(rank["actor"]["entropy"], samples(8)[number::2], strict=True):
            tokens = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long()
            with torch.no_grad():
                logits = model(input_ids=tokens[None]).logits[0, len(sample.prompt_ids) - 1 : -1]
            logprobs = torch.log_softmax(logits / 0.8, dim=-1)
            np.testing.assert_allclose(values, -(logprobs.exp() * logprobs).sum(-1), rtol=0, atol=4 * TOLERANCE)


def test_train_mini_batch_with_ppo_loss_makes_the_learners_weights(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        ours, theirs = rank["learner"], rank["actor"]
        assert float((theirs["weights"][EMBEDDING] - rank["start"][EMBEDDING]).abs().max()) > 1e-4  # it did move
        assert_close(theirs["weights"], ours["weights"], 3 * TOLERANCE)  # 3 % of a step of Adam's
        for found, expected in zip(theirs["metrics"], ours["metrics"], strict=True):
            assert np.mean(found["grad_norm"]) == pytest.approx(expected["learner/grad_norm"], rel=1e-5)
            assert np.mean(found["loss"]) == pytest.approx(expected["learner/loss"], abs=1e-5)
            assert found["lr"] == [1e-4]  # stepped once, after the last mini-batch


def test_train_batch_with_sft_loss_makes_the_learners_weights(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        ours, theirs = rank["learner_sft"], rank["sft"]
        assert theirs["losses"] == pytest.approx(ours["losses"], abs=1e-5)
        assert theirs["before"] == pytest.approx(ours["losses"][0], abs=1e-5)  # the loss of infer_batch
        # verl does not say where a prompt ends, so its rows are laid out in another way, and Adam makes steps of the
        # size of the learning rate out of gradients that are nothing but rounding.
        assert_close(theirs["weights"], ours["weights"], 5 * TOLERANCE)


def test_weights_are_exported_in_checkpoint_names_on_every_rank(ranks: list[dict[str, Any]], out_dir: Path) -> None:
    checkpoint = load_file(out_dir / "model" / "model.safetensors")
    for rank in ranks:
        assert rank["start"].keys() == checkpoint.keys()
        assert all(torch.equal(rank["start"][name], checkpoint[name]) for name in checkpoint)


def test_a_step_that_is_not_finite_is_left_out(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        actor = rank["actor"]
        assert actor["skipped"]["grad_norm"] == [np.inf, np.inf]
        assert all(torch.equal(actor["after_skipped"][name], tensor) for name, tensor in actor["weights"].items())


def test_a_checkpoint_resumes_bit_for_bit_and_holds_a_hugging_face_model(
    ranks: list[dict[str, Any]], out_dir: Path
) -> None:
    for rank in ranks:
        actor = rank["actor"]
        assert all(torch.equal(actor["resumed"][name], tensor) for name, tensor in actor["weights"].items())
    exported = out_dir / "checkpoint" / "huggingface"
    assert load_file(exported / "model.safetensors").keys() == ranks[0]["start"].keys()
    assert AutoTokenizer.from_pretrained(exported).vocab_size > 0


def test_what_is_not_supported_says_so(ranks: list[dict[str, Any]]) -> None:
    expected = {
        "temperature": "needs one temperature per batch",
        "batch": "does not support calculate_sum_pi_squared in a batch",
        "shard": "exports whole parameters, not shards",
        "hdfs": "does not copy checkpoints to or from HDFS",
    }
    for rank in ranks:
        assert rank["errors"].keys() == expected.keys()
        for name, message in expected.items():
            assert rank["errors"][name].startswith("LearnerError: ") and message in rank["errors"][name]

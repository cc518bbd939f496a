"""The learner alone on one GPU: equal to the CPU, and how fast, beside a plain transformers loop in the same run.

    python benchmarks/gpu/learner.py exact
    python benchmarks/gpu/learner.py speed [--shape 0.6b] [--microbatch 8192] [--checkpointing]

`exact` runs one update of a tiny model of each family on both devices, in float32 and bfloat16, and compares
log-probabilities and gradients. `speed` trains a random model of a Qwen3 shape: tokens a second, model FLOP/s and peak
memory. Needs neither Ray nor vLLM. Left out: several GPUs, generation, and weight sync beyond its digests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from launch.tiny_models import FAMILIES, build_tiny_model
from rl.batch import TrainBatch, TrainSample
from rl.batching import plan_update
from rl.config import AlgorithmConfig, LearnerConfig, ModelConfig, OptimizerConfig
from rl.learner import Learner
from rl.weight_sync.digest import digest
from rl.weight_sync.source import Zero3WeightSource

# hidden, intermediate, layers, heads, tied embeddings: the released models' own configurations
SHAPES = {
    "0.6b": (1024, 3072, 28, 16, True),
    "1.7b": (2048, 6144, 28, 16, True),
}
VOCABULARY = 151936
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bfloat16, NVIDIA's data sheets
STEPS = 3  # timed, after one that is not


def samples(count: int, prompt: int, response: int, vocabulary: int) -> list[TrainSample]:
    """Random samples of `prompt` + `response` tokens, with random advantages and a made-up sampler."""
    generator = np.random.default_rng(0)
    result = []
    for _ in range(count):
        result.append(
            TrainSample(
                prompt_ids=generator.integers(0, vocabulary, prompt).astype(np.int32),
                response_ids=generator.integers(0, vocabulary, response).astype(np.int32),
                loss_mask=np.ones(response, dtype=bool),
                advantages=generator.standard_normal(response).astype(np.float32),
                rollout_logprobs=np.full(response, -np.log(vocabulary), dtype=np.float32),
            )
        )
    return result


def start_learner(path: Path, dtype: str, device: str, config: LearnerConfig) -> Learner:
    """A learner of one rank."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29617")
    return Learner(
        config,
        ModelConfig(path=str(path), dtype=dtype),  # type: ignore[arg-type]
        AlgorithmConfig(),
        seed=0,
        deterministic=False,
        device=device,
        total_optimizer_steps=100,
        fixed_length=4096,
    )


def update(learner: Learner, batch: list[TrainSample]) -> Any:
    return learner.update(plan_update(TrainBatch.from_samples(tuple(batch)), num_ranks=1)[0])


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    dtype = next(learner.module.parameters()).dtype
    source = Zero3WeightSource(learner.module, dtype=dtype, bucket_bytes=1 << 20, rank=0)
    return {name: tensor.detach().float().cpu().clone() for name, tensor in source}


def one_update(folder: Path, device: str, dtype: str) -> None:
    """For each family: log-probabilities, and the gradient as the step of plain SGD, written to a file."""
    results = {}
    for family in FAMILIES:
        config = LearnerConfig(
            optimizer=OptimizerConfig(name="sgd", lr=1.0, max_grad_norm=1e9), max_tokens_per_microbatch=64
        )
        learner = start_learner(folder / family, dtype, device, config)
        batch = samples(6, 7, 25, 250)
        logprobs = learner.score_logprobs([(s.prompt_ids.tolist(), s.response_ids.tolist()) for s in batch])
        before = weights(learner)
        update(learner, batch)
        gradient = {name: before[name] - tensor for name, tensor in weights(learner).items()}
        results[family] = (np.concatenate(logprobs), gradient)
        learner.close()
    torch.save(results, folder / f"{device}-{dtype}.pt")


def exact() -> None:
    for tensor in (torch.randn(1000, 1025), torch.randn(7).to(torch.bfloat16), torch.arange(13, dtype=torch.int8)):
        assert digest(tensor.cuda()) == digest(tensor)
    print("digests: the same on both devices")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family in FAMILIES:
            build_tiny_model(family, folder / family)
        runs = [("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")]
        for device, dtype in runs:
            subprocess.run([sys.executable, __file__, "one-update", name, device, dtype], check=True)
        truth, *others = [torch.load(folder / f"{d}-{t}.pt", weights_only=False) for d, t in runs]
        print(f"{'against the CPU in float32':28s}{'logprob max':>14s}{'logprob mean':>14s}{'gradient, relative':>20s}")
        for (device, dtype), other in zip(runs[1:], others, strict=True):
            for family in FAMILIES:
                (logprobs, gradient), (logprobs_2, gradient_2) = truth[family], other[family]
                apart = np.abs(logprobs - logprobs_2)
                squares = sum(float((gradient[n] - gradient_2[n]).square().sum()) for n in gradient)
                whole = sum(float(g.square().sum()) for g in gradient.values())
                title = f"{device} {dtype} {family}"
                print(f"{title:28s}{apart.max():14.2e}{apart.mean():14.2e}{(squares / whole) ** 0.5:20.2e}")


def build_shape(shape: str, folder: Path) -> int:
    """A random checkpoint of a Qwen3 shape; returns its number of parameters."""
    hidden, intermediate, layers, heads, tied = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def report(title: str, seconds: float, options: argparse.Namespace, parameters: int) -> None:
    """Model FLOPs per token: 6 per parameter, and causal attention's 6 x layers x heads x 128 x tokens (PaLM, B)."""
    _, _, layers, heads, _ = SHAPES[options.shape]
    tokens = options.sequences * options.tokens
    flops = (6 * parameters + 6 * layers * heads * 128 * options.tokens) * tokens / seconds
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), float("nan"))
    print(
        f"{title:34s}{tokens / seconds:10,.0f} tok/s{flops / 1e12:8.0f} TFLOP/s{flops / peak:7.1%} of peak"
        f"{torch.cuda.max_memory_allocated() / 2**30:8.1f} GiB peak",
        flush=True,
    )


def timed(step: Any) -> float:
    """Seconds a step."""
    step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / STEPS


def fledge_speed(options: argparse.Namespace, folder: Path, parameters: int) -> None:
    config = LearnerConfig(
        optimizer=OptimizerConfig(lr=1e-6),
        max_tokens_per_microbatch=options.microbatch,
        activation_checkpointing=options.checkpointing,
    )
    learner = start_learner(folder, "bfloat16", "cuda", config)
    batch = samples(options.sequences, options.tokens // 8, options.tokens - options.tokens // 8, VOCABULARY)
    torch.cuda.reset_peak_memory_stats()
    report("fledge, float32 master weights", timed(lambda: update(learner, batch)), options, parameters)
    learner.close()


def plain_speed(options: argparse.Namespace, folder: Path, parameters: int) -> None:
    """The textbook loop: whole logits, loss.backward(), torch's fused AdamW over bfloat16 weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").cuda()
    model.config.use_cache = False
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    rows = torch.randint(0, VOCABULARY, (options.sequences, options.tokens), device="cuda")
    size = max(options.microbatch // options.tokens, 1)
    start = options.tokens // 8

    def step() -> None:
        for micro in rows.split(size):
            logits = model(input_ids=micro).logits[:, start - 1 : -1].float()
            logprobs = torch.log_softmax(logits, -1).gather(-1, micro[:, start:, None])
            (-logprobs.sum() / rows[:, start:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    report("plain loop, bfloat16 weights", timed(step), options, parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("exact")
    inner = commands.add_parser("one-update", help="what `exact` runs once a device")
    inner.add_argument("folder", type=Path)
    inner.add_argument("device")
    inner.add_argument("dtype")
    speed = commands.add_parser("speed")
    speed.add_argument("--shape", choices=SHAPES, default="0.6b")
    speed.add_argument("--tokens", type=int, default=2048, help="of each sequence")
    speed.add_argument("--sequences", type=int, default=16, help="of a step")
    speed.add_argument("--microbatch", type=int, default=8192, help="tokens")
    speed.add_argument("--checkpointing", action="store_true")
    speed.add_argument("--side", choices=["fledge", "plain"], help="one of them, in a folder that is there")
    speed.add_argument("--folder", type=Path, default=None)
    speed.add_argument("--parameters", type=int, default=0)
    options = parser.parse_args()
    if options.command == "exact":
        exact()
    elif options.command == "one-update":
        one_update(options.folder, options.device, options.dtype)
    elif options.side:
        side = fledge_speed if options.side == "fledge" else plain_speed
        side(options, options.folder, options.parameters)
    else:
        both_sides(options)


def both_sides(options: argparse.Namespace) -> None:
    """Each side in a process of its own, so that neither holds the other's memory."""
    with tempfile.TemporaryDirectory() as name:
        parameters = build_shape(options.shape, Path(name))
        torch.cuda.empty_cache()
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}: "
            f"Qwen3-{options.shape} ({parameters:,} parameters), "
            f"{options.sequences} x {options.tokens} tokens a step, {options.microbatch} a micro-batch, "
            f"checkpointing {options.checkpointing}",
            flush=True,
        )
        for side in ("plain", "fledge"):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run([*command, "--folder", name, "--parameters", str(parameters)], check=False)
            if done.returncode:
                print(f"{side}: ended with {done.returncode} (out of memory, if it says so above)", flush=True)


if __name__ == "__main__":
    main()

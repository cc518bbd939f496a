"""The whole loop on one GPU that learner and engine share: seconds of each part of a GRPO step, at a Qwen3 shape.

    python benchmarks/gpu/loop.py [--shape 0.6b] [--prompts 32] [--group 8] [--response 1024] [--steps 3]

Random weights, so every response runs to the token limit; weights travel over CUDA IPC. The first step warms up and is
not counted. Left out: several GPUs, and any other system.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from learner import SHAPES, build_shape

from launch.compose import training_run
from launch.data import checked_training
from launch.tiny_models import build_tokenizer
from rl.config import TrainConfig

METRICS = (
    "learner/tokens_per_s",
    "learner/memory_peak_gib",
    "rollout/logprob_diff_mean",
    "rollout/logprob_diff_max",
)


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of lower-case letters, which differs between samples."""
    return [sum(ch.islower() for ch in text) / max(len(text), 1) for text in completions]


class Printed:
    def message(self, text: str) -> None:
        print(text, flush=True)

    def now(self, text: str) -> None: ...
    def step(self, step: int, metrics: Any) -> None: ...


def configuration(options: argparse.Namespace, folder: Path) -> TrainConfig:
    rows = folder / "rows.jsonl"
    questions = (f"What is {i} plus {i * 7 % 31}? Think first, then answer." for i in range(options.prompts))
    rows.write_text("".join(json.dumps({"prompt": text, "ground_truth": ""}) + "\n" for text in questions))
    return TrainConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "total_steps": options.steps + 1,
            "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
            "data": {"train": {"path": str(rows)}, "max_prompt_tokens": 128},
            "rollout": {
                "prompts_per_step": options.prompts,
                "group_size": options.group,
                "max_response_tokens": options.response,
                "gpu_memory_utilization": 0.35,
                "max_concurrent_sequences": options.prompts * options.group,
                "enforce_eager": options.eager,
            },
            "reward": {"functions": [{"name": f"{Path(__file__).resolve()}:reward"}], "num_workers": 1},
            "learner": {
                "max_tokens_per_microbatch": options.microbatch,
                "activation_checkpointing": True,
                "optimizer": {"lr": 1e-6},
            },
            "sync": {"probe_every": 1},
            "ray": {"colocate": True},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--prompts", type=int, default=32, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="samples a prompt")
    parser.add_argument("--response", type=int, default=1024, help="tokens")
    parser.add_argument("--microbatch", type=int, default=32768, help="tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs in vLLM")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = build_shape(options.shape, folder / "model")
        build_tokenizer("qwen3").save_pretrained(folder / "model")
        torch.cuda.empty_cache()
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}: Qwen3-{options.shape} ({parameters:,} "
            f"parameters), {options.prompts} prompts x {options.group} samples of {options.response} tokens",
            flush=True,
        )
        config = configuration(options, folder)
        Path(config.run_dir).mkdir()
        with training_run(checked_training(config, Printed()), Printed()) as run:
            run.controller.sync_weights()
            results = [run.controller.step(step) for step in range(options.steps + 1)][1:]
    for stage in results[0].seconds:
        print(f"{stage:12s}{statistics.mean(r.seconds[stage] for r in results):8.2f} s")
    made = statistics.mean(r.scored.batch.num_tokens / r.scored.batch.seconds for r in results)
    gib = results[0].weights.num_bytes / 2**30
    rate = gib / statistics.mean(r.seconds["sync"] for r in results)
    print(f"rollout {made:,.0f} tokens/s; sync {gib:.2f} GiB, {rate:.2f} GiB/s")
    for key in METRICS:
        print(f"{key:28s}{statistics.mean(r.update.metrics[key] for r in results):12,.4f}")


if __name__ == "__main__":
    main()

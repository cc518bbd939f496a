"""Peak memory of one rank's updates: with torch's plain AdamW, with DeepSpeed's default, and as the learner has it.

    python benchmarks/update_memory.py [--layers 28] [--hidden 1024] [--vocabulary 151936]

DeepSpeed updates up to a billion elements at a time. The default is the shape of Qwen3-0.6B, in bfloat16. What counts
is the process's resident memory on a CPU, the allocator's on a GPU. Each side runs in a process of its own.
Sequences are short: activations hardly count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu.learner import samples, start_learner, update

import rl.zero3
from launch.tiny_models import build_tiny_model
from rl.config import LearnerConfig
from rl.memory import memory_peak_gib

SIDES = {  # fused AdamW, elements at a time
    "plain AdamW": (False, 1_000_000_000),
    "fused AdamW": (True, 1_000_000_000),
    "fledge": (True, rl.zero3.SUB_GROUP_ELEMENTS),
}
STEPS = 2


class PlainAdamW(torch.optim.AdamW):
    """The learner's optimizer as it would be without the fused kernel."""

    def __init__(self, *args: Any, fused: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def build(options: argparse.Namespace, folder: Path) -> float:
    """A random Qwen3 in bfloat16; returns its number of parameters in millions."""
    build_tiny_model(
        "qwen3",
        folder,
        dtype="bfloat16",
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        head_dim=128,
        vocab_size=options.vocabulary,
        tie_word_embeddings=True,
    )
    return (folder / "model.safetensors").stat().st_size / 2e6


def one_side(side: str, folder: Path) -> None:
    fused, rl.zero3.SUB_GROUP_ELEMENTS = SIDES[side]
    if not fused:
        torch.optim.AdamW = PlainAdamW  # type: ignore[misc]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LearnerConfig(max_tokens_per_microbatch=256, logprob_chunk_tokens=64)
    learner = start_learner(folder, "bfloat16", device, config)
    before, started = memory_peak_gib(), time.perf_counter()
    for _ in range(STEPS):
        update(learner, samples(4, 32, 32, 250))
    seconds = (time.perf_counter() - started) / STEPS
    print(f"{before:.2f} GiB at the start, {memory_peak_gib():.2f} GiB at the peak, {seconds:.1f} s an update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        one_side(options.side[0], Path(options.side[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = build(options, Path(folder))
        print(f"Qwen3 of {size:.0f} million parameters, {STEPS} updates on one rank", flush=True)
        for side, (_, elements) in SIDES.items():
            command = [sys.executable, __file__, "--side", side, folder]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            print(f"{side:<14}{elements / 1e6:5.0f} million elements at a time: {lines[-1]}", flush=True)


if __name__ == "__main__":
    main()

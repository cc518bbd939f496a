"""Seconds of one AdamW step on this machine's CPU: torch's plain and fused one, and DeepSpeed's, which it compiles.

    python benchmarks/adam.py [--elements 50000000]

All start from the same weights and get the same gradients. Left out: GPUs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

STEPS = 10  # timed, after one that is not
SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
SIDES: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "torch": lambda weights: torch.optim.AdamW(weights, **SETTINGS),
    "DeepSpeed's for CPUs": lambda weights: DeepSpeedCPUAdam(weights, adamw_mode=True, **SETTINGS),
    "torch, fused": lambda weights: torch.optim.AdamW(weights, fused=True, **SETTINGS),
}


def run(side: str, elements: int) -> tuple[float, torch.Tensor]:
    """(seconds a step, the weights after all of them)."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(elements, generator=generator))
    optimizer, seconds = SIDES[side]([weights]), 0.0
    for step in range(STEPS + 1):
        weights.grad = torch.randn(elements, generator=generator)
        started = time.perf_counter()
        optimizer.step()
        seconds += (time.perf_counter() - started) * (step > 0)
    return seconds / STEPS, weights.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--elements", type=int, default=50_000_000)
    options = parser.parse_args()
    results = {side: run(side, options.elements) for side in SIDES}
    plain, reference = results["torch"]
    for side, (seconds, weights) in results.items():
        apart = (weights - reference).abs().max().item()
        print(f"{side:<22}{seconds:7.3f} s  {plain / seconds:4.1f}x  weights apart by {apart:.1e} at most")


if __name__ == "__main__":
    main()

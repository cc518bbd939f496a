"""Forward and backward of float32 linear layers on a CPU: torch's own, and `rl.cpu_linear` through oneDNN.

    python benchmarks/cpu_linear.py [--threads 1] [--rows 1900]

For each shape the two sides take turns. On both, rows beyond the last whole block are left to torch.
ONEDNN_MAX_CPU_ISA=AVX2 shows oneDNN without AVX-512.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path[0] = str(Path(__file__).resolve().parents[1])  # rewards.py here would hide the package

SHAPES = ((256, 256), (256, 768), (768, 256), (1024, 3072), (3072, 1024))  # inputs, outputs
ROUNDS = 20


def seconds(layer: nn.Linear, inputs: Tensor, grad: Tensor) -> tuple[float, float]:
    """(forward, backward), for one pass each."""
    inputs.grad = layer.weight.grad = None
    start = time.perf_counter()
    output = layer(inputs)
    middle = time.perf_counter()
    output.backward(grad)
    return middle - start, time.perf_counter() - middle


def main() -> None:
    from rl.cpu_linear import onednn_is_faster, use_onednn

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1900)
    arguments = parser.parse_args()
    if not onednn_is_faster():
        sys.exit("on this machine torch's own product is kept (see rl/cpu_linear.py), so there is nothing to compare")
    torch.set_num_threads(arguments.threads)
    print(f"{torch.backends.cpu.get_cpu_capability()}, {arguments.threads} thread(s), {arguments.rows} rows; GFLOP/s")
    print(f"{'inputs x outputs':18s}{'torch, both passes':>22s}{'oneDNN, both passes':>22s}{'ratio':>8s}")
    for width, outputs in SHAPES:
        plain = nn.Linear(width, outputs, bias=False)
        replaced = copy.deepcopy(plain)
        use_onednn(replaced)
        inputs = torch.randn(arguments.rows, width, requires_grad=True)
        grad = torch.randn(arguments.rows, outputs)
        times: dict[nn.Linear, list[tuple[float, float]]] = {plain: [], replaced: []}
        for _ in range(ROUNDS):
            for layer, measured in times.items():
                measured.append(seconds(layer, inputs, grad))
        giga = 2e-9 * arguments.rows * width * outputs
        halves = {
            layer: [statistics.median(part) for part in zip(*measured, strict=True)]
            for layer, measured in times.items()
        }
        cells = [f"{giga / f:.0f}, {2 * giga / b:.0f}" for f, b in halves.values()]
        ratio = sum(halves[plain]) / sum(halves[replaced])
        print(f"{f'{width} x {outputs}':18s}{cells[0]:>22s}{cells[1]:>22s}{ratio:8.2f}")


if __name__ == "__main__":
    main()

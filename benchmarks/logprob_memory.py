"""Peak memory of log-probabilities and their gradients: in chunks against the naive form, in one run.

    python benchmarks/logprob_memory.py [--device cuda] [--hidden 1024] [--tokens 1024 4096] [--vocabulary 32768 65536]

Memory is what the forward and backward passes need at their peak beyond the inputs (hidden states, head) and their
gradients, which both forms need alike. Left out: the model before the head.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rl.logprobs import token_logprobs

Form = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """All [T, V] logits at once, in float32, as in a textbook."""
    logprobs = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def chunked(chunk_tokens: int) -> Form:
    def form(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(hidden, weight, None, targets, chunk_tokens=chunk_tokens, entropy_grad=True)

    return form


class Peak:
    """Peak memory in MiB since `start`: of the CUDA allocator, or of the process (Linux)."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def start(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that was freed is reused and does not show
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._before = self._status("VmRSS")

    def stop(self) -> float:
        peak = torch.cuda.max_memory_allocated() if self._cuda else self._status("VmHWM")
        return (peak - self._before) / 2**20

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field}")


def measure(form: Form, tokens: int, vocabulary: int, options: argparse.Namespace) -> tuple[float, float]:
    """(MiB beyond inputs and gradients, seconds) of one forward and backward pass."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def parameter(*shape: int) -> Tensor:
        values = 0.02 * torch.randn(*shape, generator=generator)
        return values.to(options.device, dtype).requires_grad_()

    hidden, weight = parameter(tokens, options.hidden), parameter(vocabulary, options.hidden)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator).to(options.device)
    for tensor in (hidden, weight):
        tensor.grad = torch.zeros_like(tensor) + 1  # touched, so that it counts as there before the start
    peak = Peak(options.device)
    peak.start()
    clock = time.perf_counter if options.device == "cuda" else time.process_time  # without other processes' work
    started = clock()
    logprobs, entropy = form(hidden, weight, targets)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()
    used = peak.stop()
    return used, clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[16384, 32768])
    options = parser.parse_args()
    print(f"{options.device}, {options.dtype}, hidden {options.hidden}, {options.chunk_tokens} tokens a chunk")
    print(f"{'tokens':>8} {'vocabulary':>11} {'naive MiB':>10} {'chunked MiB':>12} {'ratio':>7}", end="")
    print(f" {'naive s':>8} {'chunked s':>10}")
    for vocabulary in options.vocabulary:
        for tokens in options.tokens:
            plain_mib, plain_s = measure(naive, tokens, vocabulary, options)
            ours_mib, ours_s = measure(chunked(options.chunk_tokens), tokens, vocabulary, options)
            print(
                f"{tokens:>8} {vocabulary:>11} {plain_mib:>10.0f} {ours_mib:>12.0f} "
                f"{plain_mib / max(ours_mib, 1):>6.1f}x {plain_s:>8.2f} {ours_s:>10.2f}"
            )


if __name__ == "__main__":
    main()

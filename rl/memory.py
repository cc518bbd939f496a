"""How much memory a process has needed, learner or engine. Left out: where the figure goes."""

from __future__ import annotations

import resource

import torch


def memory_peak_gib() -> float:
    """Peak memory of this process: CUDA memory in use where there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB

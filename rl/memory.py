"""How much memory a learner or engine process has needed. Left out: recording the figure."""

from __future__ import annotations

import resource

import torch


def memory_peak_gib() -> float:
    """Peak memory of this process: allocated CUDA memory if there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB

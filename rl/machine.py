"""What of this machine a process may use. Left out: GPUs (`launch.cluster`) and memory (`launch.doctor`)."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")  # a container sees its own as the root


def usable_cores() -> int:
    """The cores in this process's affinity (as Slurm and `taskset` set it) and within its container's CPU quota, at
    least 1; `os.cpu_count` knows neither."""
    return max(1, int(min(len(os.sched_getaffinity(0)), _quota())))


def _quota() -> float:
    """CPU time per time that the container may use (cgroup v2, then v1); infinite without a quota."""
    with suppress(OSError, ValueError):  # ValueError: "max"
        quota, period = (_CGROUPS / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((_CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            return int(quota) / int(period)
    return math.inf

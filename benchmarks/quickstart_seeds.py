"""The quickstart under three seeds; fails unless reinforcement learning alone lifts held-out accuracy by 30 points.

python benchmarks/quickstart_seeds.py [SEED ...]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from launch.report import evaluation_table
from rl.metrics import read_metrics

LIFT = 0.30
RUN_DIR = Path("runs/quickstart/rl")


def main() -> None:
    seeds = [int(seed) for seed in sys.argv[1:]] or [0, 1, 2]
    failed = []
    for seed in seeds:
        started = time.monotonic()
        subprocess.run(["make", "quickstart", f"SEED={seed}"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        table = evaluation_table(read_metrics(RUN_DIR))
        before, after = next((first, last) for name, first, last in table if "/avg@" in name)
        print(f"seed {seed}: held-out accuracy {before:.3f} -> {after:.3f} ({after - before:+.3f}), {seconds:.0f} s")
        if after - before < LIFT:
            failed.append(seed)
    if failed:
        sys.exit(f"seeds {failed} lifted held-out accuracy by less than {LIFT:.0%}")


if __name__ == "__main__":
    main()

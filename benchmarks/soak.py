"""A long run of a tiny model under watch: no process of it may grow, in memory, files or threads.

    python benchmarks/soak.py [--steps 300] [--family qwen3] [KEY=VALUE ...]

Everything recurs many times: steps, syncs, probes, evaluations, checkpoints, samples on disk. Each process of the run
is measured every few seconds; the second quarter of the time is compared with the last, which leaves the warm-up out.
Fails if something grew by more than `LIMITS` allow, or if the run left behind a process, anything in shared memory, or
an engine's sockets in the temporary directory. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import yaml

PERIOD_S = 3.0
# Even a random model earns some of it, so that every step moves the weights.
DENSE_REWARD = f"{Path(__file__).resolve().with_name('step_time.py')}:reward"
PLACES = ((Path("/dev/shm"), "*"), (Path(tempfile.gettempdir()), "fledge-engine-*"))


class Usage(NamedTuple):
    """What one process uses at one time."""

    mib: float  # of memory that is its own (unique set size)
    files: float
    threads: float


# By how much the last quarter may exceed the second. Allocators keep what a longer batch once took.
LIMITS = Usage(mib=32, files=8, threads=4)


def write_config(folder: Path, family: Any, steps: int) -> Path:
    from launch.tiny_models import build_tiny_model

    config = {
        "run_dir": str(folder / "run"),
        "total_steps": steps,
        "model": {"path": str(build_tiny_model(family, folder / "model")), "dtype": "float32"},
        "data": {
            "train": {"path": "reasoning_gym:basic_arithmetic", "size": 500, "seed": 1},
            "eval": [{"path": "reasoning_gym:basic_arithmetic", "name": "held_out", "size": 16, "seed": 10000}],
            "max_prompt_tokens": 128,
        },
        "rollout": {
            "prompts_per_step": 8,
            "group_size": 4,
            "max_response_tokens": 32,
            "kv_cache_gib": 0.2,
            "enforce_eager": True,
        },
        "reward": {
            "functions": [{"name": "math"}, {"name": DENSE_REWARD}],
            "num_workers": 1,
        },
        "algorithm": {"kl": {"placement": "loss", "coefficient": 0.001}},
        "learner": {"num_workers": 2, "max_tokens_per_microbatch": 2048, "epochs": 2, "optimizer": {"lr": 1e-5}},
        "sync": {"probe_every": 5},
        "checkpoint": {"every": 20},
        "evaluation": {"every": 20, "samples_per_prompt": 2, "pass_at": [1, 2], "temperature": 1.0},
    }
    path = folder / "soak.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def role(process: psutil.Process) -> str:
    """A name that stays the same while the process runs: Ray's includes the method that an actor is in."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return words[0].split(".")[0]
    names = [Path(word).name for word in words[:3] if not word.startswith("-")]
    return " ".join(names)[:43]


def look(root: psutil.Process, history: dict[tuple[psutil.Process, str], list[tuple[float, Usage]]]) -> None:
    for process in [root, *root.children(recursive=True)]:
        try:
            usage = Usage(process.memory_full_info().uss / 2**20, process.num_fds(), process.num_threads())
            history[process, role(process)].append((time.monotonic(), usage))
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended; a zombie has no files to be counted
            continue


def left_in_places() -> set[Path]:
    return {path for place, pattern in PLACES for path in place.glob(pattern)}


def growth(points: list[tuple[float, Usage]], start: float, end: float) -> tuple[Usage, Usage] | None:
    """Medians of the second and the last quarter; None for a process that was not there in both."""
    quarter = (end - start) / 4
    second = [usage for when, usage in points if quarter <= when - start < 2 * quarter]
    last = [usage for when, usage in points if when - start >= 3 * quarter]
    if not second or not last:
        return None
    return Usage(*map(median, zip(*second, strict=True))), Usage(*map(median, zip(*last, strict=True)))


def soak(folder: Path, family: str, steps: int, overrides: list[str]) -> bool:
    """Whether nothing grew and nothing was left behind."""
    places_before = left_in_places()
    config = write_config(folder, family, steps)
    command = [sys.executable, "-m", "launch.cli", "train", str(config), *overrides]
    history: dict[tuple[psutil.Process, str], list[tuple[float, Usage]]] = defaultdict(list)
    metrics = folder / "run" / "metrics.jsonl"
    with (folder / "log").open("w") as log:
        run = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    start = 0.0
    try:
        while run.poll() is None:
            if not start and metrics.exists() and metrics.stat().st_size:
                start = time.monotonic()  # the first step is over
            if start:
                look(run, history)
            time.sleep(PERIOD_S)
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait()
    end = max((when for points in history.values() for when, _ in points), default=0.0)
    if run.returncode != 0:
        print((folder / "log").read_text()[-4000:])
        return False
    print(f"{steps} steps in {end - start:.0f} s; own memory, files and threads in the second and the last quarter")
    compared, well = 0, True
    for (process, name), points in sorted(history.items(), key=lambda item: (item[0][1], item[0][0].pid)):
        medians = growth(points, start, end)
        if medians is None:
            continue
        compared += 1
        second, last = medians
        grew = [b - a > limit for a, b, limit in zip(second, last, LIMITS, strict=True)]
        well = well and not any(grew)
        cells = "".join(f"{a:9.0f} ->{b:6.0f}" for a, b in zip(second, last, strict=True))
        print(f"{name:44s}{cells}{'   GREW' if any(grew) else ''}  ({process.pid})")
    _, alive = psutil.wait_procs([process for process, _ in history], timeout=10)
    left = [f"process {name} ({process.pid})" for process, name in history if process in alive]
    left += [str(path) for path in left_in_places() - places_before]
    for what in left:
        print(f"left behind: {what}")
    if not compared:
        print("the run was too short to compare anything; give it more --steps")
    return well and not left and compared > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--family", choices=("qwen3", "qwen3_moe", "gpt_oss"), default="qwen3")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if not soak(Path(name), arguments.family, arguments.steps, arguments.overrides):
            sys.exit(1)


if __name__ == "__main__":
    main()

"""Small Python programs per second, fully isolated, with every layer on; and what hostile neighbours cost them.

    python -m benchmarks.sandbox [--seconds 5] [--slots 2]

Left out: compiled programs (the compiler is their cost) and grading (microseconds a test).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rewards.sandbox.api import Limits, Program, RunStatus, StdinTask
from rewards.sandbox.local import LocalSandbox

PROGRAM = """
import sys
from collections import Counter
words = sys.stdin.read().split()
for word, count in sorted(Counter(words).items()):
    print(word, count)
"""
STDIN = "the quick brown fox jumps over the lazy dog " * 10


def _own_cpu_seconds() -> float:
    """CPU time of this process and of every process under it that has ended."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(work: Callable[[int], None], threads: int, seconds: float) -> tuple[int, float, float]:
    """Runs, elapsed seconds, and seconds a run at the 99th percentile."""
    stop = time.perf_counter() + seconds
    times: list[float] = []

    def loop(thread: int) -> None:
        number = thread
        while time.perf_counter() < stop:
            begun = time.perf_counter()
            work(number)
            times.append(time.perf_counter() - begun)
            number += threads

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(loop, range(threads)))
    return len(times), time.perf_counter() - started, sorted(times)[int(len(times) * 0.99)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--slots", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    print(f"{arguments.slots} slots, {os.cpu_count()} CPUs, load average before: {os.getloadavg()[0]:.2f}")
    print(f"{'':36s}{'programs/s':>11s}{'tests/s':>9s}{'p99 ms':>8s}{'CPU ms/program':>16s}{'CPUs busy/s':>13s}")
    for name, tests in (
        ("isolated box, one test a program", 1),
        ("isolated box, ten tests a program", 10),
        ("bare interpreter, no isolation", 0),
    ):
        _row(name, tests, arguments.slots, arguments.seconds)
    _neighbours(arguments.seconds)
    print("CPU ms/program is this benchmark's own; a busy machine raises it through shared caches, not through waiting")


def _neighbours(seconds: float) -> None:
    """One honest program after another in one slot, while the other slot runs the worst that it may."""
    floods = {
        "no neighbour": "",
        "a neighbour spinning in 16 processes": "import os\nfor _ in range(4): os.fork()\nwhile True: pass",
        "a neighbour that forks without end": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        "a neighbour that fills memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    }
    limits = Limits(cpu_s=2.0, wall_s=2.0)
    alone = 0.0
    for name, flood in floods.items():
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
            sandbox = LocalSandbox(slots=2, slots_folder=Path(folder))
            stop = threading.Event()

            def disturb(sandbox: LocalSandbox = sandbox, flood: str = flood, stop: threading.Event = stop) -> None:
                while flood and not stop.is_set():
                    list(sandbox.run(Program(flood), [StdinTask("")], limits))

            def honest(number: int, sandbox: LocalSandbox = sandbox) -> None:
                list(sandbox.run(Program(f"{PROGRAM}# {number}\n"), [StdinTask(STDIN)], Limits()))

            disturbed = pool.submit(disturb)
            count, elapsed, p99 = measure(honest, 1, seconds)
            stop.set()
            disturbed.result()
            sandbox.close()
        rate = count / elapsed
        alone = alone or rate
        print(f"{name:40s}{rate:7.0f} programs/s, {alone / rate:5.2f} times as long, p99 {p99 * 1e3:.1f} ms")


def _row(name: str, tests: int, slots: int, seconds: float) -> None:
    before = _own_cpu_seconds()
    # slots of its own, so that other runs on the machine do not share them
    with tempfile.TemporaryDirectory() as folder:
        sandbox = LocalSandbox(slots=slots, slots_folder=Path(folder))
        limits = Limits(cpu_s=2.0, wall_s=30.0)

        def in_box(number: int) -> None:
            program = Program(f"{PROGRAM}# {number}\n")
            assert all(r.status is RunStatus.OK for r in sandbox.run(program, [StdinTask(STDIN)] * tests, limits))

        def bare(_: int) -> None:
            command = [os.path.realpath(sys.executable), "-S", "-s", "-c", PROGRAM]
            subprocess.run(command, input=STDIN.encode(), stdout=subprocess.DEVNULL, check=True)

        work = in_box if tests else bare
        count, elapsed, p99 = measure(work, 2 * slots if tests else slots, seconds)
        sandbox.close()
    cpu = _own_cpu_seconds() - before
    rates = f"{count / elapsed:11.0f}{count * max(tests, 1) / elapsed:9.0f}{p99 * 1e3:8.1f}"
    print(f"{name:36s}{rates}{cpu / count * 1e3:16.2f}{cpu / elapsed:13.2f}")


if __name__ == "__main__":
    main()

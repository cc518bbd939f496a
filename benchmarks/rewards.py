"""Compares the math reward with plain math-verify and verl's scorers: agreement with stated truth, and speed.

`python benchmarks/rewards.py [--quick]` prints two tables in Markdown. Each grader runs in a process of its own, which
is killed and restarted when a pair takes longer than KILL_S, so that no grader can spoil another's numbers. Left out:
code (`benchmarks/sandbox.py`), and pairs whose stated truth we do not share (they say why in the data).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder holds a rewards.py, which would hide the project's package of that name

DATA = ROOT / "tests" / "data"
KILL_S = 20.0
WORKLOAD_S = 60.0  # the speed of a slow grader is measured on what it finishes in this time
REASONING = (
    "Let us write down what is given and go on step by step. With $a_1 = 3$ and $d = 4$ we have $a_n = 3 + 4(n-1)$, so "
    "that $a_{10} = 39$. The sum of the first ten terms is then $\\frac{10(3+39)}{2} = 210$, which we will need below. "
    "Next we look at the other condition: 25% of the terms are odd multiples of 3, and this leaves 7 of them.\n"
)
Grader = Callable[[str, str, str], bool]  # (prompt, response, ground truth)


def fledge() -> Grader:
    from rewards.api import RewardInput
    from rewards.math import MathReward

    reward = MathReward()
    return lambda prompt, response, truth: reward(RewardInput(prompt, response, response, truth)).reward == 1.0


def math_verify() -> Grader:
    from math_verify import parse, verify

    return lambda prompt, response, truth: bool(verify(parse(f"\\boxed{{{truth}}}"), parse(response)))


def verl_math_verify() -> Grader:
    from verl.utils.reward_score import math_verify

    return lambda prompt, response, truth: math_verify.compute_score(response, truth) == 1.0


def verl_math_reward() -> Grader:
    from verl.utils.reward_score import math_reward

    return lambda prompt, response, truth: math_reward.compute_score(response, truth) == 1.0


def verl_math_dapo() -> Grader:
    from verl.utils.reward_score import math_dapo

    def grade(prompt: str, response: str, truth: str) -> bool:
        boxed = "\\boxed" in response
        return bool(math_dapo.compute_score(response, truth, strict_box_verify=boxed)["acc"])

    return grade


def verl_prime_math() -> Grader:
    from verl.utils.reward_score import prime_math

    return lambda prompt, response, truth: bool(prime_math.compute_score(response, truth)[0])


def verl_gsm8k() -> Grader:
    from verl.utils.reward_score import gsm8k

    return lambda prompt, response, truth: gsm8k.compute_score(response, truth, method="flexible") == 1.0


GRADERS: dict[str, Callable[[], Grader]] = {
    "Fledge math": fledge,
    "math-verify": math_verify,
    "verl math_verify": verl_math_verify,
    "verl math_reward": verl_math_reward,
    "verl math_dapo": verl_math_dapo,
    "verl prime_math": verl_prime_math,
    "verl gsm8k": verl_gsm8k,
}


class GraderProcess:
    """A grader in a process of its own, with everything that it starts."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def grade(self, prompt: str, response: str, truth: str) -> tuple[bool, float, bool]:
        """(verdict, seconds, whether it had to be killed). A grader that raises or is killed says no."""
        if self._process is None:
            self._start()
        assert self._connection is not None
        self._connection.send((prompt, response, truth))
        if not self._connection.poll(KILL_S):
            self.close()
            return False, KILL_S, True
        verdict, seconds = self._connection.recv()
        return verdict, seconds, False

    def close(self) -> None:
        """End the process and its children."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()
        self._process = None

    def __enter__(self) -> GraderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._name, theirs))
        self._process.start()
        theirs.close()
        assert self._connection.recv() == "ready"


def _serve(name: str, connection: Connection) -> None:
    os.setsid()
    logging.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.redirect_stdout(io.StringIO()):
        grade = GRADERS[name]()
        grade("", "\\boxed{2}", "2")  # imports and pools
        grade("", "\\boxed{\\int_0^1 x dx}", "y")
    connection.send("ready")
    while True:
        try:
            pair = connection.recv()
        except EOFError:
            return
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                verdict = grade(*pair)
            except Exception:  # noqa: BLE001  a grader that raises has not said yes
                verdict = False
        connection.send((bool(verdict), time.perf_counter() - started))


@dataclass
class Tally:
    """What one grader did on one set."""

    right: int = 0
    false_positives: int = 0
    total: int = 0
    killed: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, verdict: bool, truth: bool, seconds: float, killed: bool) -> None:
        self.right += verdict == truth
        self.false_positives += verdict and not truth
        self.total += 1
        self.killed += killed
        self.seconds.append(seconds)

    def rate(self) -> str:
        return f"{100 * self.right / self.total:.1f}%"

    def speed(self) -> tuple[float, float]:
        """Samples a second, and the 99th percentile in milliseconds."""
        return len(self.seconds) / sum(self.seconds), 1000 * statistics.quantiles(self.seconds, n=100)[98]


def load(name: str) -> list[dict[str, Any]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "differs" not in row]


def plain_truth(row: dict[str, Any]) -> str:
    """The ground truth as datasets store it: its box or its formula, without dollar signs around it."""
    from rewards.mathematics.extraction import last_box

    truth = str(row["ground_truth"]).strip()
    boxed = last_box(truth)
    if boxed is not None:
        return boxed
    return truth[1:-1] if len(truth) > 2 and truth[0] == truth[-1] == "$" and "$" not in truth[1:-1] else truth


def realistic_mix(pairs: list[dict[str, Any]], size: int) -> list[tuple[str, str, str]]:
    """Responses as training sees them: reasoning before the answer, most answers plain numbers, some of every form."""
    generator = random.Random(0)
    others = [row for row in pairs if row["category"] not in ("hostile", "integer", "decimal", "fraction")]
    mix = []
    for _ in range(size):
        reasoning = REASONING * generator.randint(2, 8)
        if generator.random() < 0.7:
            number, top = generator.randint(-500, 5000), generator.randint(1, 99)
            truth = generator.choice([str(number), f"\\frac{{{top}}}{{7}}"])
            answer = truth if generator.random() < 0.5 else str(generator.randint(-500, 5000))
            mix.append(("", f"{reasoning}The answer is $\\boxed{{{answer}}}$.", truth))
        else:
            row = generator.choice(others)
            mix.append((row.get("prompt", ""), f"{reasoning}\n{row['response']}", plain_truth(row)))
    return mix


def plain_answers(size: int) -> Iterator[tuple[str, str, str]]:
    for n in range(size):
        answer = (str(n), f"{n / 8:.3f}", f"\\frac{{{n}}}{{12}}", f"{n * 1000:,}", f"{n}\\%")[n % 5]
        yield "", f"{REASONING * 2}The answer is $\\boxed{{{answer}}}$.", str(n)


def accuracy_table(names: list[str], sets: dict[str, list[dict[str, Any]]]) -> None:
    head = " | ".join(f"{name}: right | wrong yes" for name in sets)
    print(f"| grader | {head} | killed at {KILL_S:.0f} s | samples/s | p99 ms |")
    print("|---" * (2 * len(sets) + 4) + "|")
    for name in names:
        tallies, everything = {}, Tally()
        with GraderProcess(name) as process:
            for set_name, pairs in sets.items():
                tally = tallies[set_name] = Tally()
                for row in pairs:
                    result = process.grade(row.get("prompt", ""), row["response"], plain_truth(row))
                    for one in (tally, everything):
                        one.add(result[0], row["equal"], *result[1:])
        cells = " | ".join(f"{t.rate()} | {t.false_positives}" for t in tallies.values())
        rate, slowest = everything.speed()
        print(f"| {name} | {cells} | {everything.killed} | {rate:,.0f} | {slowest:,.1f} |", flush=True)


def speed_table(names: list[str], workloads: dict[str, list[tuple[str, str, str]]]) -> None:
    head = " | ".join(f"{name}: samples/s | p99 ms" for name in workloads)
    print(f"\n| grader | {head} |")
    print("|---" * (2 * len(workloads) + 1) + "|")
    for name in names:
        with GraderProcess(name) as process:
            cells = [" | ".join(measured(process, samples)) for samples in workloads.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def measured(process: GraderProcess, samples: list[tuple[str, str, str]]) -> tuple[str, str]:
    """Samples a second and the 99th percentile in milliseconds, over at most WORKLOAD_S."""
    tally, limit = Tally(), time.monotonic() + WORKLOAD_S
    for sample in samples:
        if time.monotonic() > limit:
            break
        _, seconds, killed = process.grade(*sample)
        tally.add(False, False, seconds, killed)
    rate, slowest = tally.speed()
    return f"{rate:,.0f}", f"{slowest:,.1f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples")
    parser.add_argument("--graders", nargs="*", default=list(GRADERS), choices=list(GRADERS))
    arguments = parser.parse_args()
    step = 10 if arguments.quick else 1
    own, public = load("math_pairs.jsonl")[::step], load("math_public_pairs.jsonl")[::step]
    print(f"{len(own)} pairs of our own, {len(public)} of public suites; one process a grader\n")
    accuracy_table(arguments.graders, {"own": own, "public": public})
    mix = realistic_mix(load("math_pairs.jsonl"), 1000 // step)
    speed_table(arguments.graders, {"plain": list(plain_answers(2000 // step)), "realistic mix": mix})


if __name__ == "__main__":
    main()

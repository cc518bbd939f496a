"""Score samples in a child process that can be killed: hard deadlines, whatever a plugin does, for the price of a pipe.

`ScoringProcess` is the parent's half, `main` the child's. The child has its own session, holds no Ray and no framework,
and ends by itself when its parent is gone. Left out: combining (`rewards.combine`) and Ray (`rewards.workers`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

from rewards.api import RewardInput
from rewards.combine import SHARED_DONE, CombinedReward, PartResults
from rewards.loading import describe_error
from rl.batch import RewardStatus
from rl.config import RewardFunctionConfig
from rl.errors import FledgeError, RewardError

START_TIMEOUT_S = 120.0  # importing a plugin may load a framework from a cold disk
COROUTINE_GRACE_S = 0.5  # coroutines are cancelled at the deadline itself; only those that ignore it meet the watchdog
KILL_GRACE_S = 2.0  # the child's own watchdog, which can say where it hung, comes first
MAX_CONSECUTIVE_TIMEOUTS = 3  # then the rest of the call is given up, so that a dead dependency cannot stall a run


@dataclass(frozen=True, slots=True)
class ScoringSpec:
    """What a scoring process needs to know; plain data."""

    functions: tuple[RewardFunctionConfig, ...]
    clip: tuple[float, float] | None
    timeout_s: float
    folder: str = field(default_factory=os.getcwd)  # where the user's own modules are looked for last


class ScoringProcess:
    """One child process, restarted whenever a sample hangs or kills it. Not safe for concurrent calls.

    Raises RewardError from the constructor when the rewards cannot be loaded there.
    """

    def __init__(self, spec: ScoringSpec) -> None:
        self._spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self.restarts = 0
        self._start()

    @property
    def pid(self) -> int:
        """The process id of the current child."""
        assert self._process is not None
        return self._process.pid

    def score(self, samples: Sequence[RewardInput]) -> list[PartResults]:
        """One result per sample, in order.

        A sample that passes the deadline gets TIMEOUT. When the child dies, the sample it worked on is tried once more,
        then gets INFRASTRUCTURE_ERROR. When work shared by several samples hangs or dies, each of them is tried once
        more, alone.
        """
        run = _Call(samples)
        while run.pending:
            if self._process is None:
                self._start()
                self.restarts += 1
            failure = self._attempt(run)
            if failure is not None:
                self._kill()
                run.record_failure(failure)
        return [run.results[i] for i in range(len(samples))]

    def close(self) -> None:
        """End the child and everything in its process group."""
        self._kill()

    def _attempt(self, run: _Call) -> PartResults | None:
        """Send the next unit of work and collect its results; the failure that stopped it, if any."""
        run.begin_unit()
        try:
            self._connection.send([run.samples[i] for i in run.unit])
            while run.unit:
                if not self._connection.poll(self._spec.timeout_s + COROUTINE_GRACE_S + KILL_GRACE_S):
                    return self._timed_out("")
                item = self._connection.recv()
                if item == SHARED_DONE:
                    run.in_shared_work = False
                elif item is not None:
                    run.record(item)
        except (EOFError, OSError):
            return self._died()
        return None

    def _timed_out(self, where: str) -> PartResults:
        text = f"no result within the deadline of {self._spec.timeout_s:g} s{where}"
        return PartResults(status=RewardStatus.TIMEOUT, error=text)

    def _died(self) -> PartResults:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_GRACE_S)
        self._trace.seek(0)
        trace = self._trace.read()
        if "Timeout (" in trace:
            frame = re.search(r'File "([^"]*)", line (\d+) in (\S+)', trace)
            return self._timed_out(f" ({Path(frame[1]).name}:{frame[2]} in {frame[3]})" if frame else "")
        code = self._process.poll()
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        error = f"the reward process ended with {how} while it scored this sample"
        return PartResults(status=RewardStatus.INFRASTRUCTURE_ERROR, error=error)

    def _start(self) -> None:
        self._connection, child_end = Pipe()
        self._trace: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in _kill
        bootstrap = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
            "from rewards.scoring_process import main; main(int(sys.argv[2]), int(sys.argv[3]))"
        )
        handles = (child_end.fileno(), self._trace.fileno())
        # Ray puts the working directory first, where its files would hide installed packages.
        path = [*(entry for entry in sys.path if entry not in ("", self._spec.folder)), self._spec.folder]
        arguments = [sys.executable, "-P", "-c", bootstrap, json.dumps(path), *map(str, handles)]
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            pass_fds=handles,
            start_new_session=True,
            env={**os.environ, **one_thread, "PYTHONFAULTHANDLER": ""},
        )
        child_end.close()
        try:
            self._connection.send(self._spec)
            if not self._connection.poll(START_TIMEOUT_S):
                raise RewardError(f"the reward process did not load its rewards within {START_TIMEOUT_S:g} s")
            answer = self._connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):  # threads of a plugin may hold it up
                self._process.wait(KILL_GRACE_S)
            code = self._process.poll()
            self._kill()
            how = "did not exit when it was done" if code is None else f"ended with code {code}"
            raise RewardError(f"the reward process {how} while it loaded its rewards") from None
        except RewardError:
            self._kill()
            raise
        if isinstance(answer, FledgeError):
            self._kill()
            raise answer

    def _kill(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session, so helpers that it started go too
        self._process.wait()
        self._process = None
        self._connection.close()
        self._trace.close()


class _Call:
    """The state of one `score` call: which samples are still to do, in which units."""

    def __init__(self, samples: Sequence[RewardInput]) -> None:
        self.samples = samples
        self.results: dict[int, PartResults] = {}
        self.units: deque[list[int]] = deque([list(range(len(samples)))] if samples else [])
        self.unit: deque[int] = deque()  # indices of the unit in work that have no result yet, in order
        self.in_shared_work = False
        self._tried: set[int] = set()
        self._consecutive_timeouts = 0

    @property
    def pending(self) -> bool:
        return bool(self.units)

    def begin_unit(self) -> None:
        self.unit = deque(self.units[0])
        self.in_shared_work = True

    def record(self, item: tuple[int, PartResults]) -> None:
        _, result = item  # the child answers in the order of the unit
        self.results[self.unit.popleft()] = result
        self._consecutive_timeouts = 0
        if self.unit:
            self.units[0] = list(self.unit)
        else:
            self.units.popleft()

    def record_failure(self, failure: PartResults) -> None:
        self.units.popleft()
        remaining = list(self.unit)
        if self.in_shared_work and len(remaining) > 1:  # whose fault it was cannot be known: each alone, once more
            self._tried.update(remaining)
            self.units.extendleft([i] for i in reversed(remaining))
            return
        culprit, *others = remaining
        if others:
            self.units.appendleft(others)
        if failure.status is not RewardStatus.TIMEOUT and culprit not in self._tried:
            self._tried.add(culprit)
            self.units.append([culprit])
            return
        self.results[culprit] = failure
        if failure.status is RewardStatus.TIMEOUT:
            self._consecutive_timeouts += 1
            if self._consecutive_timeouts >= MAX_CONSECUTIVE_TIMEOUTS:
                self._give_up(failure)

    def _give_up(self, failure: PartResults) -> None:
        error = f"not scored, because {self._consecutive_timeouts} samples in a row timed out: {failure.error}"
        while self.units:
            for index in self.units.popleft():
                self.results[index] = PartResults(status=RewardStatus.TIMEOUT, error=error)


def main(connection_fd: int, trace_fd: int) -> None:
    """The child: load the rewards, then score what comes until the parent closes the connection."""
    os.dup2(2, 1)  # a plugin that prints does not write into the caller's output
    connection = Connection(connection_fd)
    try:
        spec: ScoringSpec = connection.recv()
        try:
            reward = CombinedReward(spec.functions, spec.clip)
        except FledgeError as error:
            connection.send(error)
            return
        except Exception as error:  # noqa: BLE001  a broken plugin: the parent says so in its own process
            connection.send(RewardError(describe_error(error)))
            return
        connection.send(None)
        while True:
            _answer(connection, reward, connection.recv(), spec.timeout_s, trace_fd)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone


def _answer(
    connection: Connection, reward: CombinedReward, samples: Sequence[RewardInput], timeout_s: float, trace_fd: int
) -> None:
    """Send each step's result. The watchdog is a C thread: it ends even code that holds the interpreter lock."""
    steps = reward.stream(samples, timeout_s)
    while True:
        faulthandler.dump_traceback_later(timeout_s + COROUTINE_GRACE_S, exit=True, file=trace_fd)
        try:
            item: Any = next(steps)
        except StopIteration:
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
        connection.send(item)

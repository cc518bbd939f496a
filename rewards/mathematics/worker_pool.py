"""A bounded pool of the processes that run computer algebra for us, any of which may be lost at any request.

Left out: what is computed there, and how one pair is killed at its deadline (`rewards.mathematics.worker`). No signal
handlers, no fork of this process, no multiprocessing: a worker is a fresh interpreter that talks JSON lines over pipes,
so it starts the same from the command line, a thread, or a Ray actor.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import IO, Any

from rewards.api import InfrastructureError
from rewards.mathematics.worker import CLOCK_TO_CPU

START_DEADLINE_S = 600.0  # importing sympy takes 5 s of CPU time, which a crowded machine gives slowly
GRACE_S = 15.0  # beyond the clock deadline of a pair, which the worker keeps itself
MAX_REPLY_BYTES = 65536


class WorkerLostError(Exception):
    """The computation passed its deadline or died (most often: out of memory). The next one is not affected."""


class _WorkerDiedError(Exception):
    """The process that forks the computations is gone, or does not answer."""


class SymbolicPool:
    """At most `size` worker processes, started when first needed; safe to call from any number of threads.

    A computation gets `deadline_s` seconds of CPU time (and a few times that by the clock) and `memory_mib` MiB of
    address space.
    """

    def __init__(self, size: int, deadline_s: float, memory_mib: int) -> None:
        self._deadline_s = deadline_s
        self._memory_mib = memory_mib
        self._slots = threading.BoundedSemaphore(size)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._closed = False
        self._started = False

    def warm_up(self) -> None:
        """Start a first worker if there was none yet, without waiting for it to be ready."""
        with self._lock:
            if self._started or self._closed:
                return
            self._started = True
            self._idle.append(_Worker(self._memory_mib))

    def equal(self, gold: str, answer: str) -> bool | None:
        """Whether two LaTeX expressions are equal; None when one cannot be read.

        Raises:
            WorkerLostError: this computation passed a limit.
            InfrastructureError: workers do not start, or die.
        """
        return self._request({"op": "equal", "gold": gold, "answer": answer})

    def can_read(self, latex: str) -> bool:
        """Whether math-verify makes anything of the expression. Raises WorkerLostError."""
        return bool(self._request({"op": "read", "gold": latex}))

    def close(self) -> None:
        """End every idle worker now, and the busy ones when their request ends. Later requests raise."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    def pids(self) -> list[int]:
        """Process ids of the idle workers, for tests and `ps`."""
        with self._lock:
            return [worker.pid for worker in self._idle]

    def __enter__(self) -> SymbolicPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _request(self, message: dict[str, Any]) -> bool | None:
        message = {**message, "deadline_s": self._deadline_s}
        with self._slots:
            try:
                reply = self._ask_one(message)
            except _WorkerDiedError:  # killed from outside: this pair is not to blame, it runs in a process of its own
                try:
                    reply = self._ask_one(message)
                except _WorkerDiedError as error:
                    raise InfrastructureError(f"math: two symbolic workers died in a row: {error}") from error
        if "lost" in reply:
            raise WorkerLostError(f"symbolic comparison gave no verdict: {reply['lost']}")
        result = reply["equal"]
        return None if result is None else bool(result)

    def _ask_one(self, message: dict[str, Any]) -> dict[str, Any]:
        worker = self._take()
        try:
            reply = worker.request(message, self._deadline_s * CLOCK_TO_CPU + GRACE_S)
        except BaseException:  # also KeyboardInterrupt: a worker in an unknown state is never used again
            worker.kill()
            raise
        self._give_back(worker)
        return reply

    def _take(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise InfrastructureError("the symbolic worker pool is closed; make a new reward to go on scoring")
            self._started = True
            if self._idle:
                return self._idle.pop()
        return _Worker(self._memory_mib)

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.kill()


class _Worker:
    """One child process and its pipes. Starting does not wait until it is ready; the first request does."""

    def __init__(self, memory_mib: int) -> None:
        self._memory_mib = memory_mib
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rewards.mathematics.worker", str(memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # failures come back as replies; sympy's warnings are of no use to anyone
            env=environment,
        )
        self.pid = self._process.pid
        self._ready = False

    def request(self, message: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Send one message and wait for its reply. Raises _WorkerDiedError, InfrastructureError if it did not start."""
        self._wait_until_ready()
        try:
            _pipe(self._process.stdin).write(json.dumps(message).encode() + b"\n")
            _pipe(self._process.stdin).flush()
        except BrokenPipeError as error:
            raise _WorkerDiedError("it had died before the request") from error
        return self._read_line(deadline_s)

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        by_hand = f"run `{sys.executable} -m rewards.mathematics.worker {self._memory_mib}` by hand to see why"
        try:
            ready = self._read_line(START_DEADLINE_S)
        except _WorkerDiedError as error:
            raise InfrastructureError(f"math: the symbolic worker did not start: {error}; {by_hand}") from error
        if not ready["ready"]:
            raise InfrastructureError(f"math: the symbolic worker did not start: {ready['error']}; {by_hand}")
        self._ready = True

    def kill(self) -> None:
        """End the process and reap it. Safe to call twice."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # unsent bytes of a request whose reader is gone
                _pipe(pipe).close()

    def _read_line(self, deadline_s: float) -> dict[str, Any]:
        end = time.monotonic() + deadline_s
        stdout = _pipe(self._process.stdout)
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise _WorkerDiedError(f"no reply within {deadline_s:g} s")
                chunk = os.read(stdout.fileno(), MAX_REPLY_BYTES)
                if not chunk:
                    raise _WorkerDiedError(f"it ended with exit code {self._process.wait()}")
                line += chunk
        reply: dict[str, Any] = json.loads(line)
        return reply


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # both were asked for
    return pipe

"""The sandbox service of this machine: one zygote, boxes forked from it, slots shared with its other services.

Left out: judging results. A box serves the tasks of one program after another, until a task leaves a process behind or
has touched the private folder; then a fresh box takes over.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rewards.api import InfrastructureError
from rewards.sandbox.api import (
    MIB,
    CallTask,
    EvaluateTask,
    Limits,
    Program,
    RunResult,
    RunStatus,
    SandboxService,
    StdinTask,
    Task,
)
from rewards.sandbox.probe import missing_layers, remedy
from rewards.sandbox.process import Box, Ending, IsolationUnavailableError, Zygote
from rewards.sandbox.slots import Slots
from rl.errors import ConfigError

Isolation = Literal["full", "none"]
COMPILE_LIMITS = Limits(
    cpu_s=10.0,
    wall_s=20.0,
    memory_bytes=2048 * MIB,
    disk_bytes=128 * MIB,
    file_bytes=16 * MIB,
    output_bytes=16 * MIB,
    processes=8,
)
_BOX_PROGRAMS = 100  # that one box serves at most
_COMPILED_KEPT = 16  # compiled programs kept for later calls
_STDERR_CHARACTERS = 2000


class LocalSandbox(SandboxService):
    """Runs programs in boxes on this machine. Safe to use from several threads."""

    def __init__(
        self,
        isolation: Isolation = "full",
        slots: int | None = None,
        packages: Sequence[str] = (),
        slots_folder: Path | None = None,
    ) -> None:
        """
        Args:
            isolation: "full" refuses to run if the machine lacks a layer; "none" uses the layers that need no
                namespaces, and promises nothing at all.
            slots: programs that may run at once, over all services of this user on the machine; None: one per CPU.
            packages: installed packages that programs may import besides the standard library.
            slots_folder: where the slots' lock files are; None: one folder per user, so that all services share them.

        Raises ConfigError with the remedy if a layer is missing.
        """
        self._cpus = sorted(os.sched_getaffinity(0))
        self._slots = Slots(slots or len(self._cpus), slots_folder)
        self._isolated = isolation == "full"
        self._packages = tuple(packages)
        if packages and not self._isolated:
            raise ConfigError("the option packages works only with `isolation: full`; leave out packages or isolation")
        missing = missing_layers()
        if self._isolated and missing:
            raise ConfigError(remedy(", ".join(missing)))
        self._layers = {"seccomp": "seccomp" not in missing, "landlock": "landlock" not in missing}
        self._lock = threading.RLock()  # an abandoned run may be finalised, and give its box back, in any thread
        self._zygote: Zygote | None = None
        self._idle: dict[Limits, list[Box]] = {}
        self._compiled: OrderedDict[bytes, int | RunResult] = OrderedDict()
        self._closed = False
        self._start()

    @property
    def concurrency(self) -> int:
        """Programs that may run at once."""
        return self._slots.count

    @property
    def zygote_pid(self) -> int:
        """Process id of the zygote's outermost process, the ancestor of every box."""
        return self._start().process.pid

    def run(self, program: Program, tasks: Iterable[Task], limits: Limits) -> Iterator[RunResult]:
        """See SandboxService. Holds one slot from the first task until the iterator ends or is closed.

        A box is made before its program takes a slot and, if need be, ended after it gives the slot back, so that the
        slots' CPUs are spent on programs; call this from a few more threads than there are slots.
        """
        with contextlib.ExitStack() as stack:
            binary: int | None = None
            if program.language == "cpp":
                compiled = self._compile(program)
                if isinstance(compiled, RunResult):
                    yield compiled
                    return
                stack.callback(os.close, compiled)
                binary = compiled
            run = stack.enter_context(_ProgramRun(self, program, limits, binary))
            with self._slots.take() as slot:
                run.pin(self._cpus[slot % len(self._cpus)])
                for task in tasks:
                    yield run.task(task)

    def close(self) -> None:
        """End the zygote and every box. Runs still going raise InfrastructureError."""
        with self._lock:
            self._closed = True
            if self._zygote is not None:
                self._zygote.close()  # and with it every box
                self._zygote = None
            idle, self._idle = self._idle, {}
            for box in (box for boxes in idle.values() for box in boxes):
                with contextlib.suppress(InfrastructureError):  # a box that does not end must not keep the others alive
                    box.end()
            while self._compiled:
                _, kept = self._compiled.popitem()
                if isinstance(kept, int):
                    os.close(kept)

    def open_box(self, limits: Limits) -> Box:
        """A box with nothing in it: one that earlier programs have left as good as new, or a new one."""
        while (box := self._take_idle(limits)) is not None:
            if not box.has_ended():
                return box
            box.end()
        return self.make_box(limits)

    def _take_idle(self, limits: Limits) -> Box | None:
        with self._lock:
            boxes = self._idle.get(limits)
            return boxes.pop() if boxes else None

    def give_back(self, box: Box, limits: Limits) -> None:
        """Keep a box that is as good as new for the next program, or end it."""
        box.programs += 1
        with self._lock:
            kept = self._idle.setdefault(limits, [])
            # without a process namespace nothing guarantees that a program has left no process
            keep = (
                self._isolated
                and not self._closed
                and box.programs < _BOX_PROGRAMS
                and len(kept) < 2 * self.concurrency
            )
            if keep:
                kept.append(box)
        if not keep:
            box.end()

    def make_box(self, limits: Limits) -> Box:
        """A new box; the zygote is started again, once, if it has died."""
        settings = {"limits": asdict(limits), **self._layers}
        zygote = self._start()
        try:
            return zygote.open_box(settings)
        except InfrastructureError:
            if zygote.process.poll() is None:
                raise
            return self._start().open_box(settings)

    def _start(self) -> Zygote:
        with self._lock:
            if self._closed:
                raise InfrastructureError("the sandbox service is closed")
            if self._zygote is not None and self._zygote.process.poll() is None:
                return self._zygote
            if self._zygote is not None:
                self._zygote.close()
            try:
                self._zygote = Zygote(self._isolated, self._packages)
            except IsolationUnavailableError as error:
                raise ConfigError(remedy(str(error))) from error
            return self._zygote

    def _compile(self, program: Program) -> int | RunResult:
        """A descriptor of the binary, for the caller to close, or the result that says why there is none."""
        if shutil.which("g++") is None:
            raise ConfigError("the program is C++ and this machine has no g++; install it or use the remote sandbox")
        key = hashlib.sha256(program.source.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            kept = self._compiled.get(key)
            if isinstance(kept, int):
                self._compiled.move_to_end(key)
                return os.dup(kept)
        if kept is not None:
            return kept
        with self._slots.take(), _ProgramRun(self, program, COMPILE_LIMITS, None) as run:
            result, binary = run.compile()
        made: int | RunResult = result if binary is None else binary
        refused_by_compiler = result.exit_status > 0  # not by a limit, within which a later try may stay
        with self._lock:
            if self._closed or key in self._compiled or (binary is None and not refused_by_compiler):
                return made
            self._compiled[key] = os.dup(made) if isinstance(made, int) else made
            if len(self._compiled) > _COMPILED_KEPT:
                _, oldest = self._compiled.popitem(last=False)
                if isinstance(oldest, int):
                    os.close(oldest)
        return made


class _ProgramRun:
    """The boxes that one program's tasks run in, one at a time."""

    def __init__(self, sandbox: LocalSandbox, program: Program, limits: Limits, binary: int | None) -> None:
        self._sandbox = sandbox
        self._source = program.source.encode("utf-8", "surrogatepass")
        self._limits = limits
        self._binary = binary
        self._box: Box | None = None
        self._clean = True
        self._cpu: int | None = None

    def __enter__(self) -> _ProgramRun:
        try:
            self._open()
        except InfrastructureError:
            self._open(new=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._box is not None and self._clean:
            box, self._box = self._box, None
            self._sandbox.give_back(box, self._limits)
        self.end()

    def pin(self, cpu: int) -> None:
        """Keep the program, with all its processes and threads, on one CPU: it cannot slow those on others."""
        self._cpu = cpu
        self._open().pin(cpu)

    def task(self, task: Task) -> RunResult:
        """Run one task, in the box of the last one if that is as good as new."""
        message, content = _describe(task, self._binary is not None)
        with _Exchange(content) as exchange:
            ending = self._attempt(message, exchange)
            return self._result(ending, exchange, wants_value=not isinstance(task, StdinTask))

    def compile(self) -> tuple[RunResult, int | None]:
        """Compile the source: how it went, and a read-only descriptor of the binary if there is one."""
        with _Exchange(self._source) as exchange:
            ending = self._attempt({"kind": "compile"}, exchange)
            result = self._result(ending, exchange, wants_value=False)
            if result.status is not RunStatus.OK:
                return replace(result, status=RunStatus.COMPILE_ERROR, stdout=b""), None
            # a file that anyone holds open for writing cannot be executed, so hand out a second, read-only opening
            return result, os.open(f"/proc/self/fd/{exchange.value}", os.O_RDONLY | os.O_CLOEXEC)

    def end(self) -> None:
        """End the box, if there is one."""
        if self._box is not None:
            box, self._box = self._box, None
            box.end()

    def _attempt(self, message: dict[str, Any], exchange: _Exchange) -> Ending:
        """Run the task; if its box dies by itself, run it once more in a new one, so that an accident costs nothing."""
        descriptors = exchange.descriptors + ([self._binary] if self._binary is not None else [])
        self._clean = False  # until it is known again
        try:
            ending = self._open().run(message, descriptors, self._limits)
        except InfrastructureError:
            self.end()
            exchange.rewind()
            ending = self._open(new=True).run(message, descriptors, self._limits)
        self._clean = ending.clean
        if not ending.clean:
            self.end()
        return ending

    def _open(self, new: bool = False) -> Box:
        if self._box is None:
            make = self._sandbox.make_box if new else self._sandbox.open_box
            self._box = make(self._limits)
            try:
                self._hand_over_source(self._box)
            except BaseException:
                self.end()
                raise
        return self._box

    def _hand_over_source(self, box: Box) -> None:
        if self._cpu is not None:
            box.pin(self._cpu)
        source = _memory_file(self._source)
        try:
            box.send({"kind": "source"}, [source])
        finally:
            os.close(source)

    def _result(self, ending: Ending, exchange: _Exchange, wants_value: bool) -> RunResult:
        limit = self._limits.output_bytes
        stdout, stderr = _read_file(exchange.stdout, limit), _tail(exchange.stderr)
        value = _read_file(exchange.value, limit) if wants_value else b""
        sizes = [os.fstat(descriptor).st_size for descriptor in (exchange.stdout, exchange.stderr, exchange.value)]
        over_cpu = ending.cpu_s >= self._limits.cpu_s
        if ending.stopped == "memory":
            status = RunStatus.MEMORY_LIMIT
        elif ending.stopped == "time" or over_cpu or ending.exit_status == -signal.SIGXCPU:
            status = RunStatus.TIME_LIMIT
        elif max(sizes) > limit:
            status = RunStatus.OUTPUT_LIMIT
        elif ending.exit_status != 0:
            status = RunStatus.RUNTIME_ERROR
        else:
            status = RunStatus.OK
        returned = value if wants_value and status is RunStatus.OK else None
        return RunResult(status, stdout, stderr, returned, ending.exit_status, ending.cpu_s, ending.wall_s)


class _Exchange:
    """The in-memory files of one task: what goes in, and what comes out, without a pipe that anyone must drain."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.input = _memory_file(content)
        self.stdout, self.stderr, self.value = (os.memfd_create(name) for name in ("stdout", "stderr", "value"))
        os.fchmod(self.value, 0o755)

    @property
    def descriptors(self) -> list[int]:
        return [self.input, self.stdout, self.stderr, self.value]

    def rewind(self) -> None:
        """Make the files as new, for a second attempt."""
        os.lseek(self.input, 0, os.SEEK_SET)
        for descriptor in (self.stdout, self.stderr, self.value):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


def _describe(task: Task, is_binary: bool) -> tuple[dict[str, Any], bytes]:
    """The message for a box, and what the program's process reads."""
    if isinstance(task, StdinTask):
        kind = "execute" if is_binary else "script"
        return {"kind": kind}, task.stdin.encode("utf-8", "surrogatepass")
    if is_binary:
        raise ConfigError(
            f"{type(task).__name__} needs a Python program; C++ programs can only be tested through standard input"
        )
    if isinstance(task, CallTask):
        return {"kind": "call", "function": task.function}, task.arguments.encode()
    assert isinstance(task, EvaluateTask)
    payload = {"imports": task.imports, "expressions": task.expressions, "roots": task.roots}
    return {"kind": "evaluate"}, json.dumps(payload).encode()


def _memory_file(content: bytes) -> int:
    """A sealed file: its readers can neither change nor grow it."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    data = memoryview(content)
    while data:
        data = data[os.write(descriptor, data) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _read_file(descriptor: int, limit: int) -> bytes:
    """The first `limit` bytes."""
    parts, offset = [], 0
    while part := os.pread(descriptor, min(limit - offset, 1 << 20), offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    length = 4 * _STDERR_CHARACTERS
    return os.pread(descriptor, length, max(0, size - length)).decode("utf-8", "replace")[-_STDERR_CHARACTERS:]

"""The trusted half of the zygote and of a box: start, ask, watch, end.

Left out: what is run and in what order (`rewards.sandbox.local`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.api import InfrastructureError
from rewards.sandbox.api import Limits
from rl.errors import ConfigError

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 10.0
WATCH_INTERVAL_S = 0.05  # between looks at a box's memory; the first look comes after one interval
_HERE = Path(__file__).resolve().parent
_BOOT = "import sys; sys.path.insert(0, {!r}); from inside import zygote; del sys.path[0]; zygote.main()"


class IsolationUnavailableError(RuntimeError):
    """The kernel refused a layer of isolation; the message is the kernel's."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a task's process ended, as the box's first process or the watch saw it."""

    exit_status: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    clean: bool = False  # nothing left behind and nothing changed: the box is as good as new
    stopped: str = ""  # "time" or "memory" when the watch ended the box


def hidden_folders() -> list[str]:
    """Folders that no box may see although they may lie under the interpreter or /usr: packages and this project."""
    roots = {"/usr", "/usr/local", sys.base_prefix, sys.prefix}
    found = {str(path) for root in roots for path in Path(root).glob("lib*/python3*/*-packages")}
    found |= {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    project = _HERE.parents[1]
    if not Path(sys.base_prefix).is_relative_to(project):
        found.add(str(project))
    return sorted(found)


def package_folders(packages: Sequence[str]) -> dict[str, str]:
    """Each package's folders: name in the box -> path here. Raises ConfigError for a package that is not installed."""
    folders: dict[str, str] = {}
    for name in packages:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"the option packages names {name!r}, which is not installed as a package here")
        folder = Path(spec.submodule_search_locations[0])
        libraries = folder.with_name(f"{name}.libs")  # where wheels keep their shared libraries
        folders |= {path.name: str(path) for path in (folder, libraries) if path.is_dir()}
    return folders


class Zygote:
    """The interpreter that boxes are forked from. Safe to use from several threads."""

    def __init__(self, isolated: bool, packages: Sequence[str] = ()) -> None:
        """Raises IsolationUnavailableError when a namespace or mount is refused, InfrastructureError otherwise."""
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            executable = os.path.realpath(sys.executable)
            settings = {
                "fd": theirs.fileno(),
                "isolated": isolated,
                "prefix": sys.base_prefix,
                "hidden": hidden_folders(),
                "packages": package_folders(packages),
            }
            self.process = subprocess.Popen(
                [executable, "-S", "-s", "-P", "-c", _BOOT.format(str(_HERE)), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
                cwd="/",
            )
        answer = _receive(self._control, START_TIMEOUT_S)
        if not answer or "error" in answer:
            self.close()
            if not answer:
                raise InfrastructureError(f"the sandbox's zygote ({executable}) did not start")
            raise IsolationUnavailableError(answer["error"])

    def open_box(self, settings: dict[str, Any]) -> Box:
        """Fork a new box. Raises InfrastructureError if the zygote or the kernel cannot."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handles: list[int] = []
        try:
            with theirs, self._lock:
                socket.send_fds(self._control, [json.dumps(settings).encode()], [theirs.fileno()])
                self._control.settimeout(START_TIMEOUT_S)
                message, handles, _, _ = socket.recv_fds(self._control, 1 << 16, 1)
            answer = json.loads(message) if message else {"error": "the zygote has ended"}
        except OSError as error:
            self.process.kill()  # an answer that comes late would be taken for the next one
            answer = {"error": str(error)}
        if "error" in answer:
            ours.close()
            raise InfrastructureError(f"no new sandbox box: {answer['error']}")
        box = Box(ours, handles[0], answer["private"])
        ready = _receive(ours, START_TIMEOUT_S)
        if not ready or "error" in ready:
            box.end()
            raise InfrastructureError(f"a sandbox box did not start: {(ready or {}).get('error', 'it ended')}")
        return box

    def close(self) -> None:
        """End the zygote and every box that it forked."""
        self._control.close()
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Box:
    """One box: namespaces, a private folder, and a first process that runs tasks. For use by one thread at a time."""

    def __init__(self, channel: socket.socket, handle: int, private: str) -> None:
        self._channel = channel
        self._handle = handle
        self._private = private  # a folder of the host, only without isolation
        self.programs = 0  # how many it has served
        info = _read(f"/proc/self/fdinfo/{handle}")
        self._pid = next(int(line.split()[1]) for line in info.splitlines() if line.startswith("Pid:"))

    def pin(self, cpu: int) -> None:
        """Keep the box, and all that it starts afterwards, on one CPU."""
        try:
            os.sched_setaffinity(self._pid, {cpu})
        except OSError as error:
            raise InfrastructureError(f"a sandbox box cannot be kept on CPU {cpu}: {error}") from error

    def send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """Send one message. Raises InfrastructureError when the box has ended."""
        try:
            socket.send_fds(self._channel, [json.dumps(message).encode()], descriptors)
        except OSError as error:
            raise InfrastructureError(f"a sandbox box ended by itself: {error}") from error

    def run(self, message: dict[str, Any], descriptors: list[int], limits: Limits) -> Ending:
        """Run one task and watch it. Raises InfrastructureError when the box ends although nobody ended it."""
        started = time.monotonic()
        self.send(message, descriptors)
        while True:
            elapsed = time.monotonic() - started
            answer = _receive(self._channel, min(WATCH_INTERVAL_S, max(0.0, limits.wall_s - elapsed)))
            elapsed = time.monotonic() - started
            if answer is not None:
                if "status" not in answer:
                    raise InfrastructureError("a sandbox box ended by itself")
                return Ending(answer["status"], answer["cpu_s"], elapsed, answer["clean"])
            if elapsed >= limits.wall_s:
                return Ending(-signal.SIGKILL, 0.0, elapsed, stopped="time")
            if self.resident_bytes() > limits.memory_bytes:
                return Ending(-signal.SIGKILL, 0.0, elapsed, stopped="memory")

    def resident_bytes(self) -> int:
        """Resident memory of the box's processes that is not shared with files: heap, stacks, shared anonymous."""
        total, todo = 0, [self._pid]
        while todo:
            pid = todo.pop()
            try:
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    todo += [int(word) for word in _read(thread / "children").split()]
                fields = dict(line.split(":", 1) for line in _read(f"/proc/{pid}/status").splitlines())
            except OSError as error:
                if pid == self._pid and not self.has_ended():
                    raise InfrastructureError(f"a sandbox box's memory cannot be watched: {error}") from error
                continue  # it has ended since we read its number
            total += sum(int(fields.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssShmem"))
        return total << 10

    def has_ended(self) -> bool:
        """Whether the box is gone, with everything in it."""
        return self._wait_for_end(0.0)

    def end(self) -> None:
        """End the box and wait until every process in it is gone. Raises InfrastructureError if they do not go."""
        self._channel.close()
        try:
            first, grace = (signal.SIGTERM, 1.0) if self._private else (signal.SIGKILL, END_TIMEOUT_S)
            if not self._end_with(first, grace) and not self._end_with(signal.SIGKILL, END_TIMEOUT_S):
                raise InfrastructureError(f"a sandbox box is still there {END_TIMEOUT_S:g} s after SIGKILL")
        finally:
            os.close(self._handle)
            if self._private:
                shutil.rmtree(self._private, ignore_errors=True)

    def _end_with(self, number: int, grace_s: float) -> bool:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)
        return self._wait_for_end(grace_s)

    def _wait_for_end(self, timeout_s: float) -> bool:
        """Whether the first process has ended; with a process namespace, all others have ended before it."""
        poller = select.poll()
        poller.register(self._handle, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))


def _receive(channel: socket.socket, timeout_s: float) -> dict[str, Any] | None:
    """The next message; None if none comes in time; an empty one if the other side has ended."""
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    if not poller.poll(timeout_s * 1000):
        return None
    try:
        message = channel.recv(1 << 16)
    except ConnectionError:
        message = b""
    return json.loads(message) if message else {}


def _read(path: Path | str) -> str:
    return Path(path).read_text(errors="replace")  # a program may give itself any name

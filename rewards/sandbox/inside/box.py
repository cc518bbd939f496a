"""The first process of a box: it locks itself down, then forks one process per task and sweeps up after each.

In its process namespace it is number 1: signals from inside cannot end it, orphans become its children, and when it
ends the kernel ends everything else in the namespace. It never reads a program: its memory is what every task starts
from, and a later program could find an earlier one there. Left out: wall-clock and memory supervision, done from
outside (`rewards.sandbox.process`), and everything that runs in the program's process (`harness`).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from . import filesystem, harness, linux, seccomp

ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
_COMPILER = ("g++", "-x", "c++", "-O2", "-std=gnu++20", "-pipe", "-o")
_KEPT = {"script": 3, "call": 4, "evaluate": 4, "compile": 4, "execute": 5}  # descriptors left open, by task
_CLOCK_REALTIME_COARSE = 5
_ADDRESS_SLACK = 1 << 30  # thread arenas and libraries reserve address space that they never touch


class Box:
    """Serves tasks on a socket until it closes. Made once in a box's first process."""

    def __init__(self, channel: socket.socket, settings: dict[str, Any], prelude: dict[str, Any]) -> None:
        self.channel = channel
        self.limits: dict[str, Any] = settings["limits"]
        self.isolated: bool = settings["isolated"]
        self.private: str = settings["private"]
        self.prelude = prelude
        self.source = -1  # descriptor of the program's source
        self.ruleset = -1
        self.untouched: tuple[int, ...] = ()
        self.resource_limits = self._resource_limits()  # here, not in every program's process

    def lock_down(self, settings: dict[str, Any], proc: int) -> None:
        """Enter the box for good: private file system, no capabilities, no new privileges, system-call filter."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler would let the program interrupt this process
        if self.isolated:
            linux.write_maps("self", {"setgroups": "deny", "uid_map": "1000 0 1", "gid_map": "1000 0 1"}, proc)
            filesystem.mount_private(self.limits["disk_bytes"])
        else:
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGTERM)
            signal.signal(signal.SIGTERM, self._terminate)
        os.setsid()
        os.chdir(self.private)
        if not self.isolated:  # all boxes of an isolated zygote have the same one, which it sets for them
            set_environment(self.private)
        self.untouched = self._folder_state()
        _wait_for_next_tick()
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.drop_capabilities()
        if self.isolated:
            linux.prctl(linux.PR_SET_DUMPABLE, 0)
        if settings["landlock"]:
            self.ruleset = linux.landlock_ruleset(self._readable(), [self.private, "/dev/null"])
        if settings["seccomp"]:
            linux.install_filter(seccomp.build_filter(linux.MACHINE))

    def _readable(self) -> list[str]:
        if self.isolated:
            return ["/"]
        candidates = (*filesystem.SYSTEM_FOLDERS, *filesystem.SYSTEM_FILES, *filesystem.DEVICES, sys.base_prefix)
        return [path for path in candidates if Path(path).exists()]

    def serve(self) -> None:
        """Answer each task message with how it ended, until the other side closes."""
        while True:
            message, descriptors, _, _ = socket.recv_fds(self.channel, 1 << 16, 8)
            if not message:
                return
            task = json.loads(message)
            if task["kind"] == "source":
                if self.source >= 0:
                    os.close(self.source)
                self.source = descriptors[0]
                continue
            child = os.fork()
            if child == 0:
                self._become_program(task, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            self._answer(child)

    def _answer(self, child: int) -> None:
        """Say how a task ended. Separate from `serve`, because the next program's frames lie on top of `serve`'s."""
        _, status, usage = os.wait4(child, 0)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "clean": self._sweep(),
        }
        self.channel.send(json.dumps(answer).encode())

    def _sweep(self) -> bool:
        """End every process the task left. True when it left none and never changed the private folder."""
        left = False
        while True:
            if self.isolated:
                with suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            else:
                _kill_children()
            try:
                left = os.wait() is not None
            except ChildProcessError:
                return not left and self._folder_state() == self.untouched

    def _folder_state(self) -> tuple[int, ...]:
        """A value that changes with every file made or removed in the private folder, and with its own mode and
        attributes. The file system's free space reveals files without a name, which can outlive every process while
        they are in transit through a socket (SCM_RIGHTS)."""
        state = Path(self.private).stat()
        owner = (state.st_mode, state.st_uid, state.st_gid)
        space = os.statvfs(self.private)
        free = (space.f_bfree, space.f_ffree) if self.isolated else ()  # others write to the host's file system
        return *owner, state.st_nlink, state.st_size, state.st_mtime_ns, state.st_ctime_ns, *free

    def _terminate(self, *_: object) -> None:
        self._sweep()
        os._exit(0)

    def _become_program(self, task: dict[str, Any], descriptors: list[int]) -> NoReturn:
        """Never returns: turns the forked process into the program under its limits."""
        try:
            if not self.isolated:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self.ruleset >= 0:
                linux.landlock_restrict(self.ruleset)
            source = read_all(self.source).decode("utf-8", "surrogatepass")
            payload = self._place_descriptors(task["kind"], descriptors)
            for which, soft_and_hard in self.resource_limits:
                resource.setrlimit(which, soft_and_hard)
            if task["kind"] == "script":
                harness.run_script(source)
            elif task["kind"] == "call":
                harness.run_call(source, task["function"], payload, self.prelude, 3)
            elif task["kind"] == "evaluate":
                harness.run_evaluate(source, payload, self.prelude, 3)
            elif task["kind"] == "compile":
                os._exit(self._compile(3))
            else:
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                os.execve(4, ["program"], dict(os.environ))
        except BaseException as error:  # noqa: BLE001 - nothing may return from here into the box's first process
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(1)

    def _place_descriptors(self, kind: str, descriptors: list[int]) -> bytes:
        """0 to 2 are the standard streams, 3 takes the returned value, 4 is a compiled program. Returns the payload."""
        payload = b""
        if kind in ("call", "evaluate"):
            payload = read_all(descriptors[0])
            null = os.open("/dev/null", os.O_RDONLY)
            os.dup2(null, descriptors[0])
        # by way of high numbers, since a received descriptor may already have a number that another must get
        for index, descriptor in enumerate([fcntl.fcntl(d, fcntl.F_DUPFD_CLOEXEC, 64) for d in descriptors]):
            os.dup2(descriptor, index, inheritable=index < 3)
        os.closerange(_KEPT[kind], 1 << 16)
        return payload

    def _resource_limits(self) -> list[tuple[int, tuple[int, int]]]:
        """(resource, (soft, hard)) of a program's process, never above what this process may have itself."""
        limits = self.limits
        cpu = math.ceil(limits["cpu_s"])
        wanted = {
            resource.RLIMIT_CPU: (cpu, cpu + 1),
            resource.RLIMIT_DATA: limits["memory_bytes"],
            resource.RLIMIT_AS: limits["memory_bytes"] + _ADDRESS_SLACK,
            resource.RLIMIT_STACK: (64 << 20, resource.RLIM_INFINITY),  # programs may raise it up to the memory limit
            resource.RLIMIT_FSIZE: limits["file_bytes"],
            resource.RLIMIT_NOFILE: limits["open_files"],
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
            resource.RLIMIT_SIGPENDING: 256,
        }
        if self.isolated:  # counted in the box's own user namespace: the first process is one of them
            wanted[resource.RLIMIT_NPROC] = limits["processes"] + 1
        result = []
        for which, value in wanted.items():
            soft, hard = value if isinstance(value, tuple) else (value, value)
            ceiling = resource.getrlimit(which)[1]
            if ceiling != resource.RLIM_INFINITY:
                soft = min(soft, ceiling)
                hard = ceiling if hard == resource.RLIM_INFINITY else min(hard, ceiling)
            result.append((which, (soft, hard)))
        return result

    def _compile(self, result: int) -> int:
        """Compile the C++ source on standard input; the binary goes to `result`."""
        binary = Path(self.private) / "a.out"
        done = subprocess.run([*_COMPILER, str(binary), "-"], check=False, stdout=2)
        if done.returncode == 0:
            data = memoryview(binary.read_bytes())
            while data:
                data = data[os.write(result, data) :]
            binary.unlink()
        return 0 if done.returncode == 0 else 1


def _wait_for_next_tick() -> None:
    """File times move with the kernel's clock tick (until Linux 6.13): a change within this tick would not show."""
    now = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) == now:
        time.sleep(0.0005)


def set_environment(private: str) -> None:
    """Replace the process's environment by the one that programs see."""
    os.environ.clear()
    os.environ.update(ENVIRONMENT, HOME=private, TMPDIR=private)


def read_all(descriptor: int) -> bytes:
    """Everything in a file, from its start."""
    size = os.fstat(descriptor).st_size
    parts, offset = [], 0
    while offset < size:
        part = os.pread(descriptor, size - offset, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _kill_children() -> None:
    """Without a process namespace: kill the direct children. Their children become ours, for the sweep's next round."""
    for child in Path("/proc/self/task").glob("*/children"):
        for pid in child.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

"""Which layers of isolation this machine provides, found by trying them in a box.

Left out: printing (`fledge doctor`).
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rewards.api import InfrastructureError
from rewards.sandbox.api import MIB, Limits, Program, StdinTask
from rewards.sandbox.inside import linux
from rl.errors import ConfigError

if TYPE_CHECKING:
    from rewards.sandbox.local import LocalSandbox

# Tried inside; each name is true when the box held.
_TRIAL = """
import ctypes, errno, json, os, signal, socket
libc = ctypes.CDLL(None, use_errno=True)

def refused(action, *numbers):
    try:
        action()
    except (OSError, MemoryError) as error:
        return not numbers or getattr(error, "errno", 0) in numbers
    return False

def fork_all():
    for _ in range(64):
        if os.fork() == 0:
            signal.pause()

def write_large():
    with open("large", "wb") as file:
        file.write(bytes(9 << 20))

held = {
    "process namespace": os.getppid() == 1,
    "no new privileges": libc.prctl(39, 0, 0, 0, 0) == 1,
    "system-call filter": libc.prctl(21, 0, 0, 0, 0) == 2 and refused(lambda: socket.socket(), errno.EPERM),
    "Landlock": refused(lambda: open("/dev/full", "w"), errno.EACCES),
    "host folders hidden": not set(os.listdir("/")) & {"home", "proc", "sys", "var", "mnt"},
    "one writable folder": all(refused(lambda: open(f"{at}/x", "w")) for at in ("", "/usr", "/dev", "/etc")),
    "memory limit": refused(lambda: bytearray(128 << 20)),
    "file-size limit": refused(write_large, errno.EFBIG, errno.ENOSPC),
    "process limit": refused(fork_all, errno.EAGAIN),
}
print(json.dumps(held), flush=True)
"""
_NAMESPACES = {"user namespace": "user", "mount namespace": "mnt", "network namespace": "net", "IPC namespace": "ipc"}


@dataclass(frozen=True, slots=True)
class IsolationReport:
    """What a trial box could and could not do."""

    layers: Mapping[str, bool] = field(default_factory=dict)  # name -> it held
    problem: str = ""  # why no box could be made at all, with the remedy
    compiler: bool = False  # C++ programs can run

    @property
    def complete(self) -> bool:
        """Whether programs are fully isolated here."""
        return not self.problem and all(self.layers.values())


def probe() -> IsolationReport:
    """Start a sandbox, try every layer, end it. Takes about half a second; changes nothing."""
    from rewards.sandbox.local import LocalSandbox

    found = functools.partial(IsolationReport, compiler=shutil.which("g++") is not None)
    try:
        with tempfile.TemporaryDirectory() as folder, _closing(LocalSandbox(slots=1, slots_folder=Path(folder))) as box:
            limits = Limits(memory_bytes=96 * MIB, file_bytes=8 * MIB, processes=8)
            (result,) = box.run(Program(_TRIAL), [StdinTask("")], limits)
            if not result.stdout:
                return found(problem=f"the trial program failed: {result.stderr}")
            layers = {name: _differs(box.zygote_pid, kind) for name, kind in _NAMESPACES.items()}
            return found(layers=layers | json.loads(result.stdout))
    except (ConfigError, InfrastructureError) as error:
        return found(problem=str(error))


@contextmanager
def _closing(box: LocalSandbox) -> Iterator[LocalSandbox]:
    try:
        yield box
    finally:
        box.close()


def _differs(pid: int, kind: str) -> bool:
    """Whether a process is in a different namespace of this kind than this process."""
    return Path(f"/proc/{pid}/ns/{kind}").stat().st_ino != Path(f"/proc/self/ns/{kind}").stat().st_ino


def missing_layers() -> list[str]:
    """Layers that are known to be missing without starting anything."""
    if linux.MACHINE not in linux.SUPPORTED_MACHINES:
        wanted = " or ".join(linux.SUPPORTED_MACHINES)
        return [f"the sandbox knows the system calls of {wanted}, not of {linux.MACHINE}", "seccomp", "landlock"]
    missing = []
    if linux.landlock_abi() == 0:
        missing.append("landlock")
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        missing.append("the list of a process's children in /proc (CONFIG_PROC_CHILDREN), for the memory limit")
    if not linux.seccomp_available():
        missing.append("seccomp")
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    if release < (5, 14):
        missing.append(f"process limits inside user namespaces (Linux 5.14; this is {platform.release()})")
    return missing


def remedy(what: str) -> str:
    """The message for a machine that lacks `what`."""
    return (
        f"the code sandbox cannot isolate programs here: {what}. Allow unprivileged user namespaces (sysctl"
        " user.max_user_namespaces > 0, kernel.apparmor_restrict_unprivileged_userns=0), or start the container with a"
        " seccomp profile that lets unshare, mount and pivot_root through (docker: --security-opt"
        " seccomp=unconfined --security-opt apparmor=unconfined), or name a remote sandbox (sandbox: URL), or accept"
        " running untrusted programs unisolated with `isolation: none`"
    )

"""Ties the engine's processes to the life of the process that owns the engine.

vLLM 0.31 ends its engine core when the front end asks for it, but a front end that is killed cannot ask, and the core
then lives on with all of its memory. PR_SET_PDEATHSIG is no cure: it fires when the *thread* that started the child
ends. So each process watches for the owner's end from the moment it loads its plugins. (An engine core loads them after
its handshake with the front end; if the owner ends before that, the core gives up by itself within 5 minutes.)

vLLM's sockets are files, three per engine, which it leaves in the temporary directory: even in an orderly shutdown the
process exits before its event loop has closed them. So they get a directory of their own, which the owner removes; if
the owner was killed, the engine's processes remove it. The same goes for the file through which an engine's workers
meet, and for the shared memory of tensor-parallel workers on CPUs (8 MiB), which is named after that file. If all were
killed at once, the same user's next engine in the same place removes what was left, which it knows by the lock that an
owner holds while it lives. If an engine fails to start, the file through which its workers meet stays.

Left out: orderly shutdown (`VLLMEngine.shutdown`).
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import stat
import threading
import time
from contextlib import suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

OWNER_VARIABLE = "FLEDGE_ENGINE_OWNER"  # "<pid>:<start time>", inherited by every process of the engine
SOCKETS_VARIABLE = "FLEDGE_ENGINE_SOCKETS"  # the directory of the engine's sockets
_MEETING_VARIABLE = "FLEDGE_ENGINE_MEETING"  # in a worker: the file through which the engine's workers met
_START_TIME = 19  # index in `_stat`; in clock ticks since boot, which with the pid identify a process for good
_LOOK_S = 1.0
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "fledge-engine-"  # of the sockets' directory
_LONGEST_BASE = 107 - 24 - 36  # bytes; a socket's path has at most 107, our directory's name 24, and vLLM's names 36
_LOCK = ".fledge-engine.lock"  # in that directory; holds the path of the meeting file


class EngineFiles:
    """What an engine leaves on disk and in shared memory."""

    def __init__(self, base: str) -> None:
        self._sockets = TemporaryDirectory(prefix=_PREFIX, dir=base, ignore_cleanup_errors=True)
        self.directory = self._sockets.name
        self._meeting = ""
        unlocked = Path(self.directory, f"{_LOCK}-new")
        self._lock = unlocked.open("w")
        with suppress(OSError):  # no locks on this file system: without its final name nobody removes the directory
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            unlocked.rename(Path(self.directory, _LOCK))  # so nobody sees it unlocked while this process lives

    def own_meeting(self, path: str) -> None:
        """Take ownership of the file that a worker's `note_meeting` returned."""
        self._meeting = path
        self._lock.write(path)
        self._lock.flush()

    def cleanup(self) -> None:
        """Remove all of it. Call this when the engine has ended."""
        self._sockets.cleanup()
        _remove_meeting(self._meeting)
        self._lock.close()


def remove_left(base: str) -> None:
    """Remove what this user's engines have left in `base`, if their owners are gone."""
    for directory in Path(base).glob(f"{_PREFIX}*"):
        with suppress(OSError, ValueError):  # the owner lives and holds the lock, or it is not an engine's directory
            status = directory.lstat()
            if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o700:
                continue  # others could have put anything into it
            with open(os.open(directory / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as lock:  # noqa: PTH123
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_meeting(lock.read())
                shutil.rmtree(directory, ignore_errors=True)


def note_meeting(init_method: str) -> str:
    """In a worker: remember the file through which the engine's workers met, and return it; "" if there is none."""
    path = init_method.removeprefix("file://") if init_method.startswith("file://") else ""
    os.environ[_MEETING_VARIABLE] = path
    return path


def _remove_meeting(path: str) -> None:
    if not path:
        return
    for left in (Path(path), *_SHARED_MEMORY.glob(f"{escape(Path(path).name)}-*")):
        with suppress(OSError):  # what cannot be removed must not keep an engine alive, or hide why one ended
            left.unlink()


def own(environment: dict[str, str] | os._Environ[str]) -> EngineFiles:
    """Declare this process the owner of every engine process that it starts with `environment`.

    Returns the engine's files; call `cleanup` when the engine has ended. Its sockets are under VLLM_RPC_BASE_PATH or
    TMPDIR; under /tmp where these are too long for a socket's path, as on many clusters.
    """
    environment[OWNER_VARIABLE] = f"{os.getpid()}:{_stat(os.getpid())[_START_TIME]}"
    base = environment.get("VLLM_RPC_BASE_PATH")
    if base == environment.get(SOCKETS_VARIABLE):  # set for an earlier engine of this process
        base = None
    base = base or gettempdir()
    if len(os.fsencode(base)) > _LONGEST_BASE:
        base = "/tmp"
    remove_left(base)
    files = EngineFiles(base)
    environment[SOCKETS_VARIABLE] = environment["VLLM_RPC_BASE_PATH"] = files.directory
    return files


def tie_to_owner() -> None:
    """Start a thread that kills this process as soon as the owner has ended. Does nothing in the owner itself, or if no
    owner is declared."""
    owner = os.environ.get(OWNER_VARIABLE)
    if owner is None:
        return
    pid, start_time = (int(part) for part in owner.split(":"))
    if pid == os.getpid():
        return
    threading.Thread(target=_watch, args=(pid, start_time), name="fledge-owner-watch", daemon=True).start()


def _watch(pid: int, start_time: int) -> None:
    poll = select.poll()
    with suppress(OSError):  # the owner has ended, or the kernel has no pidfd (gVisor)
        poll.register(os.pidfd_open(pid), select.POLLIN)  # readable when the process has ended, reaped or not
        if _is_running(pid, start_time):  # checked after the pidfd is held, so the pid cannot be another process
            poll.poll()
    while _is_running(pid, start_time):
        time.sleep(_LOOK_S)
    _end()


def _is_running(pid: int, start_time: int) -> bool:
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[_START_TIME]) == start_time and fields[0] not in "ZX"  # a zombie may never be reaped


def _end() -> None:
    """Clean up, then SIGKILL: nobody is left to whom an orderly end would matter, and an engine that is busy in a
    compute kernel heeds no other signal."""
    if sockets := os.environ.get(SOCKETS_VARIABLE):
        shutil.rmtree(sockets, ignore_errors=True)
    _remove_meeting(os.environ.get(_MEETING_VARIABLE, ""))
    os.kill(os.getpid(), signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()

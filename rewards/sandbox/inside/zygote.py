"""The warm interpreter that boxes are forked from. One per service; it ends, with every box, when its socket closes.

Left out: programs. Nothing untrusted ever runs in this process.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from . import filesystem, harness, linux, seccomp
from .box import Box, set_environment

NOBODY = 65534
_OUTER = linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
_BOX = linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC


def main() -> None:
    """Entry of the zygote's interpreter. argv[1]: JSON with `fd`, `isolated`, `prefix`, `packages`, `hidden`."""
    settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=settings["fd"])
    os.environ.clear()
    prelude = harness.preload()
    gc.collect()
    gc.freeze()  # else each program's first collection would write to, and so copy, every page of the heap
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    _be_first_to_die(proc)
    try:
        if settings["isolated"]:
            _isolate(settings, proc)
    except OSError as error:
        control.send(json.dumps({"error": str(error), "errno": error.errno}).encode())
        return
    if settings["isolated"]:
        child = os.fork()  # the first process of the new process namespace
        if child:
            control.close()
            os.waitpid(child, 0)
            return
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        set_environment(filesystem.PRIVATE)
    if linux.MACHINE in linux.SUPPORTED_MACHINES:
        seccomp.build_filter(linux.MACHINE)  # cached: every box inherits it
    control.send(b'{"ready": true}')
    _serve(control, proc, settings["isolated"], prelude)


def _be_first_to_die(proc: int) -> None:
    """When the machine runs out of memory, the kernel should end boxes, not trainers."""
    try:
        descriptor = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=proc)
    except OSError:  # a hardened /proc; the boxes' own limits still hold
        return
    os.write(descriptor, b"1000")
    os.close(descriptor)


def _isolate(settings: dict[str, Any], proc: int) -> None:
    """Enter the namespaces and the root that all boxes of this zygote have in common."""
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    target = NOBODY if os.geteuid() == 0 and _is_mapped(NOBODY) else None
    if target is None:
        maps = {"setgroups": "deny", "uid_map": f"0 {os.geteuid()} 1", "gid_map": f"0 {os.getegid()} 1"}
        linux.unshare(_OUTER)
        linux.write_maps("self", maps, proc)
    else:
        os.setgroups([])
        _unshare_as(target, proc)
    filesystem.enter_root(settings["prefix"], settings["packages"], settings["hidden"])
    sys.path.append(filesystem.PACKAGES)
    linux.unshare(linux.CLONE_NEWPID)


def _is_mapped(user: int) -> bool:
    """Whether this user namespace has the user id at all (a rootless container may have a single one)."""
    with Path("/proc/self/uid_map").open() as file:
        ranges = [[int(word) for word in line.split()] for line in file]
    return any(first <= user < first + length for first, _, length in ranges)


def _unshare_as(user: int, proc: int) -> None:
    """As root: enter a user namespace whose user 0 is unprivileged outside, so that process limits take effect."""
    read_end, write_end = os.pipe()
    me = os.getpid()
    helper = os.fork()
    if helper == 0:  # stays outside, where it may map an id that is not its own
        status = 1
        try:
            os.close(write_end)
            if os.read(read_end, 1):
                linux.write_maps(str(me), {"uid_map": f"0 {user} 1", "gid_map": f"0 {user} 1"}, proc)
                status = 0
        finally:
            os._exit(status)
    linux.unshare(_OUTER)
    os.write(write_end, b"x")
    os.close(read_end)
    os.close(write_end)
    if os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]):
        raise PermissionError(1, f"mapping user {user} into a new user namespace")


def _serve(control: socket.socket, proc: int, isolated: bool, prelude: dict[str, Any]) -> None:
    """Fork one box per request: the request carries the box's socket, the answer its process handle."""
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            return
        settings = json.loads(message)
        settings["isolated"] = isolated
        settings["private"] = filesystem.PRIVATE if isolated else tempfile.mkdtemp(prefix="fledge-box-")
        try:
            child = linux.fork_into(_BOX) if isolated else os.fork()
        except OSError as error:
            control.send(json.dumps({"error": str(error), "errno": error.errno}).encode())
            os.close(descriptors[0])
            continue
        if child == 0:
            control.close()
            _run_box(descriptors[0], settings, proc, prelude)
        os.close(descriptors[0])
        handle = os.pidfd_open(child)
        answer = {"private": "" if isolated else settings["private"]}
        socket.send_fds(control, [json.dumps(answer).encode()], [handle])
        os.close(handle)


def _reap(*_: object) -> None:
    """Reap boxes that have ended; their CPU time then shows in the service's accounting."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _run_box(descriptor: int, settings: dict[str, Any], proc: int, prelude: dict[str, Any]) -> NoReturn:
    channel = socket.socket(fileno=descriptor)
    try:
        box = Box(channel, settings, prelude)
        box.lock_down(settings, proc)
        os.close(proc)
        channel.send(b'{"ready": true}')
        box.serve()
    except BaseException as error:  # noqa: BLE001 - reported to the service, which raises it
        channel.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
    finally:
        if not settings["isolated"]:
            shutil.rmtree(settings["private"], ignore_errors=True)
        os._exit(0)

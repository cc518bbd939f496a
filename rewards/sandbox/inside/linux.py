"""Thin typed wrappers of the Linux calls that Python 3.11 lacks: clone, mounts, capabilities, Landlock.

Left out: policy. What is mounted, denied or allowed is decided in `filesystem`, `seccomp` and `box`.
Sources: clone(2), mount_setattr(2), open_tree(2), capabilities(7), landlock(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import stat
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 0x1, 0x2, 0x4

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC, _MOVE_MOUNT_F_EMPTY_PATH, _MNT_DETACH = 1, 0o2000000, 0x4, 2
_SIGCHLD = 17

MACHINE = platform.machine()
_NUMBERS = {  # name: (x86_64, aarch64)
    "clone": (56, 220),
    "capset": (126, 91),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
SUPPORTED_MACHINES = ("x86_64", "aarch64")

# PyDLL keeps the interpreter lock during the call, which a clone that returns twice needs.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _syscall(name: str, *args: object) -> int:
    if MACHINE not in SUPPORTED_MACHINES:
        raise OSError(38, f"{name}: the sandbox knows {SUPPORTED_MACHINES}, this machine is {MACHINE}")
    number = _NUMBERS[name][SUPPORTED_MACHINES.index(MACHINE)]
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _check(_libc.syscall(ctypes.c_long(number), *words), name)


def fork_into(namespaces: int) -> int:
    """fork(2) whose child starts in new namespaces (CLONE_NEW* flags). The caller must have only one thread."""
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = -1
    try:
        pid = _syscall("clone", namespaces | _SIGCHLD, 0, 0, 0, 0)
    finally:
        if pid == 0:
            ctypes.pythonapi.PyOS_AfterFork_Child()
        else:
            ctypes.pythonapi.PyOS_AfterFork_Parent()
    return pid


def unshare(namespaces: int) -> None:
    """Move this process into new namespaces."""
    _check(_libc.unshare(ctypes.c_int(namespaces)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _check(result, f"mount {source} on {target}")


def open_tree(path: str) -> int:
    """A detached copy of the mounts at path, as a file descriptor for `move_mount`."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    return _syscall("open_tree", _AT_FDCWD, path.encode(), flags)


def move_mount(tree: int, target: str) -> None:
    """Attach the mounts from `open_tree` at target."""
    _syscall("move_mount", tree, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH)


def set_mount_attributes(path: str, attributes: int, recursive: bool) -> None:
    """Add MOUNT_ATTR_* to the mount at path."""
    argument = ctypes.create_string_buffer(struct.pack("=QQQQ", attributes, 0, 0, 0), 32)
    _syscall("mount_setattr", _AT_FDCWD, path.encode(), _AT_RECURSIVE if recursive else 0, argument, 32)


def make_root(path: str) -> None:
    """Make the mount at path this process's root and drop the old one."""
    os.chdir(path)
    _syscall("pivot_root", b".", b".")
    _check(_libc.umount2(b".", ctypes.c_int(_MNT_DETACH)), "umount of the old root")
    os.chdir("/")


def write_maps(process: str, maps: dict[str, str], proc: int) -> None:
    """Write a process's user-namespace maps (files in its /proc folder); `proc` is a descriptor of /proc."""
    for name, text in maps.items():
        descriptor = os.open(f"{process}/{name}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def prctl(option: int, argument: int) -> None:
    """prctl(2) with one argument."""
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero), f"prctl {option}")


def drop_capabilities() -> None:
    """Give up every capability; with no_new_privs set, neither this process nor what it starts gets one back."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    _syscall("capset", header, ctypes.create_string_buffer(24))


def install_filter(program: bytes) -> None:
    """Install a seccomp filter (an array of struct sock_filter). Needs no_new_privs."""
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)), 16)
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), fprog, zero, zero), "seccomp filter")


def seccomp_available() -> bool:
    """Whether the kernel takes seccomp filters: then a null filter is a bad address, not an unknown request."""
    zero = ctypes.c_ulong(0)
    result = _libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), None, zero, zero)
    return result < 0 and ctypes.get_errno() == errno.EFAULT


_FS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many file-system access rights each Landlock ABI has
_FS_READ = 0b1101  # execute, read_file, read_dir
_FS_FILE = 0b1100000000000111  # rights that make sense for a single file: execute, write, read, truncate, ioctl


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 if it has none."""
    try:
        return _syscall("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def landlock_ruleset(readable: list[str], writable: list[str]) -> int:
    """The descriptor of a ruleset that admits reading and executing below `readable`, everything below `writable`, and
    nothing else: no other file, no TCP (ABI 4), no signal or abstract socket to the outside (ABI 6)."""
    abi = landlock_abi()
    everything = (1 << _FS_BY_ABI[min(abi, 5)]) - 1
    attributes = struct.pack("=QQQ", everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _syscall("landlock_create_ruleset", ctypes.create_string_buffer(attributes, 24), size, 0)
    rules = [(path, _FS_READ) for path in readable] + [(path, everything) for path in writable]
    for path, access in rules:
        target = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            fitting = everything if stat.S_ISDIR(os.fstat(target).st_mode) else everything & _FS_FILE
            rule = ctypes.create_string_buffer(struct.pack("=Qi", access & fitting, target), 12)
            _syscall("landlock_add_rule", ruleset, 1, rule, 0)
        finally:
            os.close(target)
    return ruleset


def landlock_restrict(ruleset: int) -> None:
    """Bind this process, and all that it starts, to the ruleset. Needs no_new_privs."""
    _syscall("landlock_restrict_self", ruleset, 0)

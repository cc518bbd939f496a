"""The system-call filter of a box, as classic BPF: dangerous calls are denied, calls newer than the list look absent.

Left out: installing it (`linux.install_filter`). Honest programs must run unchanged under it: it leaves files, threads,
processes, pipes, socket pairs, timers and memory alone, and takes away everything that reaches other processes, the
network, mounts, namespaces, keys, the kernel's configuration, or memory that no limit counts.
Source: seccomp(2); numbers from the kernel's unistd.h.
"""

from __future__ import annotations

import functools
import struct

from .linux import SUPPORTED_MACHINES

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LAST_REVIEWED = 450  # set_mempolicy_home_node, Linux 5.17; later calls look absent (ENOSYS)

_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQ, _JUMP_GT, _JUMP_SET, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NAMESPACE_FLAGS = 0x7E020080  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME

# name: (x86_64, aarch64); None where the machine has no such call
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # network (socketpair stays, for asyncio and multiprocessing)
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # System V and POSIX message objects outlive processes
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # memory that the limits do not count or that cannot be reclaimed
    "mlock": (149, 228),
    "mlock2": (325, 284),
    "mlockall": (151, 230),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "vmsplice": (278, 75),
    # kernel surface that programs have no use for
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "fanotify_init": (300, 262),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "io_setup": (206, 0),
}
_ABSENT = {  # callers fall back when these look unimplemented
    "clone3": (435, 435),  # its flags are behind a pointer; the C library then uses clone, whose flags can be checked
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "memfd_create": (319, 279),  # its pages escape every per-process limit
    "memfd_secret": (447, 447),
}
_CLONE, _PRLIMIT64, _SENDTO, _SOCKETPAIR = (56, 220), (302, 261), (44, 206), (53, 199)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _argument_low(index: int) -> bytes:
    return _op(_LOAD, 16 + 8 * index)  # low word of struct seccomp_data.args[index], little-endian machines


def _argument_high(index: int) -> bytes:
    return _op(_LOAD, 20 + 8 * index)


@functools.cache
def build_filter(machine: str) -> bytes:
    """The filter for this machine (a key of SUPPORTED_MACHINES), as an array of struct sock_filter."""
    column = SUPPORTED_MACHINES.index(machine)
    deny, absent, allow = _op(_RETURN, _ERRNO | _EPERM), _op(_RETURN, _ERRNO | _ENOSYS), _op(_RETURN, _ALLOW)
    program = [
        _op(_LOAD, 4),  # struct seccomp_data.arch
        _op(_JUMP_EQ, _AUDIT_ARCH[machine], 1, 0),
        _op(_RETURN, _KILL_PROCESS),  # a foreign calling convention has other numbers
        _op(_LOAD, 0),  # struct seccomp_data.nr
        _op(_JUMP_GT, _LAST_REVIEWED, 0, 1),  # the x32 convention's numbers are above it too
        absent,
    ]
    for table, verdict in ((_DENIED, deny), (_ABSENT, absent)):
        for number in (numbers[column] for numbers in table.values()):
            if number is not None:
                program += [_op(_JUMP_EQ, number, 0, 1), verdict]
    program += [
        _op(_JUMP_EQ, _CLONE[column], 0, 4),
        _argument_low(0),
        _op(_JUMP_SET, _NAMESPACE_FLAGS & ~0x80, 0, 1),  # bit 7 is part of clone's exit signal
        deny,
        allow,
        _op(_JUMP_EQ, _PRLIMIT64[column], 0, 4),  # only of the calling process
        _argument_low(0),
        _op(_JUMP_EQ, 0, 1, 0),
        deny,
        allow,
        _op(_JUMP_EQ, _SOCKETPAIR[column], 0, 4),
        _argument_low(0),
        _op(_JUMP_EQ, 1, 1, 0),  # AF_UNIX
        deny,
        allow,
        _op(_JUMP_EQ, _SENDTO[column], 0, 6),  # without an address: send(2)
        _argument_low(4),
        _op(_JUMP_EQ, 0, 1, 0),
        deny,
        _argument_high(4),
        _op(_JUMP_EQ, 0, 1, 0),
        deny,
        allow,
    ]
    return b"".join(program)

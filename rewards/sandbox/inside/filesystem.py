"""What a box can see: a root of its own with read-only system folders, an interpreter, a few devices, and one tmpfs.

Left out: Landlock, which narrows the same view once more (`box`). Nothing of the host's /home, /root, /tmp, /proc, /etc
(except the loader's cache) or of the project is there, and no folder of installed Python packages.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import linux

SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
PRIVATE = "/tmp"
PACKAGES = "/packages"
_NEW_ROOT = "/proc"  # any folder that exists everywhere and is not part of the view
_EMPTY = "/.empty"


def enter_root(interpreter_prefix: str, packages: dict[str, str], hidden: list[str]) -> None:
    """Make the view and move into it. Call this in a new user and mount namespace, as a user id that may still read the
    interpreter; on return the process is that namespace's user 0, which is an ordinary user outside.

    Args:
        interpreter_prefix: the folder of the running Python interpreter, shown at the same path.
        packages: folders to show below PACKAGES: name there -> path here.
        hidden: folders inside the view to cover with an empty one (package folders, the project).
    """
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    links = {path: str(Path(path).readlink()) for path in SYSTEM_FOLDERS if Path(path).is_symlink()}
    shown = [path for path in (*SYSTEM_FOLDERS, interpreter_prefix) if Path(path).is_dir() and path not in links]
    shown = [path for path in shown if not any(_is_below(path, other) for other in shown)]
    shown += [path for path in (*SYSTEM_FILES, *DEVICES) if Path(path).exists()]
    sources = {path: (linux.open_tree(path), Path(path).is_dir()) for path in shown}
    sources |= {f"{PACKAGES}/{name}": (linux.open_tree(path), True) for name, path in packages.items()}
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # a change of user clears it, and /proc/self then belongs to root
    linux.mount("tmpfs", _NEW_ROOT, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    for folder in (PRIVATE, "/dev", _EMPTY):
        _below_root(folder).mkdir(mode=0o755, parents=True, exist_ok=True)
    for path, target in links.items():
        _below_root(path).symlink_to(target)
    _below_root("/dev/shm").symlink_to(PRIVATE)
    for path, (tree, is_folder) in sources.items():
        _attach(path, tree, is_folder)
    for path in hidden:
        if _below_root(path).is_dir():
            linux.mount(str(_below_root(_EMPTY)), str(_below_root(path)), None, linux.MS_BIND)
    linux.make_root(_NEW_ROOT)
    linux.set_mount_attributes("/", linux.MOUNT_ATTR_RDONLY, recursive=False)


def mount_private(size_bytes: int) -> None:
    """Give the calling mount namespace an empty, bounded, non-executable tmpfs as its only writable place."""
    flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("tmpfs", PRIVATE, "tmpfs", flags, f"size={size_bytes},nr_inodes=2048,mode=700")


def _attach(path: str, tree: int, is_folder: bool) -> None:
    target = _below_root(path)
    if is_folder:
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
    else:
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        target.touch()
    linux.move_mount(tree, str(target))
    os.close(tree)
    attributes = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID
    if path not in DEVICES:
        attributes |= linux.MOUNT_ATTR_NODEV
    linux.set_mount_attributes(str(target), attributes, recursive=True)


def _below_root(path: str) -> Path:
    return Path(_NEW_ROOT + path)


def _is_below(path: str, folder: str) -> bool:
    return path != folder and path.startswith(folder.rstrip("/") + "/")

"""A limit on running programs that all sandbox services of one user on a machine share, by locked files.

Left out: fairness beyond random order. The kernel frees a slot when its holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rl.errors import ConfigError

_LONGEST_NAP_S = 0.01


class Slots:
    """`count` slots, shared through `folder` with every other process that names the same folder."""

    def __init__(self, count: int, folder: Path | None = None) -> None:
        self.count = count
        self._turn = threading.BoundedSemaphore(count)  # threads of this process wait here, and wake at once
        self.folder = folder or Path(tempfile.gettempdir()) / f"fledge-sandbox-{os.getuid()}"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        owner = self.folder.lstat()
        if owner.st_uid != os.getuid() or not stat.S_ISDIR(owner.st_mode):
            raise ConfigError(f"{self.folder} belongs to user {owner.st_uid}, not to {os.getuid()}; remove it")

    @contextlib.contextmanager
    def take(self) -> Iterator[int]:
        """Wait for a free slot and hold it; yields its index."""
        with self._turn:
            nap = 0.001
            while True:
                order = list(range(self.count))
                random.shuffle(order)
                for index in order:
                    descriptor = os.open(self.folder / f"slot-{index}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        os.close(descriptor)
                        continue
                    try:
                        yield index
                    finally:
                        os.close(descriptor)
                    return
                time.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP_S)

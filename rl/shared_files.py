"""Waiting for the files of other processes, which a network file system may show to this node late."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

_TIMEOUT_S = 30.0
_LOOK_AGAIN_S = 0.1


def appears(look: Callable[[], bool]) -> bool:
    """Whether `look` returns True in the time that a file system may take."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not (seen := look()) and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN_S)
    return seen


def not_seen(paths: Sequence[Path]) -> list[Path]:
    """Those that do not exist, even after that time."""
    appears(lambda: all(path.exists() for path in paths))
    return [path for path in paths if not path.exists()]

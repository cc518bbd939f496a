"""What an engine's processes write to the stderr that they share with their owner; vLLM's exceptions only refer to it.

Left out: showing it while all is well; Ray keeps every worker's output under its session's `logs`.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path

_ERROR = re.compile(r"^\s*((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt): .*\S)\s*$", re.MULTILINE)
_TAIL_BYTES = 1 << 20  # read again for every call that fails on a dead engine
_POINTER = re.compile("root cause", re.IGNORECASE)  # "See stack trace for root cause."


class EngineLog:
    """What this process writes to stderr from now on, if stderr is a file (a Ray worker's is)."""

    def __init__(self) -> None:
        path = Path("/proc/self/fd/2").readlink()
        self._path = path if path.is_file() else None
        self._start = path.stat().st_size if self._path else 0

    def explain(self) -> str:
        """What ends an error message: the engine's own last error, and where to read more. Empty if stderr is not a
        file, because its reader has then seen the error already."""
        if self._path is None:
            return ""
        with self._path.open("rb") as file:
            file.seek(max(self._start, self._path.stat().st_size - _TAIL_BYTES))
            cause = last_error(file.read().decode(errors="replace"))
        return f"{f': {cause}' if cause else ''} (its log is {self._path} on {socket.gethostname()})"


def last_error(text: str) -> str | None:
    """The last exception in a log, ignoring those that only refer to another."""
    errors = [error for error in _ERROR.findall(text) if not _POINTER.search(error)]
    return errors[-1] if errors else None

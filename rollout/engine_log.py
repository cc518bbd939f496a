"""What an engine's processes say on the error output that they share with their owner: vLLM's errors only point to it.

Left out: showing it while all is well; Ray keeps every worker's output under its session's `logs`.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path

_ERROR = re.compile(r"^\s*((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt): .*\S)\s*$", re.MULTILINE)
_TAIL_BYTES = 1 << 20  # every call that a dead engine leaves reads it
_POINTER = re.compile("root cause", re.IGNORECASE)  # "See stack trace for root cause."


class EngineLog:
    """This process's error output from now on, where it is a file (a Ray worker's is)."""

    def __init__(self) -> None:
        path = Path("/proc/self/fd/2").readlink()
        self._path = path if path.is_file() else None
        self._start = path.stat().st_size if self._path else 0

    def explain(self) -> str:
        """For the end of an error message: the engine's last own error, and where to read more. Empty where the output
        is no file, because it has been seen already."""
        if self._path is None:
            return ""
        with self._path.open("rb") as file:
            file.seek(max(self._start, self._path.stat().st_size - _TAIL_BYTES))
            cause = last_error(file.read().decode(errors="replace"))
        return f"{f': {cause}' if cause else ''} (its log is {self._path} on {socket.gethostname()})"


def last_error(text: str) -> str | None:
    """The last exception that a log tells of, but not one that only points to another."""
    errors = [error for error in _ERROR.findall(text) if not _POINTER.search(error)]
    return errors[-1] if errors else None

"""How far the work in this process is, for those who ask from outside whether it still moves.

A learner rank is a process: one thread works (`rl.lockstep`), another one answers (`rl.workers`). Left out: who asks
(`rl.stall_watch`).
"""

from __future__ import annotations

import sys
import threading
import traceback
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Position:
    """How many pieces of work have been begun, and what the last one is."""

    begun: int = 0
    doing: str = "its start"


class Work:
    """The work of this process."""

    def __init__(self) -> None:
        self.position = Position()  # replaced as a whole, so another thread never sees half of it
        self._thread: int | None = None

    def begin(self, doing: str) -> None:
        """Call it on the thread that does it."""
        self._thread = threading.get_ident()
        self.position = Position(self.position.begun + 1, doing)

    def stack(self) -> str:
        """What the thread of the last piece executes at the moment, like a traceback; empty if it has ended."""
        frame = sys._current_frames().get(self._thread or 0)
        return "".join(traceback.format_stack(frame)) if frame else ""


WORK = Work()

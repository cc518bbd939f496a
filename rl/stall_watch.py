"""Finds out that the learner ranks have stopped moving: a rank that hangs fails no call, and the others wait for it.

Left out: how far a rank is (`rl.progress`), and the time limits of whole calls (`rl.actors`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from rl.errors import LearnerError
from rl.progress import Position

_ASK_EVERY_S = 15.0
_ANSWER_S = 15.0  # for the answers to the last question, before ranks count as hung
_STACKS = 3  # of how many ranks an error shows what they execute


class StallWatch:
    """Asks all ranks how far they are, without waiting for their answers.

    All ranks run the same micro-batches in lockstep, so if one does not move, soon none does.

    Args:
        workers: the ranks' actors, with the methods `position` and `report` of `rl.workers.LearnerWorker`.
        limit_s: how long no rank may have moved.
        settings: the configuration keys that the limit comes from.
        tell: called with what the ranks do.
    """

    def __init__(
        self, workers: Sequence[ActorHandle], limit_s: float, settings: str, tell: Callable[[str], None]
    ) -> None:
        self._workers, self._limit_s, self._settings, self._tell = list(workers), limit_s, settings, tell
        self._questions: dict[int, Any] = {}  # rank -> the call that it has not answered yet
        self._positions: dict[int, Position] = {}  # the last answers
        self._asked = -_ASK_EVERY_S
        self._moved = time.monotonic()

    def look(self) -> None:
        """Call it every few seconds. Raises LearnerError if no rank has moved in time."""
        answers = _answers(self._questions, timeout_s=0.0)
        self._questions = {rank: call for rank, call in self._questions.items() if rank not in answers}
        self._learn(answers)
        if time.monotonic() > self._moved + self._limit_s:
            self._raise_unless_moved()
        if time.monotonic() > self._asked + min(_ASK_EVERY_S, self._limit_s / 4):
            self._asked = time.monotonic()
            for rank, worker in enumerate(self._workers):
                if rank not in self._questions:
                    self._questions[rank] = worker.position.remote()

    def _learn(self, positions: Mapping[int, Position]) -> bool:
        """Keep the positions; whether one of them is new."""
        moved = any(position != self._positions.get(rank) for rank, position in positions.items())
        self._positions |= positions
        if moved:
            self._moved = time.monotonic()
            self._tell(f"the learner is at {max(self._positions.values(), key=lambda p: p.begun).doing}")
        return moved

    def _raise_unless_moved(self) -> None:
        """Ask once more, because the last answers are as old as the last question: this process may have been stopped
        since then."""
        questions = {rank: worker.report.remote() for rank, worker in enumerate(self._workers)}
        reports: dict[int, tuple[Position, str]] = _answers(questions, timeout_s=_ANSWER_S)
        positions = {rank: position for rank, (position, _) in reports.items()}
        if self._learn(positions):
            return
        error = LearnerError(
            f"no learner rank has made progress for {self._limit_s:g} s ({self._settings}): "
            f"{_where(positions, len(self._workers))}. If a micro-batch really takes that long, raise the limit or "
            "lower learner.max_tokens_per_microbatch; --resume continues from the last checkpoint"
        )
        for rank in sorted(positions, key=lambda rank: positions[rank].begun)[:_STACKS]:
            error.add_note(f"learner rank {rank} is in:\n{reports[rank][1] or 'nothing'}")
        raise error


def _answers(questions: Mapping[int, Any], *, timeout_s: float) -> dict[int, Any]:
    """Those that there are by then. A lost rank gives none: its own call says that it is lost, and why."""
    if not questions:
        return {}
    calls = list(questions.values())
    ready, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
    answers = {}
    for rank, call in questions.items():
        if call in ready:
            try:
                answers[rank] = ray.get(call)
            except RayError:
                continue
    return answers


def _where(positions: Mapping[int, Position], num_ranks: int) -> str:
    """Which ranks are where, those that are behind first."""
    together = defaultdict(list)
    for rank, position in positions.items():
        together[position].append(rank)
    parts = [
        f"ranks {ranks} are at {position.doing} (piece of work {position.begun})"
        for position, ranks in sorted(together.items(), key=lambda item: item[0].begun)
    ]
    if silent := [rank for rank in range(num_ranks) if rank not in positions]:
        parts.append(f"ranks {silent} do not answer: their processes are stopped, or busy in one call")
    return "; ".join(parts)

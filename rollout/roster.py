"""Which rollout workers there are: starts them, finds those that are lost, and starts others in their place.

Others start in the background, while those that are left go on serving, unless a run needs all of them. Left out: what
a worker does (`rollout.workers`), and what there is for it to do (`rollout.pool`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from rl.actors import Crew, end_actors, has_ended, has_failed, uninterrupted
from rl.config import RolloutConfig
from rl.errors import EnginesLostError, FledgeError, RolloutError, WeightSyncError

CREW = Crew("rollout worker", RolloutError, passing=(WeightSyncError,))
_SUSPECT = 0.1  # of rollout.hang_timeout_s, for an engine to answer where something has failed already
_NEWCOMER_S = 10.0  # for one that has nothing to do yet
_ANSWER_S = 15.0  # for a worker to say that its engine does not answer
_NEWS_S = 2.0  # for an answer that is there already to arrive, after this process itself was stopped
_CHECK_EVERY_S = 30.0  # between two questions whether an engine hangs
_MORE_LOSSES_S = 3.0  # within which the engines of a node that fails are all lost
_LOOK_S = 5.0  # between two looks at how workers do
_SHUTDOWN_TIMEOUT_S = 30.0  # for an orderly end of an engine


@dataclass(slots=True)
class _Start:
    """A worker whose engine starts."""

    worker: ActorHandle
    placed: Any  # a call that ends as soon as Ray has found room for the worker
    call: Any  # the start itself
    since: float | None = None  # when it was first seen to be placed


@dataclass(frozen=True, slots=True)
class _Check:
    """A question to a worker whether its engine makes progress."""

    call: Any
    since: float
    limit_s: float  # for an answer

    def has_bad_answer(self) -> bool:
        """Also if there is none in time."""
        if has_ended(self.call):
            return has_failed(self.call)
        if time.monotonic() < self.since + self.limit_s:
            return False
        ended, _ = ray.wait([self.call], timeout=_NEWS_S)
        return not ended or has_failed(self.call)


class Roster:
    """The rollout workers by index. Their engines begin to start at once; call `wait_until_ready` before anything else.

    Args:
        start_worker: starts the Ray actor with a given index.
        config: the rollout settings.
        all_needed: wait for those that take a lost worker's place, instead of going on with the ones that are left.
        report: called with a message when workers are lost, and when others serve in their place.
    """

    def __init__(
        self,
        start_worker: Callable[[int], ActorHandle],
        config: RolloutConfig,
        *,
        all_needed: bool,
        report: Callable[[str], None],
    ) -> None:
        self._start_worker = start_worker
        self._config = config
        self._all_needed = all_needed
        self._report = report
        self.workers: dict[int, ActorHandle] = {}  # those that serve
        self.restarts = 0
        self._losses_in_a_row = 0  # without a batch in between; many workers lost at once, as with a node, are one loss
        self._failures: Counter[int] = Counter()  # starts in a row that failed, by index
        self._ending: dict[int, ActorHandle] = {}
        self._checks: dict[int, _Check] = {}  # the last one of each that serves
        self._checked = 0.0  # when they were last looked at
        self._begun = time.monotonic()
        self._starting = {index: self._begin(index) for index in range(config.num_workers)}

    def wait_until_ready(self) -> None:
        """Wait for the engines that start when the roster is made. Raises RolloutError for the first that fails."""
        starts = dict(self._starting)
        CREW.wait(
            [start.call for start in starts.values()],
            "start its engine",
            timeout_s=self._config.start_timeout_s,
            setting="rollout.start_timeout_s",
            members=list(starts),
            since=self._begun,
        )
        self.workers |= {index: start.worker for index, start in starts.items()}
        self._starting = {}

    def raise_if_failed(self) -> None:
        """Raise RolloutError if an engine has already failed to start."""
        for index, start in self._starting.items():
            if has_failed(start.call):
                CREW.get(start.call, index, "start its engine")

    def batch_finished(self) -> None:
        """The losses before this batch are not in a row with those after it."""
        self._losses_in_a_row = 0
        self._checks = {}

    def raise_if_hung(self) -> None:
        """Raise RolloutError if an engine was found to make no more progress. Does not wait for answers, so call it
        often while a batch is under way: an engine that hangs fails no call, but it does not answer either."""
        if time.monotonic() < self._checked + _LOOK_S:
            return
        self._checked = time.monotonic()
        limit = self._config.hang_timeout_s
        for index, worker in self.workers.items():
            check = self._checks.get(index)
            if check is not None and check.has_bad_answer():
                if not has_ended(check.call):
                    raise RolloutError(
                        f"rollout worker {index} has not answered within {limit:g} s (rollout.hang_timeout_s)"
                    )
                CREW.get(check.call, index, "answer")
            if check is None or (has_ended(check.call) and time.monotonic() > check.since + _CHECK_EVERY_S):
                call: Any = worker.check_health.remote(limit)
                self._checks[index] = _Check(call, time.monotonic(), limit + _ANSWER_S)

    def find_lost(self) -> list[int]:
        """The workers that do not answer, or whose engine does not; the engines of a node that fails die one after
        another, and are found together."""
        limit = _SUSPECT * self._config.hang_timeout_s
        lost = self._found_hung() or _ill(self.workers, limit)
        if lost and len(lost) < len(self.workers):
            time.sleep(_MORE_LOSSES_S)  # in a batch, the others have enough to do meanwhile
            lost = sorted({*lost, *self._found_hung()})
            lost += _ill({index: worker for index, worker in self.workers.items() if index not in lost}, limit)
        return sorted(lost)

    def _found_hung(self) -> list[int]:
        return [index for index, check in self._checks.items() if check.has_bad_answer()]

    def can_spare(self, count: int = 1) -> bool:
        """Whether a batch can go on without so many of the workers."""
        return not self._all_needed and count < len(self.workers)

    def replace(self, lost: Sequence[int], cause: str) -> None:
        """Begin to start others in place of these, which no longer serve; `admit` lets them serve.

        Raises:
            EnginesLostError: more than rollout.max_restarts losses in a row.
        """
        self._losses_in_a_row += 1
        if self._losses_in_a_row > self._config.max_restarts:
            raise EnginesLostError(
                f"rollout workers {list(lost)} are lost, and rollout.max_restarts {self._config.max_restarts} is used "
                f"up: only that many losses in a row, without a finished batch in between, are tolerated; {cause}"
            )
        left, number = len(self.workers) - len(lost), self._config.num_workers
        meanwhile = (
            f"while those that are left ({left} of {number}) go on"
            if self.can_spare(len(lost))
            else f"which may take up to rollout.start_timeout_s {self._config.start_timeout_s:g} s"
        )
        self._report(
            f"rollout workers {list(lost)} are lost: {cause.rstrip('.')}. Others start in their place, {meanwhile} "
            "(`ray status` shows whether there is room)"
        )
        self._begin_again({index: self.workers[index] for index in lost})

    def admit(self) -> None:
        """Let those serve that have started by now, and start those again that failed. A new worker serves the initial
        weights, so sync before generating.

        Waits for all of them if all are needed, and for one if none is left to serve.

        Raises:
            EnginesLostError: in that wait, they failed to start more than rollout.max_restarts times in a row, or are
                late.
        """
        limit = self._config.start_timeout_s
        deadline = time.monotonic() + limit
        self._look_at_starts()
        while self._is_waiting:
            calls = [start.call for start in self._starting.values()]
            left = max(deadline - time.monotonic(), 0.0)
            ready, _ = ray.wait(calls, num_returns=1, timeout=min(left, _LOOK_S))
            if not ready and left <= _LOOK_S:
                raise EnginesLostError(
                    f"rollout workers {sorted(self._starting)} did not start again within {limit:g} s "
                    "(rollout.start_timeout_s)"
                )
            if self._look_at_starts():
                deadline = time.monotonic() + limit

    @property
    def _is_waiting(self) -> bool:
        return bool(self._starting) and (self._all_needed or not self.workers)

    def _look_at_starts(self) -> bool:
        """Take in those that have started, and start those again that failed; whether one of these may still be
        hoped for."""
        failures = self._failed_starts()
        back = [index for index, start in self._starting.items() if index not in failures and has_ended(start.call)]
        started = {index: self._starting[index].worker for index in back}
        for index in _ill(started, _NEWCOMER_S):  # it started, but that may be a while ago
            failures[index] = f"rollout worker {index} was lost after it had started again"
            back.remove(index)
        self.workers = dict(sorted((self.workers | {index: started[index] for index in back}).items()))
        for index in back:
            del self._starting[index]
            del self._failures[index]
        if back:
            self._report(f"rollout workers {back} serve again ({len(self.workers)} of {self._config.num_workers})")
        for index, failure in failures.items():
            self._failures[index] += 1
            if self._failures[index] == 1:  # later ones are only counted: a broken node may fail in every step
                self._report(f"{failure}; it is tried again")
        if failures:
            self._raise_if_hopeless(next(iter(failures.values())))
        self._begin_again({index: self._starting[index].worker for index in failures})
        return any(self._failures[index] <= self._config.max_restarts for index in failures)

    def _failed_starts(self) -> dict[int, str]:
        """Why starts have failed, by index. Until there is room for it on the cluster, a start is not late."""
        failures: dict[int, str] = {}
        limit = self._config.start_timeout_s
        for index, start in self._starting.items():
            if start.since is None and has_ended(start.placed):
                start.since = time.monotonic()
            if has_failed(start.call):
                try:
                    CREW.get(start.call, index, "start again")
                except FledgeError as error:
                    failures[index] = str(error)
            elif start.since is not None and time.monotonic() > start.since + limit and not has_ended(start.call):
                failures[index] = (
                    f"rollout worker {index} did not start again within {limit:g} s (rollout.start_timeout_s)"
                )
        return failures

    def _raise_if_hopeless(self, failure: str) -> None:
        """If the run waits for replacements, and those that it needs have failed too often, raise EnginesLostError."""
        enough = any if self._all_needed else all
        limit = self._config.max_restarts
        if self._is_waiting and enough(self._failures[index] > limit for index in self._starting):
            raise EnginesLostError(f"{failure}; so did every try before it (rollout.max_restarts {limit})")

    def _begin(self, index: int) -> _Start:
        worker: Any = self._start_worker(index)
        return _Start(worker, worker.__ray_ready__.remote(), worker.start.remote())

    def _begin_again(self, ended: dict[int, ActorHandle]) -> None:
        """An orderly end, if still possible, frees an engine's memory and files before its successor starts."""
        self._ending |= ended  # where an interrupt finds them
        for index in ended:
            self.workers.pop(index, None)
            self._starting.pop(index, None)
            self._checks.pop(index, None)
        _end_workers(list(ended.values()))
        with uninterrupted():
            for index in ended:
                self._starting[index] = self._begin(index)
                del self._ending[index]
                self.restarts += 1

    def shutdown(self) -> None:
        """End the engines, then the actors. Never raises: it may run while another error propagates."""
        starting = self._starting.values()
        end_actors([start.worker for start in starting if not has_ended(start.placed)])  # these would not answer
        placed = [start.worker for start in starting if has_ended(start.placed)]
        _end_workers([*self.workers.values(), *self._ending.values(), *placed])
        self.workers, self._starting, self._ending = {}, {}, {}


def _end_workers(workers: Sequence[ActorHandle]) -> None:
    calls: list[Any] = [worker.shutdown.remote() for worker in workers]
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=_SHUTDOWN_TIMEOUT_S)
    end_actors(workers)


def _ill(workers: Mapping[int, ActorHandle], timeout_s: float) -> list[int]:
    """Those that do not answer in time, or whose engine does not."""
    checks: dict[int, Any] = {index: worker.check_health.remote(timeout_s) for index, worker in workers.items()}
    if checks:
        ray.wait(list(checks.values()), num_returns=len(checks), timeout=timeout_s + _ANSWER_S)
    return [index for index, check in checks.items() if not has_ended(check) or has_failed(check)]

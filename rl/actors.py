"""Wait for Ray actors, and end them for good.

Left out: starting actors (`launch.placement` places them), and what they do.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from rl.errors import FledgeError

_DEATH_TIMEOUT_S = 30.0
_LOOK_UP_S = 5.0  # between two looks at what else happens, in a wait
_ASK_AGAIN_S = 0.02  # between checks whether a killed actor is dead
_NEWS_OF_A_LOSS_S = 5.0  # that Ray may take to report a dead actor
# Parts of the text of ray.exceptions.OutOfMemoryError, which has 4,000 more characters about Ray's settings.
_NODE_MEMORY = re.compile(r"Memory on the node \(IP: ([^,]+),.*?was (\S+) used / (\S+) limit")
_MEMORY_USER = re.compile(r"^\d+\t([\d.]+)\t(\S+)", re.MULTILINE)


_GUESSES = " Some common causes include"  # where Ray's text turns to lengthy guesses
_KILLED = (
    " If nobody ended it, the kernel probably did, because a memory limit of the job or container was reached (see "
    "Memory in docs/running.md)"
)


@dataclass(frozen=True, slots=True)
class Crew:
    """A kind of actor, and how errors of its members are reported."""

    member: str  # what a member is called, for example "learner rank"
    error: type[FledgeError]
    passing: tuple[type[FledgeError], ...] = ()  # errors of a member that are re-raised unchanged
    remedy: str = ""  # appended to the error when a member is lost
    collective: bool = False  # members wait for one another, so the others' errors can hide a lost one

    def wait(
        self,
        calls: Sequence[Any],
        what: str,
        *,
        timeout_s: float,
        setting: str,
        members: Sequence[int] | None = None,
        since: float | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Wait for one call to each member; the results, in the order of the calls.

        Args:
            calls: Ray object references.
            what: what the members were asked to do, for errors.
            setting: the configuration key that the timeout comes from.
            members: the number of each call's member; None: 0, 1, ...
            since: when the wait began (`time.monotonic`); None: with this call.
            meanwhile: called every few seconds; may raise what else has failed.

        Raises:
            FledgeError: a call failed (raised at once, because the others may only be waiting for that member), or
                calls are late, and then it names their members.
        """
        names = list(members if members is not None else range(len(calls)))
        results: dict[int, Any] = {}
        deadline = (time.monotonic() if since is None else since) + timeout_s
        waiting = list(calls)
        while waiting:
            left = max(deadline - time.monotonic(), 0.0)
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=min(left, _LOOK_UP_S))
            if not ready and left > _LOOK_UP_S:
                meanwhile()
                continue
            if not ready:
                late = [names[calls.index(call)] for call in waiting]
                raise self.error(f"{self.member}s {late} did not {what} within {timeout_s:g} s ({setting})")
            index = calls.index(ready[0])
            try:
                results[index] = self.get(ready[0], names[index], what)
            except FledgeError:
                if self.collective and not _is_lost(ready[0]) and (lost := _lost(waiting)) is not None:
                    self.get(lost, names[calls.index(lost)], what)
                raise
        return [results[index] for index in range(len(calls))]

    def get(self, call: Any, index: int, what: str) -> Any:
        """The result of a call that has ended. For an unforeseen error, the member's traceback is attached as a
        note."""
        try:
            return ray.get(call)
        except RayTaskError as error:
            if isinstance(error.cause, self.passing):
                raise error.cause from None
            foreseen = isinstance(error.cause, FledgeError)
            cause = str(error.cause) if foreseen else repr(error.cause)
            failure = self.error(f"{self.member} {index} failed to {what}: {cause}")
            if not foreseen:
                failure.add_note(str(error))  # the traceback of the member's process
            raise failure from error
        except RayError as error:  # the member or its node died, or Ray's memory monitor killed it
            raise self.error(
                f"{self.member} {index} was lost before it could {what}: {_why(error)}{self.remedy}"
            ) from error


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold interrupts back until the end of the block, in which calls are sent out to all members.

    Members that wait for one another must all get a call, or none: half of it would leave them in different
    collectives. And Ray may have sent a call whose reference an interrupt has lost.
    """
    held: list[tuple[int, Any]] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other one gets signals
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda *what: held.append(what))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            number, frame = held[0]
            handlers[number](number, frame)


def _lost(calls: Sequence[Any]) -> Any:
    """The first of these calls whose member is gone, if any.

    The other members' collectives fail a little before Ray reports the loss, in words that do not say who is missing.
    """
    ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_NEWS_OF_A_LOSS_S) if calls else ([], [])
    return next((call for call in ended if _is_lost(call)), None)


def has_ended(call: Any) -> bool:
    """Whether a call has a result or an error."""
    ended, _ = ray.wait([call], timeout=0)
    return bool(ended)


def has_failed(call: Any) -> bool:
    """Whether a call has ended with an error; False while it is running."""
    try:
        ray.get(call, timeout=0)
    except GetTimeoutError:
        return False
    except RayError:
        return True
    return False


def _is_lost(call: Any) -> bool:
    """Whether the member that ran this ended call is gone."""
    try:
        ray.get(call)
    except RayTaskError:
        return False
    except RayError:
        return True
    return False


def _why(error: RayError) -> str:
    """Ray's text in one line: the essentials if memory ran out, else all but its guesses and the actor's (indented)
    identifiers. Ray does not see the memory limits of Slurm's jobs and of systemd's slices, so its guess is ours there.
    """
    text = str(error)
    if memory := _NODE_MEMORY.search(text):
        node, used, limit = memory.groups()
        users = ", ".join(f"{name} {size} GB" for size, name in _MEMORY_USER.findall(text)[:3])
        return (
            f"Ray's memory monitor killed it, because node {node} had {used} of {limit} of memory in use (mostly by "
            f"{users}); see Memory in docs/running.md for what to lower"
        )
    plain = " ".join(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("\t"))
    plain, guesses, _ = plain.partition(_GUESSES)
    return f"{plain}{_KILLED}" if guesses else plain


def end_actors(actors: Sequence[ActorHandle]) -> None:
    """Kill actors and wait until they are dead. Never raises, because it runs while other errors propagate.

    The handles are held until then. If the last one were dropped earlier, Ray would end the worker gracefully instead,
    and its destructors can deadlock (Ray 2.60, ~CoreWorkerProcessImpl), which leaves a process behind for good.
    """
    for actor in actors:
        ray.kill(actor)
    deadline = time.monotonic() + _DEATH_TIMEOUT_S
    for actor in actors:
        while (left := deadline - time.monotonic()) > 0 and _answers(actor, left):
            time.sleep(_ASK_AGAIN_S)


def _answers(actor: ActorHandle, timeout_s: float) -> bool:
    """Whether the actor still answers: Ray's kill signal takes another route than a call, which may overtake it."""
    try:
        ray.get(actor.__ray_ready__.remote(), timeout=timeout_s)
    except RayError:  # the actor is dead, or time is up
        return False
    return True

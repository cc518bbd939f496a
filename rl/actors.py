"""Waiting for Ray actors, and ending them for good.

Left out: starting them (`launch.cluster` places them), and what they do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from rl.errors import FledgeError

_DEATH_TIMEOUT_S = 30.0
_ASK_AGAIN_S = 0.02  # whether an actor that was killed is dead
_NEWS_OF_A_LOSS_S = 5.0  # that Ray may take to tell of a dead actor
# Of the text of ray.exceptions.OutOfMemoryError, which goes on for 4,000 characters about Ray's settings.
_NODE_MEMORY = re.compile(r"Memory on the node \(IP: ([^,]+),.*?was (\S+) used / (\S+) limit")
_MEMORY_USER = re.compile(r"^\d+\t([\d.]+)\t(\S+)", re.MULTILINE)


_GUESSES = " Some common causes include"  # follow, at length, in Ray's text


@dataclass(frozen=True, slots=True)
class Crew:
    """How the errors of actors of one kind are told."""

    member: str  # "learner rank", say
    error: type[FledgeError]
    passing: tuple[type[FledgeError], ...] = ()  # raised by a member, these are raised here as they are
    remedy: str = ""  # where a member is lost
    collective: bool = False  # the members wait for one another, so what they say of a lost one hides it

    def wait(
        self,
        calls: Sequence[Any],
        what: str,
        *,
        timeout_s: float,
        setting: str,
        members: Sequence[int] | None = None,
    ) -> list[Any]:
        """What one call a member returns, in order.

        Args:
            calls: references.
            what: the members were to do.
            setting: the key that the deadline comes from.
            members: whom the calls are of; None: 0, 1, ...

        Raises:
            FledgeError: of the first call that fails, at once, because the others may only be waiting for that member;
                or calls are late, and whose.
        """
        names = list(members if members is not None else range(len(calls)))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        waiting = list(calls)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(deadline - time.monotonic(), 0.0))
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
        """The result of a call that has ended. An error that nobody foresaw has its traceback as a note."""
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
        except RayError as error:  # it died, its node did, or Ray's memory monitor killed it
            raise self.error(
                f"{self.member} {index} was lost before it could {what}: {_why(error)}{self.remedy}"
            ) from error


def _lost(calls: Sequence[Any]) -> Any:
    """The first of these calls whose member is gone, if any; the others' collectives with it fail a little before Ray
    tells of it, in words that do not say whom they miss."""
    ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_NEWS_OF_A_LOSS_S) if calls else ([], [])
    return next((call for call in ended if _is_lost(call)), None)


def has_failed(call: Any) -> bool:
    """Whether a call has ended with an error; False while it goes on."""
    try:
        ray.get(call, timeout=0)
    except GetTimeoutError:
        return False
    except RayError:
        return True
    return False


def _is_lost(call: Any) -> bool:
    """Whether the member of a call that has ended is gone."""
    try:
        ray.get(call)
    except RayTaskError:
        return False
    except RayError:
        return True
    return False


def _why(error: RayError) -> str:
    """Ray's text in one line: of a lack of memory what counts, else all but the identities of the actor (indented)."""
    text = str(error)
    if memory := _NODE_MEMORY.search(text):
        node, used, limit = memory.groups()
        users = ", ".join(f"{name} {size} GB" for size, name in _MEMORY_USER.findall(text)[:3])
        return (
            f"Ray's memory monitor killed it, because node {node} had {used} of {limit} of memory in use (mostly by "
            f"{users}); see Memory in docs/running.md for what to lower"
        )
    plain = " ".join(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("\t"))
    return plain.partition(_GUESSES)[0]


def end_actors(actors: Sequence[ActorHandle]) -> None:
    """Kill actors and wait until they are dead. Never raises: it runs while other errors are on their way out.

    The handles are held until then. Where the last one is dropped first, Ray ends the worker in order instead, and its
    destructors can lock against each other (Ray 2.60, ~CoreWorkerProcessImpl), which leaves a process behind for good.
    """
    for actor in actors:
        ray.kill(actor)
    deadline = time.monotonic() + _DEATH_TIMEOUT_S
    for actor in actors:
        while (left := deadline - time.monotonic()) > 0 and _answers(actor, left):
            time.sleep(_ASK_AGAIN_S)


def _answers(actor: ActorHandle, timeout_s: float) -> bool:
    """Whether it is still there: Ray's word to end goes another way than a call, which may arrive before it."""
    try:
        ray.get(actor.__ray_ready__.remote(), timeout=timeout_s)
    except RayError:  # it is dead, or time is up
        return False
    return True

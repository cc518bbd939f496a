"""Ending Ray actors for good. Left out: starting them (`launch.cluster` places them), and what they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

_DEATH_TIMEOUT_S = 30.0


def end_actors(actors: Sequence[ActorHandle]) -> None:
    """Kill actors and wait until they are dead. Never raises: it runs while other errors are on their way out.

    The handles are held until then. Where the last one is dropped first, Ray ends the worker in order instead, and its
    destructors can lock against each other (Ray 2.60, ~CoreWorkerProcessImpl), which leaves a process behind for good.
    """
    for actor in actors:
        ray.kill(actor)
    # A call to an actor fails as soon as its death is known; the error is the answer that is waited for.
    deaths: list[Any] = [actor.__ray_ready__.remote() for actor in actors]
    if deaths:
        ray.wait(deaths, num_returns=len(deaths), timeout=_DEATH_TIMEOUT_S)

"""Calls that may hang, run on a daemon thread and waited for with a deadline.

Left out: cancelling them. A late call goes on, but it cannot keep the process from exiting (a thread pool's would).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

from rl.errors import WeightSyncError

T = TypeVar("T")

# For the call's own deadline, which is the same one: it knows which engines are late, and should be heard first.
_NAMES_S = 5.0


def start_call(call: Callable[[], T], name: str) -> Future[T]:
    """Run `call` on a daemon thread; the future gets its result or its exception."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  # handed to whoever waits for the future
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def finish_call(future: Future[T], what: str, timeout_s: float, failure: Future[T] | None = None) -> T:
    """The call's result. Raises WeightSyncError, saying `what` was done, when the call fails or is late.

    `failure` ends the wait early: it gets an error that the call itself cannot hear of, because it waits for others.
    """
    patience_s = timeout_s + min(timeout_s, _NAMES_S)
    done, _ = wait([future] if failure is None else [future, failure], patience_s, return_when=FIRST_COMPLETED)
    if not done:
        raise WeightSyncError(
            f"{what} has not ended within {timeout_s:g} s (sync.timeout_s); an engine or its network is stuck or slow"
        )
    try:
        return (future if future in done else done.pop()).result()
    except Exception as error:
        raise WeightSyncError(f"{what} failed: {type(error).__name__}: {error}") from error

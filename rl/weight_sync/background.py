"""Run calls that may hang on a daemon thread, and wait for them with a deadline.

Left out: cancelling calls. A late one goes on, but it cannot keep the process from exiting (in a thread pool it would).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

from rl.errors import WeightSyncError

T = TypeVar("T")


def start_call(call: Callable[[], T], name: str) -> Future[T]:
    """Run `call` on a daemon thread; the future receives its result or exception."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  # handed to whoever waits for the future
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def finish_call(
    future: Future[T], what: str, timeout_s: float, late: Callable[[], str], failure: Future[T] | None = None
) -> T:
    """The call's result. Raises WeightSyncError, saying `what` was being done, if the call fails or is late.

    `late` says whom the call is waiting for (`WeightSyncClient.late`). `failure` ends the wait early: it receives
    errors that the call itself cannot see while it waits for others.
    """
    done, _ = wait([future] if failure is None else [future, failure], timeout_s, return_when=FIRST_COMPLETED)
    if not done:
        whom = late() or "the network is stuck or slow"
        raise WeightSyncError(f"{what} has not ended within {timeout_s:g} s (sync.timeout_s); {whom}")
    try:
        return (future if future in done else done.pop()).result()
    except Exception as error:
        failed = WeightSyncError(f"{what} failed: {type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):  # an engine's traceback; the cause is lost between processes
            failed.add_note(note)
        raise failed from error

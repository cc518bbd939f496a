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


def finish_call(
    future: Future[T], what: str, timeout_s: float, late: Callable[[], str], failure: Future[T] | None = None
) -> T:
    """The call's result. Raises WeightSyncError, saying `what` was done, when the call fails or is late.

    `late` says whom it waits for (`WeightSyncClient.late`). `failure` ends the wait early: it gets an error that the
    call itself cannot hear of, because it waits for others.
    """
    done, _ = wait([future] if failure is None else [future, failure], timeout_s, return_when=FIRST_COMPLETED)
    if not done:
        whom = late() or "the network is stuck or slow"
        raise WeightSyncError(f"{what} has not ended within {timeout_s:g} s (sync.timeout_s); {whom}")
    try:
        return (future if future in done else done.pop()).result()
    except Exception as error:
        failed = WeightSyncError(f"{what} failed: {type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):  # an engine's traceback; the cause does not travel
            failed.add_note(note)
        raise failed from error

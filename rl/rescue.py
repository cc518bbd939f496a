"""Saving what was learned before a run ends early. Left out: what a checkpoint holds (`rl.checkpoint`, the runs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from rl.checkpoint import CheckpointStore
from rl.errors import CheckpointError, EmptyBatchesError, FledgeError, LearnerError, WeightSyncError


class Told(Protocol):
    def message(self, text: str) -> None: ...


def save_what_was_learned(
    error: BaseException, save: Callable[[], None], *, is_saved: bool, checkpoints: CheckpointStore, display: Told
) -> None:
    """Call `save` before the run ends with `error`, unless `is_saved`, or the learners may be what has failed.

    They are intact after an interrupt, and when rollouts, rewards, files or a plugin fail. A learner that is lost would
    be waited for in vain, and weights that the rollouts did not come from must not be kept. Whatever happens in `save`,
    the caller goes on with `error`; only a second interrupt after a first one is raised.
    """
    if is_saved:
        return
    if isinstance(error, LearnerError | WeightSyncError | CheckpointError) and not isinstance(error, EmptyBatchesError):
        return
    if checkpoints.is_writing:
        display.message(checkpoints.given_up())
        return
    interrupted = isinstance(error, KeyboardInterrupt)
    reason, again = ("", "again ") if interrupted else (f"{type(error).__name__}: {error}; ", "")
    display.message(f"{reason}saving what was learned before stopping; interrupt {again}to stop at once")
    try:
        save()
    except KeyboardInterrupt:
        if interrupted:
            raise
        display.message("interrupted; the steps since the last checkpoint are not saved")
    except Exception as failed:  # noqa: BLE001 (whatever it is, it must not replace the error that ended the run)
        shown = str(failed) if isinstance(failed, FledgeError | OSError) else repr(failed)
        display.message(f"the steps since the last checkpoint could not be saved: {shown}")

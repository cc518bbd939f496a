"""Saving what was learned before a run ends early. Left out: what a checkpoint holds (`rl.checkpoint`, the runs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from rl.checkpoint import CheckpointStore
from rl.errors import CheckpointError, EmptyBatchesError, FledgeError, LearnerError, WeightSyncError


class Told(Protocol):
    def message(self, text: str) -> None: ...


def save_what_was_learned(
    error: BaseException, save: Callable[[], None], *, checkpoints: CheckpointStore, display: Told
) -> None:
    """Call `save` before the run ends with `error`, unless the learners may be what has failed.

    They are intact after an interrupt, and when rollouts, rewards, files or a plugin fail. A learner that is lost would
    be waited for in vain, and weights that the rollouts did not come from must not be kept.
    """
    if isinstance(error, LearnerError | WeightSyncError | CheckpointError) and not isinstance(error, EmptyBatchesError):
        return
    if checkpoints.is_writing:
        display.message(checkpoints.given_up())
        return
    if isinstance(error, KeyboardInterrupt):
        display.message("saving what was learned before stopping; interrupt again to stop at once")
    try:
        save()
    except (FledgeError, OSError) as failed:  # must not replace the error that ended the run
        display.message(f"the steps since the last checkpoint could not be saved: {failed}")

"""Run state on disk: atomic checkpoint folders, and the newest complete one.

A checkpoint is written to a temporary folder and renamed, so a folder named `step_N` is always complete. Left out: what
the learner writes inside (`rl.learner`), and the Hugging Face export.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rl.errors import CheckpointError

_NAME = re.compile(r"step_\d+")
_STATE = "state.json"
_DISCARDED = ".discarded_"
LEARNER = "learner"  # the sub-folder that the learner writes


class CheckpointStore:
    """The folder `checkpoints/` of a run.

    Args:
        directory: created when the first checkpoint is saved.
        keep: how many of the newest checkpoints stay on disk.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def save(self, step: int, state: Mapping[str, Any], write_learner: Callable[[Path], None]) -> Path:
        """Write a checkpoint of `step` completed steps; `write_learner` fills its learner folder.

        Nothing is visible under its final name before everything is on disk. Older checkpoints go only after that.
        """
        final = self.directory / f"step_{step:06d}"
        temporary = self.directory / f".writing_{step:06d}"
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / LEARNER).mkdir(parents=True)
        try:
            write_learner(temporary / LEARNER)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk would stay full
            raise
        if not any((temporary / LEARNER).iterdir()):
            raise CheckpointError(
                f"the learners wrote nothing that can be seen in {temporary / LEARNER}: run_dir must be on a file "
                "system that every node shares"
            )
        with (temporary / _STATE).open("w") as file:
            json.dump({"step": step, **state}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            self._discard(final)
        temporary.rename(final)
        _fsync_directory(self.directory)
        for old in self._complete()[: -self.keep]:
            self._discard(old)
        for leftover in self.directory.glob(f"{_DISCARDED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return final

    def _discard(self, path: Path) -> None:
        """Put a checkpoint aside, to be deleted at the end of this `save` or of a later one: NFS keeps files that
        another process reads, and a healthy run must not end of it."""
        aside = self.directory / f"{_DISCARDED}{path.name}_{time.time_ns()}"
        path.rename(aside)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None. Changes nothing: the run may be alive, and writing the next one."""
        complete = self._complete()
        return complete[-1] if complete else None

    def resume(self, fingerprint: str) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its state, for the run that goes on from it; None when there is none.

        Folders that a killed run left half-written are removed.

        Raises:
            CheckpointError: it cannot be read, or its "fingerprint" is another one.
        """
        for leftover in (*self.directory.glob(".writing_*"), *self.directory.glob(f"{_DISCARDED}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        path = self.latest()
        if path is None:
            return None
        state = read_state(path)
        if state["fingerprint"] != fingerprint:
            raise CheckpointError(
                f"{path} was written under another configuration (seed, model, data, batch or learner changed); "
                "resume with the run's own config.yaml, or choose another run_dir"
            )
        return path, state

    def _complete(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The run state that `CheckpointStore.save` wrote. Raises CheckpointError when it is not a checkpoint."""
    path = checkpoint / _STATE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint: {path.name} cannot be read ({error}); "
            "remove the folder to resume from the one before it"
        ) from error
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"{path} holds no run state; remove {checkpoint} to resume from the one before it")
    return state


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

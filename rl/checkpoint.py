"""Run state on disk: atomic checkpoint folders, and the newest complete one.

A checkpoint is written to a temporary folder and then renamed, so a folder named `step_N` is always complete. Left out:
what the learner writes inside (`rl.learner_checkpoint`), and the Hugging Face export.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

from rl.errors import CheckpointError, LearnerError
from rl.shared_files import appears

_NAME = re.compile(r"step_\d+")
_STATE = "state.json"
_FEW_BYTES = 4 * 2**20  # a disk with less room than this is called full
_DISCARDED = ".discarded_"
_SETTINGS = "settings"
_CONTENTS = "contents"
_UNSET = "unset"
LEARNER = "learner"  # the sub-folder that the learner writes


class Resumable(NamedTuple):
    """A checkpoint from which a run can continue."""

    path: Path
    state: dict[str, Any]
    changed: list[str]  # settings that differ from the checkpoint's, as "key old -> new"

    def describe(self) -> str:
        """A message for people: where the run continues, and which settings have changed."""
        changes = f"; changed since: {', '.join(self.changed)}" if self.changed else ""
        return f"resumed from {self.path} ({self.state['step']} steps done){changes}"


def of_step(step: int, save_checkpoint: Callable[[Path], int]) -> Callable[[Path], None]:
    """`save_checkpoint`, which returns a policy version, with a check that the weights are those of `step`."""

    def write(directory: Path) -> None:
        if (version := save_checkpoint(directory)) != step:
            raise CheckpointError(f"the learners saved policy version {version} as that of step {step}")

    return write


class CheckpointStore:
    """A run's folder `checkpoints/`.

    Args:
        directory: created when the first checkpoint is saved.
        keep: how many of the newest checkpoints stay on disk; None: all.
        best_of: the step of the best among these, which stays too; None if it is not known.
        settings: the run's configuration as plain nested dicts, which every checkpoint records.
        fixed: dotted keys of settings and sections that must be the same in a run and the checkpoint it resumes from.
        contents: of such settings that are paths, what tells whether another path leads to the same files.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int | None,
        best_of: Callable[[Collection[int]], int | None] = lambda steps: None,
        settings: Mapping[str, Any] | None = None,
        fixed: Sequence[str] = (),
        contents: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.keep = keep
        self.best_of = best_of
        self.is_writing = False  # whether the learners may still be writing, after an interrupt
        self._settings = settings or {}
        self._fixed = fixed
        self._contents = contents or {}

    def save(self, step: int, state: Mapping[str, Any], write_learner: Callable[[Path], None]) -> Path:
        """Write a checkpoint after `step` completed steps; `write_learner` fills its learner folder.

        The final name appears only when everything is on disk. Older checkpoints are deleted only after that.

        Raises:
            CheckpointError: the disk is full, or what the learners wrote cannot be seen here.
        """
        final = self.directory / f"step_{step:06d}"
        temporary = self.directory / f".writing_{step:06d}"
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / LEARNER).mkdir(parents=True)
        self.is_writing = True
        try:
            write_learner(temporary / LEARNER)
            self.is_writing = False
            if not appears(lambda: any((temporary / LEARNER).iterdir())):
                raise CheckpointError(
                    f"nothing that the learners wrote is visible in {temporary / LEARNER}: run_dir must be on a file "
                    "system that every node shares"
                )
            with (temporary / _STATE).open("w") as file:
                of_run = {_SETTINGS: self._settings, _CONTENTS: self._contents}
                json.dump({"step": step, **of_run, **state}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            full = isinstance(error, LearnerError | OSError) and _is_full(temporary)
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk would stay full
            if full:
                raise CheckpointError(self._without_room(step, error)) from error
            raise
        if final.exists():
            self._discard(final)
        temporary.rename(final)
        _fsync_directory(self.directory)
        if self.keep is not None:
            older = {number: path for number, path in self.complete().items() if number != step}
            kept = {*list(older)[max(len(older) - self.keep + 1, 0) :], self.best_of(older)}
            for number in older.keys() - kept:
                self._discard(older[number])
        for leftover in self.directory.glob(f"{_DISCARDED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return final

    def _without_room(self, step: int, error: BaseException) -> str:
        """What to say of a checkpoint that could not be written because the disk is full."""
        newest = self.latest()
        last = "there is no earlier one"
        if newest is not None:
            size = sum(path.stat().st_size for path in newest.rglob("*"))
            last = f"--resume continues from {newest}, which has {size / 2**30:.3g} GiB"
        return (
            f"the checkpoint of step {step} could not be written, because {self.directory} is full ({error}). Free "
            f"some space there, for example by removing older step_* folders; {last}"
        )

    def given_up(self) -> str:
        """What a run's end while `is_writing` costs, for people. Another save would collide with this one,
        which the learners are still writing."""
        newest = self.latest()
        kept = f"--resume continues from {newest}" if newest else "there is no earlier one"
        return f"the run ended while a checkpoint was being written, which is given up; {kept}"

    def _discard(self, path: Path) -> None:
        """Set a checkpoint aside, to be deleted at the end of this `save` or a later one: NFS keeps files that another
        process is reading, and that must not end a healthy run."""
        aside = self.directory / f"{_DISCARDED}{path.name}_{time.time_ns()}"
        path.rename(aside)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None. Changes nothing on disk, because the run may be alive and
        writing."""
        return next(reversed(self.complete().values()), None)

    def resume(self) -> Resumable | None:
        """The newest complete checkpoint, for the run that continues from it; None if there is none.

        Folders that a killed run left half-written or half-deleted are removed.

        Raises:
            CheckpointError: it cannot be read, or fixed settings differ; the message names each of them.
        """
        for leftover in (*self.directory.glob(".writing_*"), *self.directory.glob(f"{_DISCARDED}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        path = self.latest()
        if path is None:
            return None
        state = read_state(path)
        changed = dict(_differences(state[_SETTINGS], self._settings))
        moved = {key for key, digest in state.get(_CONTENTS, {}).items() if self._contents.get(key) == digest}
        if refused := [change for key, change in changed.items() if self._is_fixed(key) and key not in moved]:
            raise CheckpointError(
                f"{path} cannot be resumed with another configuration: {', '.join(refused)}; restore what changed, or "
                "choose another run_dir"
            )
        return Resumable(path, state, list(changed.values()))

    def _is_fixed(self, key: str) -> bool:
        # A section that is None on one side differs as a whole, so what is fixed may also be inside the key.
        return any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in self._fixed)

    def complete(self) -> dict[int, Path]:
        """The complete checkpoints by step, oldest first."""
        if not self.directory.is_dir():
            return {}
        found = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return dict(sorted((int(path.name.removeprefix("step_")), path) for path in found))


@contextmanager
def naming_a_full_disk(folder: Path, what: str, way_out: str) -> Iterator[None]:
    """While `what` is written into a folder under `folder`: a CheckpointError in place of an error that comes of a full
    disk, since those of torch and safetensors name no folder."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CheckpointError) or not _is_full(folder):
            raise
        raise CheckpointError(f"{what} could not be written, because {folder} is full ({error}). {way_out}") from error


def _is_full(folder: Path) -> bool:
    """Whether the disk, or the user's part of it, has no room for a few more bytes. Another error does not tell:
    torch.save's is "unexpected pos 273408 vs 273296"."""
    try:
        with TemporaryFile(dir=folder) as file:
            file.write(os.urandom(_FEW_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The run state that `CheckpointStore.save` wrote. Raises CheckpointError if the folder is not a complete
    checkpoint."""
    path = checkpoint / _STATE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint: {path.name} cannot be read ({error}); "
            "remove the folder to resume from the one before it"
        ) from error
    if not isinstance(state, dict) or not {"step", _SETTINGS} <= state.keys():
        raise CheckpointError(
            f"{path} holds no run state that this version can read; remove {checkpoint} to resume from the one before "
            "it"
        )
    return state


def _differences(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of the values that differ, each with "key old -> new"."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in (*before, *(name for name in after if name not in before)):
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(before.get(name, _UNSET), after.get(name, _UNSET), inner)
    elif before != after:
        yield key, f"{key} {_shown(before)} -> {_shown(after)}"


def _shown(value: Any) -> str:
    return "a section" if isinstance(value, Mapping) else str(value)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

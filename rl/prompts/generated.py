"""Rows of reasoning-gym's tasks, made in a process of their own.

Some tasks go through sets of texts (word_ladder, ransom_note and others), so what they make depends on Python's hash
seed, which is another one in every process; list_functions draws from Python's global generator. A resumed run would
learn from other problems, and two evaluations would measure different things. The process that makes them has both
seeds fixed.

Left out: the other sources (`rl.prompts.rows`).
"""

from __future__ import annotations

import difflib
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rl.config import DatasetConfig
from rl.errors import DataError

REASONING_GYM = "reasoning_gym:"
_COMPOSITE = "composite"  # the task that mixes others


class _Made(NamedTuple):
    """What the process says: all entries, or why there is not one more."""

    entries: list[dict[str, Any]]
    refused: str = ""  # the task's settings
    failed: str = ""  # making the entry after the last one


def is_generated(config: DatasetConfig) -> bool:
    """Whether the rows are made here."""
    return any(path.startswith(REASONING_GYM) for path in config.paths)


def generated_rows(config: DatasetConfig, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(location, fields) with what the task's own scorer needs: `score_answer(answer, entry)` of a task made with
    extra.options takes entry = {"question": extra.question, "answer": ground_truth, "metadata": extra.metadata}.

    A row of `composite` is one of the task that it was drawn from.

    Raises:
        DataError: there is no such task or option, the task refuses its options, or fails to make an entry.
    """
    task = path.removeprefix(REASONING_GYM)
    made = _make(task, config, path)
    for index, entry in enumerate(made.entries):
        drawn = entry["metadata"]["source_dataset"] if task == _COMPOSITE else task
        fields = {
            config.prompt_field: entry["question"],
            "data_source": f"{REASONING_GYM}{drawn}",
            "question": entry["question"],
            "metadata": entry["metadata"],
            "options": _own_options(config.options, drawn) if task == _COMPOSITE else config.options,
        }
        if config.ground_truth_field is not None:
            fields[config.ground_truth_field] = entry["answer"]
        yield f"{path} item {index + 1} (seed {config.seed})", fields
    if made.failed:
        raise DataError(
            f"{path} item {len(made.entries) + 1} (seed {config.seed}): the task failed to generate it: "
            f"{made.failed}; change options or seed"
        )


def _own_options(options: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What `composite` was told of one of its tasks, without seed and size, which are no matter of scoring."""
    own = next(spec for spec in options["datasets"] if spec["name"] == task).get("config", {})
    return {key: value for key, value in own.items() if key not in ("seed", "size")}


def _make(task: str, config: DatasetConfig, path: str) -> _Made:
    _check_names(task, config, path)
    size = {} if config.size is None else {"size": config.size}
    asked = pickle.dumps((task, {"seed": config.seed, **size, **config.options}))
    process = subprocess.run(
        [sys.executable, "-P", "-c", f"from {__name__} import _answer; _answer()"],
        input=asked,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if process.returncode:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        raise DataError(
            f"dataset {path}: the process that generates the task ended with exit code {process.returncode}: "
            f"{lines[-1] if lines else 'it said nothing'}"
        )
    made: _Made = pickle.loads(process.stdout)
    if made.refused:
        raise DataError(f"dataset {path}: the task rejects the options {config.options}: {made.refused}")
    return made


def _check_names(task: str, config: DatasetConfig, path: str) -> None:
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see the reasoning-gym gallery for names"
        raise DataError(f"dataset {path}: reasoning_gym has no task {task!r}; {hint}")
    known = [name for name in DATASETS[task][1].__dataclass_fields__ if name not in ("seed", "size")]
    unknown = [name for name in config.options if name not in known]
    if unknown:
        remedy = "; use the dataset's own size and seed" if set(unknown) & {"seed", "size"} else ""
        raise DataError(
            f"dataset {path}: {task} has no option {', '.join(unknown)}{remedy}; it takes {', '.join(known)}"
        )


def _answer() -> None:
    """The process: a pickle of (task, settings) on standard input, one of `_Made` on standard output."""
    answer, sys.stdout = sys.stdout.buffer, sys.stderr  # a task may print
    answer.write(pickle.dumps(_entries(*pickle.load(sys.stdin.buffer))))
    answer.flush()


def _entries(task: str, settings: dict[str, Any]) -> _Made:
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    random.seed(settings["seed"])  # list_functions draws from it, whatever its own seed
    try:
        if task == _COMPOSITE:
            specs = settings.get("datasets", ())
            settings["datasets"] = [DatasetSpec(**{"weight": 1.0, "config": {}, **spec}) for spec in specs]
        dataset = reasoning_gym.create_dataset(task, **settings)
    except Exception as error:  # noqa: BLE001  tasks check their settings with assert, ValueError and TypeError
        return _Made([], refused=str(error) or repr(error))
    entries = []
    try:
        for index in range(len(dataset)):
            entries.append(dataset[index])
    except Exception as error:  # noqa: BLE001  a task's generator may raise anything for its own settings
        return _Made(entries, failed=repr(error))
    return _Made(entries)

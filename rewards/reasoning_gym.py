"""`reasoning_gym`: the task's own scorer. Left out: making the tasks (`rl.prompts`, a dataset reasoning_gym:TASK)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from rewards.api import GroundTruthError, RewardInput, RewardOutput, register_reward
from rewards.format import boxed_contents, tagged_contents

_PREFIX = "reasoning_gym:"
FULL_MARKS = 0.999  # some scorers compute 1.0 in floating point
_DECOYS = ("nan", "0", "foo")  # answers that a model would always give if a scorer let them pass


@register_reward("reasoning_gym")
class ReasoningGymReward:
    """The score from reasoning-gym's scorer for the row's task; by default 1 for full marks and 0 for less.

    The answer is the content of the last `<answer>` or `\\boxed{}` in the final answer, else all of it. The row comes
    from a dataset `reasoning_gym:TASK`, which gives it `data_source`, `question`, `metadata` and `options`.

    Args:
        task: the task of rows that do not name theirs in `data_source`.
        partial: the scorer's own number, partial credit included. Many tasks give some for an answer that is wrong but
            of the right kind, or that holds the right one somewhere.
    """

    def __init__(self, *, task: str | None = None, partial: bool = False) -> None:
        self._task = task
        self._partial = partial
        self._datasets: dict[tuple[str, str], Any] = {}

    def __call__(self, sample: RewardInput) -> RewardOutput:
        dataset = self._dataset(sample.data_source, sample.extra)
        entry = _entry(sample.ground_truth, sample.extra)
        extracted, failed = _extract(sample.answer), 0.0
        try:
            score = float(dataset.score_answer(extracted, entry))
        except Exception:  # noqa: BLE001  it took the right answer when the data loaded, so this answer broke it
            score, failed = 0.0, 1.0
        reward = score if self._partial else float(score >= FULL_MARKS)
        return RewardOutput(reward, {"score": score, "scorer_failed": failed}, extracted)

    def validate_ground_truth(self, ground_truth: Any, extra: Mapping[str, Any]) -> None:
        """Raise GroundTruthError if the scorer cannot work with the row, or accepts an answer other than the row's."""
        dataset = self._dataset(str(extra.get("data_source", "")), extra)
        entry = _entry(ground_truth, extra)
        if ground_truth is not None:  # tasks with many right answers give none
            try:
                score = float(dataset.score_answer(ground_truth, entry))
            except Exception as error:
                raise GroundTruthError(f"reasoning_gym: the scorer fails on the row's own answer: {error!r}") from error
            if score < FULL_MARKS:
                raise GroundTruthError(
                    f"reasoning_gym: the scorer gives the row's own answer {ground_truth!r} only {score}"
                )
        for decoy in _DECOYS:
            score = 0.0
            with contextlib.suppress(Exception):  # a scorer that raises does not fall for the decoy
                score = float(dataset.score_answer(decoy, entry))
            if score >= FULL_MARKS and not _same(decoy, ground_truth):
                raise GroundTruthError(
                    f"reasoning_gym: the scorer gives full marks to {decoy!r}, though the row's own answer is "
                    f"{ground_truth!r}; if it does so for every row, the task cannot be trained on"
                )

    def _dataset(self, data_source: str, extra: Mapping[str, Any]) -> Any:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        task = data_source.removeprefix(_PREFIX) if data_source.startswith(_PREFIX) else self._task
        if task is None:
            raise GroundTruthError(
                f"reasoning_gym: data_source {data_source!r} is not {_PREFIX}TASK; set the reward's option task"
            )
        if task not in DATASETS:
            raise GroundTruthError(f"reasoning_gym has no task {task!r}")
        options = dict(extra.get("options") or {})
        key = (task, json.dumps(options, sort_keys=True, default=str))
        if key not in self._datasets:
            self._datasets[key] = reasoning_gym.create_dataset(task, seed=0, size=1, **options)
        return self._datasets[key]


def _entry(ground_truth: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    metadata = extra.get("metadata")
    if not isinstance(metadata, Mapping):
        raise GroundTruthError("reasoning_gym: the row has no field metadata, which the task's scorer reads")
    return {"question": extra.get("question", ""), "answer": ground_truth, "metadata": dict(metadata)}


def _same(decoy: str, ground_truth: Any) -> bool:
    """As text or as numbers."""
    own = str(ground_truth).strip()
    try:
        return decoy == own or float(decoy) == float(own)
    except ValueError:
        return False


def _extract(answer: str) -> str:
    if tagged := tagged_contents(answer):
        return tagged[-1].strip()
    if boxes := boxed_contents(answer):
        return boxes[-1].strip()
    return answer.strip()

"""`math`: does the response's final answer equal the ground truth?

Left out: how that is decided, which is `rewards.mathematics`, one concern a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.api import GroundTruthError, RewardInput, RewardOutput, register_reward
from rewards.mathematics.extraction import extract_answer, last_box
from rewards.mathematics.normalisation import normalise
from rewards.mathematics.numbers import read_number
from rewards.mathematics.worker_pool import SymbolicPool, WorkerLostError


@register_reward("math")
class MathReward:
    """1 when the final answer equals the ground truth, else 0."""

    def __init__(self, deadline_s: float = 5.0, memory_mib: int = 1024, num_workers: int = 1) -> None:
        self._pool = SymbolicPool(num_workers, deadline_s, memory_mib)

    def __call__(self, sample: RewardInput) -> RewardOutput:
        gold = _gold(sample.ground_truth)
        answer = extract_answer(sample.answer)
        if answer is None:
            return RewardOutput(0.0, {"answered": 0.0})
        return RewardOutput(float(self._equal(gold, normalise(answer))), {"answered": 1.0})

    def validate_ground_truth(self, ground_truth: Any, extra: Mapping[str, Any]) -> None:
        """Raise GroundTruthError when no answer could ever equal this ground truth."""
        _gold(ground_truth)

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def _equal(self, gold: str, answer: str) -> bool:
        if gold == answer:
            return True
        a, b = read_number(gold), read_number(answer)
        if a is not None and b is not None:
            return a.value == b.value
        try:
            return bool(self._pool.equal(gold, answer))
        except WorkerLostError:
            return False


def _gold(ground_truth: Any) -> str:
    text = str(ground_truth).strip()
    gold = normalise(last_box(text) or text)
    if ground_truth is None or not gold:
        raise GroundTruthError(f"math needs a ground truth that is a number or text, got {ground_truth!r}")
    return gold

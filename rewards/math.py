"""`math`: does the response's final answer equal the ground truth?

Left out: how that is decided, which is `rewards.mathematics`, one concern a module. The policy: docs/rewards/math.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.api import GroundTruthError, RewardInput, RewardOutput, register_reward
from rewards.mathematics.comparison import Policy
from rewards.mathematics.extraction import MAX_ANSWER_CHARS, extract_answer, last_box
from rewards.mathematics.normalisation import normalise
from rewards.mathematics.verifier import Verifier, spelling
from rewards.mathematics.worker_pool import SymbolicPool, WorkerLostError

MAX_TRUTHS = 32  # accepted answers of one row


@register_reward("math")
@dataclass(eq=False)
class MathReward:
    """1 when the final answer equals the ground truth, else 0.

    The ground truth is a number or a text, or a list of which any member is right; of a worked solution the last box
    counts. Breakdown: `answered` (a final answer was found), `symbolic` (computer algebra was asked), `symbolic_lost`
    (it was, and hit its limits, which costs the sample its reward).
    """

    significant_digits: int = 6  # a decimal with at least this many equals the exact value that it rounds
    percent_sign_optional: bool = True  # 28 for 28%, and the reverse
    unit_optional: bool = True  # 15 for 15 cm, and the reverse
    convert_units: bool = True  # 500 cm for 5 m
    require_box: bool = False  # only a boxed answer counts
    deadline_s: float = 3.0  # CPU seconds of computer algebra per pair; four times as many by the clock
    memory_mib: int = 1024  # address space of computer algebra
    _verifier: Verifier = field(init=False, repr=False)
    _pool: SymbolicPool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("significant_digits", 2), ("deadline_s", 0.1), ("memory_mib", 256)):
            if getattr(self, name) < least:
                raise ValueError(f"math: {name} is {getattr(self, name)}; it must be at least {least}")
        self._pool = SymbolicPool(size=1, deadline_s=self.deadline_s, memory_mib=self.memory_mib)
        policy = Policy(self.significant_digits, self.percent_sign_optional, self.unit_optional, self.convert_units)
        self._verifier = Verifier(policy, self._pool)

    def __call__(self, sample: RewardInput) -> RewardOutput:
        """Score one response. Raises GroundTruthError for an unusable ground truth."""
        truths = _truths(sample.ground_truth)
        self._pool.warm_up()
        answer = last_box(sample.answer) if self.require_box else extract_answer(sample.answer)
        if answer is None or not answer.strip() or len(answer) > MAX_ANSWER_CHARS:
            return RewardOutput(0.0, {"answered": 0.0, "symbolic": 0.0, "symbolic_lost": 0.0})
        equal = symbolic = lost = False
        for truth in truths:
            decision = self._verifier.decide(truth, answer, sample.prompt)
            equal, symbolic, lost = decision.equal, symbolic or decision.symbolic, lost or bool(decision.lost)
            if equal:
                break
        parts = {"answered": 1.0, "symbolic": float(symbolic), "symbolic_lost": float(lost)}
        # A majority is counted by one spelling for all equal answers: the ground truth's, if they are right.
        return RewardOutput(float(equal), parts, normalise(truth) if equal else spelling(answer))

    def validate_ground_truth(self, ground_truth: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Raise GroundTruthError for a ground truth that is unusable, or that no answer could be found equal to."""
        for truth in _truths(ground_truth):
            try:
                judged = self._verifier.can_judge(truth)
            except WorkerLostError as error:
                raise GroundTruthError(
                    f"math: the ground truth {_shown(truth)} takes too long to read: {error}"
                ) from error
            if not judged:
                raise GroundTruthError(
                    f"math: the ground truth {_shown(truth)} is neither a formula nor words; check its brackets and "
                    "commands, or give the row another reward"
                )

    def close(self) -> None:
        """End the worker process."""
        self._pool.close()


def _truths(ground_truth: Any) -> list[str]:
    if isinstance(ground_truth, Sequence) and not isinstance(ground_truth, str):
        if not 1 <= len(ground_truth) <= MAX_TRUTHS:
            raise GroundTruthError(f"math: a list of {len(ground_truth)} ground truths; 1 to {MAX_TRUTHS} are allowed")
        return [_truth(item) for item in ground_truth]
    return [_truth(ground_truth)]


def _truth(ground_truth: Any) -> str:
    """One ground truth as text: the last box of a worked solution, what follows GSM8K's ####, else all of it."""
    if not isinstance(ground_truth, (str, int, float)):
        raise GroundTruthError(
            f"math: the ground truth is a {type(ground_truth).__name__}; it must be a number, a text or a list of those"
        )
    if isinstance(ground_truth, float) and not math.isfinite(ground_truth):
        raise GroundTruthError(f"math: the ground truth is {ground_truth}, which is not a finite number")
    text = str(ground_truth)
    boxed = last_box(text)
    truth = boxed if boxed is not None else text.rpartition("####")[2]
    if not normalise(truth):
        raise GroundTruthError(f"math: the ground truth {_shown(text)} is empty")
    if len(truth) > MAX_ANSWER_CHARS:
        raise GroundTruthError(
            f"math: the ground truth has {len(truth)} characters, more than {MAX_ANSWER_CHARS}; box its final answer"
        )
    return truth.strip()


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")

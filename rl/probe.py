"""Do the rollout workers hold the learner's weights? Compares both sides' log-probabilities on the same tokens.

Digests prove what arrived; this proves what is served, whatever the engine did while it loaded. Left out: the transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl.batch import RolloutBatch, TokenPair
from rl.controller import Learners, RolloutPool
from rl.errors import WeightSyncError

_NUM_SEQUENCES = 4
_MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class AgreementBounds:
    """Largest differences in log-probability (nats) between rollout and learner under the same weights."""

    mean: float
    maximum: float

    @classmethod
    def for_dtype(cls, dtype: str, mean: float | None = None, *, experts: bool = False) -> AgreementBounds:
        """float32 agrees to rounding. bfloat16 differs by anything on a rare token; in the mean by 0.002 in tiny models
        and 0.01 to 0.04 in dense ones of 4 B to 7 B parameters (as users of other systems report), and by more where
        rounding flips the choice of `experts`. Another bound of the mean moves float32's maximum with it."""
        if dtype == "float32":
            return cls(mean=mean or 1e-4, maximum=10 * (mean or 1e-4))
        return cls(mean=mean or (0.3 if experts else 0.1), maximum=float("inf"))


class WeightProbe:
    """Checks every rollout worker against the learners.

    Args:
        every: syncs between probes after the first; 0 means never.
        bounds: what counts as agreement.
    """

    def __init__(self, *, every: int, bounds: AgreementBounds) -> None:
        self.every = every
        self.bounds = bounds
        self._syncs = 0
        self._owed = False

    def due(self) -> bool:
        """Count one sync; True when it is to be probed, or an earlier one still is."""
        self._syncs += 1
        self._owed |= self.every > 0 and (self._syncs == 1 or self._syncs % self.every == 0)
        return self._owed

    def pairs(self, rollouts: RolloutBatch) -> list[TokenPair]:
        """The texts to compare: the first rollouts that say something, cut to _MAX_TOKENS of the response, and without
        their last one: an engine that scores a text generates another token, for which a full context has no room."""
        chosen = [r for r in rollouts.rollouts if r.length][:_NUM_SEQUENCES]
        lengths = [min(max(r.length - 1, 1), _MAX_TOKENS) for r in chosen]
        return [
            (rollouts.prompt_of(r).token_ids, tuple(r.token_ids[:length].tolist()))
            for r, length in zip(chosen, lengths, strict=True)
        ]

    def check(
        self, pairs: Sequence[TokenPair], rollout_pool: RolloutPool, learners: Learners, *, policy_version: int
    ) -> dict[str, float]:
        """Compare; returns the differences as metrics, none where every response was empty: the next sync is probed.

        Raises:
            WeightSyncError: a worker's mean or maximal difference is outside the bounds (or not a number).
        """
        if not pairs:
            return {}
        self._owed = False
        reference = np.concatenate(learners.score_logprobs(pairs))
        worst_mean = worst_max = 0.0
        for worker, logprobs in enumerate(rollout_pool.score_logprobs(pairs)):
            difference = np.abs(np.concatenate(logprobs) - reference)
            mean, maximum = float(difference.mean()), float(difference.max())
            if not (mean <= self.bounds.mean and maximum <= self.bounds.maximum):
                raise WeightSyncError(
                    f"rollout worker {worker} does not serve policy version {policy_version}: its log-probabilities "
                    f"of {len(reference)} tokens differ from the learner's by {mean:.2e} on average (bound "
                    f"{self.bounds.mean:.0e}) and by {maximum:.2e} at most (bound {self.bounds.maximum:.0e}). The "
                    "bytes arrived intact, so the engine loaded them wrongly; see docs/weight-sync.md"
                )
            worst_mean, worst_max = max(worst_mean, mean), max(worst_max, maximum)
        return {"sync/probe_diff_mean": worst_mean, "sync/probe_diff_max": worst_max}

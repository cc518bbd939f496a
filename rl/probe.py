"""Check that the rollout workers serve the learner's weights, by log-probabilities on the same tokens.

Digests prove what arrived; this proves what is served, whatever the engine did while loading. Left out: the transfer.
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
        """The bounds for a dtype; `mean` replaces the default bound on the mean, and float32's maximum is ten times
        that.

        float32 agrees up to rounding. In bfloat16 a rare token can differ by any amount; the mean is 0.002 in tiny
        models, 0.01 to 0.04 in dense ones of 4 B to 7 B parameters (as users of other systems report), and more where
        rounding flips the choice of `experts`.
        """
        if dtype == "float32":
            return cls(mean=mean or 1e-4, maximum=10 * (mean or 1e-4))
        return cls(mean=mean or (0.3 if experts else 0.1), maximum=float("inf"))


class WeightProbe:
    """Checks every rollout worker against the learners.

    Args:
        every: probe the first sync and then every sync whose number is a multiple of this; 0: never.
        bounds: what counts as agreement.
    """

    def __init__(self, *, every: int, bounds: AgreementBounds) -> None:
        self.every = every
        self.bounds = bounds
        self._syncs = 0
        self._owed = False

    def due(self) -> bool:
        """Count one sync; True if it should be probed, or if a probe that an earlier one needed has not yet run."""
        self._syncs += 1
        self._owed |= self.every > 0 and (self._syncs == 1 or self._syncs % self.every == 0)
        return self._owed

    def pairs(self, rollouts: RolloutBatch) -> list[TokenPair]:
        """The token sequences to compare: the first non-empty rollouts, cut to _MAX_TOKENS response tokens.

        Each loses its last token (unless it is the only one), because an engine that scores a text also generates one
        more token, for which a full context has no room.
        """
        chosen = [r for r in rollouts.rollouts if r.length][:_NUM_SEQUENCES]
        lengths = [min(max(r.length - 1, 1), _MAX_TOKENS) for r in chosen]
        return [
            (rollouts.prompt_of(r).token_ids, tuple(r.token_ids[:length].tolist()))
            for r, length in zip(chosen, lengths, strict=True)
        ]

    def check(
        self, pairs: Sequence[TokenPair], rollout_pool: RolloutPool, learners: Learners, *, policy_version: int
    ) -> dict[str, float]:
        """Compare, and return the differences as metrics.

        Without `pairs` (every response was empty) there are no metrics, and the next sync is probed instead.

        Raises:
            WeightSyncError: a worker's mean or maximum difference exceeds its bound (or is not a number).
        """
        if not pairs:
            return {}
        self._owed = False
        reference = np.concatenate(learners.score_logprobs(pairs))
        worst_mean = worst_max = 0.0
        for worker, logprobs in rollout_pool.score_logprobs(pairs).items():
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

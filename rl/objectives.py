"""From one micro-batch's log-probabilities to its share of the loss: the policy objective and the supervised one.

Left out: the losses themselves (`rl.losses`), and the forward and backward passes (`rl.learner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rl.batch import TrainSample
from rl.batching import MiniBatchShare
from rl.config import AlgorithmConfig
from rl.errors import LearnerError
from rl.layouts import MicroBatch
from rl.learner_metrics import MetricSums
from rl.losses import policy_loss_spec
from rl.losses.aggregation import aggregate
from rl.losses.api import LossInputs
from rl.losses.contract import resolve_aggregation
from rl.losses.kl import KLController, kl_penalty
from rl.losses.rollout_correction import rollout_metrics, rollout_weights
from rl.plugins import check_options


class Objective(Protocol):
    """What the learner minimises. Called once per micro-batch; the results of all micro-batches and ranks add up."""

    entropy_grad: bool  # whether gradients must flow through the entropy
    split_invariant: bool  # False: one micro-batch must hold the whole mini-batch

    def __call__(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        samples: Sequence[TrainSample],
        micro: MicroBatch,
        share: MiniBatchShare,
        sums: MetricSums,
    ) -> Tensor: ...


class PolicyObjective:
    """Policy loss + KL penalty - entropy bonus, as configured by `algorithm`."""

    def __init__(self, algorithm: AlgorithmConfig, fixed_length: int) -> None:
        self._algorithm = algorithm
        self._fixed_length = fixed_length
        self._spec = policy_loss_spec(algorithm.loss)
        check_options(f"policy loss {algorithm.loss!r}", self._spec.function, algorithm.loss_options)
        self._aggregation = resolve_aggregation(self._spec, algorithm.aggregation)
        self.entropy_grad = self._spec.needs_entropy or algorithm.entropy_coefficient != 0.0
        self.split_invariant = self._spec.split_invariant
        kl = algorithm.kl
        self.kl = KLController(kl.coefficient, kl.adaptive_target, kl.adaptive_horizon)

    def __call__(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        samples: Sequence[TrainSample],
        micro: MicroBatch,
        share: MiniBatchShare,
        sums: MetricSums,
    ) -> Tensor:
        inputs = self._inputs(logprobs, entropy, samples, micro, sums)
        output = self._spec.function(inputs, **self._algorithm.loss_options)
        per_token = output.loss
        mask = inputs.loss_mask
        if inputs.ref_logprobs is not None:
            penalty = kl_penalty(inputs.logprobs, inputs.ref_logprobs, self._algorithm.kl.estimator)
            sums.add_masked_mean("learner/kl_ref", penalty, mask)
            if self._algorithm.kl.placement == "loss":
                per_token = per_token + self.kl.coefficient * penalty
        if self._algorithm.entropy_coefficient:
            per_token = per_token - self._algorithm.entropy_coefficient * entropy
        sums.add_masked_mean("learner/entropy", entropy, mask)
        for name, values in output.token_metrics.items():
            sums.add_masked_mean(f"learner/{name}", values, mask)
        return aggregate(
            per_token,
            inputs,
            self._aggregation,
            num_loss_tokens=share.num_loss_tokens,
            num_sequences=share.num_sequences,
            fixed_length=self._fixed_length,
        )

    def _inputs(
        self, logprobs: Tensor, entropy: Tensor, samples: Sequence[TrainSample], micro: MicroBatch, sums: MetricSums
    ) -> LossInputs:
        """Whatever stands outside the loss mask is replaced: 0 * NaN is NaN in a gradient."""
        device = logprobs.device
        rollout = flat(samples, "rollout_logprobs", device)
        old = flat(samples, "old_logprobs", device)
        ref = flat(samples, "ref_logprobs", device)
        if ref is None and self._algorithm.kl.placement == "loss":
            raise LearnerError("algorithm.kl.placement is loss, but samples carry no ref_logprobs; annotate them first")
        assert rollout is not None  # every sample has them
        mask = loss_mask(samples, device)
        current = logprobs.detach()
        rollout = torch.where(mask, rollout, current)
        # In one optimizer step per batch, the current policy is the old one.
        old = current if old is None else torch.where(mask, old, current)
        ref = None if ref is None else torch.where(mask, ref, current)
        advantages = torch.from_numpy(np.concatenate([s.advantages for s in samples])).to(device)
        _measure_difference(old, rollout, mask, samples, micro, sums)
        weights, correction = rollout_weights(
            old, rollout, mask, micro.sequence_index, micro.num_sequences, self._algorithm.rollout_correction
        )
        for name, value in correction.items():
            sums.add_sum(_CORRECTION + name, value)
        return LossInputs(
            logprobs=logprobs,
            old_logprobs=old,
            rollout_logprobs=rollout,
            advantages=torch.where(mask, advantages, torch.zeros_like(advantages)),
            loss_mask=mask,
            sequence_index=micro.sequence_index,
            num_sequences=micro.num_sequences,
            entropy=entropy if self.entropy_grad else None,
            ref_logprobs=ref,
            rollout_weights=weights,
        )


class SupervisedObjective:
    """Negative log-likelihood, averaged over all response tokens."""

    entropy_grad = False
    split_invariant = True

    def __call__(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        samples: Sequence[TrainSample],
        micro: MicroBatch,
        share: MiniBatchShare,
        sums: MetricSums,
    ) -> Tensor:
        del micro
        mask = loss_mask(samples, logprobs.device)
        sums.add_masked_mean("learner/entropy", entropy, mask)
        return torch.where(mask, -logprobs, torch.zeros_like(logprobs)).sum() / share.num_loss_tokens


_CORRECTION = "rollout_correction:"  # sums that only `correction_metrics` reads


def correction_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The rollout correction's metrics from the plain sums of a `MetricSums`; empty if it has none of them."""
    mine = {name.removeprefix(_CORRECTION): value for name, value in sums.items() if name.startswith(_CORRECTION)}
    return rollout_metrics(mine) if mine else {}


def flat(samples: Sequence[TrainSample], name: str, device: torch.device) -> Tensor | None:
    """A per-token field of all samples as one [T] tensor; None if no sample has it."""
    values = [getattr(s, name) for s in samples]
    missing = sum(v is None for v in values)
    if missing == len(values):
        return None
    if missing:
        raise LearnerError(f"{missing} of {len(values)} samples have no {name}; all or none must have it")
    return torch.from_numpy(np.concatenate(values).astype(np.float32)).to(device)


def loss_mask(samples: Sequence[TrainSample], device: torch.device) -> Tensor:
    """[T] bool: the loss masks of all samples."""
    return torch.from_numpy(np.concatenate([s.loss_mask for s in samples])).to(device)


def _measure_difference(
    old: Tensor, rollout: Tensor, mask: Tensor, samples: Sequence[TrainSample], micro: MicroBatch, sums: MetricSums
) -> None:
    """Measure |rollout - learner| over loss tokens of samples that were generated with the learner's current
    weights."""
    fresh = torch.tensor([s.policy_lag == 0 for s in samples], device=old.device)[micro.sequence_index]
    chosen = mask & fresh
    difference = torch.where(chosen, (old - rollout).abs(), torch.zeros_like(old))
    sums.add_masked_mean("rollout/logprob_diff_mean", difference, chosen)
    sums.add_max("rollout/logprob_diff_max", difference.max())

"""Estimators of the divergence from the reference policy, and the controller of its coefficient.

Left out: adding the penalty to the loss (the learner) or to the reward (`rl.advantages`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, assert_never

from torch import Tensor

from rl.losses.api import LOG_RATIO_BOUND

KLEstimator = Literal["k1", "k2", "k3", "k1_straight_through", "k3_straight_through"]


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """[T], [T] -> [T]: estimate of KL(pi || pi_ref) from the sampled token, with d = log pi - log pi_ref.

    - k1: d, unbiased, high variance; as a loss its expected gradient is 0, so it belongs in the reward;
    - k2: d^2 / 2, biased value, but its gradient is an unbiased gradient of the KL;
    - k3: exp(-d) - 1 + d, unbiased, never negative (the form in GRPO, arXiv 2402.03300, eq. 4);
    - k1_straight_through, k3_straight_through: the value of k1 or k3 with the gradient of k2 (verl's `k1+`, `k3+`).

    Source: Schulman 2020, joschu.net/blog/kl-approx.html. Below d = -20 (e^20), k3 stops growing and has no gradient.
    Unlike verl's, k3 is not capped at 10: that cap would remove the gradient already at d = -2.6.
    """
    difference = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            # Far below d = 0 both terms share one bound: the linear term alone would pull the wrong way there.
            difference = difference.clamp(min=-LOG_RATIO_BOUND)
            # expm1: in float32, exp(x) - 1 loses everything below 1e-7, and k3 of a small d is d^2 / 2.
            return (-difference).clamp(min=-LOG_RATIO_BOUND).expm1() + difference
        case "k1_straight_through":
            return _straight_through(difference, difference)
        case "k3_straight_through":
            return _straight_through(kl_penalty(logprobs, ref_logprobs, "k3"), difference)
        case _:
            assert_never(estimator)


def _straight_through(value: Tensor, difference: Tensor) -> Tensor:
    gradient = 0.5 * difference.square()
    return value.detach() + gradient - gradient.detach()


@dataclass(slots=True)
class KLController:
    """Coefficient of the KL penalty: fixed, or adapted towards a target KL.

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2.
    """

    coefficient: float
    target: float | None = None  # None: fixed
    horizon: int = 10000  # samples over which an error of 20 % (larger ones count as 20 %) moves it by 20 %
    configured: float = field(init=False)

    def __post_init__(self) -> None:
        self.configured = self.coefficient

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint: the adapted coefficient and the configured one it started from; empty if it is fixed."""
        return {} if self.target is None else {"configured": self.configured, "adapted": self.coefficient}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from a checkpoint. A fixed coefficient, or one configured differently since, starts as
        configured."""
        if self.target is not None and state.get("configured") == self.configured:
            self.coefficient = state["adapted"]

    def update(self, current_kl: float, num_samples: int) -> float:
        """Adapt to the mean KL of a step of `num_samples` samples; return the coefficient of the next step.

        A step whose KL is not finite leaves the coefficient unchanged: the learner skips that step too.
        """
        if self.target is None or not math.isfinite(current_kl):
            return self.coefficient
        error = min(max(current_kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * num_samples / self.horizon
        return self.coefficient

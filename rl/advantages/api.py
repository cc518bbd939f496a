"""What an advantage estimator is, and the registry of them. A new estimator is one file that calls
`register_advantage`.

An estimator sees the whole global batch at once (it runs in the controller's process, before the batch is split) and
returns one advantage per response token. It works on CPU tensors in float64; the result is stored as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """N samples with ragged responses.

    `valid[i]` is False for a sample without a signal (aborted, or its reward is unknown): it is left out of every group
    statistic and gets advantage 0. `in_loss[i]` is also False for a response that `mask_truncated` excludes from the
    loss: its reward is known and counts in its group, but statistics over tokens (whitening) cover only the tokens that
    are learned from.
    """

    rewards: Tensor  # [N] float64, the sequence reward (0 where not valid)
    group_ids: Tensor  # [N] int64
    lengths: Tensor  # [N] int64, R of each sample
    valid: Tensor  # [N] bool
    in_loss: Tensor  # [N] bool, implies valid
    token_rewards: tuple[Tensor, ...] | None = (
        None  # N x [R] float64: KL in the reward; the sequence reward is not in it
    )
    values: tuple[Tensor, ...] | None = None  # N x [R] float64, from the critic
    reward_parts: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [N] float64: the breakdown, unweighted

    def total_rewards(self) -> Tensor:
        """[N] float64: the sequence reward plus the sum of its token rewards, 0 where not valid."""
        total = self.rewards
        if self.token_rewards is not None:
            total = total + torch.stack([rewards.sum() for rewards in self.token_rewards])
        return torch.where(self.valid, total, torch.zeros_like(total))

    def reward_to_tokens(self) -> tuple[Tensor, ...]:
        """N x [R] float64: token rewards, with the sequence reward on the last token of each response."""
        out = []
        for i, length in enumerate(self.lengths.tolist()):
            row = torch.zeros(length, dtype=torch.float64) if self.token_rewards is None else self.token_rewards[i]
            row = row.clone()
            if length:
                row[-1] += self.rewards[i]
            out.append(row)
        return tuple(out)


@dataclass(frozen=True, slots=True)
class Advantages:
    """Per-token advantages, and the critic's targets where there is one."""

    advantages: tuple[Tensor, ...]  # N x [R] float64
    returns: tuple[Tensor, ...] | None = None  # N x [R] float64
    metrics: Mapping[str, float] = field(default_factory=dict)


AdvantageEstimator = Callable[..., Advantages]  # (inputs: AdvantageInputs, **options) -> Advantages


@dataclass(frozen=True, slots=True)
class AdvantageSpec:
    """A registered estimator and what the checks at start-up must know about it."""

    name: str
    function: AdvantageEstimator
    needs_groups: bool = True  # group_size must be at least 2
    needs_critic: bool = False


_REGISTRY: dict[str, AdvantageSpec] = {}


def register_advantage(
    name: str, *, needs_groups: bool = True, needs_critic: bool = False
) -> Callable[[AdvantageEstimator], AdvantageEstimator]:
    """Decorator: register an estimator as `algorithm.advantage: NAME`. Its keyword-only arguments are its options."""

    def wrap(function: AdvantageEstimator) -> AdvantageEstimator:
        if name in _REGISTRY and _REGISTRY[name].function is not function:
            raise ConfigError(f"advantage estimator {name!r} is registered twice; choose another name")
        _REGISTRY[name] = AdvantageSpec(name, function, needs_groups, needs_critic)
        return function

    return wrap


def registered_advantages() -> dict[str, AdvantageSpec]:
    """Name -> spec of every registered estimator."""
    return dict(_REGISTRY)


def spread(per_sequence: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """[N] -> N x [R]: every token of a response gets its sequence's value.

    Example: `spread(tensor([1., -1.]), tensor([2, 1]))` is `(tensor([1., 1.]), tensor([-1.]))`.
    """
    return torch.repeat_interleave(per_sequence, lengths).split(lengths.tolist())

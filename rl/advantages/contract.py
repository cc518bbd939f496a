"""What an advantage estimator must guarantee, checked on a small batch before anything expensive starts.

Left out: the estimators themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rl.advantages.api import AdvantageInputs, AdvantageSpec
from rl.errors import ConfigError
from rl.plugins import check_options


def check_estimator(spec: AdvantageSpec, options: Mapping[str, Any], *, group_size: int) -> None:
    """Raise ConfigError unless the estimator accepts the options and returns valid advantages for groups of this size.

    The probe batch has two groups, ragged responses, and a last sample without a signal.
    """
    what = f"algorithm.advantage {spec.name}"
    check_options(f"{what} (algorithm.advantage_options)", spec.function, options)
    inputs = _probe_batch(group_size)
    try:
        result = spec.function(inputs, **options)
        rows = [torch.as_tensor(row) for row in result.advantages]
    except ConfigError:
        raise
    except Exception as error:  # a plugin's own code, or an option of the wrong type
        raise ConfigError(f"{what} fails on a batch of two groups of {group_size}: {error!r}") from error
    lengths = [len(row) for row in rows]
    if lengths != inputs.lengths.tolist():
        raise ConfigError(
            f"{what} returns rows of {lengths} tokens for responses of {inputs.lengths.tolist()} tokens; it must "
            "return one advantage per token (see `spread`)"
        )
    if not all(row.isfinite().all() for row in rows):
        raise ConfigError(f"{what} returns advantages that are not finite")
    if rows[-1].any():
        raise ConfigError(
            f"{what} gives an advantage to a sample that is not valid; give 0 where inputs.valid is false"
        )


class _AnyPart(dict[str, Tensor]):
    """Has every reward part that is asked for, because the real parts are known only after scoring."""

    def __missing__(self, name: str) -> Tensor:
        return self["reward"]

    def get(self, name: str, default: Any = None) -> Tensor:
        return self[name]

    def __contains__(self, name: object) -> bool:
        return True


def _probe_batch(group_size: int) -> AdvantageInputs:
    count = 2 * group_size
    lengths = 1 + torch.arange(count) % 3
    valid = torch.ones(count, dtype=torch.bool)
    valid[-1] = False
    rewards = torch.where(valid, torch.arange(count, dtype=torch.float64) % 2, 0.0)
    return AdvantageInputs(
        rewards=rewards,
        group_ids=torch.arange(count) // group_size,
        lengths=lengths,
        valid=valid,
        in_loss=valid,
        values=tuple(torch.zeros(length, dtype=torch.float64) for length in lengths.tolist()),
        reward_parts=_AnyPart(reward=rewards),
    )

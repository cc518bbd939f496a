"""What a reward function is, and the registry of them. A new reward is one file that calls `register_reward`.

Left out: the rewards themselves, the Ray workers (`rewards.workers`), and combination by weight (`rewards.combine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rl.batch import IntArray
from rl.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class RewardInput:
    """One response to be scored, as plain data."""

    prompt: str  # the user's question
    response: str  # the whole response, without special tokens except those that mark thinking or channels
    answer: str  # the part of the response that counts as the final answer (after thinking tags or harmony channels)
    ground_truth: Any
    data_source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row's other fields
    num_tokens: int = 0  # R
    truncated: bool = False  # finish_reason was LENGTH
    token_ids: Sequence[int] | IntArray = field(default=(), compare=False, repr=False)  # [R] of the response
    group_id: int | str | None = None  # shared by all responses to one prompt
    reward: str | None = None  # a reward named by the row, in place of the config's task rewards


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """A number with named parts."""

    reward: float
    breakdown: Mapping[str, float] = field(default_factory=dict)
    extracted: str | None = None  # the judged answer, in one spelling for equal answers: majority votes count it


class GroundTruthError(DataError):
    """The row's ground truth cannot be used by this reward. Counted apart from a wrong answer, never scored 0."""


class InfrastructureError(RuntimeError):
    """The reward's own machinery failed (sandbox unavailable, endpoint down). Counted apart, never scored 0."""


class RewardFunction(Protocol):
    """A reward: one call for one sample. Any exception it raises is counted as a plugin error."""

    def __call__(self, sample: RewardInput) -> float | RewardOutput: ...


class AsyncRewardFunction(Protocol):
    """A reward that waits for something: a batch's coroutines run concurrently, each with its own deadline (see
    `max_concurrent` below)."""

    async def __call__(self, sample: RewardInput) -> float | RewardOutput: ...


class BatchRewardFunction(Protocol):
    """A reward that scores a batch at a time; one result (or exception) per sample, in order.

    The deadline covers the whole call. A generator that yields the results one by one gets a fresh deadline for each.
    """

    def score_batch(self, samples: Sequence[RewardInput]) -> Iterable[float | RewardOutput | Exception]: ...


class GroupRewardFunction(Protocol):
    """A reward that compares the responses of one prompt with each other. It must be cheap: it runs where groups meet.

    `task_rewards` holds each sample's reward from the task parts alone (see `shaping` below), before clipping.
    """

    def score_group(
        self, samples: Sequence[RewardInput], task_rewards: Sequence[float]
    ) -> Sequence[float | RewardOutput | Exception]: ...


# A reward may also have:
#   shaping: bool   True when it judges how a response is written (format, length) and not whether it is right. Shaping
#       parts stay out of `Score.unshaped_reward`, and stay on when a row names its own reward.
#   validate_ground_truth(ground_truth, extra)   raises GroundTruthError when the row's ground truth or its other fields
#       cannot be used; called for every row when the data loads.
#   max_concurrent: int   how many of its coroutines run at once.
#   close()   ends processes and connections that it holds.


# (**options) -> reward
RewardFactory = Callable[..., RewardFunction | AsyncRewardFunction | BatchRewardFunction | GroupRewardFunction]

_REGISTRY: dict[str, RewardFactory] = {}


def register_reward(name: str) -> Callable[[RewardFactory], RewardFactory]:
    """Decorator: make a factory (a class, or a function that returns a reward) reachable by name in a config."""

    def wrap(factory: RewardFactory) -> RewardFactory:
        if name in _REGISTRY and _REGISTRY[name] is not factory:
            raise ConfigError(f"reward {name!r} is registered twice; choose another name")
        _REGISTRY[name] = factory
        return factory

    return wrap


def registered_rewards() -> dict[str, RewardFactory]:
    """Name -> factory, of the rewards that are registered now."""
    return dict(_REGISTRY)

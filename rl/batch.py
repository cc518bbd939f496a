"""The currency: the data that flows from prompt to update, one frozen type per stage.

`Prompt` -> `RolloutBatch` -> `ScoredBatch` -> `TrainBatch` -> `UpdateResult`. Each stage returns the next type; no
field starts as None to be filled in later. An optional field is None for a whole run, because that run does not use it.
Sequences are ragged numpy arrays; nothing here is padded. Left out: frameworks, and every computation with them.

Shape legend: N samples, P prompt tokens of one sample, R response tokens of one sample.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
EQUAL_REWARDS = 1e-9  # rewards this close count as equal: sums of parts round, 0.1 + 0.2 is not 0.3
TokenPair = tuple[tuple[int, ...], tuple[int, ...]]  # (prompt_ids, response_ids)


class FinishReason(enum.StrEnum):
    """Why generation of one response ended."""

    STOP = "stop"  # the model ended its turn (EOS or a stop string)
    LENGTH = "length"  # cut at max_response_tokens or the model's context
    ABORT = "abort"  # the engine gave up the request; the sample carries no learning signal


class RewardStatus(enum.StrEnum):
    """The outcome of scoring one sample. Any status but OK excludes it from the loss; it is never scored 0."""

    OK = "ok"
    PLUGIN_ERROR = "plugin_error"  # the reward function raised, or returned something other than a reward
    GROUND_TRUTH_ERROR = "ground_truth_error"  # the row's ground truth cannot be used
    TIMEOUT = "timeout"  # the deadline passed in scoring itself, not in the model's program
    INFRASTRUCTURE_ERROR = "infrastructure_error"  # worker lost, sandbox unavailable, endpoint down
    SKIPPED = "skipped"  # no reward, because the rollout was aborted or rejected


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, ready for generation."""

    prompt_id: str  # stable across runs and resumes, for example "train:17"
    token_ids: tuple[int, ...]  # [P], the chat template already applied
    text: str  # the user's question as people read it (last user message), for rewards and sample files
    ground_truth: Any = None  # whatever the reward function expects; JSON-like
    data_source: str = ""  # the dataset's own name for the task (verl's field)
    reward: str | None = None  # a reward named by the row, instead of the config's
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row's other fields


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response to one prompt."""

    prompt_index: int  # into RolloutBatch.prompts
    group_id: int  # samples with equal group_id answer the same prompt and are compared with each other
    sample_index: int  # 0 .. group_size-1 within the group
    token_ids: IntArray  # [R] int32, the stop token included when one was generated
    rollout_logprobs: FloatArray  # [R] under the sampler's own distribution, after temperature and truncation
    finish_reason: FinishReason
    policy_version: int  # of the weights that generated the first token; the sample's age counts from it
    text: str  # token_ids decoded; the only special tokens kept mark thinking or channels
    answer: str  # the part of `text` that counts as the final answer (after thinking tags or harmony channels)
    last_policy_version: int = -1  # of the weights that generated the last token; -1 means the same as the first
    routed_experts: npt.NDArray[np.integer] | None = None  # [P+R-1, layers, top_k] for router replay, when recorded

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.rollout_logprobs):
            raise ValueError(
                f"rollout has {len(self.token_ids)} tokens but {len(self.rollout_logprobs)} rollout_logprobs"
            )

    @property
    def length(self) -> int:
        """R, the number of response tokens."""
        return len(self.token_ids)


OnGroup = Callable[[Prompt, Sequence[Rollout]], None]  # called with each group of samples once it is generated


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """All responses of one step. `rollouts` is ordered by (prompt_index, sample_index)."""

    prompts: tuple[Prompt, ...]
    rollouts: tuple[Rollout, ...]  # [N]
    seconds: float = 0.0  # wall-clock time of the generation

    @property
    def num_tokens(self) -> int:
        """Generated tokens over all responses."""
        return sum(r.length for r in self.rollouts)

    def prompt_of(self, rollout: Rollout) -> Prompt:
        return self.prompts[rollout.prompt_index]


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one sample, with its named parts."""

    reward: float
    breakdown: Mapping[str, float] = field(default_factory=dict)  # part name -> unweighted value
    status: RewardStatus = RewardStatus.OK
    error: str = ""  # one line, when status is not OK
    unshaped_reward: float | None = None  # before length shaping and the like; None means equal to `reward`
    passed: bool | None = None  # whether every task part passed; None: judge by a task reward of 1
    extracted: str | None = None  # the answer that was judged, normalised; None: the reward extracts none

    @property
    def ok(self) -> bool:
        return self.status is RewardStatus.OK

    @property
    def task_reward(self) -> float:
        """The reward before shaping, which tells whether the task was solved."""
        return self.reward if self.unshaped_reward is None else self.unshaped_reward

    @property
    def solved(self) -> bool:
        return self.task_reward >= 1.0 - 1e-6 if self.passed is None else self.passed


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """A RolloutBatch with one Score per rollout."""

    batch: RolloutBatch
    scores: tuple[Score, ...]  # [N], in the order of batch.rollouts

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.batch.rollouts):
            raise ValueError(f"{len(self.scores)} scores for {len(self.batch.rollouts)} rollouts")

    @property
    def valid(self) -> tuple[bool, ...]:
        """[N]: False for a sample without a signal: its reward is unknown, or it was aborted, or it is empty."""
        return tuple(
            score.ok and rollout.finish_reason is not FinishReason.ABORT and rollout.length > 0
            for rollout, score in zip(self.batch.rollouts, self.scores, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Annotations:
    """What the learner computes about a batch before the update. A field is None in runs that do not use it."""

    old_logprobs: tuple[FloatArray, ...] | None = None  # N x [R]; None: one optimizer step, so old equals current
    ref_logprobs: tuple[FloatArray, ...] | None = None  # N x [R]; None: no KL term
    values: tuple[FloatArray, ...] | None = None  # N x [R]; None: no critic
    kl_coefficient: float | None = None  # of the KL in the reward, at this step; None: no KL in the reward


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """What a forward pass needs from one sample."""

    prompt_ids: IntArray  # [P]
    response_ids: IntArray  # [R]
    routed_experts: npt.NDArray[np.integer] | None = None  # [P+R-1, layers, top_k], see Rollout

    @property
    def num_tokens(self) -> int:
        """P + R."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_positions(self) -> int:
        """n = P + R - 1: nothing is predicted from the last token."""
        return self.num_tokens - 1

    @property
    def prompt_key(self) -> bytes:
        """A key that is equal for prompts that may share one computation: equal tokens and equal recorded experts, if
        any.

        When its cache misses, the sampler computes a group's prompt again, and rounding may then choose other experts.
        """
        tokens = self.prompt_ids.tobytes()
        if self.routed_experts is None:
            return tokens
        return tokens + self.routed_experts[: len(self.prompt_ids)].tobytes()


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One sequence to learn from."""

    prompt_ids: IntArray  # [P]
    response_ids: IntArray  # [R]
    loss_mask: BoolArray  # [R] True where the token counts in the loss
    advantages: FloatArray  # [R]
    rollout_logprobs: FloatArray  # [R]
    old_logprobs: FloatArray | None = None  # [R], see Annotations
    ref_logprobs: FloatArray | None = None  # [R], see Annotations
    values: FloatArray | None = None  # [R], see Annotations
    returns: FloatArray | None = None  # [R], the critic's target
    routed_experts: npt.NDArray[np.integer] | None = None  # see Rollout
    policy_lag: int = 0  # learner version at the update minus Rollout.policy_version

    def __post_init__(self) -> None:
        length = len(self.response_ids)
        for name in (
            "loss_mask",
            "advantages",
            "rollout_logprobs",
            "old_logprobs",
            "ref_logprobs",
            "values",
            "returns",
        ):
            value = getattr(self, name)
            if value is not None and len(value) != length:
                raise ValueError(f"train sample has {length} response tokens but {len(value)} {name}")

    @property
    def tokens(self) -> TokenSequence:
        return TokenSequence(self.prompt_ids, self.response_ids, self.routed_experts)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Everything that one update needs. The denominators are global and fixed here, before any forward pass."""

    samples: tuple[TrainSample, ...]
    num_loss_tokens: int  # sum of loss_mask over the whole batch (all ranks, all micro-batches)
    num_sequences: int  # samples with at least one loss token
    metrics: Mapping[str, float] = field(default_factory=dict)  # advantage/...

    @classmethod
    def from_samples(cls, samples: tuple[TrainSample, ...], metrics: Mapping[str, float] | None = None) -> TrainBatch:
        return cls(
            samples=samples,
            num_loss_tokens=sum(s.num_loss_tokens for s in samples),
            num_sequences=sum(1 for s in samples if s.loss_mask.any()),
            metrics=metrics or {},
        )


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What one call of `update` did."""

    policy_version: int  # of the weights after the update
    metrics: Mapping[str, float]  # learner/..., critic/..., and rollout/logprob_diff_..., which the learner measures
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """One weight transfer that has arrived, as the digests of every engine's weights prove."""

    policy_version: int
    num_bytes: int
    seconds: float = 0.0

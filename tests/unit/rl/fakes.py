"""The loop's parts as plain Python, small enough to be obviously right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rl.batch import (
    Annotations,
    FinishReason,
    OnGroup,
    Prompt,
    Rollout,
    RolloutBatch,
    Score,
    ScoredBatch,
    TokenPair,
    TrainBatch,
    TrainSample,
    UpdateResult,
    WeightVersion,
)
from rl.controller import Controller, PromptSource
from rl.data_shaping import StepGroups
from rl.errors import RolloutError

PROMPTS = tuple(Prompt(prompt_id=f"p{i}", token_ids=(1, 2, i), text=f"question {i}", ground_truth=i) for i in range(6))


def rollout(
    prompt_index: int = 0, sample_index: int = 0, *, length: int = 3, version: int = 0, **fields: Any
) -> Rollout:
    defaults: dict[str, Any] = {
        "group_id": prompt_index,
        "token_ids": np.arange(length, dtype=np.int32),
        "rollout_logprobs": np.full(length, -0.5, dtype=np.float32),
        "finish_reason": FinishReason.STOP,
        "policy_version": version,
        "text": "text",
        "answer": "answer",
    }
    return Rollout(prompt_index=prompt_index, sample_index=sample_index, **(defaults | fields))


class FakePromptSource:
    def __init__(self) -> None:
        self.drawn = 0

    def draw(self, count: int) -> tuple[Prompt, ...]:
        self.drawn += count
        return tuple(PROMPTS[i % len(PROMPTS)] for i in range(self.drawn - count, self.drawn))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


@dataclass
class FakeRolloutPool:
    """Stamps the version it was told to serve. `lost` fails that many generate calls."""

    served: int = -1
    lost: int = 0
    replaced: int = 0
    deaf: bool = False  # ignores load_weights, as a worker that missed a sync
    calls: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)  # of losses

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        step: int,
        first_prompt: int = 0,
        on_group: OnGroup = lambda prompt, rollouts: None,
    ) -> RolloutBatch:
        self.calls.append(f"generate {step}" + (f" from {first_prompt}" if first_prompt else ""))
        if self.lost:
            raise RolloutError("rollout worker 0 died")
        rollouts = tuple(rollout(i, j, version=self.served) for i in range(len(prompts)) for j in range(group_size))
        for index, prompt in enumerate(prompts):
            on_group(prompt, rollouts[index * group_size : (index + 1) * group_size])
        return RolloutBatch(tuple(prompts), rollouts, seconds=0.1)

    def load_weights(self, version: WeightVersion) -> None:
        self.calls.append(f"load {version.policy_version}")
        if not self.deaf:
            self.served = version.policy_version

    def score_logprobs(self, pairs: Sequence[TokenPair]) -> dict[int, list[np.ndarray]]:
        return {0: [np.full(len(response), -0.5 - 0.01 * self.served, dtype=np.float32) for _, response in pairs]}

    def replace_lost_workers(self, cause: str) -> int:
        replaced, self.lost = self.lost, 0
        self.replaced += replaced
        if replaced:
            self.causes.append(cause)
        return replaced

    def metrics(self) -> dict[str, float]:
        return {"rollout/worker_restarts": float(self.replaced)}


@dataclass
class FakeRewardPool:
    """The first sample of a group is right, but for the prompts that are too hard."""

    too_hard: frozenset[str] = frozenset()
    earlier: list[int] = field(default_factory=list)  # how many scores of the step each call was told of
    begun: list[Rollout] = field(default_factory=list)

    def begin(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> None:
        self.begun += rollouts

    def score(self, rollouts: RolloutBatch, *, earlier: Sequence[Score] = ()) -> ScoredBatch:
        self.earlier.append(len(earlier))
        rewards = [
            float(r.sample_index == 0 and rollouts.prompt_of(r).prompt_id not in self.too_hard)
            for r in rollouts.rollouts
        ]
        return ScoredBatch(rollouts, tuple(Score(reward, {"exact": reward}) for reward in rewards))

    def metrics(self) -> dict[str, float]:
        return {"reward/worker_restarts": 0.0}


@dataclass
class FakeLearners:
    version: int = 0
    logprob_diff: float = 0.0
    skipped_steps: float = 0.0
    interrupted_in: int = 0  # the update, of which it is
    is_updating: bool = False
    last_update: UpdateResult | None = None

    def annotate(self, scored: ScoredBatch) -> Annotations:
        return Annotations()

    def update(self, batch: TrainBatch) -> UpdateResult:
        self.version += 1
        metrics = {
            "learner/loss": 0.1,
            "rollout/logprob_diff_mean": self.logprob_diff,
            "rollout/logprob_diff_max": self.logprob_diff,
            "learner/skipped_steps": self.skipped_steps,
        }
        self.last_update = UpdateResult(self.version, metrics)
        if self.version == self.interrupted_in:
            self.is_updating = True
            raise KeyboardInterrupt
        return self.last_update

    def finish_update(self) -> UpdateResult | None:
        self.is_updating = False
        return self.last_update

    def publish_weights(self) -> WeightVersion:
        return WeightVersion(self.version, num_bytes=8)

    def score_logprobs(self, pairs: Sequence[TokenPair]) -> list[np.ndarray]:
        return [np.full(len(response), -0.5 - 0.01 * self.version, dtype=np.float32) for _, response in pairs]

    def save_checkpoint(self, directory: Path) -> int:
        (directory / "weights").write_text(str(self.version))
        return self.version

    def load_checkpoint(self, directory: Path) -> None:
        self.version = int((directory / "weights").read_text())


def build_batch(scored: ScoredBatch, annotations: Annotations) -> TrainBatch:
    samples = tuple(
        TrainSample(
            prompt_ids=np.asarray(scored.batch.prompt_of(r).token_ids, dtype=np.int32),
            response_ids=r.token_ids,
            loss_mask=np.ones(r.length, dtype=np.bool_),
            advantages=np.full(r.length, s.reward, dtype=np.float32),
            rollout_logprobs=r.rollout_logprobs,
        )
        for r, s in zip(scored.batch.rollouts, scored.scores, strict=True)
    )
    return TrainBatch.from_samples(samples)


def controller(
    pool: FakeRolloutPool | None = None,
    learners: FakeLearners | None = None,
    source: PromptSource | None = None,
    rewards: FakeRewardPool | None = None,
    **shaping: Any,
) -> Controller:
    return Controller(
        source or FakePromptSource(),
        pool or FakeRolloutPool(),
        rewards or FakeRewardPool(),
        learners or FakeLearners(),
        build_batch,
        new_groups=partial(StepGroups, 2, **shaping),
        group_size=2,
    )

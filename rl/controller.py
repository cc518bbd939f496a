"""The loop. It drives a prompt source, a rollout pool, a reward pool and the learners through one step after another.

    prompts --> generate --> score --> [annotate] --> advantages --> update --> publish --> load
       ^            |                                                                        |
       '------------'------------------- the next step waits for the weights <---------------'

Each arrow is a typed value from `rl.batch`; scoring begins as soon as the first group is generated. `StepGroups`
decides which groups a step learns from, and whether to generate more of them. Left out: Ray, vLLM, DeepSpeed and torch.
The loop drives the Protocols below, so tests can drive it with fakes; what happens around a step (metrics, samples,
checkpoints, evaluation) is in `rl.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rl.batch import (
    Annotations,
    FloatArray,
    OnGroup,
    Prompt,
    Rollout,
    RolloutBatch,
    Score,
    ScoredBatch,
    TokenPair,
    TrainBatch,
    UpdateResult,
    WeightVersion,
)
from rl.data_shaping import StepGroups
from rl.errors import BrokenSyncError, EnginesLostError, RolloutError, WeightSyncError

T = TypeVar("T")


class PromptSource(Protocol):
    """An endless sequence of prompts in a seeded order."""

    def draw(self, count: int) -> tuple[Prompt, ...]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RolloutPool(Protocol):
    """The rollout workers."""

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, step: int, first_prompt: int = 0, on_group: OnGroup
    ) -> RolloutBatch:
        """`first_prompt` is the number of prompts already generated in this step, from which the samples' seeds
        continue."""
        ...

    def load_weights(self, version: WeightVersion) -> None:
        """Serve the weights that were just sent. Raises WeightSyncError if a worker does not hold this version."""
        ...

    def score_logprobs(self, pairs: Sequence[TokenPair]) -> Mapping[int, list[FloatArray]]:
        """{worker: [pair] -> [R]} log-probabilities at temperature 1, for the probe."""
        ...

    def replace_lost_workers(self, cause: str) -> int:
        """Replace every lost worker, now or later; returns how many were lost, for which `cause` is the reason. Sync
        before generating, because new workers serve the initial weights. Raises EnginesLostError if replacing
        cannot help."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Of the workers themselves, under their metric names."""
        ...


class RewardPool(Protocol):
    """The reward workers."""

    def begin(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> None:
        """Start scoring a group while others are still being generated. `score` uses these results, scores the rest,
        and discards those of rollouts that are not in its batch."""
        ...

    def score(self, rollouts: RolloutBatch, *, earlier: Sequence[Score] = ()) -> ScoredBatch:
        """`earlier` holds the step's scores so far, because the limit on failures is a share of the whole step."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Of the workers themselves, under their metric names."""
        ...


class Learners(Protocol):
    """The learner workers as a single learner."""

    def annotate(self, scored: ScoredBatch) -> Annotations:
        """What the algorithm needs before the update: log-probabilities and a critic's values (empty if it needs
        nothing)."""
        ...

    def update(self, batch: TrainBatch) -> UpdateResult: ...

    @property
    def is_updating(self) -> bool:
        """Whether an interrupt left an update unfinished."""
        ...

    def finish_update(self) -> UpdateResult | None:
        """The last update's result, waiting for one that an interrupt left unfinished; None before the first update."""
        ...

    def publish_weights(self) -> WeightVersion: ...
    def score_logprobs(self, pairs: Sequence[TokenPair]) -> list[FloatArray]: ...
    def save_checkpoint(self, directory: Path) -> int:
        """Returns the policy version that was saved."""
        ...

    def load_checkpoint(self, directory: Path) -> None: ...
    def export_hf(self, directory: Path) -> None: ...
    def export_critic(self, directory: Path) -> None: ...


BuildTrainBatch = Callable[[ScoredBatch, Annotations], TrainBatch]  # estimates advantages, then builds the batch


@dataclass(frozen=True, slots=True)
class StepResult:
    """Everything that one step produced, for recording."""

    step: int
    scored: ScoredBatch
    batch: TrainBatch
    update: UpdateResult
    weights: WeightVersion
    shaping: Mapping[str, float] = field(default_factory=dict)  # metrics on how the step's groups were chosen
    workers: Mapping[str, float] = field(default_factory=dict)  # metrics of the rollout and reward workers themselves
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> wall-clock seconds, and "step" for the whole


class Controller:
    """Owns the order of operations within a step, and nothing else."""

    def __init__(
        self,
        prompt_source: PromptSource,
        rollout_pool: RolloutPool,
        reward_pool: RewardPool,
        learners: Learners,
        build_train_batch: BuildTrainBatch,
        *,
        new_groups: Callable[[], StepGroups],
        group_size: int,
    ) -> None:
        self.prompt_source = prompt_source
        self.rollout_pool = rollout_pool
        self.reward_pool = reward_pool
        self.learners = learners
        self.build_train_batch = build_train_batch
        self.new_groups = new_groups
        self.group_size = group_size
        self.policy_version: int | None = None  # version of the weights that the rollout workers serve
        self.steps_learned = 0  # steps in the learners' weights, even if the rest of the last step fails
        self.last_update: UpdateResult | None = None

    def sync_weights(self) -> WeightVersion:
        """Send the learners' weights to the rollout workers and serve them."""
        return self.surviving_losses(self._sync, syncs=True)

    def _sync(self) -> WeightVersion:
        # Before a learner waits for them in a collective.
        self.rollout_pool.replace_lost_workers("they did not answer before a sync")
        version = self.learners.publish_weights()
        self.rollout_pool.load_weights(version)
        self.policy_version = version.policy_version
        return version

    def surviving_losses(self, call: Callable[[], T], *, syncs: bool = False) -> T:
        """What `call` returns, repeating it after rollout workers were lost.

        If `call` fails and workers are lost, they are replaced and given the weights (unless `call` itself `syncs`)
        before it runs again. A failure with no worker lost is re-raised.
        """
        needs_sync = False
        while True:
            try:
                if needs_sync:
                    self._sync()
                    needs_sync = False
                return call()
            except (BrokenSyncError, EnginesLostError):
                raise
            except (RolloutError, WeightSyncError) as error:
                if not self.rollout_pool.replace_lost_workers(str(error)):
                    raise  # every worker answers, so trying again would fail again
                needs_sync = not syncs

    def step(self, step: int) -> StepResult:
        """One on-policy step. `step` counts from 0; the rollouts come from policy version `step`."""
        clock = _Clock()
        scored, shaping = self._sample(step, clock)
        annotations = self.learners.annotate(scored)
        clock.lap("annotate")
        batch = self.build_train_batch(scored, annotations)
        update = self.last_update = self.learners.update(batch)
        self.steps_learned = step + 1
        clock.lap("update")
        weights = self.sync_weights()
        clock.lap("sync")
        workers = {**self.rollout_pool.metrics(), **self.reward_pool.metrics()}
        return StepResult(step, scored, batch, update, weights, shaping, workers, clock.seconds())

    def finish_update(self) -> None:
        """After an interrupt: wait for an update that it may have cut off, so that what was learned can be saved."""
        if (update := self.learners.finish_update()) is not None:
            self.last_update, self.steps_learned = update, update.policy_version

    def _sample(self, step: int, clock: _Clock) -> tuple[ScoredBatch, Mapping[str, float]]:
        """Generate and score until the step has its groups; all rounds use the same weights."""
        groups = self.new_groups()
        scores: list[Score] = []
        while groups.missing:
            prompts = self.prompt_source.draw(groups.missing)
            rollouts = self._generate(prompts, step, groups.generated)
            clock.lap("rollout")
            scored = self.reward_pool.score(rollouts, earlier=scores)
            clock.lap("reward")
            scores.extend(scored.scores)
            groups.add(scored)
        return groups.take()

    def _generate(self, prompts: Sequence[Prompt], step: int, first_prompt: int) -> RolloutBatch:
        """Generate; if a worker is lost, again with the same seeds and therefore the same samples."""
        rollouts = self.surviving_losses(
            lambda: self.rollout_pool.generate(
                prompts,
                group_size=self.group_size,
                step=step,
                first_prompt=first_prompt,
                on_group=self.reward_pool.begin,
            )
        )
        self._refuse_stale(rollouts)
        return rollouts

    def _refuse_stale(self, rollouts: RolloutBatch) -> None:
        stale = [r for r in rollouts.rollouts if r.policy_version != self.policy_version]
        if stale:
            raise WeightSyncError(
                f"{len(stale)} of {len(rollouts.rollouts)} rollouts come from policy version "
                f"{stale[0].policy_version}, but the last sync served version {self.policy_version}; "
                "a rollout worker missed a weight update"
            )


class _Clock:
    """Wall-clock seconds of each stage of a step, summed if a stage runs more than once."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._laps[stage] = self._laps.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return self._laps | {"step": self._last - self._start}

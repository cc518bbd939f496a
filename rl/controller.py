"""The loop. It drives a prompt source, a rollout pool, a reward pool and the learners through one step after another.

    prompts --> generate --> score --> [annotate] --> advantages --> update --> publish --> load
       ^            |                                                                        |
       '------------'------------------- the next step waits for the weights <---------------'

Each arrow is a typed value from `rl.batch`; scoring begins with the first group that is generated. `StepGroups` decides
which groups a step learns from, and whether to generate again to get them. Left out: Ray, vLLM, DeepSpeed and torch.
What the loop drives are the Protocols below, so tests drive it with fakes; what happens around a step (metrics,
samples, checkpoints, evaluation) is in `rl.run`.
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
from rl.errors import BrokenSyncError, RolloutError, WeightSyncError

T = TypeVar("T")


class PromptSource(Protocol):
    """Endless prompts in a seeded order."""

    def draw(self, count: int) -> tuple[Prompt, ...]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RolloutPool(Protocol):
    """The rollout workers."""

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, step: int, first_prompt: int = 0, on_group: OnGroup
    ) -> RolloutBatch:
        """`first_prompt` counts the step's prompts that were generated before; the samples' seeds go on from there."""
        ...

    def load_weights(self, version: WeightVersion) -> None:
        """Serve the weights that were just sent. Raises WeightSyncError where a worker does not hold this version."""
        ...

    def score_logprobs(self, pairs: Sequence[TokenPair]) -> list[list[FloatArray]]:
        """[worker][pair] -> [R] log-probabilities at temperature 1, for the probe."""
        ...

    def replace_lost_workers(self) -> int:
        """Start a worker in place of every lost one; returns how many. Raises RolloutError when that cannot help."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Of the workers themselves, under their metric names."""
        ...


class RewardPool(Protocol):
    """The reward workers."""

    def begin(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> None:
        """Start to score a group while others are still generated. `score` takes these results, scores the rest, and
        discards those of rollouts that are not in its batch."""
        ...

    def score(self, rollouts: RolloutBatch, *, earlier: Sequence[Score] = ()) -> ScoredBatch:
        """`earlier` holds the step's scores so far: too many failures are a share of the whole step."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Of the workers themselves, under their metric names."""
        ...


class Learners(Protocol):
    """The learner workers as one."""

    def annotate(self, scored: ScoredBatch) -> Annotations:
        """Log-probabilities that the algorithm needs before the update (empty when it needs none)."""
        ...

    def update(self, batch: TrainBatch) -> UpdateResult: ...

    @property
    def is_updating(self) -> bool:
        """Whether an interrupt has left an update under way."""
        ...

    def finish_update(self) -> UpdateResult | None:
        """The last update, which is waited for where an interrupt has left it under way; None before the first."""
        ...

    def publish_weights(self) -> WeightVersion: ...
    def score_logprobs(self, pairs: Sequence[TokenPair]) -> list[FloatArray]: ...
    def save_checkpoint(self, directory: Path) -> None: ...
    def load_checkpoint(self, directory: Path) -> None: ...
    def export_hf(self, directory: Path) -> None: ...
    def export_critic(self, directory: Path) -> None: ...


BuildTrainBatch = Callable[[ScoredBatch, Annotations], TrainBatch]  # estimates advantages, then builds the batch


@dataclass(frozen=True, slots=True)
class StepResult:
    """Everything that one step produced, for whoever records it."""

    step: int
    scored: ScoredBatch
    batch: TrainBatch
    update: UpdateResult
    weights: WeightVersion
    shaping: Mapping[str, float] = field(default_factory=dict)  # metrics of how the step's groups were chosen
    workers: Mapping[str, float] = field(default_factory=dict)  # metrics of the rollout and reward workers themselves
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> wall-clock seconds, and "step" for the whole


class Controller:
    """Owns the order of things within a step, and nothing else."""

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
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`report` is told of every rollout worker that was lost and replaced, and why."""
        self.prompt_source = prompt_source
        self.rollout_pool = rollout_pool
        self.reward_pool = reward_pool
        self.learners = learners
        self.build_train_batch = build_train_batch
        self.new_groups = new_groups
        self.group_size = group_size
        self.report = report
        self.policy_version: int | None = None  # of the weights that the rollout workers serve
        self.steps_learned = 0  # steps that are in the learners' weights, also where what follows in a step fails
        self.last_update: UpdateResult | None = None

    def sync_weights(self) -> WeightVersion:
        """Send the learners' weights to the rollout workers and serve them."""
        return self.surviving_losses(self._sync, syncs=True)

    def _sync(self) -> WeightVersion:
        if lost := self.rollout_pool.replace_lost_workers():  # before any learner waits for them in a collective
            self.report(f"{lost} rollout worker(s) lost and replaced: they did not answer before a sync")
        version = self.learners.publish_weights()
        self.rollout_pool.load_weights(version)
        self.policy_version = version.policy_version
        return version

    def surviving_losses(self, call: Callable[[], T], *, syncs: bool = False) -> T:
        """What `call` returns. When it fails and rollout workers are lost, they are replaced and given the weights
        (which a call that `syncs` does itself), and it is called again; a failure for another reason is raised, and one
        to replace them with what was lost."""
        needs_sync = False
        while True:
            try:
                if needs_sync:
                    self._sync()
                    needs_sync = False
                return call()
            except BrokenSyncError:
                raise
            except (RolloutError, WeightSyncError) as error:
                try:
                    replaced = self.rollout_pool.replace_lost_workers()
                except RolloutError as last:
                    raise RolloutError(f"{last} (first: {error})") from error
                if not replaced:
                    raise  # every worker answers, so trying again would fail again
                self.report(f"{replaced} rollout worker(s) lost and replaced: {error}")
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
        """After an interrupt: let the update end that it may have cut short, so that what was learned can be saved."""
        if (update := self.learners.finish_update()) is not None:
            self.last_update, self.steps_learned = update, update.policy_version

    def _sample(self, step: int, clock: _Clock) -> tuple[ScoredBatch, Mapping[str, float]]:
        """Generate and score until the step has its groups; all rounds come from the same weights."""
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
        """Generate; again, with the same seeds and so the same samples, when a worker is lost."""
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
    """Wall-clock seconds of each stage of a step; a stage that runs more than once adds up."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._laps[stage] = self._laps.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return self._laps | {"step": self._last - self._start}

"""A training run: the loop, and what happens around its steps (resume, probe, metrics, samples, evaluation,
checkpoints). Left out: processes and placement (`launch`), and the step itself (`rl.controller`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rl.batch import RewardStatus
from rl.checkpoint import LEARNER, CheckpointStore, of_step
from rl.controller import Controller, StepResult
from rl.errors import WeightSyncError
from rl.evaluation import Evaluator
from rl.metrics import Record, read_metrics, step_metrics
from rl.probe import AgreementBounds, WeightProbe
from rl.rescue import save_what_was_learned
from rl.samples import write_samples

DIFF_MEAN = "rollout/logprob_diff_mean"
DIFF_MAX = "rollout/logprob_diff_max"


class Display(Protocol):
    """Shows people the progress of the run."""

    def message(self, text: str) -> None: ...
    def now(self, text: str) -> None:
        """What the run is doing at the moment; called often."""
        ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How long the run is, and when it saves, evaluates and writes samples."""

    run_dir: Path
    total_steps: int
    checkpoint_every: int = 0  # steps; 0: only at the end
    evaluate_every: int = 0  # steps; 0: not in training
    evaluate_at_start: bool = False
    samples_every: int = 1  # steps; 0: none
    samples_per_step: int = 64

    def evaluates_after(self, step: int) -> bool:
        every = self.evaluate_every
        return every > 0 and (step % every == 0 or step == self.total_steps)


def row_is_whole(plan: RunPlan, step: int) -> bool:
    """Whether a step's row was written, including its evaluation. A crash can prevent both, because a step is saved
    first."""
    row = next((row for row in read_metrics(plan.run_dir) if row["step"] == step), {})
    return bool(row) and (any(name.startswith("eval/") for name in row) or not plan.evaluates_after(step))


@contextmanager
def _timed(metrics: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    metrics[f"time/{stage}_s"] = time.perf_counter() - started


class TrainingRun:
    """Runs the plan. Create it, call `restore()` to resume, then `execute()`."""

    def __init__(
        self,
        plan: RunPlan,
        controller: Controller,
        *,
        checkpoints: CheckpointStore,
        probe: WeightProbe,
        bounds: AgreementBounds,
        open_sinks: Callable[[int], AbstractContextManager[Record]],
        display: Display,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.plan = plan
        self.controller = controller
        self.checkpoints = checkpoints
        self.probe = probe
        self.bounds = bounds
        self.evaluator = evaluator
        self.display = display
        self.next_step = 0
        self._open_sinks = open_sinks
        self._last_row = -1  # last step whose metrics row is kept
        self._owed: dict[str, float] | None = None  # metrics of the last restored step, if its row is not whole
        self._state: dict[str, Any] = {}  # what a checkpoint of `next_step` holds besides the learners' part
        self._saved_step = 0
        self._told_of: set[RewardStatus] = set()

    def restore(self) -> bool:
        """Load the newest complete checkpoint; False when there is none.

        Raises:
            CheckpointError: it cannot be read, or belongs to a run with another configuration.
        """
        found = self.checkpoints.resume()
        if found is None:
            return False
        state = found.state
        self.controller.learners.load_checkpoint(found.path / LEARNER)
        self.controller.prompt_source.load_state_dict(state["prompt_source"])
        self.next_step = self._last_row = self._saved_step = self.controller.steps_learned = int(state["step"])
        if not row_is_whole(self.plan, self.next_step):
            self._last_row, self._owed = self.next_step - 1, state["metrics"]
        self.display.message(found.describe())
        return True

    def execute(self) -> dict[str, float]:
        """Run to the end; returns the metrics of the last step (and of the last evaluation)."""
        plan = self.plan
        metrics: dict[str, float] = {}
        with self._open_sinks(self._last_row) as record:
            try:
                self.controller.sync_weights()
                if self._owed is not None:
                    metrics = self._evaluate_and_record(record, self._owed)
                if self.evaluator and plan.evaluate_at_start and self.next_step == 0:
                    record(0, self._evaluate("start"))
                while self.next_step < plan.total_steps:
                    metrics = self._step(record)
                return metrics
            except BaseException as error:
                learned, updating = self.controller.steps_learned, self.controller.learners.is_updating
                save_what_was_learned(
                    error,
                    self._save_last_step,
                    is_saved=learned == self._saved_step and not updating,
                    checkpoints=self.checkpoints,
                    display=self.display,
                )
                raise

    def _step(self, record: Record) -> dict[str, float]:
        plan = self.plan
        result = self.controller.step(self.next_step)
        metrics = step_metrics(result)
        self._write_samples(result)
        self._tell_of_failures(result, metrics)
        done = self.next_step + 1
        try:
            self._check_agreement(metrics)
            self._state = self._run_state(metrics)  # before the step counts as done: an interrupt may come in between
            self.next_step = done
            if self.probe.due():
                with _timed(metrics, "probe"):
                    metrics |= self.controller.surviving_losses(lambda: self._probe(result))
                self._state["metrics"] = dict(metrics)
        except WeightSyncError:
            record(done, metrics)  # what led to the error, for whoever investigates
            raise
        if done == plan.total_steps or (plan.checkpoint_every and done % plan.checkpoint_every == 0):
            with _timed(metrics, "checkpoint"):
                self._save(done, self._state)  # before the evaluation, so that its failure costs no step
        return self._evaluate_and_record(record, metrics)

    def _evaluate_and_record(self, record: Record, metrics: dict[str, float]) -> dict[str, float]:
        """Finish a step: evaluate, if the plan says so, and record its row."""
        done = self.next_step
        try:
            if self.plan.evaluates_after(done):
                with _timed(metrics, "evaluation"):
                    metrics |= self._evaluate(f"step_{done:06d}")
        finally:
            record(done, metrics)
        self.display.step(done, metrics)
        return metrics

    def _probe(self, result: StepResult) -> dict[str, float]:
        return self.probe.check(
            self.probe.pairs(result.scored.batch),
            self.controller.rollout_pool,
            self.controller.learners,
            policy_version=result.weights.policy_version,
        )

    def _check_agreement(self, metrics: Mapping[str, float]) -> None:
        """Raise WeightSyncError unless rollouts and learner agree on log-probabilities; the comparison costs nothing.

        If the learner had to skip a step and its difference is not finite, there is nothing to compare; up to
        learner.max_skipped_steps of these are tolerated.
        """
        mean, maximum = metrics.get(DIFF_MEAN, 0.0), metrics.get(DIFF_MAX, 0.0)
        if not math.isfinite(mean) and metrics.get("learner/skipped_steps", 0.0) > 0:
            return
        if mean <= self.bounds.mean and maximum <= self.bounds.maximum:
            return
        raise WeightSyncError(
            f"step {self.next_step}: rollout and learner disagree on the log-probabilities of the same tokens by "
            f"{mean:.2e} on average (bound {self.bounds.mean:.0e}) and by {maximum:.2e} at most (bound "
            f"{self.bounds.maximum:.0e}), so the rollouts did not come from the learner's weights; a sync was missed "
            "or loaded wrongly. Resume from the last checkpoint, and see docs/weight-sync.md (if the model's numerics "
            "alone explain the difference, raise the bound of the average with sync.logprob_tolerance)"
        )

    def _tell_of_failures(self, result: StepResult, metrics: Mapping[str, float]) -> None:
        """Report each kind of scoring failure once: samples without a reward are left out of the loss and of
        reward/mean, which would not show it. The metrics count them in every step."""
        scores = result.scored.scores
        failed = Counter((s.status, s.error) for s in scores if not s.ok and s.status is not RewardStatus.SKIPPED)
        for (status, error), _ in failed.most_common():
            if status not in self._told_of:
                self._told_of.add(status)
                metric = f"reward/{status.value}_count"
                self.display.message(
                    f"step {result.step + 1}: {metrics[metric]:.0f} of {len(scores)} samples could not be scored: "
                    f"{status.value}: {error}; later failures of this kind are only counted, in {metric}"
                )

    def _write_samples(self, result: StepResult) -> None:
        plan = self.plan
        step = result.step + 1
        if plan.samples_every and step % plan.samples_every == 0:
            path = plan.run_dir / "samples" / f"step_{step:06d}.jsonl"
            write_samples(path, result.scored, limit=plan.samples_per_step)

    def _evaluate(self, label: str) -> dict[str, float]:
        evaluator = self.evaluator
        if evaluator is None:
            return {}
        samples = self.plan.run_dir / "samples"
        metrics = evaluator.evaluate(samples, label)
        self.display.message(
            f"evaluation {label}: "
            # Only the sets as a whole: there may be dozens of data sources.
            + ", ".join(
                f"{k.removeprefix('eval/')} {v:.3f}" for k, v in metrics.items() if "@" in k and k.count("/") == 2
            )
        )
        return metrics

    def _run_state(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        return {"metrics": dict(metrics), "prompt_source": self.controller.prompt_source.state_dict()}

    def _save(self, step: int, state: Mapping[str, Any]) -> None:
        path = self.checkpoints.save(step, state, of_step(step, self.controller.learners.save_checkpoint))
        self._saved_step = step
        self.display.message(f"checkpoint {path}")

    def _save_last_step(self) -> None:
        """Save the last step that was learned. Of one that broke off after its update, only those metrics are known."""
        controller = self.controller
        controller.finish_update()
        step, update = controller.steps_learned, controller.last_update
        if step != self.next_step and update is not None:
            self._check_agreement(update.metrics)
            self._state = self._run_state(update.metrics)
        self._save(step, self._state)

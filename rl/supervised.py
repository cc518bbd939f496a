"""A supervised run: the same learner trained on worked examples, with resume. Left out: data loading and processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rl.batch import FloatArray, TokenPair, TrainBatch, TrainSample, UpdateResult
from rl.checkpoint import LEARNER, CheckpointStore, of_step
from rl.errors import CheckpointError
from rl.metrics import Record
from rl.prompts import SftExample
from rl.rescue import save_what_was_learned
from rl.run import Display


class SupervisedLearners(Protocol):
    """The learner group, as supervised training uses it."""

    def update(self, batch: TrainBatch) -> UpdateResult: ...
    def score_logprobs(self, pairs: Sequence[TokenPair]) -> list[FloatArray]: ...
    @property
    def is_updating(self) -> bool: ...
    def finish_update(self) -> UpdateResult | None: ...
    def save_checkpoint(self, directory: Path) -> int: ...
    def load_checkpoint(self, directory: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class SupervisedPlan:
    """How often a supervised run passes over its examples, in which order, and when it saves and evaluates."""

    epochs: int
    batch_size: int  # examples per step
    seed: int  # of the order, which depends only on (seed, epoch)
    checkpoint_every: int = 0  # steps; 0: only at the end
    evaluate_every: int = 0  # steps; 0: only at the start and at the end


class SupervisedRun:
    """Epochs of shuffled batches; one optimizer step per batch. An epoch's last, smaller batch is used too.

    Args:
        examples: the examples that every epoch passes over.
        held_out: examples of which only the loss is measured.
    """

    def __init__(
        self,
        plan: SupervisedPlan,
        examples: Sequence[SftExample],
        learners: SupervisedLearners,
        *,
        checkpoints: CheckpointStore,
        display: Display,
        held_out: Sequence[SftExample] = (),
    ) -> None:
        self.plan = plan
        self._examples = examples
        self._held_out = held_out
        self._digest = _digest(examples)
        self._learners = learners
        self._checkpoints = checkpoints
        self._display = display
        self.steps_per_epoch = steps_per_epoch(len(examples), plan.batch_size)
        self.total_steps = plan.epochs * self.steps_per_epoch
        self.next_step = 0
        self._saved_step = 0

    def restore(self) -> bool:
        """Load the newest complete checkpoint; False when there is none.

        Raises:
            CheckpointError: it cannot be read, or belongs to another configuration or other examples.
        """
        found = self._checkpoints.resume()
        if found is None:
            return False
        path, state = found.path, found.state
        if state["examples"] != self._digest:
            raise CheckpointError(
                f"the worked examples changed since {path} was written, so its {state['step']} steps were made on "
                "other examples; restore the data (and data.max_tokens, on which it depends), or start a new run from "
                "the exported weights"
            )
        self._learners.load_checkpoint(path / LEARNER)
        self.next_step = self._saved_step = int(state["step"])
        self._display.message(found.describe())
        return True

    def execute(self, open_sinks: Callable[[int], AbstractContextManager[Record]]) -> dict[str, float]:
        """Run to the end; returns the metrics of the last step."""
        metrics: dict[str, float] = {}
        with open_sinks(self.next_step or -1) as record:  # a run from the start has no earlier rows
            try:
                if self._held_out and self.next_step == 0:
                    record(0, self._evaluate())
                while self.next_step < self.total_steps:
                    update = self._learners.update(self._batch(self.next_step))
                    self.next_step += 1
                    if self._is_due(self.plan.checkpoint_every):
                        self._save()  # before the evaluation, so that its failure costs no step
                    metrics = self._record(record, update)
            except BaseException as error:
                save_what_was_learned(
                    error,
                    lambda: self._save_last_step(record),
                    is_saved=self.next_step == self._saved_step and not self._learners.is_updating,
                    checkpoints=self._checkpoints,
                    display=self._display,
                )
                raise
        return metrics

    def _record(self, record: Record, result: UpdateResult, *, evaluates: bool = True) -> dict[str, float]:
        """Finish a step: evaluate if it is time to, record and show its metrics."""
        metrics = {**result.metrics, "time/step_s": result.seconds}
        try:
            if evaluates and self._held_out and self._is_due(self.plan.evaluate_every):
                metrics |= self._evaluate()
        finally:
            record(self.next_step, metrics)
        self._display.step(self.next_step, metrics)
        return metrics

    def _is_due(self, every: int) -> bool:
        return self.next_step == self.total_steps or (every > 0 and self.next_step % every == 0)

    def _evaluate(self) -> dict[str, float]:
        """The mean loss of a held-out response token."""
        logprobs: list[FloatArray] = []
        for start in range(0, len(self._held_out), self.plan.batch_size):
            chunk = self._held_out[start : start + self.plan.batch_size]
            pairs = [(tuple(e.prompt_ids.tolist()), tuple(e.response_ids.tolist())) for e in chunk]
            logprobs += self._learners.score_logprobs(pairs)
        loss = -float(np.concatenate(logprobs).mean(dtype=np.float64))
        self._display.message(f"evaluation after step {self.next_step}: loss {loss:.4f}")
        return {"eval/loss": loss}

    def _save_last_step(self, record: Record) -> None:
        """Save the last step that was learned; its update may still be under way."""
        update = self._learners.finish_update()
        unfinished = update is not None and update.policy_version > self.next_step
        self.next_step += unfinished
        self._save()
        if update is not None and unfinished:
            self._record(record, update, evaluates=False)

    def _batch(self, step: int) -> TrainBatch:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.plan.seed, epoch]).permutation(len(self._examples))
        chosen = order[position * self.plan.batch_size : (position + 1) * self.plan.batch_size]
        return TrainBatch.from_samples(tuple(_train_sample(self._examples[i]) for i in chosen))

    def _save(self) -> None:
        write_learner = of_step(self.next_step, self._learners.save_checkpoint)
        path = self._checkpoints.save(self.next_step, {"examples": self._digest}, write_learner)
        self._saved_step = self.next_step
        self._display.message(f"checkpoint {path}")


def _digest(examples: Sequence[SftExample]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        for ids in (example.prompt_ids, example.response_ids):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return digest.hexdigest()


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    return -(-num_examples // batch_size)


def _train_sample(example: SftExample) -> TrainSample:
    length = len(example.response_ids)
    return TrainSample(
        prompt_ids=example.prompt_ids,
        response_ids=example.response_ids,
        loss_mask=np.ones(length, dtype=np.bool_),
        advantages=np.zeros(length, dtype=np.float32),  # the supervised loss does not use these two
        rollout_logprobs=np.zeros(length, dtype=np.float32),
    )

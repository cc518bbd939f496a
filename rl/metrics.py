"""Step metrics, and the sinks that keep them: metrics.jsonl, TensorBoard, W&B. Names are `stage/quantity_stat`.

Left out: the terminal display (`launch.display`) and the report page (`launch.report`).
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import not_
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from rl.batch import FinishReason, RewardStatus, ScoredBatch
from rl.controller import StepResult
from rl.data_shaping import groups_with_signal
from rl.errors import CheckpointError, ConfigError

METRICS_FILE = "metrics.jsonl"
_WANDB_FINISH_S = 60.0  # for the last uploads; W&B itself waits without end, and what is missing stays on disk


def step_metrics(result: StepResult) -> dict[str, float]:
    """Every metric of one training step, by name."""
    metrics = {
        **score_metrics(result.scored),
        **result.shaping,
        **result.workers,
        **result.batch.metrics,
        **result.update.metrics,
        "policy/version": float(result.update.policy_version),
        "sync/seconds": result.weights.seconds,
        "sync/bytes": float(result.weights.num_bytes),
        "learner/loss_tokens": float(result.batch.num_loss_tokens),
    }
    for stage, seconds in result.seconds.items():
        metrics["time/step_s" if stage == "step" else f"time/{stage}_s"] = seconds
    return metrics


def score_metrics(scored: ScoredBatch) -> dict[str, float]:
    """The metrics reward/... and rollout/... of one scored batch; samples without a reward are counted, not
    averaged."""
    rollouts, scores = scored.batch.rollouts, scored.scores
    rewards = np.array([s.reward for s in scores if s.ok], dtype=np.float64)
    lengths = np.array([r.length for r in rollouts], dtype=np.float64)
    metrics = {
        "reward/mean": float(rewards.mean()) if len(rewards) else math.nan,
        "reward/std": float(rewards.std()) if len(rewards) else math.nan,
        "rollout/prompt_length_mean": float(
            np.mean([len(scored.batch.prompts[r.prompt_index].token_ids) for r in rollouts])
        ),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_frac": _share(rollouts, lambda r: r.finish_reason is FinishReason.LENGTH),
        "rollout/aborted_frac": _share(rollouts, lambda r: r.finish_reason is FinishReason.ABORT),
        "rollout/tokens": float(scored.batch.num_tokens),
        "reward/zero_signal_groups_frac": _share(list(groups_with_signal(scored, of_task=False).values()), not_),
    }
    if scored.batch.seconds > 0:
        metrics["rollout/tokens_per_s"] = scored.batch.num_tokens / scored.batch.seconds
    status = Counter(s.status for s in scores)
    for kind in RewardStatus:
        if kind is not RewardStatus.OK:
            metrics[f"reward/{kind.value}_count"] = float(status[kind])
    for part in sorted({name for s in scores for name in s.breakdown}):
        values = [s.breakdown[part] for s in scores if s.ok and part in s.breakdown]
        if values:
            metrics[f"reward/{part}_mean"] = float(np.mean(values))
    return metrics


def _share(items: Sequence[Any], predicate: Any) -> float:
    return sum(1 for item in items if predicate(item)) / max(len(items), 1)


Record = Callable[[int, Mapping[str, float]], None]  # (step, its metrics): writes them to every sink


class MetricSink(Protocol):
    """Stores one flat mapping per step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonlSink:
    """`metrics.jsonl`: one object per step, flushed at once, so that a killed run keeps what it measured.

    Args:
        run_dir: the folder that holds the file.
        done_steps: rows of later steps, left over from before a resume, are removed; -1: all rows are.
    """

    def __init__(self, run_dir: Path, *, done_steps: int) -> None:
        path = run_dir / METRICS_FILE
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(run_dir) if row["step"] <= done_steps]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(_line(row) for row in kept))
        temporary.rename(path)
        self._file = path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(_line({"step": step, "time": time.time(), **metrics}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, without a last line that a kill cut short. Raises CheckpointError for other damaged
    lines."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number != len(lines):
                raise CheckpointError(f"{path}, line {number}, is damaged: {error}; remove the line") from error
    return rows


def best_step(run_dir: Path, metric: str, steps: Collection[int]) -> int | None:
    """The one of these steps in whose row the metric is highest, the latest if several are; None if it is in none."""
    values = [(row[metric], row["step"]) for row in read_metrics(run_dir) if row["step"] in steps and metric in row]
    return max((pair for pair in values if pair[0] is not None), default=(None, None))[1]


def _line(row: Mapping[str, Any]) -> str:
    # NaN is not JSON; readers expect null for a quantity that was not measured in a step.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"


class TensorBoardSink:
    """Event files for TensorBoard, written without TensorFlow or torch."""

    def __init__(self, run_dir: Path, *, done_steps: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))
        # Tells TensorBoard to drop what was written for later steps before a resume.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=done_steps + 1, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A W&B run, which resumes under the same id.

    Charts use the training step as their axis. W&B's own step can only grow, so it would drop what a resumed run logs
    at a step that was logged before.

    Args:
        mode: None: what WANDB_MODE says, or else online.

    Raises:
        ConfigError: W&B cannot be reached (which takes it a minute and a half to find out), or refuses the run.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        mode: Literal["online", "offline"] | None,
        name: str,
        config: Mapping[str, Any],
    ) -> None:
        import wandb

        asked: Any = mode or os.environ.get("WANDB_MODE")  # W&B reads it but once, when a process first uses it
        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex
        id_file.write_text(run_id)
        try:
            self._run = wandb.init(
                project=project,
                mode=asked,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(finish_timeout=_WANDB_FINISH_S),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"W&B takes no run of logging.wandb_project {project} from {socket.gethostname()}: {error}; without a "
                f"connection set logging.wandb_mode=offline, and upload later: `wandb sync {run_dir}/wandb/offline-*`"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish(exit_code=1 if sys.exception() else 0)  # so that W&B can alert on failed runs

"""What a scored batch is summarised to, under which names, and what a killed run leaves of metrics.jsonl."""

import json
import math

import pytest
from fakes import PROMPTS, FakeRolloutPool, controller, rollout

from rl.batch import FinishReason, RewardStatus, RolloutBatch, Score, ScoredBatch
from rl.errors import CheckpointError
from rl.metrics import JsonlSink, read_metrics, score_metrics, step_metrics


def test_a_scored_batch_in_numbers():
    """Group 0 has a signal, by its shaping; group 1 has none, since the sample that would make one has no reward."""
    length, abort = FinishReason.LENGTH, FinishReason.ABORT
    rollouts = (
        rollout(0, 0, length=2),
        rollout(0, 1, length=4, finish_reason=length),
        rollout(1, 0, length=6),
        rollout(1, 1, length=8, finish_reason=abort),
    )
    scores = (
        Score(1.0, {"math": 1.0, "format": 0.5}, unshaped_reward=0.0),
        Score(0.0, {"math": 0.0}),
        Score(0.5, {"math": 0.5}),
        Score(math.nan, {"math": 9.0}, RewardStatus.SKIPPED),
    )
    metrics = score_metrics(ScoredBatch(RolloutBatch(PROMPTS[:2], rollouts, seconds=4.0), scores))
    assert metrics == {
        "reward/mean": 0.5,
        "reward/std": pytest.approx(math.sqrt(1 / 6)),
        "reward/math_mean": 0.5,
        "reward/format_mean": 0.5,
        "reward/zero_signal_groups_frac": 0.5,
        "reward/plugin_error_count": 0.0,
        "reward/ground_truth_error_count": 0.0,
        "reward/timeout_count": 0.0,
        "reward/infrastructure_error_count": 0.0,
        "reward/skipped_count": 1.0,
        "rollout/prompt_length_mean": 3.0,
        "rollout/length_mean": 5.0,
        "rollout/length_max": 8.0,
        "rollout/truncated_frac": 0.25,
        "rollout/aborted_frac": 0.25,
        "rollout/tokens": 20.0,
        "rollout/tokens_per_s": 5.0,
    }


def test_a_batch_that_could_not_be_scored_has_no_reward_and_no_rate():
    failed = (Score(math.nan, status=RewardStatus.TIMEOUT),)
    metrics = score_metrics(ScoredBatch(RolloutBatch(PROMPTS[:1], (rollout(),)), failed))
    assert math.isnan(metrics["reward/mean"]) and math.isnan(metrics["reward/std"])
    assert (metrics["reward/timeout_count"], metrics["reward/zero_signal_groups_frac"]) == (1.0, 1.0)
    assert "rollout/tokens_per_s" not in metrics


def test_a_step_in_numbers():
    loop = controller(FakeRolloutPool())
    loop.sync_weights()
    result = loop.step(0)
    metrics = step_metrics(result)
    assert (metrics["policy/version"], metrics["sync/bytes"], metrics["learner/loss_tokens"]) == (1.0, 8.0, 12.0)
    assert (metrics["learner/loss"], metrics["rollout/worker_restarts"]) == (0.1, 0.0)
    assert {name for name in metrics if name.startswith("time/")} == {
        f"time/{stage}_s" for stage in ("rollout", "reward", "annotate", "update", "sync", "step")
    }
    assert metrics["time/step_s"] == result.seconds["step"]
    assert metrics["sync/seconds"] == result.weights.seconds


def test_a_last_row_that_a_kill_cut_short_is_left_out_and_another_is_named(tmp_path):
    sink = JsonlSink(tmp_path, done_steps=-1)
    for step in (1, 2):
        sink.write(step, {"reward/mean": math.nan, "learner/lr": 0.5})
    sink.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert {**json.loads(lines[0]), "time": 0} == {"step": 1, "time": 0, "reward/mean": None, "learner/lr": 0.5}
    path.write_text(lines[0] + lines[1][:20])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    path.write_text(lines[0][:20] + "\n" + lines[1])
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 1, is damaged: .*; remove the line"):
        read_metrics(tmp_path)

"""What metrics become on disk: TensorBoard's event files, which a resumed run goes on with, and an offline W&B run."""

import pytest

from rl.errors import ConfigError
from rl.metrics import TensorBoardSink, WandbSink


def scalars(run_dir, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    first = TensorBoardSink(tmp_path, done_steps=0)
    for step in (1, 2, 3):
        first.write(step, {"reward/mean": step / 10, "learner/loss": 1.0})
    first.close()
    assert scalars(tmp_path, "reward/mean") == [(step, pytest.approx(step / 10)) for step in (1, 2, 3)]
    resumed = TensorBoardSink(tmp_path, done_steps=2)  # step 3 was after the last checkpoint
    resumed.write(3, {"reward/mean": 0.9})
    resumed.close()
    assert scalars(tmp_path, "reward/mean") == [
        (step, pytest.approx(value)) for step, value in ((1, 0.1), (2, 0.2), (3, 0.9))
    ]


def test_an_offline_wandb_run_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for mode, steps in (("offline", (1, 2, 3)), (None, (3, 4))):
        sink = WandbSink(tmp_path, project="p", mode=mode, name="n", config={"seed": 1})
        for step in steps:
            sink.write(step, {"reward/mean": 0.5})
        sink.close()
    run_id = (tmp_path / "wandb_id").read_text()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(run_id in run.name for run in runs)  # two of the same second are told apart by a suffix
    assert all(list(run.glob("*.wandb")) for run in runs)


def test_wandb_is_told_of_failures_and_never_given_a_step_of_its_own_which_it_would_drop(tmp_path, monkeypatch):
    import wandb

    calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    monkeypatch.setattr(wandb, "init", lambda **kwargs: Run())
    sink = WandbSink(tmp_path, project="p", mode="offline", name="n", config={})
    sink.write(3, {"reward/mean": 0.5})
    assert calls == [
        ("define_metric", ("*",), {"step_metric": "step"}),
        ("log", ({"step": 3, "reward/mean": 0.5},), {}),
    ]
    sink.close()
    try:
        raise RuntimeError
    except RuntimeError:
        sink.close()  # as the run's own end does while its error is on the way out
    assert calls[2:] == [("finish", (), {"exit_code": 0}), ("finish", (), {"exit_code": 1})]


def test_a_wandb_that_cannot_be_reached_is_named_with_the_way_out(tmp_path, monkeypatch):
    import wandb

    def init(**settings):
        raise wandb.errors.CommError("context deadline exceeded")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ConfigError, match=r"context deadline exceeded; .* logging.wandb_mode=offline, .*wandb sync"):
        WandbSink(tmp_path, project="p", mode=None, name="n", config={})

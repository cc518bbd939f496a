"""What happens around the steps: metrics, samples, probe, agreement, checkpoints, resume."""

import errno
import json
import math
import os
import re
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from fakes import PROMPTS, FakeLearners, FakePromptSource, FakeRewardPool, FakeRolloutPool, controller, rollout

from rl.batch import RewardStatus, RolloutBatch, Score
from rl.checkpoint import CheckpointStore, read_state
from rl.config import CurriculumConfig, DynamicSamplingConfig
from rl.data_shaping import PassRateCurriculum
from rl.errors import (
    CheckpointError,
    ConfigError,
    EmptyBatchesError,
    LearnerError,
    RewardError,
    RolloutError,
    WeightSyncError,
)
from rl.evaluation import EvalSet, Evaluator
from rl.metrics import JsonlSink, best_step, read_metrics
from rl.probe import AgreementBounds, WeightProbe
from rl.prompts import CurriculumSource, PromptSource
from rl.run import RunPlan, TrainingRun

BOUNDS = AgreementBounds(mean=1e-4, maximum=1e-3)


class Silent:
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)

    def now(self, text): ...

    def step(self, step, metrics):
        self.messages.append(f"step {step}")


class EvalPool(FakeRolloutPool):
    def generate_eval(self, prompts, *, on_group) -> RolloutBatch:
        return self.generate(prompts, group_size=2, step=-1, on_group=on_group)


@contextmanager
def recorded(run_dir, done_steps):
    with closing(JsonlSink(run_dir, done_steps=done_steps)) as sink:
        yield sink.write


def make_run(
    run_dir: Path,
    *,
    total_steps=4,
    learners=None,
    pool=None,
    source=None,
    probe_every=1,
    shaping=(),
    store=None,
    **plan,
):
    pool, learners, source = pool or EvalPool(), learners or FakeLearners(), source or FakePromptSource()
    loop = controller(pool, learners, source, **dict(shaping))
    return TrainingRun(
        RunPlan(run_dir, total_steps, **({"checkpoint_every": 2} | plan)),
        loop,
        checkpoints=store or CheckpointStore(run_dir / "checkpoints", keep=2),
        probe=WeightProbe(every=probe_every, bounds=BOUNDS),
        bounds=BOUNDS,
        open_sinks=partial(recorded, run_dir),
        display=Silent(),
        evaluator=Evaluator([EvalSet("held", loop_prompts())], pool, FakeRewardPool(), pass_at=(1, 2)),
    )


def loop_prompts():
    return FakePromptSource().draw(2)


def test_a_run_writes_one_row_a_step_samples_and_checkpoints(tmp_path):
    run = make_run(tmp_path, evaluate_every=2)
    last = run.execute()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["reward/mean"] == 0.5
    assert rows[0]["reward/exact_mean"] == 0.5
    assert rows[1]["eval/held/pass@2"] == 1.0
    assert rows[1]["eval/held/avg@2"] == 0.5
    assert "eval/held/pass@2" not in rows[0]
    assert last["policy/version"] == 4.0
    assert last["sync/probe_diff_max"] < 1e-6
    samples = (tmp_path / "samples" / "step_000003.jsonl").read_text().splitlines()
    assert json.loads(samples[0])["ground_truth"] == loop_prompts()[0].ground_truth + 4 % 6
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


def test_people_are_told_of_steps_and_evaluations(tmp_path):
    run = make_run(tmp_path, total_steps=2, evaluate_every=2)
    run.execute()
    checkpoint = tmp_path / "checkpoints" / "step_000002"
    evaluation = "evaluation step_000002: held/avg@2 0.500, held/pass@1 0.500, held/pass@2 1.000"
    assert run.display.messages == ["step 1", f"checkpoint {checkpoint}", evaluation, "step 2"]


def test_without_a_number_of_steps_only_the_end_is_saved(tmp_path):
    make_run(tmp_path, total_steps=3, checkpoint_every=0).execute()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000003"]


def test_a_row_that_a_kill_after_the_checkpoint_cost_is_written_when_resuming(tmp_path):
    make_run(tmp_path, total_steps=2).execute()
    whole = read_metrics(tmp_path)
    assert whole[1].pop("time/checkpoint_s") > 0  # what is measured of a checkpoint comes too late for it
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    run = make_run(tmp_path, total_steps=2)
    assert run.restore()
    run.execute()
    first, second = read_metrics(tmp_path)
    assert (first, second | {"time": 0.0}) == (whole[0], whole[1] | {"time": 0.0})


def test_a_checkpoint_that_cannot_be_deleted_yet_is_deleted_later(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("rl.checkpoint.shutil.rmtree", lambda path, ignore_errors: None)  # as NFS, while it is open
        for step in (1, 2):
            store.save(step, {}, lambda directory: (directory / "shard").touch())
    assert store.latest() == tmp_path / "step_000002"
    assert len(list(tmp_path.iterdir())) == 2
    store.save(3, {}, lambda directory: (directory / "shard").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_an_evaluation_that_fails_costs_no_step(tmp_path):
    run = make_run(tmp_path, evaluate_every=2)
    run.evaluator.evaluate = lambda directory, label, **_: raise_(RolloutError("the evaluation took too long"))
    with pytest.raises(RolloutError, match="took too long"):
        run.execute()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    resumed = make_run(tmp_path, evaluate_every=2)
    assert resumed.restore() and resumed.next_step == 2
    resumed.execute()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("row_was_written", [True, False])
def test_an_evaluation_that_was_cut_short_is_made_up_for_when_resuming(tmp_path, row_was_written):
    run = make_run(tmp_path, evaluate_every=2)
    run.evaluator.evaluate = lambda directory, label, **_: raise_(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    if not row_was_written:  # killed outright, between the checkpoint and the row
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    resumed = make_run(tmp_path, total_steps=2, evaluate_every=2)
    assert resumed.restore()
    last = resumed.execute()
    first, second = read_metrics(tmp_path)
    assert second["eval/held/pass@2"] == last["eval/held/pass@2"] == 1.0
    assert second.keys() - first.keys() >= {"eval/held/pass@2", "eval/held/avg@2"}
    assert first.keys() <= second.keys()

    again = make_run(tmp_path, total_steps=2, evaluate_every=2)
    again.restore()
    assert again.execute() == {}, "nothing is left to do"


def test_a_run_that_had_no_checkpoint_yet_starts_its_rows_again(tmp_path):
    class Dies(FakeLearners):
        def update(self, batch):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        make_run(tmp_path, learners=Dies(), evaluate_every=2, evaluate_at_start=True).execute()
    run = make_run(tmp_path, total_steps=1, evaluate_at_start=True)
    assert not run.restore()
    run.execute()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def raise_(error):
    raise error


class FailingRewards(FakeRewardPool):
    """Scores so many batches, then never again."""

    def __init__(self, good: int, error: BaseException | None = None) -> None:
        super().__init__(frozenset({"p0", "p3"}))
        self.good = good
        self.error = error or RewardError("the reward fails on every sample")

    def score(self, rollouts, *, earlier=()):
        self.good -= 1
        if self.good < 0:
            raise self.error
        return super().score(rollouts, earlier=earlier)


def test_rewards_that_fail_for_good_cost_no_step_that_was_learned(tmp_path):
    shaped_run(tmp_path / "straight", 6).execute()
    run = shaped_run(tmp_path / "failed", 6, checkpoint_every=0, rewards=FailingRewards(good=7))
    with pytest.raises(RewardError):
        run.execute()
    rows = len(read_metrics(tmp_path / "failed"))
    assert 0 < rows < 6
    (saved,) = (tmp_path / "failed" / "checkpoints").iterdir()
    assert saved.name == f"step_{rows:06d}"
    assert f"checkpoint {saved}" in run.display.messages

    resumed = shaped_run(tmp_path / "failed", 6)
    assert resumed.restore()
    resumed.execute()
    assert drawn(tmp_path / "failed") == drawn(tmp_path / "straight"), "the failed step drew its prompts again"


@pytest.mark.parametrize("where", ["rewards", "update", "sync"])
def test_an_interrupt_costs_no_step_that_was_learned(tmp_path, where):
    learners = FakeLearners(interrupted_in=3 if where == "update" else 0)
    rewards = FailingRewards(2, KeyboardInterrupt()) if where == "rewards" else None
    run = make_run(tmp_path, learners=learners, shaping={"rewards": rewards}, checkpoint_every=0, total_steps=5)
    if where == "sync":
        learners.publish_weights = lambda publish=learners.publish_weights: (
            raise_(KeyboardInterrupt()) if learners.version == 3 else publish()
        )
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    learned = 2 if where == "rewards" else 3
    assert run.display.messages[-2:] == [
        "saving what was learned before stopping; interrupt again to stop at once",
        f"checkpoint {tmp_path}/checkpoints/step_{learned:06d}",
    ]
    learners, source = FakeLearners(), FakePromptSource()
    resumed = make_run(tmp_path, learners=learners, source=source, total_steps=5)
    assert resumed.restore()
    assert (resumed.next_step, learners.version, source.drawn) == (learned, learned, 2 * learned)
    resumed.execute()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupt_between_a_steps_end_and_its_state_loses_neither(tmp_path, step):
    source = FakePromptSource()
    state_dict = source.state_dict
    source.state_dict = lambda: raise_(KeyboardInterrupt()) if source.drawn == 2 * step else state_dict()
    run = make_run(tmp_path, source=source, checkpoint_every=0)
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    assert not (tmp_path / "checkpoints").exists(), "the second one stops it at once"
    source.drawn, calls = 0, iter([KeyboardInterrupt()])
    source.state_dict = lambda: (
        raise_(error) if source.drawn == 2 * step and (error := next(calls, None)) else state_dict()
    )
    run = make_run(tmp_path, source=source, checkpoint_every=0)
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    learners, source = FakeLearners(), FakePromptSource()
    resumed = make_run(tmp_path, learners=learners, source=source)
    assert resumed.restore()
    assert (resumed.next_step, learners.version, source.drawn) == (step, step, 2 * step)


@pytest.mark.parametrize(
    ("error", "is_saved"),
    [
        (ValueError("an estimator"), True),
        (OSError("Input/output error"), True),
        (ConfigError("a plugin"), True),
        (SystemExit(3), True),
        (EmptyBatchesError("nothing to learn from"), True),
        (LearnerError("learner rank 1 was lost"), False),  # saving would wait for it
        (WeightSyncError("an engine has other weights"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_ends_a_run_costs_no_step_while_the_learners_are_intact(tmp_path, error, is_saved):
    learners = FakeLearners()
    learners.update = lambda batch, update=learners.update: raise_(error) if learners.version == 3 else update(batch)
    with pytest.raises(type(error)):
        make_run(tmp_path, learners=learners, checkpoint_every=0, total_steps=5).execute()
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == (["step_000003"] if is_saved else [])


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (TypeError("a bug"), "the steps since the last checkpoint could not be saved: TypeError('a bug')"),
        (LearnerError("rank 1 was lost"), "the steps since the last checkpoint could not be saved: rank 1 was lost"),
        (KeyboardInterrupt(), "interrupted; the steps since the last checkpoint are not saved"),
    ],
    ids=["bug", "loss", "Ctrl-C"],
)
def test_what_happens_while_saving_does_not_hide_why_the_run_ended(tmp_path, fails, told):
    learners = FakeLearners()
    run = make_run(tmp_path, learners=learners, shaping={"rewards": FailingRewards(2)}, checkpoint_every=0)
    learners.save_checkpoint = lambda directory: raise_(fails)
    with pytest.raises(RewardError, match="fails on every sample"):
        run.execute()
    assert run.display.messages[-2:] == [
        "RewardError: the reward fails on every sample; saving what was learned before stopping; interrupt to stop at "
        "once",
        told,
    ]


def test_samples_that_cannot_be_written_cost_no_step(tmp_path, monkeypatch):
    def write(path, scored, *, limit):
        if path.name == "step_000003.jsonl":
            raise OSError("Stale file handle")

    monkeypatch.setattr("rl.run.write_samples", write)
    with pytest.raises(OSError, match="Stale file handle"):
        make_run(tmp_path, checkpoint_every=0, total_steps=5).execute()
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["step_000003"]


def test_samples_are_written_after_the_same_steps_as_checkpoints(tmp_path):
    make_run(tmp_path, total_steps=5, samples_every=2, checkpoint_every=2).execute()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_000002.jsonl", "step_000004.jsonl"]


def test_weights_of_another_step_are_not_saved_as_this_ones(tmp_path):
    learners = FakeLearners()
    learners.save_checkpoint = lambda directory: (directory / "weights").touch() or 7
    with pytest.raises(CheckpointError, match="the learners saved policy version 7 as that of step 2"):
        make_run(tmp_path, learners=learners).execute()
    assert CheckpointStore(tmp_path / "checkpoints", keep=2).latest() is None


def test_an_interrupted_save_is_not_met_by_another_and_what_is_on_disk_is_not_saved_again(tmp_path):
    learners, saves = FakeLearners(), []
    learners.save_checkpoint = lambda directory: saves.append(directory) or raise_(KeyboardInterrupt())
    run = make_run(tmp_path, total_steps=3, learners=learners)
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    assert len(saves) == 1
    given_up = "the run ended while a checkpoint was being written, which is given up; there is no earlier one"
    assert run.display.messages[-1] == given_up
    run = make_run(tmp_path, shaping={"rewards": FailingRewards(2, KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    assert [text for text in run.display.messages if "saved" in text or "checkpoint" in text] == [
        f"checkpoint {tmp_path}/checkpoints/step_000002"
    ]


def test_samples_without_a_reward_are_told_of_once_a_kind(tmp_path):
    class Fails(FakeRewardPool):
        def score(self, rollouts, *, earlier=()):
            scored = super().score(rollouts, earlier=earlier)
            broken = Score(math.nan, status=RewardStatus.PLUGIN_ERROR, error="mine: KeyError: 'level'")
            skipped = Score(math.nan, status=RewardStatus.SKIPPED, error="the rollout was aborted")
            return replace(scored, scores=(broken, broken, skipped, *scored.scores[3:]))

    run = make_run(tmp_path, total_steps=3, shaping={"rewards": Fails()})
    run.execute()
    told = [text for text in run.display.messages if "could not be scored" in text]
    assert told == [
        "step 1: 2 of 4 samples could not be scored: plugin_error: mine: KeyError: 'level'; "
        "later failures of this kind are only counted, in reward/plugin_error_count"
    ]


@pytest.mark.parametrize("good, expected", [(0, []), (2, [2])])
def test_what_is_on_disk_or_was_never_learned_is_not_saved_again(tmp_path, good, expected):
    saves = []
    for resumes in (False, True):
        run = make_run(tmp_path, shaping={"rewards": FailingRewards(0 if resumes else good)})
        assert run.restore() == (resumes and good > 0)
        run.checkpoints.save = lambda *args, save=run.checkpoints.save: saves.append(args[0]) or save(*args)
        with pytest.raises(RewardError):
            run.execute()
        assert saves == expected


class DiesInASync(EvalPool):
    """Of one policy version, for good."""

    def __init__(self, version):
        super().__init__()
        self.version = version

    def load_weights(self, version):
        if version.policy_version == self.version:
            raise RolloutError("rollout workers [0] are lost and rollout.max_restarts 0 is used up")
        super().load_weights(version)


@pytest.mark.parametrize("version", [3, 4])
def test_a_step_whose_sync_fails_for_good_is_kept_with_what_is_known_of_it(tmp_path, version):
    with pytest.raises(RolloutError, match="used up"):
        make_run(tmp_path, pool=DiesInASync(version), evaluate_every=4).execute()
    learners, source = FakeLearners(), FakePromptSource()
    run = make_run(tmp_path, learners=learners, source=source, evaluate_every=4)
    assert run.restore()
    assert (run.next_step, learners.version, source.drawn) == (version, version, 2 * version)
    last = run.execute()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[version - 1]["learner/loss"] == 0.1
    assert last["eval/held/pass@2"] == 1.0, "the evaluation of the last step is made up for"


def test_an_update_that_disagreed_with_its_rollouts_is_not_kept(tmp_path):
    run = make_run(tmp_path, learners=FakeLearners(logprob_diff=5.0), pool=DiesInASync(1))
    with pytest.raises(RolloutError, match="used up"):
        run.execute()
    assert not (tmp_path / "checkpoints").exists()
    assert "could not be saved: step 0: rollout and learner disagree" in run.display.messages[-1]


def test_a_save_that_fails_does_not_hide_what_ended_the_run(tmp_path):
    run = make_run(tmp_path, checkpoint_every=0, shaping={"rewards": FailingRewards(1)})
    run.checkpoints.save = lambda *args: raise_(OSError("no space left"))
    with pytest.raises(RewardError):
        run.execute()
    assert run.display.messages[-1] == "the steps since the last checkpoint could not be saved: no space left"


@pytest.mark.parametrize("where", ["learner", "state"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_is_full_is_said_to_be(tmp_path, monkeypatch, where, number):
    def write(folder):
        (folder / "w").write_bytes(b"1" * 2**20)

    def fsync(descriptor):
        raise OSError(number, "no fsync")

    def fail(folder):
        monkeypatch.setattr(os, "fsync", fsync)
        if where == "learner":
            raise LearnerError("learner rank 0 failed: unexpected pos 273408 vs 273296")
        write(folder)

    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {}, write)
    kind = LearnerError if where == "learner" else OSError
    message = "unexpected pos" if where == "learner" else "no fsync"
    if number != errno.EIO:
        kind = CheckpointError
        message = rf"of step 2 .*, because {tmp_path} is full \(.*{message}.*\)\. .*step_000001, which has 0.00\d+ GiB$"
    with pytest.raises(kind, match=message):
        store.save(2, {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_resumed_run_continues_where_the_checkpoint_was(tmp_path):
    make_run(tmp_path, total_steps=3).execute()  # the last step always saves
    learners, source = FakeLearners(), FakePromptSource()
    run = make_run(tmp_path, total_steps=5, learners=learners, source=source)
    assert run.restore()
    assert (run.next_step, learners.version, source.drawn) == (3, 3, 6)
    run.execute()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def shaped_run(run_dir: Path, total_steps: int, *, rewards=None, **plan) -> TrainingRun:
    """Dynamic sampling over a curriculum: what is drawn depends on everything that was scored before."""
    curriculum = PassRateCurriculum(CurriculumConfig())
    source = CurriculumSource(PromptSource(PROMPTS, shuffle=True, seed=1), curriculum, seed=1)
    shaping = {
        "rewards": rewards or FakeRewardPool(frozenset({"p0", "p3"})),
        "dynamic_sampling": DynamicSamplingConfig(max_rounds=2),
        "curriculum": curriculum,
    }
    return make_run(run_dir, total_steps=total_steps, source=source, shaping=shaping, **plan)


def drawn(run_dir: Path) -> list[tuple[list[str], float]]:
    """The prompts that each step learned from, and how many were generated for it."""
    samples = sorted((run_dir / "samples").glob("step_*.jsonl"))
    prompts = [[json.loads(line)["prompt_id"] for line in path.read_text().splitlines()] for path in samples]
    generated = [row["rollout/dynamic_sampling_generated_groups"] for row in read_metrics(run_dir)]
    return list(zip(prompts, generated, strict=True))


@pytest.mark.parametrize("done", [1, 4, 7])
def test_a_shaped_run_resumes_exactly(tmp_path, done):
    shaped_run(tmp_path / "straight", 10).execute()
    shaped_run(tmp_path / "resumed", done).execute()
    again = shaped_run(tmp_path / "resumed", 10)
    assert again.restore()
    again.execute()
    assert drawn(tmp_path / "resumed") == drawn(tmp_path / "straight")
    assert max(generated for _, generated in drawn(tmp_path / "straight")) > 2


def test_rows_after_the_checkpoint_are_replaced_when_resuming(tmp_path):
    class Dies(FakeLearners):
        def update(self, batch):
            if self.version == 3:
                raise RuntimeError("killed")
            return super().update(batch)

    with pytest.raises(RuntimeError, match="killed"):
        make_run(tmp_path, learners=Dies()).execute()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    run = make_run(tmp_path)
    run.restore()
    run.execute()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_the_newest_checkpoints_stay_and_what_was_just_written_always_does(tmp_path):
    def save(step, keep):
        CheckpointStore(tmp_path, keep=keep).save(step, {}, lambda folder: (folder / "w").touch())
        return sorted(int(path.name[5:]) for path in tmp_path.glob("step_*"))

    assert [save(step, keep=5) for step in (1, 2, 3, 4)][-1] == [1, 2, 3, 4]
    assert save(5, keep=2) == [4, 5]
    assert save(2, keep=2) == [2, 5]
    assert save(3, keep=1) == [3]
    assert [save(step, keep=None) for step in (4, 5, 6, 10)][-1] == [3, 4, 5, 6, 10]
    assert CheckpointStore(tmp_path, keep=2).latest() == tmp_path / "step_000010"


def test_a_resumed_run_says_what_changed_and_refuses_what_must_not(tmp_path):
    def store(**changes):
        settings = {"seed": 0, "critic": None, "lr": 0.1, "data": {"train": {"path": "a", "options": {}}, "eval": []}}
        fixed = ("seed", "critic.path", "data.train")
        return CheckpointStore(tmp_path / "checkpoints", keep=2, settings={**settings, **changes}, fixed=fixed)

    make_run(tmp_path, store=store()).execute()
    resumed = make_run(tmp_path, store=store())
    assert resumed.restore()
    assert resumed.display.messages[0].endswith("(4 steps done)")
    data = {"train": {"path": "a", "options": {}}, "eval": ["b"]}
    resumed = make_run(tmp_path, store=store(lr=0.2, data=data))
    assert resumed.restore()
    assert resumed.display.messages[0].endswith("changed since: lr 0.1 -> 0.2, data.eval [] -> ['b']")
    for change, named in (
        ({"seed": 7, "lr": 0.2}, "another configuration: seed 0 -> 7;"),
        ({"critic": {"path": None, "clip": 1}}, "critic None -> a section;"),
        ({"data": {"train": {"path": "a", "options": {"k": 1}}, "eval": []}}, "data.train.options.k unset -> 1;"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(named)):
            make_run(tmp_path, store=store(**change)).restore()


def test_disagreement_of_the_log_probabilities_stops_the_run(tmp_path):
    with pytest.raises(WeightSyncError, match=r"step 0: .* 2\.00e-03 at most \(bound 1e-03\)"):
        make_run(tmp_path, learners=FakeLearners(logprob_diff=2e-3)).execute()
    with pytest.raises(WeightSyncError, match="nan"):
        make_run(tmp_path / "b", learners=FakeLearners(logprob_diff=float("nan"))).execute()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1], "what led to it is on record"
    assert (tmp_path / "samples" / "step_000001.jsonl").is_file()


def test_numbers_that_are_not_finite_are_the_learners_business_where_it_skipped_the_step(tmp_path):
    learners = FakeLearners(logprob_diff=float("nan"), skipped_steps=1.0)
    assert make_run(tmp_path, learners=learners).execute()["learner/skipped_steps"] == 1.0
    with pytest.raises(WeightSyncError):
        make_run(tmp_path / "b", learners=FakeLearners(logprob_diff=2e-3, skipped_steps=1.0)).execute()


def test_a_worker_lost_in_an_evaluation_costs_the_set_that_it_was_in_and_no_other(tmp_path):
    asked = []

    class Loses(EvalPool):
        def generate_eval(self, prompts, **options):
            asked.append(len(prompts))
            if asked == [2, 1]:
                self.lost = 1
                raise RolloutError("rollout worker 0 was lost")
            return super().generate_eval(prompts, **options)

    pool = Loses()
    run = make_run(tmp_path, total_steps=1, evaluate_every=1, pool=pool)
    sets = [EvalSet("first", loop_prompts()), EvalSet("second", loop_prompts()[:1])]
    surviving = run.controller.surviving_losses
    run.evaluator = Evaluator(sets, pool, FakeRewardPool(), pass_at=(1,), surviving=surviving)
    metrics = run.execute()
    assert asked == [2, 1, 1]
    assert {"eval/first/avg@2", "eval/second/avg@2"} < metrics.keys()


def test_each_bound_of_the_agreement_stops_the_run_by_itself(tmp_path):
    class OneToken(FakeLearners):
        def update(self, batch):
            result = super().update(batch)
            return replace(result, metrics={**result.metrics, "rollout/logprob_diff_max": 2e-3})

    with pytest.raises(WeightSyncError, match=r"0\.00e\+00 on average .* 2\.00e-03 at most"):
        make_run(tmp_path / "maximum", learners=OneToken()).execute()
    with pytest.raises(WeightSyncError, match=r"5\.00e-04 on average \(bound 1e-04\)"):
        make_run(tmp_path / "mean", learners=FakeLearners(logprob_diff=5e-4)).execute()


def test_the_probe_finds_an_engine_that_loaded_other_weights(tmp_path):
    class Wrong(EvalPool):
        def score_logprobs(self, pairs):
            return {0: [np.full(len(response), -0.9, dtype=np.float32) for _, response in pairs]}

    with pytest.raises(WeightSyncError, match="rollout worker 0 does not serve policy version 1"):
        make_run(tmp_path, pool=Wrong()).execute()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]  # what led to it


def probed(probe, length):
    batch = RolloutBatch(PROMPTS[:1], (rollout(length=length),))
    return probe.check(probe.pairs(batch), EvalPool(), FakeLearners(), policy_version=1)


def test_a_probe_of_rollouts_that_say_nothing_compares_nothing():
    probe = WeightProbe(every=1, bounds=BOUNDS)
    assert probed(probe, length=0) == {}


def test_the_probe_runs_after_the_first_sync_and_then_every_so_many():
    probe = WeightProbe(every=3, bounds=AgreementBounds(mean=1, maximum=1))
    made = [probe.due() and bool(probed(probe, length=4)) for _ in range(7)]
    assert made == [True, False, True, False, False, True, False]
    assert not any(WeightProbe(every=0, bounds=BOUNDS).due() for _ in range(5))


def test_a_probe_that_could_compare_nothing_is_made_after_the_next_sync():
    probe = WeightProbe(every=50, bounds=AgreementBounds(mean=1, maximum=1))
    assert probe.due() and not probed(probe, length=0)
    assert probe.due() and probed(probe, length=4)
    assert not probe.due()


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    """Evaluated after it was saved, so the next save knows its value; a metric that was not measured is null."""
    values = {2: None, 4: 0.5, 6: 0.7, 8: 0.7, 10: 0.2, 12: 0.3, 14: 0.9}
    best_of = partial(best_step, tmp_path, "eval/sums/pass@1")
    store = CheckpointStore(tmp_path / "checkpoints", keep=1, best_of=best_of)
    kept = {}
    with (tmp_path / "metrics.jsonl").open("w") as rows:
        for step, value in values.items():
            store.save(step, {}, lambda folder: (folder / "w").touch())
            kept[step] = list(store.complete())
            rows.write(f'{{"step": {step}, "eval/sums/pass@1": {json.dumps(value)}}}\n{{"step": {step + 1}}}\n')
            rows.flush()
    assert kept == {2: [2], 4: [4], 6: [4, 6], 8: [6, 8], 10: [8, 10], 12: [8, 12], 14: [8, 14]}
    assert store.best_of(store.complete()) == 14
    assert store.latest() == tmp_path / "checkpoints" / "step_000014"


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, lambda folder: (folder / "w").write_text("1"))

    def dies(folder):
        (folder / "w").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.save(2, {}, dies)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]  # the disk would stay full
    (tmp_path / ".writing_000002").mkdir()  # as a killed run leaves it
    assert store.latest().name == "step_000001"
    assert (tmp_path / ".writing_000002").is_dir()  # whoever only looks must not take it from a run that is alive
    assert store.resume().path.name == "step_000001"
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_a_checkpoint_that_a_file_system_shows_late_is_waited_for(tmp_path):
    def write(folder):
        Timer(0.3, lambda: (folder / "w").write_text("1")).start()

    assert (CheckpointStore(tmp_path, keep=1).save(1, {}, write) / "learner" / "w").exists()


def test_a_checkpoint_that_the_learners_wrote_elsewhere_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("rl.shared_files._TIMEOUT_S", 0.0)
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {}, lambda folder: (folder / "w").write_text("1"))
    with pytest.raises(CheckpointError, match="must be on a file system that every node shares"):
        store.save(2, {}, lambda folder: None)
    assert store.latest().name == "step_000001"


def test_what_a_killed_run_left_half_written_does_not_get_into_a_checkpoint(tmp_path):
    left = tmp_path / ".writing_000001" / "learner"
    left.mkdir(parents=True)
    (left / "shard_of_another_world_size").touch()
    path = CheckpointStore(tmp_path, keep=1).save(1, {}, lambda folder: (folder / "w").write_text("1"))
    assert [file.name for file in (path / "learner").iterdir()] == ["w"]


def test_a_damaged_state_says_what_to_do(tmp_path):
    path = CheckpointStore(tmp_path, keep=1).save(1, {}, lambda folder: (folder / "w").write_text("1"))
    (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="remove the folder to resume from the one before"):
        read_state(path)
    for text in ("[]", '{"settings": {}}', '{"step": 1}'):
        (path / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match="holds no run state that this version can read; remove"):
            read_state(path)


def test_bounds_of_agreement_by_dtype_and_kind_of_model():
    assert AgreementBounds.for_dtype("float32", experts=True) == AgreementBounds(1e-4, 1e-3)
    assert AgreementBounds.for_dtype("float32", 1e-3).maximum == pytest.approx(1e-2)
    dense, mixture = AgreementBounds.for_dtype("bfloat16"), AgreementBounds.for_dtype("bfloat16", experts=True)
    assert (dense.mean, mixture.mean) == (0.1, 0.3)
    assert AgreementBounds.for_dtype("bfloat16", 0.5, experts=True) == AgreementBounds(0.5, float("inf"))

"""What a group of learners decides before it asks any of them; and how their failures are told."""

import dataclasses
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from rl import actors
from rl.actors import Crew
from rl.batch import (
    Annotations,
    FinishReason,
    Prompt,
    Rollout,
    RolloutBatch,
    Score,
    ScoredBatch,
    TrainBatch,
    TrainSample,
    UpdateResult,
)
from rl.config import AlgorithmConfig, LearnerConfig, ModelConfig
from rl.errors import ConfigError, LearnerError, RolloutError, WeightSyncError
from rl.learner_group import LearnerGroup
from rl.workers import LearnerSpec, LearnerWorker, RayWeightSyncClient


def batch(masked):
    ids = np.arange(3, dtype=np.int32)
    values = np.zeros(3, dtype=np.float32)
    return TrainBatch.from_samples((TrainSample(ids, ids, np.full(3, not masked), values, values),))


def spec(algorithm=None, **learner):
    return LearnerSpec(
        LearnerConfig(**learner),
        ModelConfig(path="unused"),
        algorithm,
        seed=0,
        deterministic=False,
        device="cpu",
        total_optimizer_steps=1,
    )


@pytest.fixture
def calls_are_results(monkeypatch):
    monkeypatch.setattr(LearnerGroup, "_wait", lambda self, calls, *_, **__: calls)


def test_a_batch_without_a_loss_token_is_borne_but_not_for_ever():
    group = LearnerGroup(spec(max_skipped_steps=2), [])
    for masked in (True, True, False, True, True):
        group._count_empty(batch(masked))
    with pytest.raises(LearnerError, match="none of the 1 samples has a token to learn from .* for 3 steps in a row"):
        group._count_empty(batch(masked=True))


class Updates:
    """Returns the version that its update made; an interrupt may come while it is asked."""

    def __init__(self, interrupt=False):
        self.update, self.interrupt = self, interrupt

    def remote(self, shares):
        if self.interrupt:
            signal.raise_signal(signal.SIGINT)
        return UpdateResult(7, {"loss": 0.5})


def test_an_update_that_was_interrupted_can_be_waited_for_and_every_rank_has_it(calls_are_results, monkeypatch):
    group = LearnerGroup(spec(num_workers=2), [Updates(), Updates()])
    assert group.finish_update() is None
    wait = LearnerGroup._wait
    monkeypatch.setattr(LearnerGroup, "_wait", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        group.update(batch(masked=False))
    assert (group.is_updating, group.policy_version) == (True, 0)
    monkeypatch.setattr(LearnerGroup, "_wait", wait)
    assert group.finish_update().policy_version == group.policy_version == 7
    assert not group.is_updating
    assert group.finish_update() is group.last_update
    cut = LearnerGroup(spec(num_workers=2), [Updates(interrupt=True), Updates()])
    with pytest.raises(KeyboardInterrupt):
        cut.update(batch(masked=False))
    assert len(cut.updating) == 2, "both ranks have it, and wait for each other in it"
    assert cut.finish_update().policy_version == 7


def test_a_wait_looks_up_now_and_then(monkeypatch):
    monkeypatch.setattr(actors, "_LOOK_UP_S", 0.0)
    monkeypatch.setattr(actors.ray, "wait", lambda calls, **_: ([], calls))

    def failed():
        raise RolloutError("an engine did not start")

    with pytest.raises(RolloutError, match="an engine did not start"):
        Crew("learner rank", LearnerError).wait([object()], "start", timeout_s=60, setting="x", meanwhile=failed)
    with pytest.raises(LearnerError, match=r"learner ranks \[0\] did not start within 60 s \(x\)"):
        Crew("learner rank", LearnerError).wait(
            [object()], "start", timeout_s=60, setting="x", since=time.monotonic() - 61, meanwhile=failed
        )


class Rank:
    """One whose node sees what the driver writes into run_dir, or does not, and the other way round."""

    def __init__(self, rank, sees=True, is_seen=True):
        self.rank, self.sees, self.is_seen, self.leave_mark = rank, sees, is_seen, self

    def remote(self, directory):
        if self.sees and self.is_seen:
            assert LearnerWorker(self.rank, 4).leave_mark(directory)
        return self.sees


def test_a_run_dir_that_learners_do_not_share_is_found_before_the_first_step(calls_are_results, monkeypatch, tmp_path):
    monkeypatch.setattr("rl.shared_files._TIMEOUT_S", 0.0)
    well = LearnerGroup(spec(), [Rank(0), Rank(1)], nodes=["a", "a"])
    well.check_run_dir(tmp_path / "made" / "here")
    (tmp_path / "made" / "here").rmdir()
    (tmp_path / "made").rmdir()
    ranks = [Rank(0), Rank(1, sees=False), Rank(2, is_seen=False), Rank(3)]
    group = LearnerGroup(spec(), ranks, nodes=["a", "b", "c", "d"])
    with pytest.raises(ConfigError, match=rf"learner ranks \[1, 2\] on b, c do not share run_dir {tmp_path} with"):
        group.check_run_dir(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not LearnerWorker(0, 1).leave_mark(str(tmp_path / "elsewhere"))


class Worker:
    """Says of each sequence how long its response is; of the reference and the critic in other words."""

    def __init__(self):
        self.annotate = self
        self.seen = []

    def remote(self, sequences, *, old_logprobs):
        self.seen += sequences
        rows = tuple(np.full(len(s.response_ids), len(s.response_ids), np.float32) for s in sequences)
        others = {"ref_logprobs": tuple(-row for row in rows), "values": tuple(row + 0.5 for row in rows)}
        return Annotations(old_logprobs=rows if old_logprobs else None, **others, kl_coefficient=0.3)


def scored_batch():
    reasons = [FinishReason.STOP, FinishReason.ABORT, FinishReason.STOP, FinishReason.LENGTH]
    rollouts = tuple(
        Rollout(0, 0, i, np.arange(i + 1, dtype=np.int32), np.zeros(i + 1, np.float32), reason, 0, "", "")
        for i, reason in enumerate(reasons)
    )
    return ScoredBatch(RolloutBatch((Prompt("p", (1, 2), "q"),), rollouts), tuple(Score(1.0) for _ in rollouts))


def test_samples_that_are_not_valid_are_not_scored_and_get_zeros(calls_are_results):
    workers = [Worker(), Worker()]
    found = LearnerGroup(spec(AlgorithmConfig(), mini_batches=2), workers).annotate(scored_batch())
    assert [row.tolist() for row in found.old_logprobs] == [[1.0], [0.0, 0.0], [3.0] * 3, [4.0] * 4]
    assert [row[0] for row in found.ref_logprobs] == [-1.0, 0.0, -3.0, -4.0]
    assert [row[0] for row in found.values] == [1.5, 0.0, 3.5, 4.5]
    assert found.kl_coefficient == 0.3
    assert sorted(len(s.response_ids) for worker in workers for s in worker.seen) == [1, 3, 4]


@pytest.mark.parametrize(
    ("learner", "placement", "asked", "has_old"),
    [
        ({}, "none", False, False),
        ({"epochs": 2}, "none", True, True),
        ({"mini_batches": 2}, "none", True, True),
        ({}, "loss", True, False),
        ({}, "reward", True, True),
    ],
)
def test_learners_are_asked_for_what_the_algorithm_reads(calls_are_results, learner, placement, asked, has_old):
    kl = {} if placement == "none" else {"kl": {"placement": placement, "coefficient": 0.1}}
    worker = Worker()
    found = LearnerGroup(spec(AlgorithmConfig(**kl), **learner), [worker]).annotate(scored_batch())
    assert (bool(worker.seen), found.old_logprobs is not None) == (asked, has_old)


class Updated:
    """A learner of one rank that notes the responses of every step; each update makes a version."""

    def __init__(self, version=0):
        self.version, self.plans = version, []
        self.update = SimpleNamespace(remote=self._update)
        self.load_checkpoint = SimpleNamespace(remote=lambda directory: self.version)

    def _update(self, shares):
        self.plans.append([[int(s.response_ids[0]) for s in share.samples] for share in shares])
        self.version += 1
        return UpdateResult(self.version, {})


def test_every_update_has_its_own_order_and_a_resumed_run_goes_on_with_it(calls_are_results, tmp_path):
    values = np.zeros(1, np.float32)
    responses = [np.array([i], dtype=np.int32) for i in range(8)]
    batch = TrainBatch.from_samples(tuple(TrainSample(r, r, np.ones(1, bool), values, values) for r in responses))
    straight, resumed = Updated(), Updated(version=1)
    group, later = (LearnerGroup(spec(mini_batches=2, epochs=2), [worker]) for worker in (straight, resumed))
    assert [group.update(batch).policy_version for _ in range(2)] == [1, 2]
    first, second = straight.plans
    assert [sorted(epoch[0] + epoch[1]) for epoch in (first[:2], first[2:])] == [list(range(8))] * 2
    assert first != second
    later.load_checkpoint(tmp_path)
    later.update(batch)
    assert resumed.plans == [second]


CREW = Crew("rollout worker", RolloutError, passing=(WeightSyncError,))


def fails_with(monkeypatch, error):
    monkeypatch.setattr(actors.ray, "get", lambda call: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("error", [OutOfMemoryError("the node is out of memory"), RayActorError(error_msg="it died")])
def test_a_member_that_is_lost_however_it_went_is_an_error_of_the_crew(monkeypatch, error):
    fails_with(monkeypatch, error)
    with pytest.raises(RolloutError, match="rollout worker 3 was lost before it could generate"):
        CREW.get("call", 3, "generate")


def test_of_a_lack_of_memory_only_what_counts_is_told(monkeypatch):
    text = (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 72) was "
        "22.68GB used / 23.54GB limit (0.963311)\nOOM kill reason: exceeded threshold of 24012257280B\nTop 10 memory "
        "users: PID\tMEM(GB)\tCOMMAND\n16543\t17.53\tray::LearnerWorker\n9771\t4.01\tVLLM::EngineCore\n"
        "Refer to the documentation on how to address the out of memory issue: Consider provisioning more memory."
    )
    fails_with(monkeypatch, OutOfMemoryError(text))
    with pytest.raises(RolloutError) as caught:
        CREW.get("call", 3, "generate")
    assert str(caught.value) == (
        "rollout worker 3 was lost before it could generate: Ray's memory monitor killed it, because node 192.0.2.2 "
        "had 22.68GB of 23.54GB of memory in use (mostly by ray::LearnerWorker 17.53 GB, VLLM::EngineCore 4.01 GB); "
        "see Memory in docs/running.md for what to lower"
    )


def test_of_a_kill_that_ray_knows_nothing_of_the_likely_reason_is_told(monkeypatch):
    text = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: LearnerWorker\nWorker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
        "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called"
    )
    fails_with(monkeypatch, RayActorError(error_msg=text))
    with pytest.raises(
        RolloutError, match=r"code 2\. End of file\. If nobody ended it, the kernel .* a memory limit"
    ) as it:
        CREW.get("call", 3, "generate")
    assert "ray stop" not in str(it.value)


def task_error(cause):
    return RayTaskError("generate", "", cause)


def test_an_error_of_a_member_passes_or_is_told_with_its_name(monkeypatch):
    fails_with(monkeypatch, task_error(WeightSyncError("version 3, not 4")))
    with pytest.raises(WeightSyncError, match="^version 3, not 4$"):
        CREW.get("call", 0, "generate")
    fails_with(monkeypatch, task_error(ValueError("no such token")))
    with pytest.raises(RolloutError, match="rollout worker 1 failed to generate: ValueError..no such token"):
        CREW.get("call", 1, "generate")


def test_an_error_that_nobody_foresaw_carries_its_traceback(monkeypatch):
    fails_with(
        monkeypatch, RayTaskError("generate", 'File "engine.py", line 7, in go', KeyError("x")).as_instanceof_cause()
    )
    with pytest.raises(RolloutError, match=r"failed to generate: KeyError\('x'\)") as caught:
        CREW.get("call", 1, "generate")
    assert "line 7, in go" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", [RuntimeError, RolloutError])  # unforeseen, or in our own words
def test_a_member_that_is_gone_is_told_of_in_the_place_of_those_who_miss_it(monkeypatch, kind):
    outcomes = {
        "a": task_error(kind("connection reset by peer")),
        "b": task_error(RuntimeError("connection reset by peer")),
        "c": RayActorError(error_msg="it died"),
    }
    monkeypatch.setattr(
        actors.ray, "wait", lambda calls, num_returns, timeout: (calls[:num_returns], calls[num_returns:])
    )
    monkeypatch.setattr(actors.ray, "get", lambda call: (_ for _ in ()).throw(outcomes[call]))
    crew = dataclasses.replace(CREW, collective=True)
    with pytest.raises(RolloutError, match="worker 2 was lost before it could update: it died"):
        crew.wait(["a", "b", "c"], "update", timeout_s=9, setting="x")
    with pytest.raises(RolloutError, match="worker 0 failed to update: .*connection reset"):
        crew.wait(["a", "b"], "update", timeout_s=9, setting="x")
    with pytest.raises(RolloutError, match="worker 0 failed to update: .*connection reset"):
        CREW.wait(["a", "b", "c"], "update", timeout_s=9, setting="x")


def test_the_first_failure_ends_the_wait_and_late_members_are_named(monkeypatch):
    monkeypatch.setattr(actors.ray, "wait", lambda calls, num_returns, timeout: ([calls[-1]], calls[:-1]))
    fails_with(monkeypatch, RayActorError(error_msg="it died"))
    with pytest.raises(RolloutError, match="worker 7 was lost"):
        CREW.wait(["a", "b"], "start", timeout_s=9, setting="x", members=[4, 7])
    monkeypatch.setattr(actors.ray, "wait", lambda calls, num_returns, timeout: ([], calls))
    with pytest.raises(RolloutError, match=r"rollout workers \[4, 7\] did not start within 9 s \(rollout.timeout_s\)"):
        CREW.wait(["a", "b"], "start", timeout_s=9, setting="rollout.timeout_s", members=[4, 7])


class Receiver:
    """A handle whose every call is a name, and which has a method of any name."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *arguments: self._name)


def test_every_engine_gets_its_place_among_those_that_there_are(monkeypatch):
    told = {}
    receivers = {
        index: SimpleNamespace(
            init_weight_transfer=SimpleNamespace(remote=lambda info, i=index: told.update({i: info}))
        )
        for index in (0, 2)
    }
    monkeypatch.setattr("rl.workers._RECEIVERS", SimpleNamespace(wait=lambda calls, *what, **limits: calls))
    RayWeightSyncClient(receivers, 1.0).init_weight_transfer_engine({"port": 7, "rank_offsets": [1, 3]})
    assert told == {0: {"port": 7, "rank_offset": 1}, 2: {"port": 7, "rank_offset": 3}}


def test_weights_for_nobody_are_not_called_sent():
    group = LearnerGroup(SimpleNamespace(), [])
    with pytest.raises(WeightSyncError, match="no rollout worker to send weights to"):
        group.publish_weights()


def test_a_sync_knows_which_engines_it_waits_for(monkeypatch):
    client = RayWeightSyncClient({0: Receiver("a"), 2: Receiver("b"), 3: Receiver("c")}, timeout_s=0.1)
    assert client.late() == ""
    monkeypatch.setattr(actors.ray, "get", lambda call: call)
    waiting = ["b"]

    def wait(calls, num_returns, timeout):
        ended = [call for call in calls if call not in waiting][:num_returns]
        return ended, [call for call in calls if call not in ended]

    monkeypatch.setattr(actors.ray, "wait", wait)
    with pytest.raises(WeightSyncError, match=r"rollout workers \[2\] did not answer update_weights within 0.1 s"):
        client.update_weights({})
    assert client.late() == "rollout workers [2] have not answered"
    waiting.clear()
    client.update_weights({})
    assert client.late() == ""

"""Ranks that have stopped moving are found and named; the ranks are plain Ray actors here."""

import os
import re
import signal
import threading
import time

import psutil
import pytest
import ray

from rl.actors import end_actors
from rl.config import LearnerConfig, ModelConfig
from rl.errors import LearnerError
from rl.learner_group import LearnerGroup
from rl.workers import WATCH, LearnerSpec, LearnerWorker

pytestmark = [pytest.mark.stack, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def ranks():
    class Rank(LearnerWorker):
        """Updates by counting micro-batches."""

        def update(self, micro_batches, seconds_each):
            from rl.progress import WORK

            for number in range(1, micro_batches + 1):
                WORK.begin(f"micro-batch {number}")
                time.sleep(seconds_each)
            return micro_batches

        def pid(self):
            return os.getpid()

        def thread(self):
            return threading.get_ident()

    rank = ray.remote(concurrency_groups={WATCH: 1}, num_cpus=0.01, max_restarts=0)(Rank)
    started = [rank.remote(number, 2) for number in range(2)]
    ray.get([worker.meet.remote() for worker in started])
    yield started
    end_actors(started)


def wait_for(ranks, calls, hang_timeout_s):
    spec = LearnerSpec(
        LearnerConfig(num_workers=2, hang_timeout_s=hang_timeout_s, timeout_s=60),
        ModelConfig(path="unused"),
        None,
        seed=0,
        deterministic=False,
        device="cpu",
        total_optimizer_steps=1,
    )
    group = LearnerGroup(spec, ranks)
    return group._wait(calls, "update", meanwhile=group._look())


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr("rl.actors._LOOK_UP_S", 0.1)
    monkeypatch.setattr("rl.stall_watch._ANSWER_S", 5.0)


def test_an_update_may_take_longer_than_one_of_its_micro_batches(ranks):
    assert wait_for(ranks, [worker.update.remote(8, 0.5) for worker in ranks], hang_timeout_s=2) == [8, 8]


def test_all_that_a_rank_does_it_does_on_one_thread_which_is_not_the_one_that_answers(ranks):
    """torch keeps settings per thread, such as the number of OpenMP threads and the current GPU."""
    rank = ranks[0]
    calls = [call for _ in range(50) for call in (rank.thread.remote(), rank.position.remote())][::2]
    assert len(set(ray.get(calls))) == 1
    working = rank.update.remote(1, 5)
    ray.get(rank.position.remote(), timeout=60)
    assert not ray.wait([working], timeout=0)[0], "it answers while it works"


def test_ranks_that_do_not_move_are_named_with_what_they_are_in(ranks):
    calls = [ranks[0].update.remote(2, 30), ranks[1].update.remote(1, 0.0)]
    calls[1] = ranks[1].update.remote(2, 30)  # one micro-batch ahead
    with pytest.raises(LearnerError) as found:
        wait_for(ranks, calls, hang_timeout_s=2)
    assert str(found.value) == (
        "no learner rank has made progress for 2 s (learner.hang_timeout_s): ranks [0] are at micro-batch 1 (piece of "
        "work 1); ranks [1] are at micro-batch 1 (piece of work 2). If a micro-batch really takes that long, raise the "
        "limit or lower learner.max_tokens_per_microbatch; --resume continues from the last checkpoint"
    )
    first, second = found.value.__notes__
    assert first.startswith("learner rank 0 is in:\n") and second.startswith("learner rank 1 is in:\n")
    assert re.search(r"in update\n\s+time.sleep\(seconds_each\)", first), first


def test_a_rank_that_is_stopped_is_named(ranks):
    process = psutil.Process(ray.get(ranks[1].pid.remote()))
    calls = [worker.update.remote(60, 0.1 if worker is ranks[1] else 30) for worker in ranks]
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(LearnerError, match=r"; ranks \[1\] do not answer: their processes are stopped, or busy"):
            wait_for(ranks, calls, hang_timeout_s=2)
    finally:
        process.send_signal(signal.SIGCONT)

"""The pool over real Ray actors whose engine is a plain object: routing, deadlines, what happens to lost workers."""

import asyncio
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import ray

from rl.actors import end_actors
from rl.batch import FinishReason, Prompt, WeightVersion
from rl.config import RolloutConfig
from rl.errors import RolloutError, WeightSyncError
from rollout.engine import GenerationResult, SamplingParameters
from rollout.pool import RolloutPool
from rollout.workers import RolloutWorker

pytestmark = [pytest.mark.stack, pytest.mark.usefixtures("ray_cluster")]
PROMPTS = tuple(Prompt(f"p{i}", tuple(range(i + 1)), text=str(i)) for i in range(6))


def builder(index, faults):
    """What makes worker `index`. `faults` says what is wrong with which worker, and where these note their "lives"."""
    fault, lives = faults.get(index), faults.get("lives")

    def build():  # a function in a function travels as it is; the workers cannot import this file
        class Engine:
            """Answers with its worker's index, the sample's seed and how many samples it has drawn so far."""

            drawn = 0

            def note(self, what):
                if lives is not None:
                    with Path(lives).open("a") as file:
                        file.write(f"{index} {what}\n")

            async def start(self):
                self.note("starts")
                if fault == "no start":
                    raise RolloutError(f"rollout engine {index} did not start: no memory")
                if fault == "slow start":
                    await asyncio.sleep(60)

            async def generate(self, requests, parameters):
                if fault == "stale":
                    raise WeightSyncError("told to serve policy version 3, not 2")
                if fault == "hangs":
                    await asyncio.sleep(60)
                if fault in ("slow", "dies late"):
                    await asyncio.sleep(1 if fault == "slow" else 3)
                if fault in ("dies", "dies late"):
                    os._exit(1)
                ids = [np.array([index, r.seed % 7, self.drawn + i], np.int32) for i, r in enumerate(requests)]
                self.drawn += len(requests)
                return [GenerationResult(i, np.zeros(3, np.float32), FinishReason.STOP, 0, 0) for i in ids]

            async def activate(self, policy_version):
                pass

            async def memory_peak_gib(self):
                return 0.0

            async def check_health(self):
                if fault == "hangs":
                    raise RolloutError("no progress")

            async def shutdown(self):
                self.note("ends")

        return Engine(), lambda prompt, ids: ("", "")

    return build


class Pools:
    """Makes pools, and ends them."""

    def __init__(self):
        self.pools, self.started, self.told = [], [], []

    def make(self, workers, faults=None, **settings):
        faults = self.faults = dict(faults or {})
        deterministic = settings.pop("deterministic", False)
        config = RolloutConfig(num_workers=workers, **({"timeout_s": 20, "start_timeout_s": 60} | settings))
        parameters = SamplingParameters(max_tokens=2)

        def start(index):
            options = {"max_concurrency": 100, "num_cpus": 0.01, "max_restarts": 0}
            worker = ray.remote(RolloutWorker).options(**options).remote(builder(index, faults))
            faults.pop(index, None)  # the one that replaces it is well
            self.started.append(worker)
            return worker

        pool = RolloutPool(
            start,
            config,
            training=parameters,
            evaluation=parameters,
            deterministic=deterministic,
            seed=1,
            report=self.told.append,
        )
        self.pools.append(pool)
        pool.wait_until_ready()
        return pool


@pytest.fixture
def pools():
    made = Pools()
    yield made
    for pool in made.pools:
        pool.shutdown()


def places(batch):
    """(prompt, worker) of every sample, in order."""
    return [(r.prompt_index, int(r.token_ids[0])) for r in batch.rollouts]


def test_every_sample_comes_once_in_order_and_a_slow_worker_hoards_none(pools):
    pool = pools.make(2, {0: "slow"}, max_concurrent_sequences=2)
    seen = {}

    def on_group(prompt, group):
        seen.update({id(rollout): prompt for rollout in group})

    batch = pool.generate(PROMPTS, group_size=2, step=0, on_group=on_group)
    assert seen == {id(rollout): batch.prompt_of(rollout) for rollout in batch.rollouts}
    assert [(r.prompt_index, r.sample_index) for r in batch.rollouts] == [(p, s) for p in range(6) for s in range(2)]
    groups = [worker for _, worker in places(batch)][::2]
    assert places(batch)[1::2] == places(batch)[::2], "a group is drawn by one worker"
    assert groups.count(0) == 1 and groups.count(1) == 5


def test_in_deterministic_mode_the_place_decides_who_draws(pools):
    batch = pools.make(2, {0: "slow"}, deterministic=True).generate(PROMPTS, group_size=1, step=0)
    assert places(batch) == [(p, p % 2) for p in range(6)]


def test_samples_do_not_depend_on_the_workers(pools):
    seeds = [
        [int(r.token_ids[1]) for r in pools.make(workers).generate(PROMPTS, group_size=2, step=3).rollouts]
        for workers in (1, 2)
    ]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) > 2


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("stale", WeightSyncError, "^told to serve policy version 3, not 2$"),
        ("dies", RolloutError, "rollout worker 1 was lost before it could generate"),
        ("hangs", RolloutError, r"rollout workers \[1\] finished none of . groups within rollout.timeout_s 2"),
    ],
)
def test_a_worker_that_fails_is_named_and_replaced(pools, fault, kind, message):
    pool = pools.make(2, {1: fault}, timeout_s=2)
    with pytest.raises(kind, match=message):
        pool.generate(PROMPTS, group_size=2, step=0)
    lost = pool.replace_lost_workers()
    assert lost == (0 if fault == "stale" else 1)
    assert pool.metrics()["rollout/worker_restarts"] == lost
    if lost:
        assert len(pool.generate(PROMPTS, group_size=2, step=0).rollouts) == 12


def test_what_was_finished_before_a_worker_was_lost_is_not_drawn_again_under_the_same_weights(pools):
    pool = pools.make(2, {1: "dies late"}, max_concurrent_sequences=2)
    pool.load_weights(WeightVersion(3, 0))
    with pytest.raises(RolloutError, match="rollout worker 1 was lost"):
        pool.generate(PROMPTS, group_size=2, step=0)  # five groups of worker 0, and one that is lost
    pool.replace_lost_workers()
    pool.load_weights(WeightVersion(3, 0))
    batch = pool.generate(PROMPTS, group_size=2, step=0)
    drawn = {int(r.token_ids[2]) for r in batch.rollouts if r.token_ids[0] == 0}
    assert len(batch.rollouts) == 12 and set(range(10)) <= drawn <= set(range(12))
    again = pool.generate(PROMPTS, group_size=2, step=0)
    assert min(int(r.token_ids[2]) for r in again.rollouts if r.token_ids[0] == 0) >= 10


def test_what_was_finished_under_other_weights_is_drawn_again(pools):
    pool = pools.make(2, {1: "dies late"}, max_concurrent_sequences=2)
    pool.load_weights(WeightVersion(3, 0))
    with pytest.raises(RolloutError, match="rollout worker 1 was lost"):
        pool.generate_eval(PROMPTS)
    pool.replace_lost_workers()
    pool.load_weights(WeightVersion(4, 0))
    batch = pool.generate_eval(PROMPTS)
    assert min(int(r.token_ids[2]) for r in batch.rollouts if r.token_ids[0] == 0) >= 4


def test_a_start_that_fails_is_told_while_others_still_start(pools):
    with pytest.raises(RolloutError, match="worker 1 failed to start its engine: rollout engine 1 did not start: no m"):
        pools.make(2, {0: "slow start", 1: "no start"}, start_timeout_s=20)


def test_a_kill_that_takes_its_time_is_waited_for(pools, monkeypatch):
    pool = pools.make(2)
    kill = ray.kill
    monkeypatch.setattr("rl.actors.ray.kill", lambda actor: threading.Timer(0.5, kill, [actor]).start())
    pool.shutdown()
    for worker in pools.started:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(worker.__ray_ready__.remote(), timeout=20)


def test_a_lost_engine_ends_in_order_before_the_next_one_starts(pools, tmp_path):
    lives = tmp_path / "lives"
    pool = pools.make(1, {0: "hangs", "lives": str(lives)}, timeout_s=2)
    with pytest.raises(RolloutError):
        pool.generate(PROMPTS, group_size=1, step=0)
    assert pool.replace_lost_workers() == 1
    assert lives.read_text().splitlines() == ["0 starts", "0 ends", "0 starts"]


def test_a_worker_that_fails_while_it_starts_again_is_another_loss(pools):
    pool = pools.make(2, {0: "dies"}, max_restarts=2, start_timeout_s=10)
    with pytest.raises(RolloutError, match="was lost"):
        pool.generate(PROMPTS, group_size=1, step=0)
    pools.faults[0] = "no start"
    assert pool.replace_lost_workers() == 1
    assert pool.metrics()["rollout/worker_restarts"] == 2
    assert "rollout worker 0 failed to start again: rollout engine 0 did not start: no memory" in pools.told
    assert len(pool.generate(PROMPTS, group_size=1, step=0).rollouts) == 6

    pools.faults[1] = "slow start"
    end_actors([pool.workers[1]])
    with pytest.raises(RolloutError, match=r"rollout workers \[1\] did not start again within 10 s \(rollout.start_t"):
        pool.replace_lost_workers()


def test_losses_count_once_however_many_workers_they_take_and_are_forgotten_after_a_batch(pools):
    pool = pools.make(3, {0: "dies", 1: "dies"}, max_restarts=1)
    for _ in range(2):
        with pytest.raises(RolloutError, match="was lost"):
            pool.generate(PROMPTS, group_size=1, step=0)
            end_actors(pool.workers[:2])  # the second time: as if their node were gone
            pool.generate(PROMPTS, group_size=1, step=0)
        assert pool.replace_lost_workers() == 2
    assert pool.metrics()["rollout/worker_restarts"] == 4
    assert all("rollout workers [0, 1] are lost; others are started" in text for text in pools.told)
    end_actors([pool.workers[0]])
    with pytest.raises(RolloutError, match=r"workers \[0\] are lost, and rollout.max_restarts 1 is used up"):
        pool.replace_lost_workers()

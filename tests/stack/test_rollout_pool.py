"""The pool over real Ray actors whose engine is a plain object: routing, deadlines, what happens to lost workers."""

import asyncio
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from rl.actors import end_actors
from rl.batch import FinishReason, Prompt, WeightVersion
from rl.config import RolloutConfig
from rl.errors import EnginesLostError, RolloutError, WeightSyncError
from rollout.engine import GenerationResult, SamplingParameters
from rollout.pool import RolloutPool
from rollout.roster import Roster
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
                if fault == "waits to start":
                    while not Path(f"{lives}.go").exists():
                        await asyncio.sleep(0.05)

            async def generate(self, requests, parameters):
                if fault == "stale":
                    raise WeightSyncError("told to serve policy version 3, not 2")
                if fault in ("hangs", "is frozen", "never ends"):
                    await asyncio.sleep(60)
                if fault in ("slow", "dies late"):
                    await asyncio.sleep(1 if fault == "slow" else 2)
                if fault in ("dies", "dies late") or any(r.prompt_ids == faults.get("poison") for r in requests):
                    os._exit(1)
                ids = [np.array([index, r.seed % 7, self.drawn + i], np.int32) for i, r in enumerate(requests)]
                self.drawn += len(requests)
                return [GenerationResult(i, np.zeros(3, np.float32), FinishReason.STOP, 0, 0) for i in ids]

            async def score_logprobs(self, pairs):
                return [np.full(1, index, np.float32)]

            async def activate(self, policy_version):
                pass

            async def memory_peak_gib(self):
                return 0.0

            async def check_health(self, timeout_s):
                if fault in ("hangs", "is frozen"):
                    await asyncio.sleep(timeout_s if fault == "hangs" else 60)
                    raise RolloutError("no progress")
                if fault == "slow":
                    await asyncio.sleep(0.8 * timeout_s)

            async def shutdown(self):
                self.note("ends")

        return Engine(), lambda prompt, ids: ("", "")

    return build


class Pools:
    """Makes pools, and ends them."""

    def __init__(self):
        self.rosters, self.started, self.told = [], [], []

    def make(self, workers, faults=None, **settings):
        faults = self.faults = dict(faults or {})
        deterministic = settings.pop("deterministic", False)
        all_needed, trained = settings.pop("all_needed", deterministic), settings.pop("trained", True)
        config = RolloutConfig(
            num_workers=workers, **({"timeout_s": 20, "hang_timeout_s": 3, "start_timeout_s": 60} | settings)
        )
        parameters = SamplingParameters(max_tokens=2)

        def start(index):
            options = {"max_concurrency": 100, "num_cpus": 0.01, "max_restarts": 0}
            if faults.get(index) == "no room":
                options["resources"] = {"nowhere": 1}
            worker = ray.remote(RolloutWorker).options(**options).remote(builder(index, faults))
            faults.pop(index, None)  # the one that replaces it is well
            if "always" in faults:
                faults[index] = faults["always"]
            self.started.append(worker)
            return worker

        roster = Roster(start, config, all_needed=all_needed, report=self.told.append)
        self.rosters.append(roster)
        roster.wait_until_ready()
        settings = {"training": parameters, "evaluation": parameters, "deterministic": deterministic, "seed": 1}
        return RolloutPool(roster, config, trained=trained, **settings)


@pytest.fixture
def pools(monkeypatch):
    monkeypatch.setattr("rollout.roster._MORE_LOSSES_S", 0.2)  # for the sake of the suite
    monkeypatch.setattr("rollout.roster._LOOK_S", 0.2)
    monkeypatch.setattr("rollout.roster._CHECK_EVERY_S", 0.2)
    monkeypatch.setattr("rollout.pool._LOOK_S", 0.2)
    monkeypatch.setattr("rollout.pool._ADMIT_EVERY_S", 0.5)
    made = Pools()
    yield made
    for roster in made.rosters:
        roster.shutdown()


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
        ("hangs", RolloutError, "rollout worker 1 failed to answer: no progress"),
        ("is frozen", RolloutError, r"rollout worker 1 has not answered within 3 s \(rollout.hang_timeout_s\)"),
        ("never ends", RolloutError, r"workers \[1\] finished none of . groups within rollout.timeout_s 2; raise it"),
    ],
)
def test_a_worker_that_fails_where_all_are_needed_is_named_and_replaced(pools, monkeypatch, fault, kind, message):
    if fault == "is frozen":
        monkeypatch.setattr("rollout.roster._ANSWER_S", 3.0)
    pool = pools.make(2, {1: fault}, timeout_s=2 if fault == "never ends" else 50, all_needed=True)
    with pytest.raises(kind, match=message):
        pool.generate(PROMPTS, group_size=2, step=0)
    lost = pool.replace_lost_workers("the cause")
    assert lost == (0 if fault in ("stale", "never ends") else 1)
    assert pool.metrics()["rollout/worker_restarts"] == lost
    assert list(pool.workers) == [0, 1]
    if lost:
        assert len(pool.generate(PROMPTS, group_size=2, step=0).rollouts) == 12
        assert pools.told == [
            "rollout workers [1] are lost: the cause. Others start in their place, which may take up to "
            "rollout.start_timeout_s 60 s (`ray status` shows whether there is room)",
            "rollout workers [1] serve again (2 of 2)",
        ]


def allow(pool, **settings):
    """Change settings after the start, which takes its time on a busy machine."""
    pool.roster._config = pool.roster._config.model_copy(update=settings)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize("fault", ["dies late", "hangs"])
def test_the_others_draw_what_a_lost_worker_has_not_while_another_starts_in_its_place(pools, tmp_path, fault):
    lives = tmp_path / "lives"
    pool = pools.make(3, {1: fault, "lives": str(lives)}, timeout_s=50, max_concurrent_sequences=2)
    pools.faults[1] = "waits to start"
    batch = pool.generate(PROMPTS, group_size=2, step=0)
    assert [(r.prompt_index, r.sample_index) for r in batch.rollouts] == [(p, s) for p in range(6) for s in range(2)]
    assert {worker for _, worker in places(batch)} == {0, 2}
    drawn = [int(r.token_ids[2]) for r in batch.rollouts if r.token_ids[0] == 0]
    assert len(set(drawn)) == len(drawn) == max(drawn) + 1, "nothing is drawn twice"
    cause = "rollout worker 1 was lost before it could" if fault == "dies late" else "worker 1 failed to answer: no p"
    assert len(pools.told) == 1 and cause in pools.told[0]
    assert "Others start in their place, while those that are left (2 of 3) go on" in pools.told[0]

    for _ in range(2):  # it takes its time, and nobody waits for it
        assert pool.replace_lost_workers("") == 0
        pool.load_weights(WeightVersion(1, 0))
        assert {worker for _, worker in places(pool.generate(PROMPTS, group_size=1, step=1))} == {0, 2}
    assert pool.score_logprobs([]) == {0: [0.0], 2: [2.0]}
    assert pool.metrics()["rollout/workers_serving"] == 2

    Path(f"{lives}.go").touch()
    wait_for(lambda: pool.replace_lost_workers("") == 0 and list(pool.workers) == [0, 1, 2])
    assert pools.told[1:] == ["rollout workers [1] serve again (3 of 3)"]
    assert {worker for _, worker in places(pool.generate(PROMPTS, group_size=1, step=2))} == {0, 1, 2}
    assert pool.metrics()["rollout/workers_serving"] == 3


def test_an_engine_that_hangs_is_found_while_the_others_go_on(pools):
    pool = pools.make(2, {0: "hangs", 1: "slow"}, max_concurrent_sequences=2)
    pools.faults[0] = "no room"
    done_when_told = []
    pool.roster._report = lambda text: done_when_told.append(len(seen))
    seen = []
    batch = pool.generate(PROMPTS, group_size=2, step=0, on_group=lambda prompt, group: seen.append(prompt))
    assert len(batch.rollouts) == 12 and len(seen) == 6
    assert done_when_told == [done_when_told[0]] and done_when_told[0] < 5


def test_a_busy_engine_is_not_taken_for_one_that_hangs(pools):
    pool = pools.make(2, {0: "slow", 1: "slow"}, max_concurrent_sequences=1)
    assert len(pool.generate(PROMPTS, group_size=1, step=0).rollouts) == 6
    assert pools.told == [] and pool.metrics()["rollout/worker_restarts"] == 0


def test_a_start_that_fails_beside_others_that_serve_is_tried_again_and_told_of_once(pools):
    pool = pools.make(2, {0: "dies"}, max_restarts=1)
    pools.faults[0] = "no start"
    assert len(pool.generate(PROMPTS, group_size=1, step=0).rollouts) == 6
    for failures in range(1, 4):  # more than may be lost in a row
        pools.faults[0] = "no start"
        wait_for(lambda n=failures: pool.replace_lost_workers("") == 0 and pool.roster.restarts > n)
    pools.faults[0] = None
    wait_for(lambda: pool.replace_lost_workers("") == 0 and list(pool.workers) == [0, 1])
    failure = "rollout worker 0 failed to start again: rollout engine 0 did not start: no memory; it is tried again"
    assert [text for text in pools.told if "start again" in text] == [failure]


def test_a_late_start_is_a_failure_only_once_there_is_room_for_it(pools):
    pool = pools.make(3, {0: "dies", 1: "dies"})
    allow(pool, start_timeout_s=3)
    pools.faults |= {0: "no room", 1: "slow start"}
    assert len(pool.generate(PROMPTS, group_size=1, step=0).rollouts) == 6
    wait_for(lambda: pool.replace_lost_workers("") == 0 and list(pool.workers) == [1, 2])
    late = "rollout worker 1 did not start again within 3 s (rollout.start_timeout_s); it is tried again"
    assert [text for text in pools.told if "start again" in text] == [late]
    ends = time.monotonic()
    pool.roster.shutdown()  # and does not ask one that was never there to end
    assert time.monotonic() - ends < 20
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(pools.started[3].__ray_ready__.remote(), timeout=20)


def test_if_none_is_left_the_first_that_has_started_again_is_waited_for(pools, tmp_path):
    pool = pools.make(2, {"lives": str(tmp_path / "lives")})
    pools.faults |= {0: "waits to start"}
    end_actors(pool.workers.values())
    assert pool.replace_lost_workers("their node is gone") == 2
    assert list(pool.workers) == [1]
    assert len(pool.generate(PROMPTS, group_size=1, step=0).rollouts) == 6


def test_one_that_is_lost_again_before_it_serves_is_not_let_in(pools):
    pool = pools.make(2, {0: "dies"})
    pool.generate(PROMPTS, group_size=1, step=0)
    start = pool.roster._starting[0]
    ray.get(start.call, timeout=60)
    end_actors([start.worker])
    assert pool.replace_lost_workers("") == 0
    assert list(pool.workers) == [1]
    assert pools.told[-1] == "rollout worker 0 was lost after it had started again; it is tried again"
    wait_for(lambda: pool.replace_lost_workers("") == 0 and list(pool.workers) == [0, 1])


def test_nobody_waits_forever_for_one_without_room_beside_one_that_cannot_start(pools):
    pool = pools.make(2, {"always": "no start"}, max_restarts=1)
    allow(pool, start_timeout_s=5)
    end_actors([pool.workers[1]])
    pool.replace_lost_workers("")
    pool.roster.batch_finished()
    pools.faults[0] = "no room"
    end_actors([pool.workers[0]])
    with pytest.raises(
        EnginesLostError, match=r"\[0, 1\] did not start again within 5 s .*; they were lost because: the power failed$"
    ):
        pool.replace_lost_workers("the power failed")


def test_a_late_start_is_tried_again_also_while_everybody_waits(pools):
    pool = pools.make(2, {0: "dies"})
    pools.faults[0] = "slow start"
    pool.generate(PROMPTS, group_size=1, step=0)
    ray.get(pool.roster._starting[0].placed, timeout=60)
    assert pool.replace_lost_workers("") == 0  # sees that there was room for it
    time.sleep(2)
    allow(pool, start_timeout_s=4)
    pools.faults[1] = "no room"
    end_actors([pool.workers[1]])
    assert pool.replace_lost_workers("") == 1
    assert list(pool.workers) == [0]


def test_a_second_wait_for_the_start_changes_nothing(pools):
    pool = pools.make(2)
    before = dict(pool.workers)
    pool.roster.wait_until_ready()
    assert pool.workers == before and len(before) == 2


def test_without_a_learner_a_new_worker_serves_at_once(pools):
    pool = pools.make(2, {0: "dies", 1: "slow"}, trained=False, max_concurrent_sequences=2)
    many = tuple(Prompt(f"p{i}", (i,), text=str(i)) for i in range(24))
    batch = pool.generate_eval(many)
    assert len(batch.rollouts) == 24
    assert {worker for _, worker in places(batch)} == {0, 1}


def test_an_evaluation_without_a_learner_survives_the_loss_of_its_only_engine(pools):
    pool = pools.make(1, {0: "dies"})
    batch = pool.surviving_losses(lambda: pool.generate_eval(PROMPTS))
    assert len(batch.rollouts) == 6
    with pytest.raises(RolloutError, match="no loss"):
        pool.surviving_losses(lambda: (_ for _ in ()).throw(RolloutError("no loss")))


def test_a_prompt_that_kills_every_engine_ends_the_run(pools):
    pool = pools.make(3, {"poison": PROMPTS[3].token_ids}, max_restarts=1)
    with pytest.raises(
        EnginesLostError,
        match=r"are lost, and rollout.max_restarts 1 is used up.*; rollout worker \d was lost before it",
    ):
        pool.generate(PROMPTS, group_size=1, step=0)


def test_what_was_finished_before_a_worker_was_lost_is_not_drawn_again_under_the_same_weights(pools):
    pool = pools.make(2, {1: "dies late"}, max_concurrent_sequences=2, all_needed=True)
    pool.load_weights(WeightVersion(3, 0))
    with pytest.raises(RolloutError, match="rollout worker 1 was lost"):
        pool.generate(PROMPTS, group_size=2, step=0)  # five groups of worker 0, and one that is lost
    pool.replace_lost_workers("")
    pool.load_weights(WeightVersion(3, 0))
    batch = pool.generate(PROMPTS, group_size=2, step=0)
    drawn = {int(r.token_ids[2]) for r in batch.rollouts if r.token_ids[0] == 0}
    assert len(batch.rollouts) == 12 and set(range(10)) <= drawn <= set(range(12))
    again = pool.generate(PROMPTS, group_size=2, step=0)
    assert min(int(r.token_ids[2]) for r in again.rollouts if r.token_ids[0] == 0) >= 10


def test_what_was_finished_under_other_weights_is_drawn_again(pools):
    pool = pools.make(2, {1: "dies late"}, max_concurrent_sequences=2, all_needed=True)
    pool.load_weights(WeightVersion(3, 0))
    with pytest.raises(RolloutError, match="rollout worker 1 was lost"):
        pool.generate_eval(PROMPTS)
    pool.replace_lost_workers("")
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
    pool.roster.shutdown()
    for worker in pools.started:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(worker.__ray_ready__.remote(), timeout=20)


def test_a_lost_engine_ends_in_order_before_the_next_one_starts(pools, tmp_path):
    lives = tmp_path / "lives"
    pool = pools.make(1, {0: "hangs", "lives": str(lives)})
    with pytest.raises(RolloutError):
        pool.generate(PROMPTS, group_size=1, step=0)
    assert pool.replace_lost_workers("") == 1
    assert lives.read_text().splitlines() == ["0 starts", "0 ends", "0 starts"]


def test_starts_that_fail_again_and_again_end_a_run_that_waits_for_them(pools):
    pool = pools.make(2, max_restarts=2, all_needed=True)
    pools.faults[0] = "no start"
    end_actors([pool.workers[0]])
    assert pool.replace_lost_workers("it died") == 1
    assert pool.metrics()["rollout/worker_restarts"] == 2
    failure = "rollout worker 0 failed to start again: rollout engine 0 did not start: no memory"
    assert f"{failure}; it is tried again" in pools.told
    assert len(pool.generate(PROMPTS, group_size=1, step=0).rollouts) == 6

    pools.faults[1] = "slow start"
    end_actors([pool.workers[1]])
    allow(pool, start_timeout_s=3)
    with pytest.raises(
        EnginesLostError, match=r"rollout workers \[1\] did not start again within 3 s \(rollout.start_t"
    ):
        pool.replace_lost_workers("it died")


def test_one_that_never_starts_again_ends_a_run_that_has_no_other(pools):
    pool = pools.make(1, {"always": "no start"}, max_restarts=2)
    end_actors([pool.workers[0]])
    failure = "rollout worker 0 failed to start again: rollout engine 0 did not start: no memory"
    with pytest.raises(RolloutError, match=rf"{failure}; so did every try before it \(rollout.max_restarts 2\)"):
        pool.replace_lost_workers("it died")
    assert pool.metrics()["rollout/worker_restarts"] == 3


def test_losses_count_once_however_many_workers_they_take_and_are_forgotten_after_a_batch(pools):
    pool = pools.make(3, {0: "dies", 1: "dies"}, max_restarts=1, all_needed=True)
    for _ in range(2):
        with pytest.raises(RolloutError, match="was lost"):
            pool.generate(PROMPTS, group_size=1, step=0)
            end_actors([pool.workers[0], pool.workers[1]])  # the second time: as if their node were gone
            pool.generate(PROMPTS, group_size=1, step=0)
        assert pool.replace_lost_workers("") == 2
    assert pool.metrics()["rollout/worker_restarts"] == 4
    assert sum("rollout workers [0, 1] are lost" in text for text in pools.told) == 2
    end_actors([pool.workers[0]])
    with pytest.raises(RolloutError, match=r"workers \[0\] are lost, and rollout.max_restarts 1 is used up.*; gone$"):
        pool.replace_lost_workers("gone")

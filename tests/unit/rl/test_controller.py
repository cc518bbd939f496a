"""One step's order, versions and failures."""

import itertools
from types import SimpleNamespace

import pytest
from fakes import PROMPTS, FakeLearners, FakePromptSource, FakeRewardPool, FakeRolloutPool, controller

from rl.config import DynamicSamplingConfig
from rl.errors import BrokenSyncError, EnginesLostError, RolloutError, WeightSyncError
from rl.metrics import step_metrics


def test_a_step_generates_with_the_synced_version_and_ends_with_a_sync():
    pool = FakeRolloutPool()
    loop = controller(pool)
    loop.sync_weights()
    first, second = loop.step(0), loop.step(1)
    assert pool.calls == ["load 0", "generate 0", "load 1", "generate 1", "load 2"]
    assert [r.policy_version for r in second.scored.batch.rollouts] == [1, 1, 1, 1]
    assert (first.update.policy_version, second.weights.policy_version) == (1, 2)
    assert set(first.seconds) == {"rollout", "reward", "annotate", "update", "sync", "step"}
    assert first.batch.num_loss_tokens == 12


def test_groups_are_handed_to_the_rewards_as_they_are_generated():
    rewards = FakeRewardPool()
    loop = controller(FakeRolloutPool(), rewards=rewards)
    loop.sync_weights()
    rollouts = loop.step(0).scored.batch.rollouts
    assert [id(rollout) for rollout in rewards.begun] == [id(rollout) for rollout in rollouts]


def test_rollouts_of_another_version_stop_the_run():
    pool = FakeRolloutPool()
    loop = controller(pool)
    loop.sync_weights()
    pool.deaf = True
    loop.step(0)
    with pytest.raises(WeightSyncError, match="4 of 4 rollouts come from policy version 0.*served version 1"):
        loop.step(1)


def test_a_lost_worker_is_replaced_synced_and_the_step_generated_again():
    pool = FakeRolloutPool()
    loop = controller(pool)
    loop.sync_weights()
    pool.lost = 1
    result = loop.step(0)
    assert pool.replaced == 1
    assert pool.calls == ["load 0", "generate 0", "load 0", "generate 0", "load 1"]
    assert len(result.scored.scores) == 4


def test_a_worker_that_is_lost_while_weights_are_sent_is_replaced_and_told_of():
    class DiesInSync(FakeLearners):
        def publish_weights(self):
            if self.version == 1 and not pool.replaced:
                pool.lost = 1
                raise WeightSyncError("rollout worker 0 died during update_weights")
            return super().publish_weights()

    pool = FakeRolloutPool()
    loop = controller(pool, DiesInSync())
    loop.sync_weights()
    result = loop.step(0)
    assert pool.calls == ["load 0", "generate 0", "load 1"]
    assert pool.causes == ["rollout worker 0 died during update_weights"]
    assert result.workers == {"rollout/worker_restarts": 1.0, "reward/worker_restarts": 0.0}
    assert step_metrics(result)["rollout/worker_restarts"] == 1.0


def test_a_worker_that_is_dead_before_a_sync_is_replaced_before_any_learner_waits_for_it():
    pool = FakeRolloutPool()
    loop = controller(pool)
    pool.lost = 1
    loop.sync_weights()
    assert pool.calls == ["load 0"]
    assert pool.causes == ["they did not answer before a sync"]


def test_a_transfer_that_broke_off_between_gpus_is_not_repeated():
    class Breaks(FakeLearners):
        def publish_weights(self):
            pool.lost = 1
            raise BrokenSyncError("rank 0: sending policy version 0 failed")

    pool = FakeRolloutPool()
    with pytest.raises(BrokenSyncError):
        controller(pool, Breaks()).sync_weights()
    assert pool.replaced == 0


def test_what_runs_beside_the_steps_survives_a_loss_too():
    pool = FakeRolloutPool()
    loop = controller(pool)
    loop.sync_weights()
    answers = []

    def evaluate():
        answers.append(pool.served)
        if len(answers) == 1:
            pool.lost, pool.served = 1, -1
            raise RolloutError("rollout worker 0 died")
        return pool.served

    assert loop.surviving_losses(evaluate) == 0
    assert answers == [0, 0]
    assert pool.calls == ["load 0", "load 0"]


def test_a_failure_that_replacing_does_not_mend_is_raised():
    class Broken(FakeRolloutPool):
        def replace_lost_workers(self, cause: str) -> int:
            return 0

    loop = controller(Broken(lost=1), FakeLearners())
    loop.sync_weights()
    with pytest.raises(RolloutError, match="died"):
        loop.step(0)


def test_if_the_lost_cannot_be_replaced_the_loop_does_not_try_again():
    class UsedUp(FakeRolloutPool):
        def replace_lost_workers(self, cause: str) -> int:
            self.causes.append(cause)
            raise EnginesLostError(f"rollout.max_restarts 0 is used up; {cause}")

    pool = UsedUp()
    loop = controller(pool)
    with pytest.raises(EnginesLostError, match="used up; they did not answer before a sync"):
        loop.sync_weights()
    loop.policy_version, pool.served, pool.lost = 0, 0, 1
    with pytest.raises(EnginesLostError, match=r"^rollout.max_restarts 0 is used up; rollout worker 0 died$"):
        loop.step(0)
    assert pool.causes == ["they did not answer before a sync", "rollout worker 0 died"]


def test_dynamic_sampling_generates_again_with_the_same_weights_and_new_seeds():
    pool, source = FakeRolloutPool(), FakePromptSource()
    hard = FakeRewardPool(frozenset({"p0", "p1", "p3"}))
    loop = controller(pool, source=source, rewards=hard, dynamic_sampling=DynamicSamplingConfig(max_rounds=5))
    loop.sync_weights()
    pool.lost = 1
    result = loop.step(0)
    assert pool.calls == [
        "load 0",
        "generate 0",
        "load 0",
        "generate 0",
        "generate 0 from 2",
        "generate 0 from 4",
        "load 1",
    ]
    assert [p.prompt_id for p in result.scored.batch.prompts] == ["p2", "p4"]
    assert {r.policy_version for r in result.scored.batch.rollouts} == {0}
    assert source.drawn == 5
    assert hard.earlier == [0, 4, 8]
    assert result.shaping["rollout/dynamic_sampling_rounds"] == 3.0
    assert set(result.seconds) == {"rollout", "reward", "annotate", "update", "sync", "step"}


def test_the_seconds_of_the_stages_add_up_to_the_step(monkeypatch):
    ticks = itertools.count(5)
    monkeypatch.setattr("rl.controller.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    hard = FakeRewardPool(frozenset({"p0"}))
    loop = controller(rewards=hard, dynamic_sampling=DynamicSamplingConfig(max_rounds=5))
    loop.sync_weights()
    seconds = loop.step(0).seconds  # two rounds; a stage is a tick of this clock
    assert seconds == {"rollout": 2.0, "reward": 2.0, "annotate": 1.0, "update": 1.0, "sync": 1.0, "step": 7.0}


def test_dynamic_sampling_ends_at_its_cap():
    pool, hopeless = FakeRolloutPool(), FakeRewardPool(frozenset(p.prompt_id for p in PROMPTS))
    loop = controller(pool, rewards=hopeless, dynamic_sampling=DynamicSamplingConfig(max_rounds=3))
    loop.sync_weights()
    result = loop.step(0)
    assert pool.calls == ["load 0", "generate 0", "generate 0 from 2", "generate 0 from 4", "load 1"]
    assert [p.prompt_id for p in result.scored.batch.prompts] == ["p0", "p1"]
    assert result.shaping["rollout/dynamic_sampling_filled_groups"] == 2.0

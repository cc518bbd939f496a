"""One step's order, versions and failures."""

import pytest
from fakes import FakeLearners, FakeRolloutPool, controller

from rl.errors import RolloutError, WeightSyncError


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


def test_a_failure_that_replacing_does_not_mend_is_raised():
    class Broken(FakeRolloutPool):
        def replace_lost_workers(self) -> int:
            return 0

    loop = controller(Broken(lost=1), FakeLearners())
    loop.sync_weights()
    with pytest.raises(RolloutError, match="died"):
        loop.step(0)

"""The reward workers on a real Ray cluster: deadlines, lost processes, accounting, and what they must not import."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from rewards.workers import RewardPool, check_error_fraction
from rl.actors import end_actors
from rl.batch import FinishReason, Prompt, RewardStatus, Rollout, RolloutBatch, Score
from rl.config import RewardConfig, RewardFunctionConfig
from rl.errors import RewardError

pytestmark = pytest.mark.stack

PLUGIN = textwrap.dedent(
    """
    import os, re, sys, time
    from pathlib import Path

    from helper_beside_the_plugin import ANSWER

    FRAMEWORKS = {"torch", "vllm", "deepspeed", "transformers", "verl", "ray"}


    def reward(sample):
        print("plugins may print")
        text = sample.response
        if text == "hang":
            re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter lock
        if text == "raise":
            raise KeyError("no such thing")
        if text == "modules":
            return len(FRAMEWORKS & set(sys.modules)) + 10.0 * ("rewards.combine" in sys.modules)
        if text == "exit":
            os._exit(7)
        if text == "sleep":
            time.sleep(0.8)
        if text.startswith("count"):
            with open(text.split()[-1], "a") as counts:
                counts.write("x")
        if text.startswith("exit once"):
            mark = Path(text.split()[-1])
            if not mark.exists():
                mark.touch()
                os._exit(7)
        return float(text == ANSWER)


    class Compare:
        def score_group(self, samples, task_rewards):
            if any(sample.response == "hang" for sample in samples):
                time.sleep(600)
            return [1.0 for _ in samples]


    def completions_reward(completions, **kwargs):
        if any(completion == "hang" for completion in completions):
            time.sleep(600)
        return [1.0 if completion == "right" else 0.0 for completion in completions]
    """
)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "helper_beside_the_plugin.py").write_text("ANSWER = 'right'\n")
    path = folder / "my_reward.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(scope="module")
def pool(ray_cluster: None, plugin: Path) -> Iterator[RewardPool]:
    """One pool for the module. Its plugin has a relative path, which the workers cannot resolve themselves."""
    relative = os.path.relpath(plugin, Path.cwd())
    functions = (RewardFunctionConfig(name=f"{relative}:reward"), RewardFunctionConfig(name="exact", weight=0.5))
    pool = RewardPool(RewardConfig(functions=functions, num_workers=2, timeout_s=1.0, batch_size=4))
    yield pool
    pool.close()


def make_batch(*texts: str, aborted: frozenset[int] = frozenset()) -> RolloutBatch:
    prompts = (Prompt("train:0", (1, 2), "what is right?", ground_truth="right"),)
    rollouts = tuple(
        Rollout(
            prompt_index=0,
            group_id=0,
            sample_index=i,
            token_ids=np.array([3], np.int32),
            rollout_logprobs=np.array([-0.5], np.float32),
            finish_reason=FinishReason.ABORT if i in aborted else FinishReason.STOP,
            policy_version=0,
            text=text,
            answer=text,
        )
        for i, text in enumerate(texts)
    )
    return RolloutBatch(prompts, rollouts)


def test_scores_come_back_in_order_with_their_parts(pool: RewardPool) -> None:
    scored = pool.score(make_batch("right", "wrong", "right", "", "wrong", "right", "right"))
    assert [score.reward for score in scored.scores] == [1.5, 0.0, 1.5, 0.0, 0.0, 1.5, 1.5]
    assert scored.scores[0].breakdown == {"reward": 1.0, "exact": 1.0}
    assert all(score.ok for score in scored.scores)


def test_what_was_begun_before_the_batch_was_whole_is_scored_once(pool: RewardPool, tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    batch = make_batch("right", *[f"count {counts}"] * 9, "right", "wrong", aborted=frozenset({2}))
    pool.begin(batch.prompts[0], make_batch("raise", "raise", "raise", "raise", "raise").rollouts)  # not asked for
    pool.begin(batch.prompts[0], batch.rollouts[:7])
    pool.begin(batch.prompts[0], batch.rollouts[7:10])
    end = time.monotonic() + 20.0
    while (len(counts.read_text()) if counts.exists() else 0) < 7 and time.monotonic() < end:
        time.sleep(0.05)  # all but the aborted one, and one that waits for others
    scored = pool.score(batch)
    assert [score.reward for score in scored.scores if score.ok] == [1.5, *[0.0] * 8, 1.5, 0.0]
    assert scored.scores[2].status is RewardStatus.SKIPPED and counts.read_text() == "x" * 8
    assert pool.score(batch).scores[0].reward == 1.5 and counts.read_text() == "x" * 16  # nothing is kept


def test_workers_that_cannot_be_replaced_end_the_run_whatever_was_begun(
    ray_cluster: None, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused() -> None:
        raise RewardError("a reward worker did not start")

    functions = (RewardFunctionConfig(name=f"{plugin}:reward"),)
    pool = RewardPool(RewardConfig(functions=functions, num_workers=1))
    try:
        monkeypatch.setattr(pool, "_add_worker", refused)
        end_actors(pool.worker_handles())
        batch = make_batch("right", "wrong", "right")
        pool.begin(batch.prompts[0], batch.rollouts[:2])
        with pytest.raises(RewardError, match="did not start"):
            pool.score(batch)
    finally:
        pool.close()


def test_a_hanging_sample_times_out_and_the_others_are_scored(pool: RewardPool) -> None:
    scored = pool.score(make_batch("right", "hang", "right", "wrong", "right"))
    assert [s.status for s in scored.scores] == [RewardStatus.OK, RewardStatus.TIMEOUT] + [RewardStatus.OK] * 3
    assert "deadline of 1 s (my_reward.py:" in scored.scores[1].error or "in match" in scored.scores[1].error
    assert [s.reward for s in scored.scores if s.ok] == [1.5, 1.5, 0.0, 1.5]


def test_a_sample_that_kills_its_process_is_tried_twice(pool: RewardPool, tmp_path: Path) -> None:
    scored = pool.score(make_batch("right", "exit", f"exit once {tmp_path / 'mark'}", "right"))
    statuses = [score.status for score in scored.scores]
    assert statuses == [RewardStatus.OK, RewardStatus.INFRASTRUCTURE_ERROR, RewardStatus.OK, RewardStatus.OK]
    assert "exit code 7" in scored.scores[1].error


def test_errors_aborted_rollouts_and_the_error_limit(pool: RewardPool) -> None:
    scored = pool.score(make_batch("right", "raise", "right", aborted=frozenset({2})))
    statuses = [score.status for score in scored.scores]
    assert statuses == [RewardStatus.OK, RewardStatus.PLUGIN_ERROR, RewardStatus.SKIPPED]
    assert "KeyError: 'no such thing'" in scored.scores[1].error
    with pytest.raises(RewardError, match=r"2 of 3 samples .* \(2 of 2\) is plugin_error: reward: KeyError"):
        pool.score(make_batch("raise", "raise", "right"))
    assert len(pool.score(make_batch("raise", "raise", "right"), earlier=[Score(1.0)]).scores) == 3  # 2 of 4
    check_error_fraction(scored.scores, 0.5)


def test_a_lost_worker_is_replaced_and_its_chunk_scored_elsewhere(pool: RewardPool) -> None:
    before = pool.num_replaced
    end_actors(pool.worker_handles())
    scored = pool.score(make_batch("right", "wrong", "right"))
    assert [score.reward for score in scored.scores] == [1.5, 0.0, 1.5]
    assert pool.num_replaced >= before + 2
    assert pool.metrics() == {"reward/worker_restarts": float(pool.num_replaced)}


def test_workers_hold_no_framework(pool: RewardPool) -> None:
    frameworks = {"torch", "vllm", "deepspeed", "transformers", "verl"}
    for worker in pool.worker_handles():
        loaded = set(ray.get(worker.__ray_call__.remote(lambda self: list(__import__("sys").modules))))
        assert "rewards" in loaded
        assert not loaded & frameworks
    [score] = pool.score(make_batch("modules")).scores
    assert score.breakdown["reward"] == 10.0


def test_a_batch_function_that_hangs_is_rescored_one_by_one(
    ray_cluster: None, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plugin.parent)  # the workers are elsewhere, but find the module all the same
    functions = (RewardFunctionConfig(name="my_reward:completions_reward"),)
    pool = RewardPool(RewardConfig(functions=functions, num_workers=1, timeout_s=1.0))
    try:
        scored = pool.score(make_batch("right", "hang", "wrong"))
    finally:
        pool.close()
    assert [score.status for score in scored.scores] == [RewardStatus.OK, RewardStatus.TIMEOUT, RewardStatus.OK]
    assert scored.scores[0].reward == 1.0


def test_a_comparison_of_a_group_that_hangs_ends_the_run(ray_cluster: None, plugin: Path) -> None:
    functions = (RewardFunctionConfig(name="exact"), RewardFunctionConfig(name=f"{plugin}:Compare"))
    pool = RewardPool(RewardConfig(functions=functions, num_workers=1, timeout_s=1.0))
    try:
        assert [score.reward for score in pool.score(make_batch("right", "wrong")).scores] == [2.0, 1.0]
        with pytest.raises(RewardError, match="score_group.* has not come back within reward.timeout_s 1"):
            pool.score(make_batch("right", "hang"))
    finally:
        pool.close()  # does not wait for it


def test_closing_leaves_no_process_behind(ray_cluster: None) -> None:
    pool = RewardPool(RewardConfig(functions=(RewardFunctionConfig(name="exact"),), num_workers=1))
    child = ray.get(pool.worker_handles()[0].child_pid.remote())
    pool.close()
    end = time.monotonic() + 20.0
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_a_pool_that_is_closed_while_it_scores_starts_nothing_any_more(ray_cluster: None, plugin: Path) -> None:
    functions = (RewardFunctionConfig(name=f"{plugin}:reward"),)
    pool = RewardPool(RewardConfig(functions=functions, num_workers=1))
    batch = make_batch(*["sleep"] * 8)
    pool.begin(batch.prompts[0], batch.rollouts)  # as an interrupt leaves it
    time.sleep(0.2)
    pool.close()
    assert pool.num_replaced == 0 and pool.worker_handles() == ()


def test_a_reward_that_cannot_load_says_so_at_once(ray_cluster: None) -> None:
    with pytest.raises(RewardError, match=r"there is no reward 'exakt'; did you mean exact\?"):
        RewardPool(RewardConfig(functions=(RewardFunctionConfig(name="exakt"),)))

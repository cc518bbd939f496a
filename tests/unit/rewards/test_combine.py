"""Weights, gates, clipping, the breakdown, rows' own rewards, and every kind of failure kept apart."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import loading
from rewards.api import GroundTruthError, InfrastructureError, RewardInput, RewardOutput
from rewards.combine import CombinedReward, to_output
from rl.batch import Prompt, RewardStatus, Score
from rl.config import RewardFunctionConfig
from rl.errors import ConfigError, RewardError


class Shaping:
    shaping = True

    def __call__(self, sample: RewardInput) -> RewardOutput:
        return RewardOutput(float(sample.extra.get("shape", 0.0)), {"inner": 0.25})


class BrevityInGroup:
    """The shortest right response of a group gets 1."""

    shaping = True

    def score_group(self, samples: Sequence[RewardInput], task_rewards: Sequence[float]) -> list[float]:
        right = [s.num_tokens for s, reward in zip(samples, task_rewards) if reward > 0]
        return [float(bool(right) and s.num_tokens == min(right)) for s in samples]


class LongestInGroup:
    """A task reward: the longest response of a group gets 1."""

    def score_group(self, samples: Sequence[RewardInput], task_rewards: Sequence[float]) -> list[float]:
        if any(s.response == "bad" for s in samples):
            raise ValueError("a bad one")
        return [float(s.num_tokens == max(other.num_tokens for other in samples)) for s in samples]


class Checked:
    def __call__(self, sample: RewardInput) -> float:
        return 1.0

    def validate_ground_truth(self, ground_truth: Any, extra: Any) -> None:
        if ground_truth is None and not extra:
            raise GroundTruthError("no ground truth")


def task(sample: RewardInput) -> float:
    return float(sample.extra.get("task", 1.0))


def raises(sample: RewardInput) -> float:
    raise {"ground truth": GroundTruthError, "infrastructure": InfrastructureError, "timeout": TimeoutError}.get(
        sample.response, ZeroDivisionError
    )("it failed")


async def slow(sample: RewardInput) -> float:
    await asyncio.sleep(30.0 if sample.response == "slow" else 0.0)
    return 1.0


def picky_batch(samples: Sequence[RewardInput]) -> list[float]:
    if any(s.response == "bad" for s in samples):
        raise ValueError("a bad one")
    return [1.0] * len(samples)


def lazy_batch(samples: Sequence[RewardInput]) -> Iterator[Any]:
    for s in samples:
        yield KeyError("this one only") if s.response == "bad" else 1.0


async def async_batch(samples: Sequence[RewardInput]) -> list[float]:
    await asyncio.sleep(0)
    return [float(s.response == "x") for s in samples]


def short_batch(samples: Sequence[RewardInput]) -> list[float]:
    return [1.0] * (len(samples) - 1)


class ManyForGroup:
    def score_group(self, samples: Sequence[RewardInput], task_rewards: Sequence[float]) -> list[float]:
        return [1.0] * (len(samples) + 1)


def long_batch(samples: Sequence[RewardInput]) -> list[float]:
    return [1.0] * (len(samples) + 1)


def abstains(completions, **kwargs):  # type: ignore[no-untyped-def]
    return [None if c == "skip" else 1.0 for c in completions]


PLUGINS: dict[str, Any] = {
    "task": task,
    "shaping": Shaping,
    "brevity": BrevityInGroup,
    "longest": LongestInGroup,
    "checked": Checked,
    "raises": raises,
    "slow": slow,
    "picky": picky_batch,
    "lazy": lazy_batch,
    "async_batch": async_batch,
    "short": short_batch,
    "long": long_batch,
    "many_for_group": ManyForGroup,
    "abstains": abstains,
    "constant": lambda sample: sample.extra["value"],
}


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        dist = None

        def __init__(self, target: Any) -> None:
            self.load: Callable[[], Any] = lambda: target

    monkeypatch.setattr(loading, "_entry_points", lambda: {name: Point(target) for name, target in PLUGINS.items()})


def sample(response: str = "x", **fields: Any) -> RewardInput:
    extra = {key: fields.pop(key) for key in ("task", "shape", "value") if key in fields}
    return RewardInput(prompt="", response=response, answer=response, ground_truth="x", extra=extra, **fields)


def combined(*names: str | dict[str, Any], clip: tuple[float, float] | None = None) -> CombinedReward:
    configs = [RewardFunctionConfig(**({"name": n} if isinstance(n, str) else n)) for n in names]
    return CombinedReward(configs, clip)


def score(reward: CombinedReward, *samples: RewardInput) -> list[Score]:
    return list(reward.score(samples, timeout_s=0.2))


def test_weighted_sum_and_breakdown() -> None:
    reward = combined({"name": "task", "weight": 2.0}, {"name": "shaping", "weight": 0.5}, "task")
    [one] = score(reward, sample(task=1.0, shape=-1.0))
    assert one.reward == 2.0 * 1.0 + 0.5 * -1.0 + 1.0
    assert one.breakdown == {"task": 1.0, "shaping": -1.0, "shaping/inner": 0.25, "task#2": 1.0}
    assert one.unshaped_reward == 3.0


def test_a_closed_gate_takes_the_reward_but_not_the_penalty() -> None:
    reward = combined("task", {"name": "shaping", "gate": True, "weight": 0.0})
    open_, closed, penalty = score(reward, sample(shape=1.0), sample(shape=0.0), sample(task=-1.0, shape=0.0))
    assert [open_.reward, closed.reward, penalty.reward] == [1.0, 0.0, -1.0]
    assert [open_.unshaped_reward, closed.unshaped_reward, penalty.unshaped_reward] == [1.0, 1.0, -1.0]


def test_a_task_gate_counts_in_the_unshaped_reward_too() -> None:
    reward = combined({"name": "task", "gate": True}, {"name": "exact", "weight": 5.0})
    [closed] = score(reward, sample(task=0.0))
    assert (closed.reward, closed.unshaped_reward) == (0.0, 0.0)


def test_clipping() -> None:
    reward = combined({"name": "task", "weight": 10.0}, "shaping", clip=(-1.0, 1.0))
    assert [s.reward for s in score(reward, sample(task=1.0), sample(task=-1.0), sample(task=0.05))] == [1.0, -1.0, 0.5]


def test_a_response_that_is_right_in_every_task_part_is_solved_whatever_its_weight_and_form() -> None:
    reward = combined({"name": "task", "weight": 0.5}, {"name": "exact", "weight": 0.25}, "shaping")
    right, half = score(reward, sample(shape=-3.0), sample("y", shape=3.0))
    assert (right.solved, right.extracted) == (True, "x")
    assert (half.solved, half.extracted) == (False, "y")
    assert score(combined("task"), sample(task=0.5))[0].passed is False
    [one] = score(combined({"name": "task", "weight": 10.0}, clip=(-1.0, 1.0)), sample())
    assert (one.solved, one.extracted) == (True, None)


def test_clipping_does_not_hide_that_a_part_is_wrong() -> None:
    reward = combined({"name": "task", "weight": 1.0}, {"name": "exact", "weight": 0.1}, clip=(-1.0, 1.0))
    right, wrong = score(reward, sample(), sample("y"))
    assert (right.reward, right.unshaped_reward, right.solved) == (1.0, 1.0, True)
    assert (wrong.reward, wrong.solved) == (1.0, False)


@pytest.mark.parametrize(
    ("exact", "passes", "fails"),
    [
        ({"weight": 0.0}, "y", None),  # only watches
        ({"weight": 0.0, "gate": True}, "x", "y"),
        ({"weight": -1.0}, "y", "x"),  # a penalty
    ],
)
def test_watchers_gates_and_penalties_among_the_task_parts(exact, passes, fails) -> None:
    reward = combined("task", {"name": "exact"} | exact)
    assert score(reward, sample(passes))[0].solved
    if fails is not None:
        assert not score(reward, sample(fails))[0].solved


def test_parts_that_only_watch_solve_nothing() -> None:
    assert not score(combined({"name": "task", "weight": 0.0}), sample())[0].solved


def test_a_penalty_alone_is_passed_by_who_gets_none() -> None:
    clean, punished = score(combined({"name": "task", "weight": -1.0}), sample(task=0.0), sample(task=1.0))
    assert clean.solved and not punished.solved


def test_length_and_repetition_shape_a_task_and_do_not_judge_it() -> None:
    length = {"name": "length", "options": {"max_tokens": 4, "buffer_tokens": 2}}
    repetition = {"name": "repetition", "options": {"n": 1, "free": 0.0}, "weight": 0.5}
    [one] = score(combined("exact", length, repetition), replace(sample(num_tokens=3), response="x x"))
    assert (one.reward, one.unshaped_reward, one.passed) == (1.0 - 0.5 - 0.25, 1.0, True)


def test_only_shaping_parts_have_no_unshaped_reward() -> None:
    assert score(combined("shaping"), sample(shape=0.5))[0].unshaped_reward is None


def test_a_row_names_its_own_reward_in_place_of_the_task_parts() -> None:
    reward = combined({"name": "task", "weight": 3.0}, {"name": "exact", "weight": 7.0}, "shaping")
    configured, other, unknown = score(
        reward, sample(reward="exact", shape=1.0), sample(reward="checked", shape=1.0), sample(reward="chekced")
    )
    assert (configured.reward, configured.breakdown) == (8.0, {"exact": 1.0, "shaping": 1.0, "shaping/inner": 0.25})
    assert (other.reward, other.unshaped_reward) == (2.0, 1.0)
    assert unknown.status is RewardStatus.PLUGIN_ERROR
    assert "did you mean checked?" in unknown.error


def test_ground_truths_are_checked_by_the_parts_that_can() -> None:
    reward = combined("task", "checked")
    reward.validate_ground_truth("1")
    reward.validate_ground_truth(None, extra={"metadata": 1})
    with pytest.raises(GroundTruthError):
        reward.validate_ground_truth(None)
    combined("task").validate_ground_truth(None)
    with pytest.raises(RewardError, match="there is no reward 'nothing'"):
        reward.validate_ground_truth("1", "nothing")
    with pytest.raises(GroundTruthError):
        combined("task").validate_ground_truth(None, "checked")


def test_a_row_that_nothing_would_score_is_refused() -> None:
    nothing = CombinedReward(())
    nothing.validate_ground_truth("1", "math")  # the row's own
    with pytest.raises(ConfigError, match=r"reward\.functions is empty and the row names no reward"):
        nothing.validate_ground_truth("1")


def test_a_loaded_row_is_checked_with_its_own_reward_fields_and_data_source() -> None:
    class Sees:
        def __call__(self, sample: RewardInput) -> float:
            return 1.0

        def validate_ground_truth(self, ground_truth: Any, extra: Any) -> None:
            raise GroundTruthError(f"{ground_truth} {dict(extra)}")

    PLUGINS["sees"] = Sees
    prompt = Prompt("p", (1,), "q", "7", "gsm8k", reward="sees", extra={"level": 3})
    with pytest.raises(GroundTruthError, match=r"7 \{'level': 3, 'data_source': 'gsm8k'\}"):
        combined("task").validate_prompt(prompt)


def test_a_function_is_called_once_a_sample_and_a_batch_may_be_a_coroutine() -> None:
    called = []

    def once(sample: RewardInput) -> float:
        called.append(sample.response)
        return 1.0

    PLUGINS["once"] = once
    scores = score(combined("once", "async_batch"), sample("x"), sample("y"))
    assert called == ["x", "y"]
    assert [s.reward for s in scores] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("response", "status"),
    [
        ("ground truth", RewardStatus.GROUND_TRUTH_ERROR),
        ("infrastructure", RewardStatus.INFRASTRUCTURE_ERROR),
        ("timeout", RewardStatus.TIMEOUT),
        ("anything", RewardStatus.PLUGIN_ERROR),
    ],
)
def test_exceptions_become_their_own_status(response: str, status: RewardStatus) -> None:
    [failed] = score(combined("task", "raises"), sample(response))
    assert failed.status is status
    assert failed.error.startswith("raises: ") and "it failed (test_combine.py:" in failed.error
    assert math.isnan(failed.reward) and not failed.breakdown


@pytest.mark.parametrize("value", [None, "1.0", math.nan, math.inf, [1.0], {"acc": 1.0}, 1j, RewardOutput(math.nan)])
def test_results_that_are_no_reward_are_plugin_errors(value: Any) -> None:
    [failed] = score(combined("constant"), sample(value=value))
    assert failed.status is RewardStatus.PLUGIN_ERROR
    assert failed.error.startswith("constant: ")


@pytest.mark.parametrize("value", [1, True, np.float32(1.0), np.bool_(True), np.array(1.0), Fraction(1)])
def test_every_real_number_is_a_reward(value: Any) -> None:
    [one] = score(combined("constant"), sample(value=value))
    assert (one.reward, type(one.reward)) == (1.0, float)


def test_verl_dicts_become_a_breakdown() -> None:
    assert to_output(RewardOutput(1.0, extracted=["4"])).extracted == "['4']"  # type: ignore[arg-type]
    assert to_output({"acc": True, "score": 0.5, "pred": 7, "n": np.int64(3)}) == RewardOutput(
        0.5, {"acc": 1.0, "n": 3.0}, "7"
    )


def test_a_slow_coroutine_times_out_alone() -> None:
    statuses = [s.status for s in score(combined("slow", "task"), sample("slow"), sample("fast"))]
    assert statuses == [RewardStatus.TIMEOUT, RewardStatus.OK]


def test_no_coroutine_waits_for_others_at_the_price_of_its_deadline() -> None:
    class Queue:
        max_concurrent = 2
        running = most = 0

        async def __call__(self, sample: RewardInput) -> float:
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0.15)  # of 0.2 s
            self.running -= 1
            return 1.0

    queue = Queue()
    PLUGINS["queue"] = queue
    assert [s.status for s in score(combined("queue"), *[sample()] * 5)] == [RewardStatus.OK] * 5
    assert queue.most == 2


@pytest.mark.parametrize("name", ["picky", "lazy"])
def test_a_bad_sample_fails_alone_in_a_batch(name: str) -> None:
    scores = score(combined(name), sample("a"), sample("bad"), sample("c"))
    assert [s.status for s in scores] == [RewardStatus.OK, RewardStatus.PLUGIN_ERROR, RewardStatus.OK]


@pytest.mark.parametrize(("name", "count"), [("short", 1), ("long", 3)])
def test_a_batch_with_a_wrong_number_of_results_fails_whole(name: str, count: int) -> None:
    scores = score(combined(name), sample("a"), sample("b"))
    assert {s.status for s in scores} == {RewardStatus.PLUGIN_ERROR}
    assert f"the function returned {count} results for 2 samples" in scores[0].error


def test_a_group_with_a_wrong_number_of_results_fails_whole() -> None:
    scores = score(combined("many_for_group"), sample(group_id=1), sample(group_id=1))
    assert {s.status for s in scores} == {RewardStatus.PLUGIN_ERROR}
    assert "score_group returned 3 results for 2 samples" in scores[0].error


def test_a_task_that_abstains_is_not_judged_by_its_shaping() -> None:
    skipped, scored = score(combined("abstains", "shaping"), sample("skip", shape=0.5), sample("x", shape=0.5))
    assert (skipped.status, skipped.error) == (
        RewardStatus.PLUGIN_ERROR,
        "none of abstains applies to this sample (each returned None)",
    )
    assert scored.ok and scored.breakdown["shaping"] == 0.5


def test_a_rows_reward_that_shapes_counts_once_and_an_ambiguous_one_is_refused() -> None:
    [one] = score(combined("task", {"name": "shaping", "weight": 0.5}), sample(reward="shaping", shape=1.0))
    assert (one.reward, one.breakdown) == (0.5, {"shaping": 1.0, "shaping/inner": 0.25})
    with pytest.raises(RewardError, match="names the reward 'task', and 2 entries of reward.functions have that name"):
        combined("task", {"name": "task", "weight": 0.1}).validate_ground_truth("1", "task")


def test_none_of_trl_abstains() -> None:
    skipped, scored = score(combined("abstains", {"name": "task", "weight": 0.5}), sample("skip"), sample("x"))
    assert (skipped.reward, skipped.breakdown) == (0.5, {"task": 0.5 * 2})
    assert scored.reward == 1.5
    [nothing] = score(combined("abstains"), sample("skip"))
    assert nothing.status is RewardStatus.PLUGIN_ERROR
    assert "none of abstains applies" in nothing.error


def test_group_parts_compare_the_responses_that_could_be_scored() -> None:
    samples = [
        sample(num_tokens=9, group_id=1),
        sample(num_tokens=5, group_id=1),
        sample(num_tokens=2, group_id=1, task=0.0),
        sample(num_tokens=7, group_id=2),
        sample(num_tokens=8),
        sample(num_tokens=3),  # of no group, as the one before it: each is alone
    ]
    scores = score(combined("task", {"name": "brevity", "weight": 0.5}), *samples)
    assert [s.breakdown["brevity"] for s in scores] == [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert [s.reward for s in scores] == [1.0, 1.5, 0.0, 1.5, 1.5, 1.5]
    assert [s.unshaped_reward for s in scores] == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_what_compares_a_group_sees_the_task_rewards_without_their_shaping() -> None:
    [one] = score(combined("task", "shaping", "brevity"), sample(shape=-1.0, group_id=1))
    assert one.breakdown["brevity"] == 1.0


def test_a_rows_own_reward_may_compare_a_group() -> None:
    samples = [sample(num_tokens=n, group_id=1, reward="longest") for n in (3, 7)]
    scores = score(combined("task", {"name": "brevity", "weight": 0.25}), *samples)
    assert [s.breakdown for s in scores] == [{"longest": 0.0, "brevity": 0.0}, {"longest": 1.0, "brevity": 1.0}]
    assert [s.reward for s in scores] == [0.0, 1.25]


def test_a_task_part_that_compares_leaves_rows_with_a_reward_of_their_own_alone() -> None:
    scores = score(combined("longest"), sample("bad", group_id=1, reward="task"), sample(num_tokens=2, group_id=2))
    assert [(s.status, s.reward) for s in scores] == [(RewardStatus.OK, 1.0), (RewardStatus.OK, 1.0)]


@pytest.mark.parametrize(
    "definition",
    [
        "class Same:\n    def score_group(self, samples, task_rewards):\n        return [{value}] * len(samples)\n",
        "class Same:\n    def score_batch(self, samples):\n        return [{value}] * len(samples)\n",
    ],
    ids=["group", "batch"],
)
def test_rows_rewards_of_one_name_in_two_files_stay_apart(tmp_path, definition: str) -> None:
    names = []
    for value in (0.25, 0.75):
        path = tmp_path / f"file_{value}.py"
        path.write_text(definition.format(value=value))
        names.append(f"{path}:Same")
    samples = [sample(group_id=i, reward=names[i % 2]) for i in range(4)]
    assert [s.reward for s in score(combined("task"), *samples)] == [0.25, 0.75, 0.25, 0.75]


def test_what_failed_to_compare_a_group_is_not_covered_up_by_what_did_not() -> None:
    scores = score(combined("longest", "brevity"), sample("bad", group_id=1), sample(group_id=1))
    assert {s.status for s in scores} == {RewardStatus.PLUGIN_ERROR}
    assert "ValueError: a bad one" in scores[0].error


@given(
    values=st.lists(st.tuples(st.floats(-3, 3), st.floats(-2, 2), st.booleans()), min_size=1, max_size=4),
    bounds=st.none() | st.just((-1.0, 1.0)),
)
def test_the_sum_is_what_it_says(values: list[tuple[float, float, bool]], bounds: tuple[float, float] | None) -> None:
    class Point:
        dist = None

        def __init__(self, value: float) -> None:
            self.value = value

        def load(self) -> Any:
            return lambda sample: self.value

    before = loading._entry_points
    loading._entry_points = lambda: {f"p{i}": Point(value) for i, (value, _, _) in enumerate(values)}  # type: ignore
    try:
        configs = [{"name": f"p{i}", "weight": w, "gate": gate} for i, (_, w, gate) in enumerate(values)]
        [one] = combined(*configs, clip=bounds).score([sample()])
    finally:
        loading._entry_points = before
    total = sum(value * weight for value, weight, _ in values)
    if any(gate and value <= 0 for value, _, gate in values):
        total = min(total, 0.0)
    low, high = bounds or (-math.inf, math.inf)
    assert one.reward == pytest.approx(min(max(total, low), high))

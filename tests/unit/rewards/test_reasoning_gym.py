"""reasoning-gym's own scorers, through rows as the loader makes them."""

from __future__ import annotations

from typing import Any

import pytest
import reasoning_gym

from rewards.api import GroundTruthError, RewardInput, RewardOutput
from rewards.reasoning_gym import ReasoningGymReward


def rows(task: str, **options: Any) -> list[tuple[str, Any, dict[str, Any]]]:
    """(data_source, ground truth, other fields) of three rows."""
    entries = reasoning_gym.create_dataset(task, seed=3, size=3, **options)
    fields = [{"question": e["question"], "metadata": e["metadata"], "options": options} for e in entries]
    return [(f"reasoning_gym:{task}", e["answer"], extra) for e, extra in zip(entries, fields)]


def score(row: tuple[str, Any, dict[str, Any]], answer: str, **options: Any) -> RewardOutput:
    source, ground_truth, extra = row
    sample = RewardInput("", answer, answer, ground_truth, data_source=source, extra=extra)
    return ReasoningGymReward(**options)(sample)


@pytest.mark.parametrize("task", ["basic_arithmetic", "chain_sum", "gsm_symbolic", "countdown", "knights_knaves"])
def test_the_tasks_own_answers_are_right(task: str) -> None:
    for row in rows(task):
        ReasoningGymReward().validate_ground_truth(row[1], {**row[2], "data_source": row[0]})
        assert score(row, str(row[1])).reward == 1.0
        assert score(row, f"It is <answer>{row[1]}</answer>.").reward == 1.0
        assert score(row, f"nothing like it: {task}").reward == 0.0


def test_any_right_answer_counts_not_only_the_rows_own() -> None:
    [row, *_] = rows("countdown", min_numbers=2, max_numbers=2)
    a, b = row[2]["metadata"]["numbers"]
    target = row[2]["metadata"]["target"]
    forms = [f"{a}+{b}", f"{b}+{a}", f"{a}*{b}", f"{b}*{a}", f"{a}-{b}", f"{b}-{a}"]
    right = [form for form in forms if eval(form) == target]
    assert right
    assert all(score(row, form).reward == 1.0 for form in right)


def test_partial_credit_is_asked_for() -> None:
    [row, *_] = rows("chain_sum")
    padded = f"{row[1]} or perhaps something else"
    assert 0.0 < score(row, padded).breakdown["score"] < 1.0
    assert score(row, padded).reward == 0.0
    assert 0.0 < score(row, padded, partial=True).reward < 1.0


def test_an_answer_that_breaks_the_scorer_is_wrong() -> None:
    class Breaking:
        def score_answer(self, answer: str, entry: Any) -> float:
            raise RecursionError(answer)

    reward = ReasoningGymReward(task="chain_sum")
    reward._datasets[("chain_sum", "{}")] = Breaking()
    sample = RewardInput("", "((((", "((((", "1", extra={"metadata": {}})
    assert reward(sample) == RewardOutput(0.0, {"score": 0.0, "scorer_failed": 1.0}, "((((")
    with pytest.raises(GroundTruthError, match="fails on the row's own answer"):
        reward.validate_ground_truth("1", {"metadata": {}})


@pytest.mark.parametrize(
    ("ground_truth", "extra", "message"),
    [
        ("1", {"metadata": {}}, "is not reasoning_gym:TASK; set the reward's option task"),
        ("1", {"metadata": {}, "data_source": "reasoning_gym:no_such_task"}, "has no task 'no_such_task'"),
        ("1", {"data_source": "reasoning_gym:chain_sum"}, "has no field metadata"),
    ],
)
def test_rows_that_cannot_be_scored(ground_truth: Any, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(GroundTruthError, match=message):
        ReasoningGymReward().validate_ground_truth(ground_truth, extra)


@pytest.mark.parametrize(
    ("task", "decoy"), [("complex_arithmetic", "nan"), ("coin_flip", "0"), ("game_of_life_halting", "nan")]
)
def test_a_scorer_that_takes_any_answer_is_refused(task: str, decoy: str) -> None:
    refusable = [row for row in rows(task) if row[1] != "1"]  # coin_flip's scorer does not give 1's marks to 0
    assert refusable
    for source, ground_truth, extra in refusable:
        with pytest.raises(GroundTruthError, match=f"full marks to '{decoy}', .* the task cannot be trained on"):
            ReasoningGymReward().validate_ground_truth(ground_truth, {**extra, "data_source": source})


@pytest.mark.parametrize(("ground_truth", "ok"), [("0", True), ("0.0", True), ("1", False), (None, False)])
def test_a_decoy_that_is_right_is_none(ground_truth: Any, ok: bool) -> None:
    class TakesNought:
        def score_answer(self, answer: str, entry: Any) -> float:
            return float(float(answer) == 0 or answer == entry["answer"])

    reward = ReasoningGymReward(task="chain_sum")
    reward._datasets[("chain_sum", "{}")] = TakesNought()
    if ok:
        reward.validate_ground_truth(ground_truth, {"metadata": {}})
    else:
        with pytest.raises(GroundTruthError, match="gives full marks to '0'"):
            reward.validate_ground_truth(ground_truth, {"metadata": {}})


@pytest.mark.parametrize("flood", ["<answer>", r"\boxed{"])
def test_flooding_scores_0_and_costs_no_time(flood: str) -> None:
    assert score(rows("chain_sum")[0], flood * (200_000 // len(flood))).reward == 0.0


def test_a_ground_truth_that_the_scorer_refuses() -> None:
    [row, *_] = rows("countdown")
    with pytest.raises(GroundTruthError, match="gives the row's own answer '1' only"):
        ReasoningGymReward().validate_ground_truth("1", {**row[2], "data_source": row[0]})

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


@pytest.mark.parametrize("task", ["chain_sum", "gsm_symbolic", "countdown", "knights_knaves"])
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


def test_a_ground_truth_that_the_scorer_refuses() -> None:
    [row, *_] = rows("countdown")
    with pytest.raises(GroundTruthError, match="gives the row's own answer '1' only"):
        ReasoningGymReward().validate_ground_truth("1", {**row[2], "data_source": row[0]})

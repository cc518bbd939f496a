"""Equal once normalised, and not otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from rewards.api import GroundTruthError, RewardInput
from rewards.exact import ExactReward


def reward(answer: str, ground_truth: Any, **options: Any) -> float:
    sample = RewardInput(prompt="", response=answer, answer=answer, ground_truth=ground_truth)
    return ExactReward(**options)(sample).reward


@pytest.mark.parametrize(
    ("answer", "ground_truth"),
    [
        ("Paris", "paris"),
        (" New \n York ", "new york"),
        ("「東京」。", "東京"),
        ("A1", "a1"),
        ("42", 42),
        ("42.0", 42.0),
        ("42", 42.0),  # of a column of integers with gaps
        ("colour", ["color", "colour"]),
        ("...", "..."),
        ("A1.", "A1"),
        ("**Paris**", "Paris"),
        ('"Paris"', "Paris"),
        ("(Paris)", "Paris"),
        ("Paris!", "Paris"),
        ('**"Paris."**', "Paris"),
        ("パリ!」", "パリ!」"),
        ("5!", "5!"),
        ("**5!**.", "5!"),
        ("C++.", "C++"),
        ("It is blue", '"It is blue."'),
        ("\u22125", -5),
        ("[1, 2]", "[1, 2]"),
        ("`__init__`", "__init__"),
    ],
)
def test_equal(answer: str, ground_truth: Any) -> None:
    assert reward(answer, ground_truth) == 1.0


@pytest.mark.parametrize(
    ("answer", "ground_truth"),
    [
        ("Paris, France", "Paris"),
        ("", "x"),
        ("not Paris", "Paris"),
        ("4 2", "42"),
        ("-5", 15),
        ("5", "-5"),
        ("-5", "5"),
        ("5", "5!"),
        ("5!", "5"),
        ("5", ".5"),
        (".5", "5"),
        ("C#", "C++"),
        ("A-", "A+"),
        ("5%", "5"),
        ("(1, 2)", "[1, 2]"),
        ("init", "__init__"),
        ("(Paris", "Paris"),
        ("..", "..."),
    ],
)
def test_different(answer: str, ground_truth: Any) -> None:
    assert reward(answer, ground_truth) == 0.0


@pytest.mark.parametrize("flood", ["-", "!", "(", '"', "**", " ", "\u0301\u0316"])
def test_flooding_scores_0_and_costs_no_time(flood: str) -> None:
    flooded = flood * (200_000 // len(flood))
    assert reward(f"a{flooded}b", "a") == reward(f"a{flooded}", "b") == 0.0


def test_a_long_ground_truth_can_be_answered() -> None:
    text = "so on " * 2000
    assert reward(f"**{text}**", text) == 1.0


def test_options() -> None:
    assert reward("Paris", "paris", ignore_case=False) == 0.0
    assert reward("Paris.", "Paris", ignore_punctuation=False) == 0.0
    assert reward("the Nile", "Nile", ignore_articles=True) == 1.0
    assert reward("first: 1 last: 2", "2", pattern=r"\w+: (\d)") == 1.0
    assert reward("none", "2", pattern=r"\d") == 0.0


def test_answers_that_are_equal_vote_alike() -> None:
    said = [RewardInput("", answer, answer, "paris") for answer in ("Paris", " PARIS. ", "Rome")]
    assert [ExactReward()(sample).extracted for sample in said] == ["paris", "paris", "rome"]


@pytest.mark.parametrize("ground_truth", [None, {}, [], [None], True, "", "  "])
def test_unusable_ground_truths(ground_truth: Any) -> None:
    with pytest.raises(GroundTruthError, match="exact: the ground truth"):
        ExactReward().validate_ground_truth(ground_truth, {})

"""The letter is read where it is stated, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.api import GroundTruthError, RewardInput
from rewards.choice import ChoiceReward
from rl.errors import ConfigError

CITIES = ["Rome", "Paris", "Berlin", "Madrid"]


def reward(answer: str, ground_truth: Any = "B", choices: Any = None, **options: Any) -> float:
    extra = {} if choices is None else {"choices": choices}
    sample = RewardInput(prompt="", response=answer, answer=answer, ground_truth=ground_truth, extra=extra)
    return ChoiceReward(**options)(sample).reward


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "**B**",
        "B)",
        "[B]",
        "B",
        "(B)",
        "B) Paris",
        "**B.** Paris",
        r"\boxed{B}",
        r"So it is \boxed{\text{B}}.",
        r"$\boxed{\textbf{(B)}}$",
        r"A is wrong: \boxed{A}? No, \boxed{B}",
        "<answer>B</answer>",
        "<answer> (B) Paris </answer>",
        "The answer is B.",
        "The correct answer is (B) because A is not in France.",
        "The answer is A. Wait. The final answer is **B**",
        "Answer: B",
        "**Answer:** B",
        "The best option is B",
        "答えはBです。",
        "正解:(B)",
        "最終回答: B",
        "選択肢はB",
    ],
)
def test_right_answers(answer: str) -> None:
    assert reward(answer) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "C",
        "A or B",
        "A, B",
        "A, B, C, D",
        "A B C D",
        "The answer is A or B",
        "The answer is A, B, C or D.",
        r"\boxed{A, B}",
        r"\boxed{B} or rather \boxed{C}",
        r"\boxed{}",
        "A) Rome\nB) Paris\nC) Berlin\nD) Madrid",
        "I think that B is a city.",
        "Bananas",
        "The answer is Bananas",
        "B) Berlin is big. C) Paris",
        "The answer is not B",
        "<answer>A</answer> B",
        "答えはAかBです",
        "答えはBかAです",
        "The answer is B, or maybe C",
        "The answer is B or possibly (C)",
        "答えはB、またはC",
    ],
)
def test_wrong_answers_and_hedges(answer: str) -> None:
    assert reward(answer, choices=CITIES) == 0.0


def test_texts_of_choices() -> None:
    assert reward("Paris", choices=CITIES) == 1.0
    assert reward("paris.", choices={"A": "Rome", "B": "Paris"}) == 1.0
    assert reward("paris", choices={"label": ["A", "B"], "text": ["Rome", "Paris"]}) == 1.0
    assert reward("B) Rome", choices=CITIES) == 0.0
    assert reward("Paris, France", choices=CITIES) == 0.0
    assert reward("Paris") == 0.0
    assert reward("same", choices=["same", "same"]) == 0.0


@pytest.mark.parametrize("ground_truth", ["B", "b", "(B)", "B", 1, "Paris", ["B"]])
def test_forms_of_the_ground_truth(ground_truth: Any) -> None:
    assert reward("B", ground_truth, CITIES) == 1.0
    assert reward("A", ground_truth, CITIES) == 0.0


def test_several_right_letters() -> None:
    for ground_truth in ("AC", ["A", "C"], [0, 2]):
        assert reward("A, C", ground_truth) == reward("The answer is C and A", ground_truth) == 1.0
        assert reward("A", ground_truth) == reward("A, B, C", ground_truth) == 0.0


def test_letters_of_ones_own() -> None:
    assert reward("答えはイ", "イ", letters="アイウエ") == 1.0
    assert reward("答えはア", "イ", letters="アイウエ") == 0.0


@pytest.mark.parametrize("ground_truth", [None, "", "Z", "Paris", 4, -1, True, [], ["A", "Q"], 1.5])
def test_ground_truths_that_name_no_choice(ground_truth: Any) -> None:
    with pytest.raises(GroundTruthError, match="choice: the ground truth"):
        ChoiceReward(letters="ABCD").validate_ground_truth(ground_truth, {})


def test_choices_that_are_no_list() -> None:
    with pytest.raises(GroundTruthError, match="must list at most 10 choices"):
        ChoiceReward().validate_ground_truth("A", {"choices": "A) x B) y"})
    with pytest.raises(ConfigError, match="at least two different letters"):
        ChoiceReward(letters="AA")


@given(st.text(alphabet="AB()*.,:\\{}boxed answer is") | st.text())
def test_any_text_is_scored(text: str) -> None:
    assert reward(text, "B", CITIES) in (0.0, 1.0)

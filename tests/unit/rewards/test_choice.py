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
        "The answer is b.",
        "the answer is (b) here",
        "The answer is **b** here",
        "answer: b\nIt is in France.",
        "The answer is b, because it is in France",
        "答えはbです",
        "The answer is B, a city in France.",
        "The answer is B. But the answer is a hard one.",
        r"The answer is $\boxed{\text{(B)}}$.",
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
        "The answer is B and c are right",
        "The answer is a or b.",
        "The answer is $B$ or $C$",
        "The answer is b squared",
    ],
)
def test_wrong_answers_and_hedges(answer: str) -> None:
    assert reward(answer, choices=CITIES) == 0.0


def test_texts_of_choices() -> None:
    assert reward("Paris", choices=CITIES) == 1.0
    assert reward("The answer is B) Paris.", choices=CITIES) == 1.0
    assert reward("The answer is (B), Rome is smaller.", choices=CITIES) == 1.0
    for wrong in ("B) Rome", "B, Rome.", "B (Rome)", '(B) "Rome"', "B) **Rome**", "**B**. Rome"):
        assert reward(f"The answer is {wrong}", choices=CITIES) == 0.0
    for padding in ("", "...", None):
        assert reward("The answer is B.", choices=["Rome", "Paris", padding, padding]) == 1.0
        assert reward("The answer is (B)", choices=["Rome", "Paris", padding, padding]) == 1.0
    assert reward("The answer is B) -5", choices=["5", "-5"]) == 1.0
    assert reward("The answer is B) C++.", choices=["C", "C++"]) == 1.0
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


@pytest.mark.parametrize(
    "answer",
    [
        "The answer is a prime number, so B.",
        "The answer is a prime number, so (B).",
        "The correct answer is a tough call.",
        "Answer: A prime number",
        "Answer: I think C",
        "Answer: I'd say C",
    ],
)
def test_articles_and_pronouns_are_no_letters(answer: str) -> None:
    assert all(reward(answer, letter) == 0.0 for letter in "ABCI")


def test_a_and_i_are_letters_where_nothing_else_fits() -> None:
    assert reward("The answer is A because it is even.", "A") == reward("The answer is a.", "A") == 1.0
    assert reward("The answer is **A** prime number", "A") == reward("The answer is I.", "I") == 1.0


def test_a_ground_truth_that_is_a_text_made_of_letters() -> None:
    assert reward("B", "Bad", ["Good", "Bad"]) == reward("C", "AB", ["A", "B", "AB", "O"]) == 1.0
    assert reward("A, B, D", "Bad", ["Good", "Bad", "Ugly", "Odd"]) == 0.0
    assert reward("A", "A", ["B", "A"]) == 1.0  # a single letter is a letter


@pytest.mark.parametrize("flood", ["(", "**", " ", "( ", "A,", "answer is", "answer is (", r"\boxed{", "<answer>", ":"])
def test_flooding_scores_0_and_costs_no_time(flood: str) -> None:
    flooded = flood * (200_000 // len(flood))
    for answer in (flooded, f"answer is C{flooded}x", f"answer is {flooded}x", f"C{flooded}"):
        assert reward(answer) == 0.0


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

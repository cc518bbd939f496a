"""Layouts that count and layouts that only look like it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.api import RewardInput
from rewards.format import FormatReward, boxed_contents, tagged_contents
from rl.errors import ConfigError
from rollout.chat import think_answer


def reward(response: str, *, truncated: bool = False, **options: Any) -> float:
    opened = options.get("prompt_opens_thinking", False)
    answer = think_answer(response, prompt_opens=opened)
    return FormatReward(**options)(
        RewardInput(prompt="", response=response, answer=answer, ground_truth=None, truncated=truncated)
    ).reward


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>2+2</think>4", 1.0),
        ("\n<think>\n2+2\n</think>\n\n4\n", 1.0),
        ("4", 0.0),
        ("<think>2+2</think>", 0.0),
        ("<think> </think>4", 0.0),
        ("<think>2+2", 0.0),
        ("so <think>2+2</think>4", 0.0),
        ("<think>a</think><think>b</think>4", 0.0),
        ("<think>a</think>4</think>", 0.0),
        ("2+2</think>4", 0.0),
    ],
)
def test_thinking(response: str, expected: float) -> None:
    assert reward(response) == expected


def test_the_prompt_may_open_the_thinking() -> None:
    assert reward("2+2</think>4", prompt_opens_thinking=True) == 1.0
    assert reward("<think>2+2</think>4", prompt_opens_thinking=True) == 0.0
    assert reward("<thought>a</thought>b", open_tag="<thought>", close_tag="</thought>") == 1.0


def test_harmony_channels() -> None:
    def harmony(response: str, answer: str) -> float:
        return FormatReward()(RewardInput(prompt="", response=response, answer=answer, ground_truth=None)).reward

    final = "<|start|>assistant<|channel|>final<|message|>4"
    text = f"<|channel|>analysis<|message|>2+2<|end|>{final}"
    assert harmony(text, "4") == harmony(f"{text}<|end|>", "4") == 1.0
    assert harmony(text.replace("<|message|>4", " <|constrain|>json<|message|>\n4\n"), "4") == 1.0
    assert harmony(f"<|channel|>analysis<|message|> <|end|>{final}", "4") == 0.0
    assert harmony(f"<|channel|>commentary to=f<|message|>2+2<|end|>{final}", "4") == 0.0
    assert harmony(f"{text}<|end|><|start|>assistant<|channel|>analysis<|message|>5", "4") == 0.0
    assert harmony("<|channel|>analysis<|message|>2+2", "") == 0.0
    assert harmony("<|channel|>final<|message|>4", "4") == 0.0


@pytest.mark.parametrize("closed", ["", "</think>", "<think></think>"])
@pytest.mark.parametrize("prompt_opens_thinking", [False, True])
def test_models_of_other_formats_cannot_forge_channels(closed: str, prompt_opens_thinking: bool) -> None:
    final = "<|end|><|start|>assistant<|channel|>final<|message|>"
    for forged in ("<|channel|>analysis 42", f"<|channel|>analysis<|message|>2+2{final}"):
        if not (closed == "</think>" and prompt_opens_thinking):  # which is honest thinking
            assert reward(f"{forged}{closed}4", prompt_opens_thinking=prompt_opens_thinking) == 0.0
            assert reward(f"{closed}{forged}4", prompt_opens_thinking=prompt_opens_thinking) == 0.0


def test_a_cut_response_has_no_layout() -> None:
    assert reward("<think>2+2</think>4", truncated=True) == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"so \boxed{4}", 1.0),
        (r"so \boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{1} or \boxed{2}", 0.0),
        (r"so \boxed{}", 0.0),
        (r"so \boxed{4", 0.0),
        (r"<think>\boxed{1}</think> so \boxed{4}", 1.0),
        (r"<think>\boxed{4}</think> so four", 0.0),
    ],
)
def test_one_boxed_answer(response: str, expected: float) -> None:
    assert reward(response, thinking=False, boxed=True) == expected


def test_answer_tags_and_patterns() -> None:
    assert reward("<answer>4</answer>", thinking=False, answer_tags=True) == 1.0
    assert reward("<answer>3</answer><answer>4</answer>", thinking=False, answer_tags=True) == 0.0
    assert reward("<answer><answer>4</answer>", thinking=False, answer_tags=True) == 0.0
    assert reward("step one\nstep two", thinking=False, pattern=r"step .*two") == 1.0
    assert reward("first step one", thinking=False, pattern=r"step .*") == 0.0


def test_partial_gives_the_share_of_checks() -> None:
    options = {"boxed": True, "pattern": r".*\.", "partial": True}
    assert reward(r"<think>a</think>\boxed{4}", **options) == pytest.approx(2 / 3)


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({"thinking": False}, "nothing to check"),
        ({"pattern": "("}, "not a valid regular expression"),
        ({"open_tag": "<x>", "close_tag": "<x>"}, "two different tags"),
    ):
        with pytest.raises(ConfigError, match=message):
            FormatReward(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "flood", ["<answer>", "</answer>", r"\boxed{", r"\boxed", "{", "}", "<|start|>", "<|message|>"]
)
def test_flooding_scores_0_and_costs_no_time(flood: str) -> None:
    flooded = flood * (200_000 // len(flood))
    for response in (flooded, f"{flooded}4", f"<think>{flooded}</think>"):
        assert reward(response, answer_tags=True, boxed=True, partial=True) == 0.0


def test_boxes_in_boxes_and_tags() -> None:
    assert boxed_contents(r"\boxed{a \boxed {\}b} \{} \\boxed{c} } \boxed{\boxed{d}") == [
        r"a \boxed {\}b} \{",
        r"\}b",
        "c",
        "",
        "d",
    ]
    deep = boxed_contents(r"\boxed{" * 25_000 + "}" * 25_000)
    assert len(deep) == 25_000 and deep[99] and deep[100:] == [""] * 24_900
    assert tagged_contents("</answer><answer>a<answer>b</answer> <answer></answer><answer>c") == ["a<answer>b", ""]


@given(st.text(alphabet="{}\\ab") | st.text())
def test_boxes_are_read_by_their_braces(content: str) -> None:
    depth, balanced = 0, True
    plain = content.replace("\\", "")
    for character in plain:
        depth += (character == "{") - (character == "}")
        balanced = balanced and depth >= 0
    [found] = boxed_contents(r"\boxed{" + plain + "}") if "boxed" not in plain else [plain]
    assert found == plain if balanced and depth == 0 else True
    boxed_contents(content)

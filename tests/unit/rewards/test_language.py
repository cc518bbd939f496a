"""Which language a response is in, reasoning and answer apart."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.api import RewardInput, RewardOutput
from rewards.language import LanguageReward, languages_of, wanted_share
from rl.errors import ConfigError

ENGLISH = "We first compute the sum of both sides and then divide by two to obtain the result."
JAPANESE = "まず両辺の和を計算し、次に二で割って結果を得ます。したがって答えは四十二です。"
CHINESE = "首先我们计算两边的和,然后除以二得到结果。因此答案是四十二。"
FRENCH = "Nous calculons d'abord la somme des deux côtés puis nous divisons par deux pour obtenir le résultat."
GERMAN = "Zuerst berechnen wir die Summe beider Seiten und teilen dann durch zwei, um das Ergebnis zu erhalten."
SENTENCES = {"en": ENGLISH, "ja": JAPANESE, "zh": CHINESE, "fr": FRENCH, "de": GERMAN}


def output(reasoning: str, answer: str, prompt: str = "", **options: Any) -> RewardOutput:
    response = f"<think>{reasoning}</think>{answer}"
    sample = RewardInput(prompt=prompt, response=response, answer=answer, ground_truth=None)
    return LanguageReward(**options)(sample)


@pytest.mark.parametrize("written", SENTENCES)
@pytest.mark.parametrize("wanted", SENTENCES)
def test_every_pair_of_languages(wanted: str, written: str) -> None:
    share, letters = wanted_share(SENTENCES[written], frozenset({wanted}))
    assert share == float(wanted == written)
    assert letters > 20
    assert languages_of(SENTENCES[written]) == {written}


def test_mixed_text_has_a_share_between() -> None:
    for wanted in ("en", "ja"):
        assert 0.2 < wanted_share(ENGLISH + JAPANESE, frozenset({wanted}))[0] < 0.8
    assert 0.3 < wanted_share(ENGLISH + " " + FRENCH, frozenset({"en"}))[0] < 0.7


def test_code_mathematics_links_and_names_belong_to_no_language() -> None:
    code = "```python\nprint('hello world, this is english text')\n```"
    for foreign in (
        code,
        r"$\text{the sum of all}$",
        r"\[ \mathrm{volume} \]",
        "https://example.org/long/path",
        "<think>",
    ):
        assert wanted_share(JAPANESE + foreign, frozenset({"ja"}))[0] == 1.0
    assert wanted_share("GPUでxを計算し、DNAとyも調べます。", frozenset({"ja"}))[0] == 1.0
    assert wanted_share("値はABC123です", frozenset({"ja"}))[0] == 1.0


def test_environments_belong_to_no_language() -> None:
    inner = r"\begin{align}\begin{cases} one english sentence \end{cases}\end{align}"
    assert wanted_share(JAPANESE + inner, frozenset({"ja"}))[0] == 1.0
    assert wanted_share(JAPANESE + r"\begin{align}" + ENGLISH, frozenset({"ja"}))[0] < 0.8


@pytest.mark.parametrize("flood", [r"\(", r"\[", r"\begin{a}", "$$ ", "`", "<|", "a", "a値", "\u0301\u0316"])
def test_flooding_costs_no_time(flood: str) -> None:
    flooded = flood * (200_000 // len(flood))
    assert 0.0 <= output(flooded, ENGLISH, language="en").reward <= 1.0


def test_japanese_headings_in_han_only_are_not_chinese() -> None:
    assert wanted_share("解答:\n" + JAPANESE + "\n結論:四十二", frozenset({"ja"}))[0] == 1.0


def test_reasoning_and_answer_are_told_apart() -> None:
    mixed = output(CHINESE, JAPANESE, language="ja")
    assert mixed.breakdown == {"reasoning": 0.0, "answer": 1.0}
    assert mixed.reward == 0.5
    assert output(CHINESE, JAPANESE, language="ja", answer_weight=0.25).reward == 0.25
    assert output(CHINESE, JAPANESE, language="ja", threshold=0.9).reward == 0.0
    assert output(JAPANESE, JAPANESE, language="ja", threshold=0.9).reward == 1.0


def test_a_part_without_letters_leaves_it_to_the_other() -> None:
    assert output(ENGLISH, "42", language="en").reward == 1.0
    assert output(CHINESE, r"\boxed{42}", language="en").reward == 0.0
    assert output("", ENGLISH, language="en").reward == 1.0


def test_saying_nothing_is_no_way_out() -> None:
    assert output("1+1=2", "2", language="en").reward == 0.0


def test_the_language_of_the_prompt() -> None:
    assert output(JAPANESE, "四十二です", prompt="六かける七は?").reward == 1.0
    assert output(ENGLISH, ENGLISH, prompt="六かける七は?").reward == 0.0
    assert languages_of("x² + y² = z² とする") == {"ja"}
    for question in ("JSONとは", "HTTPとは何?", "SAT と GRE", "GDPの定義"):
        assert languages_of(question) == {"ja"}
    for question in ("求和", "什么是JSON?", "求ABCD"):
        assert languages_of(question) == {"ja", "zh"}
    for question, language in (("यह क्या है?", "hi"), ("ไป", "th"), ("네?", "ko")):
        assert languages_of(question) == {language}
    assert languages_of("Да?") == {"ru", "uk", "bg"}
    with pytest.raises(ValueError, match="script"):
        output(ENGLISH, ENGLISH, prompt="რამდენია ექვსჯერ შვიდი?")


@pytest.mark.parametrize("prompt", ["Solve for x.", "Is 7 prime?", "What is 1+1?", "Find the roots of x^2-1."])
def test_a_question_too_short_to_tell_takes_any_language_of_its_script(prompt: str) -> None:
    assert output(ENGLISH, ENGLISH, prompt=prompt).reward == 1.0
    assert output(ENGLISH, FRENCH, prompt=prompt).reward == 1.0
    assert output(ENGLISH, CHINESE, prompt=prompt).reward == 0.5
    assert languages_of(f"{ENGLISH} {prompt}") == {"en"}


@pytest.mark.parametrize("prompt", ["6 x 7 = ?", "$1+1$", "", "f(x) = ab?", "2x+3=7", "3x+2y=12", "α+β=?"])
def test_a_question_without_words_takes_any_language(prompt: str) -> None:
    assert output(JAPANESE, CHINESE, prompt=prompt).reward == output(ENGLISH, GERMAN, prompt=prompt).reward == 1.0


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({"language": "japanese"}, "does not know 'japanese'; it knows prompt, ja, zh"),
        ({"answer_weight": 2.0}, "answer_weight must be"),
        ({"threshold": 0.0}, "threshold in"),
    ):
        with pytest.raises(ConfigError, match=message):
            LanguageReward(**options)  # type: ignore[arg-type]


@given(st.text())
def test_any_text_has_a_share(text: str) -> None:
    for language in ("ja", "en"):
        assert 0.0 <= wanted_share(text, frozenset({language}))[0] <= 1.0
    with suppress(ValueError):
        languages_of(text)

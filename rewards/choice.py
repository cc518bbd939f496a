"""`choice`: the letter of a multiple-choice answer. Left out: answers that are neither a letter nor a choice's text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.api import GroundTruthError, RewardInput, RewardOutput, register_reward
from rewards.format import boxed_contents, nfkc, tagged_contents
from rl.errors import ConfigError

# Repetitions are possessive (`*+`) where two of them could divide the same characters in many ways: trying each of them
# would take time quadratic in the text's length.
_ANNOUNCEMENTS = (
    r"(?:final\s+|correct\s+|best\s+|right\s+)?(?:answer|option|choice)(?:\s+is|\s*[:=])++(?:\s+(?:option|choice))?",
    r"(?:最終)?(?:答え|解答|回答|正解|正答|選択肢)(?:は|[:=])++",
)
_JOINTS = r"(?:\s*(?:,|、|/|&|と|か|または|もしくは|あるいは|and|or)\s*)"
_DOUBT = r"\s*+[,、]?\s*+(?:or|maybe|perhaps|possibly|か|または|もしくは|あるいは).{0,20}?"  # "B, or maybe C"
_TOUCHING = r"[A-Za-z0-9À-ɏァ-ヴー]"  # a letter beside one of these is part of a word
_OPENING = r"(?:[(\[$]\s*|\*\*|\\text(?:bf)?\{\s*)*+"
_CLOSING = r"(?:\s*+[)\]}$]|\*\*)*+"
_GOES_ON = r"(?:and|or|because|since|as|for|but|which|while|due|is|maybe|perhaps|possibly)\b"  # may follow a letter
# "a" and "I" are English words: in prose they are letters only if no other word follows
_IS_WORD = rf"['’]\w|[^\S\n]+(?!{_GOES_ON})[a-z]"
_ENDS = rf"(?=[)\]}}*$,;:!?。、ぁ-ん一-龥]|\.(?!\w)|\s*+(?:\Z|{_GOES_ON})|[^\S\n]*\n)"
_MAX_STATED = 2000  # characters
_AROUND_TEXTS = " .,;:!*_\"'“”‘’()[]–—"  # not - or +, which belong to numbers and names


@register_reward("choice")
class ChoiceReward:
    """1 when the answer chooses the right letter, or exactly the right letters, else 0.

    The letter comes from the last `\\boxed{}` or `<answer>`, else from the last announcement ("the answer is (B)",
    "答え: B"), else from an answer that is nothing but the letter, alone or before its choice's text ("B) Paris").
    Full-width letters count. Where the row lists its choices, an answer that is one choice's text counts as its letter.
    An answer that names several letters is no answer, unless the ground truth has several. No letter is ever picked out
    of prose.

    The ground truth is a letter ("B", "(b)"), several ("AC" or a list), an index from 0, or a choice's text.

    Args:
        letters: the letters of the choices, in order.
        choices_field: the row's field with the texts of the choices.
    """

    def __init__(self, *, letters: str = "ABCDEFGHIJ", choices_field: str = "choices") -> None:
        if len(set(letters)) < 2 or len(set(letters)) < len(letters):
            raise ConfigError(f"reward 'choice' needs at least two different letters, not {letters!r}")
        self._letters = unicodedata.normalize("NFKC", letters).upper()
        self._choices_field = choices_field
        capitals, small = f"[{re.escape(self._letters)}]", f"[{re.escape(self._letters.lower())}]"

        def alone(letter: str) -> str:
            return rf"(?<!{_TOUCHING}){letter}(?!{_TOUCHING})"

        self._letter = re.compile(alone(capitals), re.IGNORECASE)
        joined = rf"{_CLOSING}(?:{_JOINTS}{_OPENING}{alone(capitals)}{_CLOSING})*"
        self._only = re.compile(
            rf"(?:\\text(?:bf)?\{{|\W)*+(?P<run>{alone(capitals)}{joined})[\s.。:)*]*+", re.IGNORECASE
        )
        self._leading = re.compile(rf"[(\[*]*(?P<letter>{capitals})[)\].:、]\**\s+(?P<text>\S.*)")
        # In an announcement case matters: a small letter must end the sentence or be closed by a bracket or bold.
        capital = rf"{capitals}(?:(?<![AI])|(?!{_IS_WORD}))"
        first = alone(rf"(?-i:{capital}|{small}{_ENDS})")
        further = alone(rf"(?-i:{capital}|{small}(?:(?<![ai])|{_ENDS}))")  # "B, a prime number", but not "B and c are"
        joined = rf"{_CLOSING}(?:{_JOINTS}{_OPENING}{further}{_CLOSING})*"
        self._announced = re.compile(
            rf"(?:{'|'.join(_ANNOUNCEMENTS)})(?:\\(?:boxed|text|textbf)\{{|[\s*$(\[])*+(?P<run>{first}{joined})",
            re.IGNORECASE,
        )
        self._doubt = re.compile(rf"{_DOUBT}{_OPENING}{further}", re.IGNORECASE)

    def __call__(self, sample: RewardInput) -> RewardOutput:
        choices = self._choices(sample.extra)
        wanted = self._wanted(sample.ground_truth, choices)
        chosen = self._chosen(nfkc(sample.answer).strip(), choices)
        extracted = "".join(sorted(chosen)) or None
        return RewardOutput(float(chosen == wanted), {"answered": float(bool(chosen))}, extracted)

    def validate_ground_truth(self, ground_truth: Any, extra: Mapping[str, Any]) -> None:
        """Raise GroundTruthError unless the ground truth names at least one of the choices."""
        self._wanted(ground_truth, self._choices(extra))

    def _chosen(self, answer: str, choices: Mapping[str, str]) -> frozenset[str]:
        if marked := boxed_contents(answer) or tagged_contents(answer):
            return self._stated(marked[-1].strip(), choices)
        if announcements := list(self._announced.finditer(answer)):
            run, end = announcements[-1]["run"], announcements[-1].end()
            letters = self._letters_in(run)
            text = answer[end:].partition("\n")[0].lstrip(").]:、* ")  # "B) Paris"
            named = _with_text(text, choices) or _with_text(text.strip(_AROUND_TEXTS), choices)
            doubted = self._doubt.match(answer, end) is not None or (named and not named & letters)
            return frozenset() if doubted else letters
        return self._stated(answer, choices)

    def _stated(self, text: str, choices: Mapping[str, str]) -> frozenset[str]:
        """The letters of a text that is nothing but an answer: letters, a letter with its text, or a choice's text."""
        if len(text) > _MAX_STATED:
            return frozenset()
        if match := self._only.fullmatch(text):
            return self._letters_in(match["run"])
        by_text = _with_text(text, choices)
        if len(by_text) == 1:
            return by_text
        match = self._leading.fullmatch(text)  # one line only, because a list of all choices is no answer
        if match and (not choices or _normal(choices.get(match["letter"].upper(), "")) == _normal(match["text"])):
            return frozenset(match["letter"].upper())
        return frozenset()

    def _letters_in(self, run: str) -> frozenset[str]:
        return frozenset(letter.upper() for letter in self._letter.findall(run))

    def _choices(self, extra: Mapping[str, Any]) -> dict[str, str]:
        """Letter -> text, where the row has them: a list in order, or a mapping by letter."""
        value = extra.get(self._choices_field)
        if value is None:
            return {}
        if isinstance(value, Mapping) and {"label", "text"} <= set(value):  # the format of ARC and similar datasets
            value = dict(zip(value["label"], value["text"]))
        if isinstance(value, Mapping):
            return {str(letter).upper(): str(text) for letter, text in value.items()}
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > len(self._letters):
            raise GroundTruthError(
                f"choice: the field {self._choices_field} must list at most {len(self._letters)} choices, not {value!r}"
            )
        return dict(zip(self._letters, map(str, value)))

    def _wanted(self, ground_truth: Any, choices: Mapping[str, str]) -> frozenset[str]:
        if isinstance(ground_truth, list | tuple) and ground_truth:
            return frozenset().union(*(self._wanted(one, choices) for one in ground_truth))
        if isinstance(ground_truth, int) and not isinstance(ground_truth, bool):
            if 0 <= ground_truth < (len(choices) or len(self._letters)):
                return frozenset(self._letters[ground_truth])
        elif isinstance(ground_truth, str):
            text = unicodedata.normalize("NFKC", ground_truth).strip()
            stripped = text.strip("()[]. ").upper()
            if len(stripped) > 1 and len(by_text := _with_text(text, choices)) == 1:  # the text "Bad" is not A, B and D
                return by_text
            if stripped and set(stripped) <= set(self._letters) and len(set(stripped)) == len(stripped):
                return frozenset(stripped)
            if letters := self._stated(text, choices):
                return letters
        raise GroundTruthError(
            f"choice: the ground truth {ground_truth!r} is neither a letter of {self._letters}, nor an index, nor the "
            "text of a choice"
        )


def _with_text(text: str, choices: Mapping[str, str]) -> frozenset[str]:
    wanted = _normal(text)  # rows may be padded with empty choices, which no text names
    return frozenset(letter for letter, choice in choices.items() if wanted and _normal(choice) == wanted)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(".。 ")

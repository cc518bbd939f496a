"""`exact`: the answer equals the ground truth as a string, once both are normalised. Left out: mathematics."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from rewards.api import GroundTruthError, RewardInput, RewardOutput, register_reward

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_QUOTES = ('""', "''", "“”", "‘’", "«»", "‹›", "「」", "『』")
_BRACKETS = ("()", "[]", "{}", "<>", "【】", "〔〕", "《》", "〈〉", "**", "__", "``")  # and markdown's emphasis
_STOPS = ".,。、"
_MARKS = "!?:;"  # like _STOPS, in NFKC, which makes full-width forms plain
_MAX_LAYERS = 100
_MAX_EXTRA = 2000  # characters


@register_reward("exact")
class ExactReward:
    """1 when the final answer equals the ground truth, else 0.

    Both sides get Unicode NFKC (full-width forms become plain), one space for any white space, and none at the ends.
    The ground truth may be a list: any of its members counts. An answer that is thousands of characters longer than the
    ground truth is wrong without a comparison.

    Args:
        ignore_case: compare case-folded.
        ignore_punctuation: drop marks around the answer that the ground truth lacks: quotation marks, brackets and
            emphasis at both ends, and punctuation that ends a sentence. Quotation marks and full stops around the
            ground truth are optional too. Signs and other marks belong to the answer: -5 is not 5, nor 5! or 5%.
        ignore_articles: drop English a, an, the.
        pattern: a regular expression; the last match in the answer (its first group, if it has one) is compared instead
            of the whole answer.
    """

    def __init__(
        self,
        *,
        ignore_case: bool = True,
        ignore_punctuation: bool = True,
        ignore_articles: bool = False,
        pattern: str | None = None,
    ) -> None:
        self._ignore_case = ignore_case
        self._ignore_punctuation = ignore_punctuation
        self._ignore_articles = ignore_articles
        self._pattern = re.compile(pattern, re.DOTALL) if pattern else None

    def __call__(self, sample: RewardInput) -> RewardOutput:
        answer = sample.answer
        if self._pattern is not None:
            matches = list(self._pattern.finditer(answer))
            if not matches:
                return RewardOutput(0.0)
            answer = matches[-1].group(1 if self._pattern.groups else 0) or ""
        accepted = _accepted(sample.ground_truth)
        if len(answer) > max(map(len, accepted)) + _MAX_EXTRA:
            return RewardOutput(0.0)
        wanted = {form for text in accepted for form in self._forms(text, _QUOTES, _STOPS)}
        forms = list(self._forms(answer, _QUOTES + _BRACKETS, _STOPS + _MARKS))
        right = [form for form in forms if form in wanted]
        return RewardOutput(float(bool(right)), extracted=(right or forms)[-1])

    def validate_ground_truth(self, ground_truth: Any, extra: Mapping[str, Any]) -> None:
        """Raise GroundTruthError unless the ground truth is text, or a list of texts, that an answer can equal."""
        for text in _accepted(ground_truth):
            if not self._normal(text):
                raise GroundTruthError(f"exact: the ground truth {text!r} is empty once normalised")

    def _forms(self, text: str, pairs: tuple[str, ...], marks: str) -> Iterator[str]:
        """The text, and what is left each time that a mark at its end, or a pair around it, is taken off.

        Example: '"Paris!"' gives '"Paris!"', 'Paris!' and 'Paris'.
        """
        text = self._normal(text)
        yield text
        for _ in range(_MAX_LAYERS if self._ignore_punctuation else 0):
            if text.rstrip(marks + " ") and text[-1] in marks and not re.search(r"[\d)\]}]!$", text):  # a factorial
                text = text[:-1].strip()
            elif len(text) > 2 and text[0] + text[-1] in pairs and text[1:-1].strip():
                text = text[1:-1].strip()
            else:
                return
            yield text

    def _normal(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
        if self._ignore_case:
            text = text.casefold()
        if self._ignore_articles:
            text = _ARTICLES.sub(" ", text)
        return " ".join(text.split())


def _accepted(ground_truth: Any) -> list[str]:
    values = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not values or not all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in values):
        raise GroundTruthError(
            f"exact: the ground truth must be a string, a number or a list of them, not {ground_truth!r}"
        )
    # Integers in a column with gaps arrive as floats.
    whole = [str(int(value)) for value in values if isinstance(value, float) and value.is_integer()]
    return [*map(str, values), *whole]

"""`exact`: the answer equals the ground truth as a string, once both are normalised. Left out: mathematics."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from rewards.api import GroundTruthError, RewardInput, RewardOutput, register_reward

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION_AROUND = re.compile(r"^[\W_]+|[\W_]+$")


@register_reward("exact")
class ExactReward:
    """1 when the final answer equals the ground truth, else 0.

    Both sides get Unicode NFKC (full-width forms become plain), one space for any white space, and none around. The
    ground truth may be a list: any of its members counts.

    Args:
        ignore_case: compare case-folded.
        ignore_punctuation: drop punctuation around the answer (a final full stop, quotation marks).
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
        wanted = {self._normal(text) for text in _accepted(sample.ground_truth)}
        normal = self._normal(answer)
        return RewardOutput(float(normal in wanted), extracted=normal)

    def validate_ground_truth(self, ground_truth: Any, extra: Mapping[str, Any]) -> None:
        """Raise GroundTruthError unless the ground truth is text, or a list of texts, that an answer can equal."""
        for text in _accepted(ground_truth):
            if not self._normal(text):
                raise GroundTruthError(f"exact: the ground truth {text!r} is empty once normalised")

    def _normal(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        if self._ignore_case:
            text = text.casefold()
        if self._ignore_articles:
            text = _ARTICLES.sub(" ", text)
        text = " ".join(text.split())
        if self._ignore_punctuation:
            text = _PUNCTUATION_AROUND.sub("", text) or text
        return text


def _accepted(ground_truth: Any) -> list[str]:
    values = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not values or not all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in values):
        raise GroundTruthError(
            f"exact: the ground truth must be a string, a number or a list of them, not {ground_truth!r}"
        )
    return [str(value) for value in values]

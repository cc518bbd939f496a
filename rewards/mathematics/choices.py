"""Multiple choice: a ground truth that is one letter, or several.

Left out: everything else.
"""

from __future__ import annotations

import re

_LETTERS = "A-J"
_TRUTH = re.compile(rf"\(?([{_LETTERS}])\)?\.?")
_TRUTHS = re.compile(rf"[{_LETTERS}](?:\s*(?:,|;|and|&|、|と)?\s*[{_LETTERS}])+")
_ANSWER = re.compile(
    r"(?:(?:option|choice|answer|選択肢)\s*:?\s*)?[(\[{]?\s*([A-Ja-j])\s*(?:[)\]}]*[.):：]?|[)\]}.]+)", re.IGNORECASE
)
_ANSWER_WITH_TEXT = re.compile(r"(?:(?:option|choice)\s+)?(?:\(\s*([A-J])\s*\)|([A-J])\s*[.):：])\s*(.+)", re.DOTALL)
_OTHER_CHOICE = re.compile(r"\(\s*[A-J]\s*\)|(?<![A-Za-z])[A-J]\s*[.):：]")
_WRAPPERS = re.compile(r"\\text\s*\{|[{}$*]")


def choices_of_truth(text: str) -> frozenset[str] | None:
    """The letters of a ground truth that is a choice, or None. Only capitals A to J are choices."""
    plain = _WRAPPERS.sub("", text).strip()
    if match := _TRUTH.fullmatch(plain):
        return frozenset(match[1])
    if _TRUTHS.fullmatch(plain):
        return frozenset(re.findall(rf"[{_LETTERS}]", plain))
    return None


def choices_of_answer(text: str) -> frozenset[str] | None:
    """The letters that an answer names, also if a choice's text stands beside its letter; None if it names none."""
    plain = _WRAPPERS.sub(" ", text).strip()
    if match := _ANSWER.fullmatch(plain):
        return frozenset(match[1].upper())
    if match := _ANSWER_WITH_TEXT.fullmatch(plain):
        if _OTHER_CHOICE.search(match[3]):
            return None
        return frozenset((match[1] or match[2]).upper())
    listed = re.sub(r"[()]", "", plain)
    if _TRUTHS.fullmatch(listed) or re.fullmatch(rf"[{_LETTERS}](?:\s*(?:,|;|and|or|&|、|と)\s*[{_LETTERS}])+", listed):
        return frozenset(re.findall(rf"[{_LETTERS}](?![a-z])", listed))
    return None

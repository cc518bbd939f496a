"""The whole decision: is this final answer equal to this ground truth?

Left out: finding the answer in a response (`rewards.mathematics.extraction`) and the reward around it (`rewards.math`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.mathematics.choices import choices_of_answer, choices_of_truth
from rewards.mathematics.comparison import Policy, compare
from rewards.mathematics.evaluation import Budget, TooLargeError, UndefinedError, exact
from rewards.mathematics.normalisation import normalise
from rewards.mathematics.reading import Answer, read_answer
from rewards.mathematics.scalars import Verdict
from rewards.mathematics.syntax import Collection, Node, Number, SetOperation
from rewards.mathematics.worker_pool import SymbolicPool, WorkerLostError

MAX_SYMBOLIC_CHARS = 400
MAX_SYMBOLIC_DEPTH = 12
_SPELLED_DIGITS = 100
_HUGE = re.compile(
    r"\d{40,}|\^\s*\{[^{}]*\^\s*\{[^{}]*\^|\^\s*\d+\s*\^\s*\d|\^\s*\{?\s*\d{4,}"  # numbers, towers of powers, powers
    r"|\d{4,}\s*\}?\s*!|!\s*!"  # factorials
)
_OPERATION = re.compile(
    r"[-+*/^!=<>]|\\(?:times|cdot|div|frac|sqrt|int|sum|prod|lim|sin|cos|tan|log|ln|binom|le|ge|pm)(?![a-zA-Z])"
)
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, and whether computer algebra was asked for it or was lost over it."""

    equal: bool
    symbolic: bool = False
    lost: str = ""


class Verifier:
    """Decides one pair at a time; safe to call from any thread."""

    def __init__(self, policy: Policy, pool: SymbolicPool) -> None:
        self._policy = policy
        self._pool = pool

    def decide(self, truth: str, answer: str, prompt: str = "") -> Decision:
        """Whether `answer` equals `truth`. An answer that only repeats a calculation in `prompt` does not count."""
        choices = choices_of_truth(truth)
        if choices is not None:
            return Decision(choices_of_answer(normalise(answer)) == choices)
        gold, found = read_answer(truth), read_answer(answer)
        decision = self._decide(gold, found)
        if decision.equal and prompt and quotes_question(gold, found, prompt):
            return Decision(False, decision.symbolic)
        return decision

    def can_judge(self, truth: str) -> bool:
        """Whether anything but the same text could be found equal to this ground truth. Raises WorkerLostError."""
        gold = read_answer(truth)
        if choices_of_truth(truth) is not None or gold.node is not None:
            return True
        return not is_hostile(gold.text) and self._pool.can_read(gold.text)

    def _decide(self, gold: Answer, found: Answer) -> Decision:
        if _compact(gold.text) == _compact(found.text):
            return Decision(True)
        gold, found = _with_agreeing_commas(gold, found)
        if gold.node is not None and found.node is not None:
            verdict = compare(gold.node, found.node, self._policy)
            if verdict is not Verdict.UNDECIDED:
                return Decision(verdict is Verdict.EQUAL)
        elif not (gold.unsupported or found.unsupported or gold.node is None):
            return Decision(False)
        if is_hostile(gold.text) or is_hostile(found.text):
            return Decision(False)
        try:
            return Decision(bool(self._pool.equal(gold.text, found.text)), symbolic=True)
        except WorkerLostError as error:
            return Decision(False, symbolic=True, lost=str(error))


def spelling(answer: str) -> str:
    """One text for all answers with one rational value (1/2, 0.5 and \\frac{1}{2}), else the normalised answer."""
    found = read_answer(answer)
    try:
        value = None if found.node is None else exact(found.node, Budget())
    except (TooLargeError, UndefinedError):
        value = None
    short = value is not None and max(abs(value.numerator), value.denominator) < 10**_SPELLED_DIGITS
    return str(value) if short else normalise(answer)


def is_hostile(text: str) -> bool:
    """Whether a text is of a size or shape that computer algebra is known to choke on."""
    if len(text) > MAX_SYMBOLIC_CHARS or _HUGE.search(text):
        return True
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest > MAX_SYMBOLIC_DEPTH


def quotes_question(gold: Answer, found: Answer, prompt: str) -> bool:
    """Whether an answer is a calculation copied from the question, unless the ground truth is written like that."""
    answer = _compact(found.text)
    if isinstance(found.node, Number) or len(answer) < 3 or not _OPERATION.search(found.text):
        return False
    if answer == _compact(gold.text):
        return False
    return answer in _compact(normalise(prompt))


def _compact(text: str) -> str:
    text = re.sub(r"[{}*]|\\(?:cdot|times)(?![a-zA-Z])", "", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # 1 2 is not 12


def _with_agreeing_commas(gold: Answer, found: Answer) -> tuple[Answer, Answer]:
    """Read commas again if the two readings disagree on them: 1,234 may be a list, 2,74 a decimal."""
    listed = [_is_list(answer.node) for answer in (gold, found)]
    if listed[0] == listed[1]:
        return gold, found
    number, other = (found, gold) if listed[0] else (gold, found)
    if "," in number.text:
        number = read_answer(number.text, grouping=False)
    elif _DECIMAL_COMMA.fullmatch(other.text) and isinstance(number.node, Number):
        other = read_answer(other.text.replace(",", "."))
    return (other, number) if listed[0] else (number, other)


def _is_list(node: Node | None) -> bool:
    return isinstance(node, (Collection, SetOperation))

"""Whether two expressions have the same value: exactly, to a hundred digits, or at points where both are defined.

Left out: everything that is not one value (`rewards.mathematics.comparison`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from enum import Enum
from fractions import Fraction
from functools import cache
from typing import Any

from rewards.mathematics.evaluation import Budget, Numeric, TooLargeError, UndefinedError, exact
from rewards.mathematics.syntax import Apply, Constant, Node, Number, UnsupportedError, symbols, walk

NUM_POINTS = 6
MAX_POINTS = 24  # tried for a function that is seldom real
POINTS_IN_FULL = 2  # compared at more than one precision; at the other points one precision is enough
MIN_AGREEING_POINTS = 3
COARSE_DIGITS, FINE_DIGITS, FINEST_DIGITS = 60, 120, 240
INTEGER_NAMES = frozenset("nkmNMK")  # variables that stand for whole numbers by custom
FLOAT_DIGITS = 15  # a decimal with so many digits was printed from a double
FLOAT_NOISE = Fraction(1, 10**14)


class Verdict(Enum):
    """What a comparison says."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNDECIDED = "undecided"  # for a computer-algebra system to decide


def same_value(gold: Node, answer: Node, significant_digits: int) -> Verdict:
    """Compare two scalar expressions. A decimal of at least `significant_digits` equals the value that it rounds."""
    if gold == answer:
        return Verdict.EQUAL
    if symbols(gold) != symbols(answer):
        return Verdict.DIFFERENT
    try:
        budget = Budget()
        a, b = exact(gold, budget), exact(answer, budget)
        if a is not None and b is not None:
            return _verdict(a == b or _rounds(gold, answer, a, b, significant_digits))
        if symbols(gold):
            return _same_function(gold, answer)
        return _same_constant(gold, answer, significant_digits)
    except (TooLargeError, UndefinedError):
        return Verdict.DIFFERENT
    except UnsupportedError:
        return Verdict.UNDECIDED


def proportional(gold: Node, answer: Node) -> int | None:
    """The sign of the constant c in gold = c * answer where both are defined; 0: there is none, None: unknown."""
    if symbols(gold) != symbols(answer):
        return 0
    numeric = numeric_at(FINE_DIGITS)
    ratios = []
    try:
        for point in points(symbols(gold), NUM_POINTS):
            try:
                a, b = numeric.value(gold, point), numeric.value(answer, point)
            except UndefinedError:
                continue
            if abs(a) < 1e-40 and abs(b) < 1e-40:
                continue
            if abs(a) < 1e-40 or abs(b) < 1e-40:
                return 0
            ratios.append(a / b)
    except TooLargeError:
        return 0
    except UnsupportedError:
        return None
    if len(ratios) < MIN_AGREEING_POINTS or any(abs(r - ratios[0]) > abs(ratios[0]) * 1e-50 for r in ratios[1:]):
        return 0
    ratio = ratios[0]
    return 0 if abs(numeric.context.im(ratio)) > 1e-50 else (1 if numeric.context.re(ratio) > 0 else -1)


def points(names: frozenset[str], count: int) -> list[dict[str, Fraction]]:
    """Points to compare at: the first with all variables positive, then one all negative, then of mixed signs.

    The same on every call.
    """
    ordered = sorted(names)
    generator = random.Random(",".join(ordered))
    chosen = []
    for i in range(count):
        signs = (1,) if i < NUM_POINTS // 2 else (-1,) if i == NUM_POINTS // 2 else (1, -1)
        chosen.append({n: Fraction(generator.randint(211, 2903), 1009) * generator.choice(signs) for n in ordered})
    return chosen


@cache
def numeric_at(digits: int) -> Numeric:
    """One evaluator per precision; they hold no state."""
    return Numeric(digits)


def as_decimal(node: Node) -> Number | None:
    """The number if it is written as a decimal, perhaps with a sign in front."""
    if isinstance(node, Apply) and node.name == "neg" and isinstance(node.args[0], Number):
        inner = node.args[0]
        node = Number(-inner.value, inner.places, inner.digits)
    return node if isinstance(node, Number) and node.places is not None else None


def _verdict(equal: bool) -> Verdict:
    return Verdict.EQUAL if equal else Verdict.DIFFERENT


def _rounds(gold: Node, answer: Node, a: Fraction, b: Fraction, significant_digits: int) -> bool:
    """Whether one is a decimal that rounds the other, which is not a decimal, or they differ only by float noise."""
    gold_decimal, answer_decimal = as_decimal(gold), as_decimal(answer)
    if gold_decimal and answer_decimal:
        return max(gold_decimal.digits, answer_decimal.digits) >= FLOAT_DIGITS and abs(a - b) <= abs(a) * FLOAT_NOISE
    decimal, value = (gold_decimal, b) if gold_decimal else (answer_decimal, a)
    return decimal is not None and _is_rounding(decimal, decimal.value, value, significant_digits)


def _is_rounding(decimal: Number, shown: Any, value: Any, significant_digits: int) -> bool:
    """Whether a decimal is the value rounded or cut at the decimal's last place (or with the noise of a double)."""
    if decimal.places is None or decimal.digits < significant_digits:
        return False
    difference, places = abs(shown - value), 10**decimal.places
    cut = abs(shown) <= abs(value) and difference * places < 1
    noise = decimal.digits >= FLOAT_DIGITS and difference * FLOAT_NOISE.denominator <= abs(value)
    return bool(cut or difference * 2 * places <= 1 or noise)


def _same_constant(gold: Node, answer: Node, significant_digits: int) -> Verdict:
    numeric = numeric_at(COARSE_DIGITS)
    if _has_infinity(gold) or _has_infinity(answer):
        return _verdict(bool(numeric.value(gold, {}) == numeric.value(answer, {})))
    gold_decimal, answer_decimal = as_decimal(gold), as_decimal(answer)
    decimal, other = (gold_decimal, answer) if gold_decimal else (answer_decimal, gold)
    if decimal is not None and as_decimal(other) is None:
        shown, value = numeric.value(decimal, {}), numeric.value(other, {})
        if numeric.context.im(value):
            return Verdict.DIFFERENT
        if _is_rounding(decimal, shown, numeric.context.re(value), significant_digits):
            return Verdict.EQUAL  # else it may still be all of the value: sin 30 degrees is 0.5
    return _verdict(_agree(gold, answer, {}, _difference(COARSE_DIGITS, gold, answer, {})))


def _has_infinity(node: Node) -> bool:
    return any(isinstance(n, Constant) and n.name == "inf" for n in walk(node))


def _same_function(gold: Node, answer: Node) -> Verdict:
    """Agreement where both have a value: over the reals, unless one of them contains i or neither is ever real."""
    names = symbols(gold)
    nodes = [*walk(gold), *walk(answer)]
    somewhere = points(names, MAX_POINTS)
    agreed = None
    if not any(isinstance(n, Constant) and n.name == "i" for n in nodes):
        agreed = _agree_on(gold, answer, somewhere, real=True)
    if agreed is None:
        agreed = _agree_on(gold, answer, somewhere, real=False)
    if not agreed and names <= INTEGER_NAMES:
        generator = random.Random(0)
        whole = [{name: Fraction(generator.randint(2, 30)) for name in sorted(names)} for _ in range(NUM_POINTS)]
        agreed = _agree_on(gold, answer, whole, real=False)
    return _verdict(bool(agreed))


def _agree_on(gold: Node, answer: Node, where: list[dict[str, Fraction]], real: bool) -> bool | None:
    """Whether two expressions agree at the points where both have a value; None: there are too few such points.

    A point where only one has a value does not count as a difference, so that ln(ab) is ln a + ln b; but an absolute
    value says that signs matter, so that ln|x| is not ln x.
    """
    same_domain = any(isinstance(n, Apply) and n.name == "abs" for n in (*walk(gold), *walk(answer)))
    agreed = 0
    for i, point in enumerate(where):
        if i >= NUM_POINTS and agreed >= MIN_AGREEING_POINTS:
            break
        a, b = _value_or_none(gold, point, real), _value_or_none(answer, point, real)
        if a is None or b is None:
            if same_domain and (a is None) != (b is None):
                return False
            continue
        near = abs(a - b) <= max(abs(a), abs(b)) * 1e-40
        if not (near and agreed >= POINTS_IN_FULL) and not _agree(gold, answer, point, abs(a - b)):
            return False
        agreed += 1
    return True if agreed >= MIN_AGREEING_POINTS else None


def _value_or_none(node: Node, point: Mapping[str, Fraction], real: bool) -> Any:
    try:
        return numeric_at(COARSE_DIGITS).value(node, point, real)
    except UndefinedError:
        return None


def _agree(gold: Node, answer: Node, point: Mapping[str, Fraction], coarse: Any) -> bool:
    """Whether the difference is zero: one that is only rounding shrinks with more precision, a real one stays.

    `coarse` is the absolute difference in COARSE_DIGITS.
    """
    fine = _difference(FINE_DIGITS, gold, answer, point)
    if fine and coarse == 0:
        coarse, fine = fine, _difference(FINEST_DIGITS, gold, answer, point)
    return bool(fine == 0 or fine < coarse * 1e-30) and _settles(gold, point) and _settles(answer, point)


def _settles(node: Node, point: Mapping[str, Fraction]) -> bool:
    """Whether more precision finds the same value. 1/sin(pi) grows instead, because only rounding keeps sin(pi) from
    being zero, and swallows whatever is added to it."""
    coarse, fine = (numeric_at(digits).value(node, point) for digits in (COARSE_DIGITS, FINE_DIGITS))
    return bool(abs(coarse - fine) <= max(1, abs(fine)) * 1e-20)


def _difference(digits: int, gold: Node, answer: Node, point: Mapping[str, Fraction]) -> Any:
    numeric = numeric_at(digits)
    return abs(numeric.value(gold, point) - numeric.value(answer, point))

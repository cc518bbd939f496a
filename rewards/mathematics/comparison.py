"""Whether an answer equals the ground truth, form by form. The ground truth determines which form is asked for.

Left out: single values (`rewards.mathematics.scalars`), inequalities (`relations`), choices (`choices`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from rewards.mathematics.relations import compare_relations, interval_of, is_sum_of_letters, unwrapped
from rewards.mathematics.scalars import Verdict, as_decimal, same_value
from rewards.mathematics.sets import compare_sets
from rewards.mathematics.syntax import (
    Apply,
    BaseNumber,
    Collection,
    Matrix,
    Node,
    Number,
    Quantity,
    Ratio,
    Relation,
    SetOperation,
    Symbol,
    Text,
    Unit,
    expand_plus_minus,
    is_scalar,
    symbols,
)
from rewards.mathematics.units import DEGREE

_SYNONYMS = {
    "no solutions": "no solution",
    "no real solution": "no solution",
    "no real solutions": "no solution",
    "none": "no solution",
    "dne": "does not exist",
    "doesn't exist": "does not exist",
    "undefined": "does not exist",
}


@dataclass(frozen=True, slots=True)
class Policy:
    """What is a matter of taste. The defaults follow what common benchmarks accept; see docs/rewards/math.md."""

    significant_digits: int = 6  # a decimal with at least this many equals the exact value that it rounds
    percent_sign_optional: bool = True  # 28 for 28%, and the reverse, above one percent
    unit_optional: bool = True  # 15 for 15 cm, and the reverse; a conflicting unit is always wrong
    convert_units: bool = True  # 500 cm for 5 m


def compare(gold: Node, answer: Node, policy: Policy) -> Verdict:
    """EQUAL, DIFFERENT, or UNDECIDED if that takes values that only a computer-algebra system can find."""
    if gold == answer:
        return Verdict.EQUAL
    gold, answer = _spread(gold), _spread(answer)
    if isinstance(gold, Quantity) or isinstance(answer, Quantity):
        return _compare_quantities(gold, answer, policy)
    if _percentage(gold) is not None or _percentage(answer) is not None:
        return _compare_percentages(gold, answer, policy)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _compare_relations(gold, answer, policy)
    return _compare_forms(gold, answer, policy)


def _compare_forms(gold: Node, answer: Node, policy: Policy) -> Verdict:
    """The part of `compare` that is left after units, percent signs and equals signs."""
    if isinstance(gold, BaseNumber) or isinstance(answer, BaseNumber):
        return _verdict(_same_base_number(gold, answer))
    if isinstance(gold, Text) and isinstance(answer, Text):
        return _verdict(_SYNONYMS.get(gold.words, gold.words) == _SYNONYMS.get(answer.words, answer.words))
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        return _compare_ratios(gold, answer, policy)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _compare_matrices(gold, answer, policy)
    if isinstance(gold, (Collection, SetOperation)) or isinstance(answer, (Collection, SetOperation)):
        return _compare_collections(gold, answer, policy)
    if is_scalar(gold) and is_scalar(answer):
        return same_value(gold, answer, policy.significant_digits)
    return Verdict.DIFFERENT


def _verdict(equal: bool) -> Verdict:
    return Verdict.EQUAL if equal else Verdict.DIFFERENT


def _all(verdicts: Sequence[Verdict]) -> Verdict:
    if any(v is Verdict.DIFFERENT for v in verdicts):
        return Verdict.DIFFERENT
    return Verdict.UNDECIDED if any(v is Verdict.UNDECIDED for v in verdicts) else Verdict.EQUAL


def _spread(node: Node) -> Node:
    """± written out as a list of two values, or as two items within a list or set; degrees as a quantity."""
    if isinstance(node, Collection) and node.kind in ("list", "set"):
        items = tuple(part for item in node.items for part in expand_plus_minus(item))
        return node if items == node.items else replace(node, items=items)
    if isinstance(node, Apply) and node.name == "degree":
        return Quantity(node.args[0], DEGREE)
    if isinstance(node, Apply) and node.name == "neg" and isinstance(inner := _spread(node.args[0]), Quantity):
        return Quantity(Apply("neg", (inner.value,)), inner.unit)
    if isinstance(node, (Apply, Relation, Collection)):
        readings = expand_plus_minus(node)
        return node if len(readings) == 1 else Collection("list", readings)
    return node


# -- quantities and percentages


def _compare_quantities(gold: Node, answer: Node, policy: Policy) -> Verdict:
    if isinstance(gold, Quantity) and isinstance(answer, Quantity):
        return _compare_two_quantities(gold, answer, policy)
    quantity, other = (gold, answer) if isinstance(gold, Quantity) else (answer, gold)
    assert isinstance(quantity, Quantity)  # the caller saw one
    if isinstance(other, Relation):
        other = unwrapped(other) or other
        if isinstance(other, Quantity):
            return _compare_two_quantities(quantity, other, policy)
    if _percentage(other) is not None and _percentage(quantity.value) is None:
        return Verdict.DIFFERENT  # 5 cm are not 5%, though either may be written as 5
    if quantity.product is not None and (symbols(other) or (quantity.tight and quantity is gold)):
        return compare(quantity.product, other, policy)
    if quantity.unit == DEGREE and is_scalar(quantity.value) and is_scalar(other):
        radians = same_value(Apply("degree", (quantity.value,)), other, policy.significant_digits)
        if radians is Verdict.EQUAL:
            return radians
    if not policy.unit_optional:
        return Verdict.DIFFERENT
    return compare(quantity.value, other, policy) if quantity is gold else compare(other, quantity.value, policy)


def _compare_two_quantities(gold: Quantity, answer: Quantity, policy: Policy) -> Verdict:
    if gold.unit == answer.unit or _same_words(gold.unit, answer.unit):
        return compare(gold.value, answer.value, policy)
    if not policy.convert_units or not gold.unit.same_dimension(answer.unit):
        return Verdict.DIFFERENT
    if not (is_scalar(gold.value) and is_scalar(answer.value)):
        return Verdict.DIFFERENT
    converted = Apply("mul", (answer.value, Number(answer.unit.factor / gold.unit.factor)))
    return same_value(gold.value, converted, policy.significant_digits)


def _same_words(a: Unit, b: Unit) -> bool:
    """Whether two unknown units mean the same thing: `sequences` and `arithmetic sequences`."""
    if len(a.dimensions) != 1 or len(b.dimensions) != 1 or a.factor != b.factor:
        return False
    first, second = set(a.dimensions[0][0].split()), set(b.dimensions[0][0].split())
    return a.dimensions[0][1] == b.dimensions[0][1] and (first <= second or second <= first)


def _percentage(node: Node) -> Node | None:
    """The number before the percent sign, if the node is a percentage."""
    if isinstance(node, Apply) and node.name == "neg":
        inner = _percentage(node.args[0])
        return None if inner is None else Apply("neg", (inner,))
    if isinstance(node, Apply) and node.name == "percent":
        return node.args[0]
    return None


def _compare_percentages(gold: Node, answer: Node, policy: Policy) -> Verdict:
    gold_percent, answer_percent = _percentage(gold), _percentage(answer)
    if gold_percent is not None and answer_percent is not None:
        return compare(gold_percent, answer_percent, policy)
    percent, other = (gold_percent, answer) if gold_percent is not None else (answer_percent, gold)
    assert percent is not None  # the caller saw one
    if isinstance(other, Relation):
        other = unwrapped(other) or other
    if not (is_scalar(percent) and is_scalar(other)):
        return Verdict.DIFFERENT
    hundredth: Node = Apply("div", (percent, Number(Fraction(100))))
    if (decimal := as_decimal(percent)) is not None and decimal.places is not None:
        hundredth = Number(decimal.value / 100, decimal.places + 2, decimal.digits)
    as_value = same_value(hundredth, other, policy.significant_digits)
    if as_value is not Verdict.DIFFERENT or not policy.percent_sign_optional:
        return as_value
    over_one = isinstance(other, Number) and abs(other.value) > 1
    return same_value(percent, other, policy.significant_digits) if over_one else Verdict.DIFFERENT


# -- relations


def _compare_relations(gold: Node, answer: Node, policy: Policy) -> Verdict:
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return compare_relations(gold, answer, lambda a, b: compare(a, b, policy))
    relation, other = (gold, answer) if isinstance(gold, Relation) else (answer, gold)
    assert isinstance(relation, Relation)  # the caller saw one
    value = unwrapped(relation)
    if value is not None:
        return compare(value, answer, policy) if relation is gold else compare(gold, value, policy)
    interval = interval_of(relation)
    if interval is not None and isinstance(other, (Collection, SetOperation, Symbol)):
        return _compare_collections(interval, other, policy)
    if relation is answer and isinstance(gold, Number) and is_sum_of_letters(relation):
        return compare(gold, relation.terms[-1], policy)
    if isinstance(gold, Collection) and gold.kind == "list":
        return Verdict.DIFFERENT
    if isinstance(answer, Collection) and answer.kind == "list" and relation is gold:
        return _compare_collections(gold, answer, policy)
    return Verdict.DIFFERENT


# -- things with parts


def _same_base_number(gold: Node, answer: Node) -> bool:
    if isinstance(gold, BaseNumber) and isinstance(answer, BaseNumber):
        return gold == answer
    if not isinstance(gold, BaseNumber):
        return False
    digits = str(answer.value) if isinstance(answer, Number) and answer.places is None else ""
    if isinstance(answer, Text):
        digits = answer.words.upper()
    return digits == gold.digits


def _compare_ratios(gold: Ratio, answer: Ratio, policy: Policy) -> Verdict:
    if len(gold.items) != len(answer.items) or not all(is_scalar(n) for n in (*gold.items, *answer.items)):
        return Verdict.DIFFERENT
    first = (gold.items[0], answer.items[0])
    return _all(
        [
            same_value(Apply("mul", (g, first[1])), Apply("mul", (a, first[0])), policy.significant_digits)
            for g, a in zip(gold.items[1:], answer.items[1:], strict=True)
        ]
    )


def _compare_matrices(gold: Node, answer: Node, policy: Policy) -> Verdict:
    gold_matrix, answer_matrix = _as_matrix(gold), _as_matrix(answer)
    if gold_matrix is None or answer_matrix is None:
        return Verdict.UNDECIDED if _holds_matrix(gold) and _holds_matrix(answer) else Verdict.DIFFERENT
    if isinstance(gold, Collection) != isinstance(answer, Collection) and len(gold_matrix.rows[0]) == 1 == len(
        answer_matrix.rows
    ):
        answer_matrix = Matrix(tuple((entry,) for entry in answer_matrix.rows[0]))
    elif isinstance(gold, Collection) and len(answer_matrix.rows[0]) == 1:
        gold_matrix = Matrix(tuple((entry,) for entry in gold_matrix.rows[0]))
    if (len(gold_matrix.rows), len(gold_matrix.rows[0])) != (len(answer_matrix.rows), len(answer_matrix.rows[0])):
        return Verdict.DIFFERENT
    pairs = [
        (g, a)
        for gs, as_ in zip(gold_matrix.rows, answer_matrix.rows, strict=True)
        for g, a in zip(gs, as_, strict=True)
    ]
    return _all([compare(g, a, policy) for g, a in pairs])


def _holds_matrix(node: Node) -> bool:
    return isinstance(node, Matrix) or (isinstance(node, Apply) and any(_holds_matrix(arg) for arg in node.args))


def _as_matrix(node: Node) -> Matrix | None:
    """The node as a matrix: it may be one, its negative, a scalar times one, or a tuple in round brackets (a row)."""
    match node:
        case Matrix():
            return node
        case Collection(kind="tuple", items=items, opening="(", closing=")"):
            return Matrix((items,))
        case Apply(name="neg", args=(inner,)):
            return _mapped(_as_matrix(inner), lambda entry: Apply("neg", (entry,)))
        case Apply(name="mul", args=(factor, inner)) if is_scalar(factor):
            return _mapped(_as_matrix(inner), lambda entry: Apply("mul", (factor, entry)))
        case _:
            return None


def _mapped(matrix: Matrix | None, function: Callable[[Node], Node]) -> Matrix | None:
    return None if matrix is None else Matrix(tuple(tuple(function(entry) for entry in row) for row in matrix.rows))


def _compare_collections(gold: Node, answer: Node, policy: Policy) -> Verdict:
    return compare_sets(gold, answer, lambda a, b: compare(a, b, policy))

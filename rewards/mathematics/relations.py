"""Equations and inequalities: what an assignment assigns, when two say the same, and which interval one describes.

Left out: sets of numbers (`rewards.mathematics.sets`). Nothing here solves: an equation is never the same as its roots,
or an answer that only repeats the question would be right.
"""

from __future__ import annotations

from collections.abc import Callable

from rewards.mathematics.grammar import OPAQUE_FUNCTIONS
from rewards.mathematics.scalars import Verdict, proportional, same_value
from rewards.mathematics.syntax import (
    Apply,
    Collection,
    Constant,
    Node,
    Number,
    Relation,
    SetOperation,
    Symbol,
    Text,
    is_scalar,
    symbols,
)

_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_INFINITY = Constant("inf")
_MINUS_INFINITY = Apply("neg", (Constant("inf"),))

Compare = Callable[[Node, Node], Verdict]


def is_label(node: Node) -> bool:
    """Whether a node only names something: x, f(x), (x, y), AB, words (as which `reading` gives an angle ABC)."""
    match node:
        case Symbol(name=name):
            return not name.startswith("mathbb:")
        case Apply(name=name, args=args) if name.startswith("call:"):
            return all(is_scalar(arg) for arg in args)
        case Apply(name="pow", args=(Symbol(name=name), Number(value=value))):  # the inverse of f
            return name in OPAQUE_FUNCTIONS and value == -1
        case Apply(name="mul", args=args):  # AB, the length of a segment
            return all(is_label(arg) for arg in args)
        case Collection(kind="tuple", items=items):
            return all(isinstance(item, Symbol) for item in items)
        case Text():
            return True
        case _:
            return False


def label_of(relation: Relation) -> Node | None:
    """What the relation assigns to, if it is an assignment."""
    return relation.terms[0] if is_label(relation.terms[0]) else None


def unwrapped(relation: Relation) -> Node | None:
    """The value that `x = ... = value` or `x in set` gives; None if the relation is not an assignment.

    An approximation after an equation is dropped: `x = 1/3 ~ 0.33` gives 1/3.
    """
    terms, operators = relation.terms, relation.operators
    if operators == ("in",):
        return terms[1] if is_label(terms[0]) else None
    if not set(operators) <= {"=", "~"}:
        return None
    if operators[0] == "=" and "~" in operators:
        terms = terms[: operators.index("~") + 1]
    if is_label(terms[0]):
        return terms[-1]
    if len(terms) == 2 and isinstance(terms[1], Symbol):
        return terms[0]
    constants = all(is_scalar(term) and not symbols(term) for term in terms)
    if constants and all(same_value(terms[-1], term, 6) is Verdict.EQUAL for term in terms[:-1]):
        return terms[-1]  # 1 + 2 + 3 = 6
    return None


def is_sum_of_letters(relation: Relation) -> bool:
    """Whether it is `m + n = ... = 33`, the sum that contests ask for. A ground truth like that may be a line, so only
    an answer is read as such a sum, and the verdict rejects one that stands in the question.
    """
    letters, left = list[str](), [relation.terms[0]]
    while left:
        match left.pop():
            case Apply(name="add", args=args):
                left.extend(args)
            case Symbol(name=name) if len(name) == 1:
                letters.append(name)
            case _:
                return False
    return set(relation.operators) == {"="} and len(set(letters)) == len(letters) >= 2


def compare_relations(gold: Relation, answer: Relation, compare: Compare) -> Verdict:
    """Compare two relations: assignments by value, equations up to a factor, inequalities up to a positive factor."""
    if "in" in (*gold.operators, *answer.operators):
        return _compare_membership(gold, answer, compare)
    gold_value, answer_value = unwrapped(gold), unwrapped(answer)
    if gold_value is not None and answer_value is not None and label_of(gold) == label_of(answer):
        verdict = compare(gold_value, answer_value)
        if verdict is not Verdict.DIFFERENT:
            return verdict
    if gold_value is not None and answer_value is None and not symbols(gold_value):
        return Verdict.DIFFERENT  # the ground truth is solved, the answer is not
    if not all(is_scalar(term) for term in (*gold.terms, *answer.terms)):
        return Verdict.DIFFERENT
    verdict = _match_steps(_steps(gold), _steps(answer))
    if verdict is Verdict.DIFFERENT and symbols(gold) == symbols(answer):
        gold_set, answer_set = interval_of(gold), interval_of(answer)
        if gold_set is not None and answer_set is not None:
            return compare(gold_set, answer_set)
    return verdict


def interval_of(relation: Relation) -> Node | None:
    """The set that an inequality in one bare variable describes: `1 < x <= 2` is (1, 2], `|x| > 1` is a union."""
    terms, operators = relation.terms, relation.operators
    if len(terms) == 2:
        if _is_variable(terms[1]) and operators[0] in (*_FLIPPED, "!="):
            terms, operators = (terms[1], terms[0]), (_FLIPPED.get(operators[0], "!="),)
        if _is_bound(terms[1]) and _is_variable(terms[0]):
            return _half_line(operators[0], terms[1])
        if (
            _is_bound(terms[1])
            and isinstance(terms[0], Apply)
            and terms[0].name == "abs"
            and _is_variable(terms[0].args[0])
        ):
            return _absolute(operators[0], terms[1])
        return None
    if len(terms) == 3 and _is_variable(terms[1]) and _is_bound(terms[0]) and _is_bound(terms[2]):
        if operators[0] in (">", ">="):
            terms, operators = tuple(reversed(terms)), tuple(_FLIPPED.get(o, o) for o in reversed(operators))
        if set(operators) <= {"<", "<="}:
            return _interval(terms[0], operators[0] == "<", terms[2], operators[1] == "<")
    return None


def _compare_membership(gold: Relation, answer: Relation, compare: Compare) -> Verdict:
    gold_set = unwrapped(gold) if "in" in gold.operators else interval_of(gold)
    answer_set = unwrapped(answer) if "in" in answer.operators else interval_of(answer)
    if gold_set is None or answer_set is None:
        return Verdict.DIFFERENT
    return compare(gold_set, answer_set)


def _is_variable(node: Node) -> bool:
    return isinstance(node, Symbol) and not node.name.startswith("mathbb:")


def _is_bound(node: Node) -> bool:
    return is_scalar(node) and not symbols(node)


def _interval(low: Node, low_open: bool, high: Node, high_open: bool) -> Node:
    return Collection("tuple", (low, high), "(" if low_open else "[", ")" if high_open else "]")


def _half_line(operator: str, bound: Node) -> Node | None:
    match operator:
        case "<" | "<=":
            return _interval(_MINUS_INFINITY, True, bound, operator == "<")
        case ">" | ">=":
            return _interval(bound, operator == ">", _INFINITY, True)
        case "!=":
            below, above = _half_line("<", bound), _half_line(">", bound)
            assert below is not None and above is not None  # both operators are known
            return SetOperation("cup", (below, above))
        case _:
            return None


def _absolute(operator: str, bound: Node) -> Node | None:
    negative = Apply("neg", (bound,))
    if operator in ("<", "<="):
        return _interval(negative, operator == "<", bound, operator == "<")
    below, above = _half_line({">": "<", ">=": "<="}.get(operator, ""), negative), _half_line(operator, bound)
    return None if below is None or above is None else SetOperation("cup", (below, above))


def _steps(relation: Relation) -> list[tuple[str, Node]]:
    """One (operator, difference) for each sign of the chain, with every > turned into <."""
    steps: list[tuple[str, Node]] = []
    for left, sign, right in zip(relation.terms, relation.operators, relation.terms[1:]):
        operator = "=" if sign == "~" else sign
        small, large = (right, left) if operator in (">", ">=") else (left, right)
        if operator in (">", ">="):
            operator = _FLIPPED[operator]
        difference: Node = Apply("add", (small, Apply("neg", (large,))))
        steps.append((operator, _over_one_denominator(difference)[0] if operator == "=" else difference))
    return steps


def _over_one_denominator(node: Node) -> tuple[Node, Node | None]:
    """(numerator, denominator), so that `y = 1/x` and `xy = 1` are one equation; None: the denominator is one."""
    if not isinstance(node, Apply) or not symbols(node):
        return node, None
    parts = [_over_one_denominator(arg) for arg in node.args]
    match node.name, parts:
        case "neg", [(top, bottom)]:
            return Apply("neg", (top,)), bottom
        case "add", [(a, b), (c, d)]:
            return Apply("add", (_product(a, d), _product(c, b))), _product_of(b, d)
        case "mul", [(a, b), (c, d)]:
            return Apply("mul", (a, c)), _product_of(b, d)
        case "div", [(a, b), (c, d)]:
            return _product(a, d), _product(c, b)
        case _:
            return node, None


def _product(node: Node, factor: Node | None) -> Node:
    return node if factor is None else Apply("mul", (node, factor))


def _product_of(a: Node | None, b: Node | None) -> Node | None:
    return b if a is None else _product(a, b)


def _match_steps(gold: list[tuple[str, Node]], answer: list[tuple[str, Node]]) -> Verdict:
    if len(gold) != len(answer):
        return Verdict.DIFFERENT
    left = list(answer)
    for operator, difference in gold:
        for candidate in left:
            sign = proportional(difference, candidate[1]) if candidate[0] == operator else 0
            if sign is None:
                return Verdict.UNDECIDED
            if sign > 0 or (sign < 0 and operator in ("=", "!=")):
                left.remove(candidate)
                break
        else:
            return Verdict.DIFFERENT
    return Verdict.EQUAL

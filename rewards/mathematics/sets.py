"""Lists, tuples, sets, intervals and unions of them.

Left out: what their parts are worth, which the caller's `compare` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewards.mathematics.evaluation import TooLargeError, UndefinedError
from rewards.mathematics.relations import Compare, interval_of, label_of, unwrapped
from rewards.mathematics.scalars import Verdict, numeric_at
from rewards.mathematics.syntax import (
    Apply,
    Collection,
    Constant,
    Node,
    Relation,
    SetOperation,
    Symbol,
    UnsupportedError,
    is_scalar,
    symbols,
)

MAX_ITEMS = 60  # of an unordered collection; matching is quadratic
_INFINITY = Constant("inf")
_REALS = Collection("tuple", (Apply("neg", (_INFINITY,)), _INFINITY), "(", ")")


def compare_sets(gold: Node, answer: Node, compare: Compare) -> Verdict:
    """Compare two nodes of which at least one is a collection or a set operation."""
    gold, answer = _simplified(gold), _simplified(answer)
    if _is_region(gold, answer) or _is_region(answer, gold):
        return _compare_regions(gold, answer, compare)
    if isinstance(gold, Collection) and isinstance(answer, Collection):
        return _compare_collections(gold, answer, compare)
    single, other = (gold, answer) if isinstance(answer, Collection) else (answer, gold)
    if isinstance(other, Collection) and other.kind == "set" and len(other.items) == 1:
        return compare(other.items[0], single) if single is answer else compare(single, other.items[0])
    return Verdict.DIFFERENT


def _simplified(node: Node) -> Node:
    """One form for what can be written in several: a set named by letter, `x = 1, 2`, `x = 1 or x = 2`, `A(1, 2)`."""
    if isinstance(node, Symbol) and node.name == "mathbb:R":
        return _REALS
    if isinstance(node, Apply) and node.name == "mul" and isinstance(node.args[0], Symbol):
        inside = node.args[1]
        if isinstance(inside, Collection) and inside.kind == "tuple":
            return inside
    if not isinstance(node, Collection) or node.kind != "list":
        return node
    relations = [item for item in node.items if isinstance(item, Relation)]
    if len(relations) == 1 and relations[0] is node.items[0] and (value := unwrapped(relations[0])) is not None:
        return Collection("list", (value, *node.items[1:]))
    if relations and len(relations) == len(node.items):
        labels = {label_of(relation) for relation in relations}
        values = [unwrapped(relation) for relation in relations]
        if len(labels) == 1 and None not in labels and all(value is not None for value in values):
            return Collection("list", tuple(value for value in values if value is not None))
        intervals = [interval_of(relation) for relation in relations]
        if all(interval is not None for interval in intervals) and len({symbols(r) for r in relations}) == 1:
            return SetOperation("cup", tuple(interval for interval in intervals if interval is not None))
    return node


# -- collections


def _compare_collections(gold: Collection, answer: Collection, compare: Compare) -> Verdict:
    kinds = {gold.kind, answer.kind}
    if kinds == {"tuple"}:
        if _brackets(gold) != _brackets(answer) and len(gold.items) == 2:
            return Verdict.DIFFERENT
        return _in_order(gold.items, answer.items, compare)
    if "tuple" in kinds:
        bare, tupled = (gold, answer) if answer.kind == "tuple" else (answer, gold)
        if bare.kind == "set" or _brackets(tupled) != "()":
            return Verdict.DIFFERENT
        values = _assigned_values(bare)
        return _in_order(values, answer.items, compare) if bare is gold else _in_order(gold.items, values, compare)
    gold_items, answer_items = gold.items, answer.items
    if "set" in kinds:
        gold_items, answer_items = _distinct(gold_items, compare), _distinct(answer_items, compare)
    return _in_any_order(gold_items, answer_items, compare)


def _brackets(node: Collection) -> str:
    """Brackets in the usual notation: `]0,1[` is (0, 1)."""
    return {"]": "("}.get(node.opening, node.opening) + {"[": ")"}.get(node.closing, node.closing)


def _assigned_values(node: Collection) -> tuple[Node, ...]:
    """Values of `y = 2, x = 1` in the order of their names; the items themselves if they are no assignments."""
    assigned = {}
    for item in node.items:
        label = label_of(item) if isinstance(item, Relation) else None
        value = unwrapped(item) if isinstance(item, Relation) else None
        if not isinstance(label, Symbol) or value is None:
            return node.items
        assigned[label.name] = value
    return tuple(assigned[name] for name in sorted(assigned))


def _in_order(gold: tuple[Node, ...], answer: tuple[Node, ...], compare: Compare) -> Verdict:
    if len(gold) != len(answer):
        return Verdict.DIFFERENT
    return _combined([compare(g, a) for g, a in zip(gold, answer, strict=True)])


def _in_any_order(gold: tuple[Node, ...], answer: tuple[Node, ...], compare: Compare) -> Verdict:
    if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
        return Verdict.DIFFERENT
    left = list(answer)
    undecided = False
    for item in gold:
        verdicts = [compare(item, candidate) for candidate in left]
        if Verdict.EQUAL in verdicts:
            left.pop(verdicts.index(Verdict.EQUAL))
        elif Verdict.UNDECIDED in verdicts:
            left.pop(verdicts.index(Verdict.UNDECIDED))
            undecided = True
        else:
            return Verdict.DIFFERENT
    return Verdict.UNDECIDED if undecided else Verdict.EQUAL


def _distinct(items: tuple[Node, ...], compare: Compare) -> tuple[Node, ...]:
    distinct: list[Node] = []
    for item in items[:MAX_ITEMS]:
        if not any(compare(item, other) is Verdict.EQUAL for other in distinct):
            distinct.append(item)
    return (*distinct, *items[MAX_ITEMS:])


def _combined(verdicts: list[Verdict]) -> Verdict:
    if Verdict.DIFFERENT in verdicts:
        return Verdict.DIFFERENT
    return Verdict.UNDECIDED if Verdict.UNDECIDED in verdicts else Verdict.EQUAL


# -- regions of the real line


@dataclass(frozen=True, slots=True)
class _Piece:
    """An interval with numeric ends, and the nodes that the ends came from."""

    low: Any
    low_open: bool
    high: Any
    high_open: bool
    low_node: Node
    high_node: Node


def _is_region(node: Node, other: Node) -> bool:
    """Whether a node is a union, or an interval next to one (a pair in round brackets may be either)."""
    if isinstance(node, SetOperation):
        return True
    return _is_interval(node) and _is_interval(other) and _brackets(node) != _brackets(other)  # type: ignore[arg-type]


def _is_interval(node: Node) -> bool:
    return isinstance(node, Collection) and node.kind == "tuple" and len(node.items) == 2


def _compare_regions(gold: Node, answer: Node, compare: Compare) -> Verdict:
    try:
        gold_pieces, answer_pieces = _merged(_pieces(gold)), _merged(_pieces(answer))
    except (TooLargeError, UndefinedError):
        return Verdict.DIFFERENT
    except UnsupportedError:
        return _compare_parts(gold, answer, compare)
    if len(gold_pieces) != len(answer_pieces):
        return Verdict.DIFFERENT
    verdicts = []
    for g, a in zip(gold_pieces, answer_pieces, strict=True):
        if (g.low_open, g.high_open) != (a.low_open, a.high_open):
            return Verdict.DIFFERENT
        verdicts += [compare(g.low_node, a.low_node), compare(g.high_node, a.high_node)]
    return _combined(verdicts)


def _compare_parts(gold: Node, answer: Node, compare: Compare) -> Verdict:
    """Compare unions whose ends are no numbers: the operation and the parts must be the same."""
    if not (isinstance(gold, SetOperation) and isinstance(answer, SetOperation) and gold.name == answer.name):
        return Verdict.DIFFERENT
    if gold.name == "setminus":
        return _in_order(gold.args, answer.args, compare)
    return _in_any_order(gold.args, answer.args, compare)


def _pieces(node: Node) -> list[_Piece]:
    """The node's intervals, disjoint or not, in any order. Raises UnsupportedError unless all ends are numeric."""
    node = _simplified(node)
    match node:
        case Collection(kind="tuple", items=(low, high)):
            brackets = _brackets(node)
            return [_Piece(_number(low), brackets[0] == "(", _number(high), brackets[1] == ")", low, high)]
        case Collection(kind="set", items=items):
            return [_Piece(_number(i), False, _number(i), False, i, i) for i in items]
        case SetOperation(name="cup", args=args):
            return [piece for arg in args for piece in _pieces(arg)]
        case SetOperation(name="setminus", args=(whole, Collection(kind="set", items=holes))):
            pieces = _pieces(whole)
            for hole in holes:
                pieces = [part for piece in pieces for part in _without(piece, hole)]
            return pieces
        case _:
            raise UnsupportedError("a set without numeric ends")


def _number(node: Node) -> Any:
    if not is_scalar(node) or symbols(node):
        raise UnsupportedError("an end that is no number")
    numeric = numeric_at(60)
    value = numeric.value(node, {})
    if numeric.context.im(value):
        raise UnsupportedError("a complex end")
    return numeric.context.re(value)


def _without(piece: _Piece, hole: Node) -> list[_Piece]:
    at = _number(hole)
    if not piece.low <= at <= piece.high:
        return [piece]
    below = _Piece(piece.low, piece.low_open, at, True, piece.low_node, hole)
    above = _Piece(at, True, piece.high, piece.high_open, hole, piece.high_node)
    return [part for part in (below, above) if part.low < part.high]


def _merged(pieces: list[_Piece]) -> list[_Piece]:
    """Sorted and joined where they overlap or touch."""
    merged: list[_Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.low, p.low_open)):
        last = merged[-1] if merged else None
        if last is None or piece.low > last.high or (piece.low == last.high and piece.low_open and last.high_open):
            merged.append(piece)
            continue
        further = piece if (piece.high, not piece.high_open) > (last.high, not last.high_open) else last
        merged[-1] = _Piece(last.low, last.low_open, further.high, further.high_open, last.low_node, further.high_node)
    return merged

"""What an answer is once read: a small tree of numbers, symbols, operations, and the structures answers come in.

Left out: reading text into it (`tokens`, `parsing`), values (`evaluation`), equality (`comparison`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias


class UnreadableError(Exception):
    """The text is not an answer in any form that the grammar knows."""


class UnsupportedError(Exception):
    """The text is mathematics that only a computer-algebra system can judge: sums, integrals, limits."""


@dataclass(frozen=True, slots=True)
class Number:
    """An exact rational number; for decimals `places` and `digits` say how precisely it was written."""

    value: Fraction
    places: int | None = None  # digits after the point; None: an integer or a fraction, so nothing was rounded
    digits: int = 0  # significant digits shown


@dataclass(frozen=True, slots=True)
class Constant:
    """pi, e, i or infinity."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, subscripts included in its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Apply:
    """An operation or function: add, mul, div, pow, neg, root, factorial, pm, percent, degree, sin, call:f, ..."""

    name: str
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Collection:
    """Several things. `kind` is list (commas only), set (braces) or tuple (in the brackets `opening`, `closing`)."""

    kind: str
    items: tuple[Node, ...]
    opening: str = ""
    closing: str = ""


@dataclass(frozen=True, slots=True)
class SetOperation:
    """A union, intersection or difference of sets."""

    name: str  # cup, cap or setminus
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of entries, all of one length."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain `terms[0] operators[0] terms[1] operators[1] ...`; operators are = != < <= > >= ~ in."""

    terms: tuple[Node, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """`factor` times a product of base units, for example km/h = 5/18 of (("m", 1), ("s", -1))."""

    factor: Fraction
    dimensions: tuple[tuple[str, int], ...]

    def same_dimension(self, other: Unit) -> bool:
        return self.dimensions == other.dimensions


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with a unit. If the unit could be a variable, as in `3 m`, `product` is that reading; `3m` is tight."""

    value: Node
    unit: Unit
    product: Node | None = None
    tight: bool = False


@dataclass(frozen=True, slots=True)
class Ratio:
    """a : b : c."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class BaseNumber:
    """Digits in a stated number base."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Text:
    """Words."""

    words: str


Node: TypeAlias = (
    Number
    | Constant
    | Symbol
    | Apply
    | Collection
    | SetOperation
    | Matrix
    | Relation
    | Quantity
    | Ratio
    | BaseNumber
    | Text
)


def children(node: Node) -> tuple[Node, ...]:
    """The nodes directly below."""
    match node:
        case Apply(args=below) | SetOperation(args=below) | Collection(items=below) | Ratio(items=below):
            return below
        case Relation(terms=below):
            return below
        case Matrix(rows=rows):
            return tuple(entry for row in rows for entry in row)
        case Quantity(value=value):
            return (value,)
        case _:
            return ()


def walk(node: Node) -> Iterator[Node]:
    """Every node of the tree, from the top."""
    yield node
    for child in children(node):
        yield from walk(child)


def symbols(node: Node) -> frozenset[str]:
    """Names of the variables in it."""
    return frozenset(n.name for n in walk(node) if isinstance(n, Symbol))


def is_scalar(node: Node) -> bool:
    """Whether the node is an expression with one value: only numbers, symbols and operations."""
    return all(isinstance(n, (Number, Constant, Symbol, Apply)) for n in walk(node))


def map_children(node: Node, children_of: tuple[Node, ...]) -> Node:
    """The same node with other children, in the order of `children`."""
    match node:
        case Apply() | SetOperation():
            return replace(node, args=children_of)
        case Collection() | Ratio():
            return replace(node, items=children_of)
        case Relation():
            return replace(node, terms=children_of)
        case Matrix(rows=rows):
            width = len(rows[0])
            return Matrix(tuple(children_of[i : i + width] for i in range(0, len(children_of), width)))
        case Quantity():
            return replace(node, value=children_of[0])
        case _:
            return node


def expand_plus_minus(node: Node) -> tuple[Node, ...]:
    """Both readings of a node with ±, else the node alone. All the ± of one answer take the same sign."""
    if not any(isinstance(n, Apply) and n.name in ("pm", "mp") for n in walk(node)):
        return (node,)
    return (_with_sign(node, "pm"), _with_sign(node, "mp"))


def _with_sign(node: Node, positive: str) -> Node:
    below = tuple(_with_sign(child, positive) for child in children(node))
    if isinstance(node, Apply) and node.name in ("pm", "mp"):
        last = below[-1] if node.name == positive else Apply("neg", (below[-1],))
        return last if len(below) == 1 else Apply("add", (below[0], last))
    return map_children(node, below) if below else node

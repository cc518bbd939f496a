"""Reads a normalised answer into a tree, by recursive descent over its tokens.

Left out: values (`rewards.mathematics.evaluation`). Sums, integrals and limits are recognised but not read: they raise
UnsupportedError, and a computer-algebra system judges them.
"""

from __future__ import annotations

from rewards.mathematics.expressions import negated
from rewards.mathematics.grammar import CLOSINGS, CONNECTORS, RELATIONS, SET_OPERATORS
from rewards.mathematics.operands import OperandParser
from rewards.mathematics.syntax import (
    Apply,
    Collection,
    Matrix,
    Node,
    Ratio,
    Relation,
    SetOperation,
    Symbol,
    UnreadableError,
    UnsupportedError,
)
from rewards.mathematics.tokens import Kind, tokenise

MAX_DETERMINANT = 4


def parse(text: str, grouping: bool = True) -> Node:
    """The tree of a normalised answer without its unit.

    Raises:
        UnreadableError: it is not a formula, or it is too long or too deep.
        UnsupportedError: it needs a computer-algebra system.
    """
    parser = _AnswerParser(tokenise(text, grouping))
    node = parser.answer()
    parser.expect_end()
    return node


class _AnswerParser(OperandParser):
    """The structures that answers come in: lists, relations, ratios, unions, and everything in brackets."""

    def answer(self) -> Node:
        """A list of relations, or a single one."""
        items = [self._relation()]
        while self._take_connector():
            if self._next.kind is Kind.END:
                break
            items.append(self._relation())
        items = [item for item in items if not _is_domain(item)] or items
        return items[0] if len(items) == 1 else Collection("list", tuple(items))

    def _take_connector(self) -> bool:
        found = False
        while (
            self._is_sign(",", ";")
            or self._is_command("land", "lor", "quad")
            or (self._next.kind is Kind.WORD and self._next.text.lower() in CONNECTORS)
        ):
            self._position += 1
            found = True
        return found

    def _relation(self) -> Node:
        terms, operators = [self._ratio()], []
        while (operator := self._relation_sign()) is not None:
            self._position += 1
            operators.append(operator)
            terms.append(self._ratio())
        return terms[0] if not operators else Relation(tuple(terms), tuple(operators))

    def _relation_sign(self) -> str | None:
        if self._next.kind in (Kind.SIGN, Kind.COMMAND):
            return RELATIONS.get(self._next.text)
        return None

    def _ratio(self) -> Node:
        items = [self._set_expression()]
        while self._take_sign(":"):
            items.append(self._set_expression())
        return items[0] if len(items) == 1 else Ratio(tuple(items))

    def _set_expression(self) -> Node:
        left = self._sum()
        while self._next.kind in (Kind.COMMAND, Kind.WORD) and self._next.text in SET_OPERATORS:
            name = SET_OPERATORS[self._advance().text]
            right = self._sum()
            if isinstance(left, SetOperation) and left.name == name == "cup":
                left = SetOperation(name, (*left.args, right))
            else:
                left = SetOperation(name, (left, right))
        return left

    def _group(self) -> Node:
        self._expect("{")
        if self._is_command("circ"):
            self._position += 1
            node: Node = Symbol("circ")
        else:
            node = self.answer()
        self._expect("}")
        return node

    def _bracketed(self) -> Node:
        opening = self._advance().text
        bars, self._bars = self._bars, 0
        outer, self._reversed = self._reversed, opening == "]"
        items = [self._relation()]
        while self._take_connector():
            items.append(self._relation())
        self._bars, self._reversed = bars, outer
        if not self._is_sign(")", "]", "["):
            raise self._fail("a closing bracket")
        closing = self._advance().text
        if len(items) == 1 and (opening, closing) in (("(", ")"), ("[", "]")):
            return items[0]
        return Collection("tuple", tuple(items), opening, closing)

    def _delimited(self, opening: str) -> Node:
        closing, function = CLOSINGS[opening]
        items = [self._relation()]
        while self._take_connector():
            items.append(self._relation())
        if not self._take_command(closing):
            raise self._fail(f"\\{closing}")
        if function is None:
            return Collection("tuple", tuple(items), "(", ")")
        return Apply(function, tuple(items))

    def _set(self) -> Node:
        self._expect("\\{")
        if self._take_sign("\\}"):
            return Collection("set", (), "\\{", "\\}")
        if self._skip_builder_variable():  # {x | x > 2} stands for its condition
            condition = self.answer()
            self._expect("\\}")
            return condition
        items = [self._relation()]
        while self._take_connector():
            items.append(self._relation())
        self._expect("\\}")
        return Collection("set", tuple(items), "\\{", "\\}")

    def _skip_builder_variable(self) -> bool:
        r"""Step over `x |` or `x \in \mathbb{R} :` at the start of a set."""
        if self._next.kind is not Kind.LETTER:
            return False
        for position in range(self._position + 1, min(self._position + 7, len(self._tokens))):
            token = self._tokens[position]
            if token.kind is Kind.SIGN and token.text in ("|", ":"):
                if position > self._position + 1 and self._tokens[self._position + 1].text != "in":
                    return False
                self._position = position + 1
                return True
        return False

    def _absolute(self) -> Node:
        self._expect("|")
        self._bars += 1
        inside = self._sum()
        self._bars -= 1
        self._expect("|")
        return Apply("abs", (inside,))

    def _environment(self) -> Node:
        name = self._subscript()
        if name == "array":
            self._subscript()
        if name.rstrip("*") not in ("matrix", "pmatrix", "bmatrix", "vmatrix", "Bmatrix", "smallmatrix", "array"):
            raise UnsupportedError(f"\\begin{{{name}}}")
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while not self._is_command("end"):
            row.append(self._relation())
            if self._take_sign("&"):
                continue
            rows.append(tuple(row))
            row = []
            if not self._take_sign("\\\\") and not self._is_command("end"):
                raise self._fail("the next row")
        self._position += 1
        if self._subscript() != name or not rows or len({len(r) for r in rows}) != 1:
            raise UnreadableError("a matrix with rows of different lengths")
        return _determinant(rows) if name == "vmatrix" else Matrix(tuple(rows))


def _is_domain(node: Node) -> bool:
    r"""Whether the node only says what kind of number a variable is: `k \in \mathbb{Z}`."""
    return (
        isinstance(node, Relation)
        and node.operators == ("in",)
        and isinstance(node.terms[1], Symbol)
        and node.terms[1].name.startswith("mathbb:")
    )


def _determinant(rows: list[tuple[Node, ...]]) -> Node:
    """The determinant, expanded along its first row."""
    if len(rows) != len(rows[0]) or len(rows) > MAX_DETERMINANT:
        raise UnsupportedError("a determinant that is not square, or large")
    if len(rows) == 1:
        return rows[0][0]
    total: Node | None = None
    for column, entry in enumerate(rows[0]):
        minor = _determinant([row[:column] + row[column + 1 :] for row in rows[1:]])
        term: Node = Apply("mul", (entry, minor))
        if column % 2:
            term = negated(term)
        total = term if total is None else Apply("add", (total, term))
    assert total is not None  # no row is empty
    return total

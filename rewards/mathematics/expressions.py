"""Sums, products, powers and whatever binds tighter, with the juxtapositions that stand for a product or a sum.

Left out: operands (`rewards.mathematics.operands`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from rewards.mathematics.grammar import COMMAND_SIGNS, CONSTANTS, FUNCTIONS, GREEK, RELATIONS, SET_OPERATORS
from rewards.mathematics.syntax import Apply, Node, Number, Symbol, UnreadableError, UnsupportedError
from rewards.mathematics.token_reader import TokenReader
from rewards.mathematics.tokens import Kind


class ExpressionParser(TokenReader, ABC):
    """One method per level of precedence, loosest first."""

    @abstractmethod
    def _primary(self) -> Node:
        """An operand: a number, a name, a command, or something in brackets."""

    @abstractmethod
    def _group(self) -> Node:
        """What stands between braces."""

    def _sum(self) -> Node:
        left = self._signed_term()
        while True:
            if self._take_sign("+"):
                left = Apply("add", (left, self._signed_term()))
            elif self._take_sign("-"):
                left = Apply("add", (left, Apply("neg", (self._signed_term(),))))
            elif self._is_command("pm", "mp"):
                name = self._advance().text
                left = Apply(name, (left, self._signed_term()))
            else:
                return left

    def _signed_term(self) -> Node:
        negative = self._take_sign("-")
        if not negative:
            self._take_sign("+")
        if self._is_command("pm", "mp"):
            node: Node = Apply(self._advance().text, (self._term(),))
        else:
            node = self._term()
        return negated(node) if negative else node

    def _term(self) -> Node:
        left = self._power()
        while True:
            if self._take_sign("*") or self._take_command("times", "cdot"):
                left = Apply("mul", (left, self._signed_power()))
            elif self._take_sign("/") or self._take_command("div"):
                left = self._divided(left)
            elif self._is_command("bmod", "mod", "pmod"):
                raise UnsupportedError("modular arithmetic")
            elif self._starts_factor():
                left = self._juxtaposed(left)
            else:
                return left

    def _divided(self, left: Node) -> Node:
        right = self._signed_power()
        if isinstance(right, Apply) and right.name == "percent":  # 4/9 % is four ninths of a percent
            return Apply("percent", (quotient(left, right.args[0]),))
        return quotient(left, right)

    def _juxtaposed(self, left: Node) -> Node:
        """Implicit multiplication, or a mixed number if a whole number stands before a proper fraction."""
        written_number = self._tokens[self._position - 1].kind is Kind.NUMBER and is_whole(left)
        if self._next.kind is Kind.NUMBER and isinstance(left, Number):
            if not (written_number and self._next.spaced and self._slash_after_next()):
                raise UnreadableError("two numbers stand side by side")
            right = self._power()
            self._expect("/")
            number = mixed(left, self._divided(right))
            if number is None:
                raise UnreadableError("a mixed number without a proper fraction")
            return number
        fraction_follows = self._is_command("frac")
        right = self._power()
        number = mixed(left, right) if fraction_follows and written_number else None
        return Apply("mul", (left, right)) if number is None else number

    def _slash_after_next(self) -> bool:
        after = self._tokens[self._position + 1]
        return after.kind is Kind.SIGN and after.text == "/"

    def _starts_factor(self) -> bool:
        token = self._next
        if token.kind in (Kind.NUMBER, Kind.LETTER):
            return True
        if token.kind is Kind.WORD:
            return token.text in FUNCTIONS or token.text in CONSTANTS or token.text in GREEK
        if token.kind is Kind.COMMAND:
            return token.text not in COMMAND_SIGNS and token.text not in RELATIONS and token.text not in SET_OPERATORS
        if token.text == "[":
            return not self._reversed
        return token.text in ("(", "{") or (token.text == "|" and not self._bars)

    def _signed_power(self) -> Node:
        if self._take_sign("-"):
            return negated(self._power())
        self._take_sign("+")
        return self._power()

    def _power(self) -> Node:
        base = self._postfix()
        if self._take_sign("^"):
            self._enter()
            exponent = self._exponent()
            self._leave()
            if isinstance(exponent, Symbol) and exponent.name == "circ":
                return self._suffixed(Apply("degree", (base,)))
            return self._suffixed(Apply("pow", (base, exponent)))
        return base

    def _exponent(self) -> Node:
        if self._take_sign("-"):
            return Apply("neg", (self._unsigned_exponent(),))
        self._take_sign("+")
        return self._unsigned_exponent()

    def _unsigned_exponent(self) -> Node:
        if self._is_command("circ"):
            self._position += 1
            return Symbol("circ")
        if self._is_sign("{"):
            return self._group()
        return self._power()

    def _postfix(self) -> Node:
        return self._suffixed(self._primary())

    def _suffixed(self, node: Node) -> Node:
        while True:
            if self._take_sign("!"):
                node = Apply("factorial", (node,))
            elif self._is_sign("%") and not (isinstance(node, Apply) and node.name == "percent"):
                self._position += 1
                node = Apply("percent", (node,))
            elif self._is_sign("'") and isinstance(node, Symbol):
                self._position += 1
                node = Symbol(node.name + "'")
            else:
                return node


def negated(node: Node) -> Node:
    if isinstance(node, Number):
        return Number(-node.value, node.places, node.digits)
    return Apply("neg", (node,))


def quotient(top: Node, bottom: Node) -> Node:
    """A fraction; a single number if it is written with whole numbers, so that it can be part of a mixed number."""
    if isinstance(top, Number) and isinstance(bottom, Number) and is_whole(top) and is_whole(bottom) and bottom.value:
        return Number(top.value / bottom.value)
    return Apply("div", (top, bottom))


def mixed(whole: Node, fraction: Node) -> Node | None:
    """The mixed number, as in `2 1/2` and `33 1/3 %`; None if the fraction is not proper."""
    if _is_proper(fraction):
        return Apply("add", (whole, fraction))
    if isinstance(fraction, Apply) and fraction.name == "percent" and _is_proper(fraction.args[0]):
        return Apply("percent", (Apply("add", (whole, fraction.args[0])),))
    return None


def is_whole(node: Node) -> bool:
    return isinstance(node, Number) and node.places is None and node.value.denominator == 1


def _is_proper(node: Node) -> bool:
    return isinstance(node, Number) and node.places is None and 0 <= node.value < 1

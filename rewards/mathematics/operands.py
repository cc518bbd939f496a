"""Operands: numbers, variables, constants, fractions, roots and functions.

Left out: how they combine (`rewards.mathematics.expressions`), and brackets (`rewards.mathematics.parsing`).
"""

from __future__ import annotations

from abc import abstractmethod
from fractions import Fraction

from rewards.mathematics.expressions import ExpressionParser, quotient
from rewards.mathematics.grammar import CLOSINGS, CONSTANTS, FUNCTIONS, GREEK, OPAQUE_FUNCTIONS, UNSUPPORTED
from rewards.mathematics.numbers import read_number
from rewards.mathematics.syntax import (
    Apply,
    Collection,
    Constant,
    Node,
    Number,
    Symbol,
    UnreadableError,
    UnsupportedError,
)
from rewards.mathematics.tokens import Kind, Token


class OperandParser(ExpressionParser):
    """Everything that can stand on one side of an operator."""

    @abstractmethod
    def _bracketed(self) -> Node:
        """What stands in round or square brackets."""

    @abstractmethod
    def _delimited(self, opening: str) -> Node:
        r"""What stands between two commands, such as `\lfloor` and `\rfloor`; the first is already consumed."""

    @abstractmethod
    def _set(self) -> Node:
        """A set in braces."""

    @abstractmethod
    def _absolute(self) -> Node:
        """An absolute value."""

    @abstractmethod
    def _environment(self) -> Node:
        r"""A matrix; `\begin` is already consumed."""

    def _primary(self) -> Node:
        self._enter()
        node = self._operand()
        self._leave()
        return node

    def _operand(self) -> Node:
        token = self._next
        match token.kind:
            case Kind.NUMBER:
                return self._number()
            case Kind.LETTER:
                return self._letter()
            case Kind.WORD:
                self._position += 1
                return self._named(token.text, token)
            case Kind.COMMAND:
                self._position += 1
                return self._command(token.text)
            case Kind.SIGN if token.text in ("(", "["):
                return self._bracketed()
            case Kind.SIGN if token.text == "{":
                return self._group()
            case Kind.SIGN if token.text == "\\{":
                return self._set()
            case Kind.SIGN if token.text == "|":
                return self._absolute()
            case Kind.SIGN if token.text == "]":
                return self._bracketed()  # ]0,1[
            case _:
                raise self._fail("a value")

    def _number(self) -> Node:
        text = self._advance().text
        read = read_number(text)
        if read is None:
            raise UnreadableError(f"a number of {len(text)} digits")
        if self._is_command("overline", "dot") and "." in text:
            return self._repeating(text)
        if "." in text and self._is_command("dots"):
            return self._repeating_dots(text)
        return Number(read.value, read.places, read.digits)

    def _repeating(self, text: str) -> Node:
        self._position += 1
        self._expect("{")
        period = self._advance().text
        self._expect("}")
        if not period.isdigit():
            raise self._fail("a repeating digit")
        return _repeating_decimal(text, period)

    def _repeating_dots(self, text: str) -> Node:
        places = text.partition(".")[2]
        if len(places) < 3 or len(set(places[-3:])) != 1:
            raise self._fail("three equal digits before the dots")
        self._position += 1
        return _repeating_decimal(text, places[-1])

    def _letter(self) -> Node:
        name = self._advance().text
        if name in ("e", "i") and not self._is_sign("_"):
            return Constant(name)
        if self._take_sign("_"):
            name += "_" + self._subscript()
        if name in OPAQUE_FUNCTIONS and self._is_sign("("):
            return Apply(f"call:{name}", self._arguments())
        return Symbol(name)

    def _subscript(self) -> str:
        """The subscript as text: it names the variable and has no value."""
        if not self._is_sign("{"):
            return self._advance().text
        start, depth = self._position + 1, 0
        while self._next.kind is not Kind.END:
            depth += self._is_sign("{") - self._is_sign("}")
            self._position += 1
            if depth == 0:
                return "".join(t.text for t in self._tokens[start : self._position - 1])
        raise self._fail("}")

    def _arguments(self) -> tuple[Node, ...]:
        inside = self._bracketed()
        return inside.items if isinstance(inside, Collection) else (inside,)

    # -- names

    def _named(self, word: str, token: Token) -> Node:
        if word in CONSTANTS:
            return Constant(CONSTANTS[word])
        if word in FUNCTIONS:
            return self._function(FUNCTIONS[word])
        if word in GREEK:
            return self._greek(word)
        self._position -= 1
        raise self._fail("a value")

    def _command(self, name: str) -> Node:
        if name in CONSTANTS:
            return Constant(CONSTANTS[name])
        if name in UNSUPPORTED:
            raise UnsupportedError(f"\\{name}")
        if name == "frac":
            return self._fraction()
        if name == "binom":
            return Apply("binom", (self._argument(), self._argument()))
        if name == "begin":
            return self._environment()
        if name == "emptyset":
            return Collection("set", (), "\\{", "\\}")
        if name == "mathbb":
            self._expect("{")
            letter = self._advance().text
            self._expect("}")
            return Symbol(f"mathbb:{letter}")
        if name in CLOSINGS:  # \langle ... \rangle and \lfloor ... \rfloor
            return self._delimited(name)
        if name in FUNCTIONS:
            return self._function(FUNCTIONS[name])
        if name in GREEK:
            return self._greek(name)
        if name in ("overline", "bar", "hat", "vec", "widehat", "overrightarrow", "mathcal", "tilde"):
            return Symbol(f"{name}:{self._subscript()}")
        self._position -= 1
        raise self._fail("a value")

    def _greek(self, name: str) -> Node:
        if self._take_sign("_"):
            name += "_" + self._subscript()
        return Symbol(name)

    def _fraction(self) -> Node:
        top, bottom = self._argument(), self._argument()
        return quotient(top, bottom)

    def _argument(self) -> Node:
        r"""A braced group, or one digit or letter: `\frac12` is one half."""
        if self._is_sign("{"):
            return self._group()
        token = self._next
        if token.kind is Kind.NUMBER and len(token.text) > 1 and token.text.isdigit():
            self._tokens[self._position] = Token(Kind.NUMBER, token.text[1:])
            return Number(Fraction(int(token.text[0])))
        return self._primary()

    def _function(self, name: str) -> Node:
        if name == "root":
            return self._root()
        base: tuple[Node, ...] = ()
        if name == "log" and self._take_sign("_"):
            base = (self._argument(),)
        power = self._exponent() if name not in ("abs",) and self._take_sign("^") else None
        if self._is_sign("(", "{", "["):
            arguments = self._arguments() if not self._is_sign("{") else (self._group(),)
        else:
            arguments = (self._function_term(),)
        if (
            power is not None
            and power in (Apply("neg", (Number(Fraction(1)),)), Number(Fraction(-1)))
            and name in ("sin", "cos", "tan")
        ):
            return Apply(f"a{name}", arguments)
        applied = Apply(name, arguments + base)
        return applied if power is None else Apply("pow", (applied, power))

    def _function_term(self) -> Node:
        r"""The argument of a function without brackets: `\sin 2x` takes the product, `\sin x \cos x` only x."""
        node = self._signed_power()
        while self._starts_factor() and not self._starts_function() and not self._is_sign("(", "["):
            node = self._juxtaposed(node)
        return node

    def _starts_function(self) -> bool:
        return self._next.kind in (Kind.COMMAND, Kind.WORD) and (
            self._next.text in FUNCTIONS and FUNCTIONS[self._next.text] != "root"
        )

    def _root(self) -> Node:
        index: Node = Number(Fraction(2))
        if self._take_sign("["):
            index = self._sum()
            self._expect("]")
        radicand = self._power_free_argument()
        return Apply("root", (radicand, index))

    def _power_free_argument(self) -> Node:
        if self._is_sign("{"):
            return self._group()
        if self._is_sign("("):
            return self._bracketed()
        return self._primary()


def _repeating_decimal(start: str, period: str) -> Node:
    places = start.partition(".")[2]
    value = Fraction(int(start.replace(".", "") or 0), 10 ** len(places))
    return Number(value + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(places)))

"""Walks over the tokens of an answer; the base of its recursive-descent parser.

Left out: any grammar.
"""

from __future__ import annotations

from rewards.mathematics.syntax import UnreadableError
from rewards.mathematics.tokens import Kind, Token

MAX_DEPTH = 40


class TokenReader:
    """A position in a list of tokens that only moves forward, and how deep the parser is nested there."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0
        self._bars = 0  # open |...|, inside which a bar closes
        self._reversed = False  # inside ]a, b[, where an opening bracket closes

    @property
    def _next(self) -> Token:
        return self._tokens[self._position]

    def _advance(self) -> Token:
        token = self._next
        if token.kind is Kind.END:
            raise self._fail("more")
        self._position += 1
        return token

    def _is_sign(self, *signs: str) -> bool:
        return self._next.kind is Kind.SIGN and self._next.text in signs

    def _is_command(self, *names: str) -> bool:
        return self._next.kind is Kind.COMMAND and self._next.text in names

    def _take_sign(self, *signs: str) -> bool:
        if self._is_sign(*signs):
            self._position += 1
            return True
        return False

    def _fail(self, wanted: str) -> UnreadableError:
        found = self._next.text or "the end"
        return UnreadableError(f"expected {wanted} but found {found!r} at token {self._position}")

    def expect_end(self) -> None:
        """Raise UnreadableError when tokens are left over."""
        if self._next.kind is not Kind.END:
            raise self._fail("the end")

    def _expect(self, *signs: str) -> None:
        if not self._take_sign(*signs):
            raise self._fail(" or ".join(signs))

    def _take_command(self, *names: str) -> bool:
        if self._is_command(*names):
            self._position += 1
            return True
        return False

    def _enter(self) -> None:
        """Go one level deeper. A parser that raises is thrown away, so an error need not restore the level."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError(f"nested more than {MAX_DEPTH} deep")

    def _leave(self) -> None:
        self._depth -= 1

"""What a right result is: comparison of a program's output or value with the expected one, in the trusted process.

Left out: running programs, and `assert` statements (`rewards.sandbox.asserts`). Values from a box are compared as the
JSON trees of `inside.plain`; no object that a program chose is built, hashed or compared by its own methods here.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from rewards.sandbox.inside import plain

Tree = Any  # what json.loads gives
MAX_VALUE_BYTES = 1 << 20  # parsed, JSON takes up to a hundred times its size


def same_output(produced: bytes, expected: str, tolerance: float) -> bool:
    """Whether standard output is right: equal line by line, but for trailing white space and empty lines at the end.

    A word that the expected output writes as a decimal fraction may differ by `tolerance`, relative or absolute.
    """
    ours, theirs = _lines(produced.decode("utf-8", "replace")), _lines(expected)
    if ours == theirs:
        return True
    if tolerance <= 0 or len(ours) != len(theirs):
        return False
    return all(a == b or _same_words(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_words(produced: str, expected: str, tolerance: float) -> bool:
    ours, theirs = re.split(r"(\s+)", produced), re.split(r"(\s+)", expected)  # with the white space between
    return len(ours) == len(theirs) and all(
        a == b or _close_words(a, b, tolerance) for a, b in zip(ours, theirs, strict=True)
    )


def _close_words(produced: str, expected: str, tolerance: float) -> bool:
    if not any(mark in expected for mark in ".eE") or len(produced) > 64 or not produced.isascii() or "_" in produced:
        return False
    try:
        a, b = float(produced), float(expected)
    except ValueError:
        return False
    return math.isfinite(a) and math.isfinite(b) and _close(a, b, tolerance)


def _close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(1.0, abs(b))


def parse_value(value: bytes | None) -> Tree:
    """The JSON tree of a returned value. Raises NotPlainError if it is not JSON, or larger than MAX_VALUE_BYTES."""
    if value is None or len(value) > MAX_VALUE_BYTES:
        raise plain.NotPlainError("no value was returned" if value is None else f"a value of {len(value)} bytes")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise plain.NotPlainError("the returned value is not JSON") from error


def holds_opaque(tree: Tree) -> bool:
    """Whether a value without a plain form is anywhere in the tree."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            if "o" in node:
                return True
            todo += node.values()
        elif isinstance(node, list):
            todo += node
    return False


def tree_of(value: Any) -> Tree:
    """The JSON tree of a trusted value, for comparison with a produced one."""
    return json.loads(plain.encode(value))


def same_value(produced: Tree, expected: Tree, tolerance: float, lists_are_tuples: bool) -> bool:
    """Whether two trees stand for equal values, by Python's rules for `==`.

    Args:
        produced, expected: trees as `plain.encode` writes them; `produced` may be any JSON.
        tolerance: a float may differ from an expected float by this much, relative or absolute.
        lists_are_tuples: lists and tuples are equal, for expected values from JSON, which has no tuples.
    """
    return _Comparison(tolerance, lists_are_tuples).same(produced, expected, 0)


class _Comparison:
    def __init__(self, tolerance: float, lists_are_tuples: bool) -> None:
        self.tolerance = tolerance
        self.lists_are_tuples = lists_are_tuples

    def same(self, ours: Tree, theirs: Tree, depth: int) -> bool:
        if depth > 2 * plain.MAX_DEPTH:
            return False
        kind, a = self._open(ours)
        other, b = self._open(theirs)
        if kind != other:
            return False
        if kind == "number":
            return self._same_number(a, b)
        if kind in ("list", "t", "q", "c"):
            return len(a) == len(b) and all(self.same(x, y, depth + 1) for x, y in zip(a, b, strict=True))
        if kind == "s":
            return len(a) == len(b) and {self._key(x) for x in a} == {self._key(y) for y in b}
        if kind == "d":
            return self._same_dict(a, b, depth)
        if kind in ("atom", "b", "r", "D", "F"):
            return type(a) is type(b) and a == b
        return False  # opaque values and iterators equal nothing

    def _open(self, tree: Tree) -> tuple[str, Any]:
        """Kind and content; an unknown form becomes a kind of its own."""
        if isinstance(tree, bool | int | float):
            return "number", tree
        if tree is None or isinstance(tree, str):
            return "atom", tree
        if isinstance(tree, list):
            return "list", tree
        if len(tree) != 1:
            return "malformed", None
        tag, body = next(iter(tree.items()))
        if tag == "i" and isinstance(body, str):
            return self._open_integer(body)
        if tag == "n" and isinstance(body, str) and body in ("nan", "inf", "-inf"):
            return "number", float(body)
        if tag == "f":
            tag = "s"
        if tag == "t" and self.lists_are_tuples:
            tag = "list"
        if tag in ("t", "s", "q", "c", "list") and not isinstance(body, list):
            return "malformed", None
        return tag, body

    @staticmethod
    def _open_integer(text: str) -> tuple[str, Any]:
        try:
            return "number", int(text, 16)
        except ValueError:
            return "malformed", None

    def _same_number(self, a: float, b: float) -> bool:
        if a == b:
            return True
        if not isinstance(b, float) or isinstance(a, bool):
            return False
        try:
            return math.isfinite(a) and math.isfinite(b) and _close(float(a), b, self.tolerance)
        except OverflowError:
            return False

    def _same_dict(self, ours: Any, theirs: Any, depth: int) -> bool:
        pairs = _pairs(ours), _pairs(theirs)
        if pairs[0] is None or pairs[1] is None or len(pairs[0]) != len(pairs[1]):
            return False
        produced = {self._key(key): value for key, value in pairs[0]}
        return len(produced) == len(pairs[0]) and all(
            (key := self._key(name)) in produced and self.same(produced[key], value, depth + 1)
            for name, value in pairs[1]
        )

    def _key(self, tree: Tree, depth: int = 0) -> str:
        """Text that is equal for equal values. Hashed instead of the value, whose hash the program could choose."""
        if depth > 2 * plain.MAX_DEPTH:
            return "deep"
        kind, content = self._open(tree)
        if kind == "number":
            if isinstance(content, float) and content.is_integer():
                content = int(content)
            return f"number:{int(content):x}" if isinstance(content, int) else f"number:{content!r}"
        if kind in ("list", "t", "q", "c"):
            return f"{kind}[{','.join(self._key(item, depth + 1) for item in content)}]"
        if kind == "s":
            return f"s[{','.join(sorted(self._key(item, depth + 1) for item in content))}]"
        return f"{kind}:{json.dumps(content)}"


def _pairs(body: Any) -> list[Any] | None:
    if isinstance(body, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in body):
        return body
    return None

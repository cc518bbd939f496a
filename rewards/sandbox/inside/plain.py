"""Plain data as JSON text, and back: how arguments enter a box and how values leave it. Never pickle.

JSON's own types stand for themselves; every other built-in type is an object with one key, its tag. Left out: comparing
values outside the box (`rewards.sandbox.grading`), which works on the JSON tree and never rebuilds hostile objects.
"""

from __future__ import annotations

import json
import math
from collections import deque
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_DEPTH = 100
MAX_NODES = 2_000_000
_SMALL = 1 << 63


class NotPlainError(ValueError):
    """The value is too deep, too large, or not valid text of this encoding."""


class Opaque:
    """Stands for a value that has no plain form. Equal to nothing, not even to itself."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


def _encode_number(value: Any) -> Any:
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        number = int(value)
        return number if -_SMALL < number < _SMALL else {"i": hex(number)}
    if isinstance(value, float):
        number_f = float(value)
        return number_f if math.isfinite(number_f) else {"n": repr(number_f)}
    return {"c": [_encode_number(value.real), _encode_number(value.imag)]}


class _Encoder:
    def __init__(self) -> None:
        self.nodes = 0

    def items(self, values: Any, depth: int) -> list[Any]:
        return [self.tree(value, depth) for value in values]

    def tree(self, value: Any, depth: int) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise NotPlainError(f"a value nests deeper than {MAX_DEPTH} or holds more than {MAX_NODES} parts")
        if value is None:
            return None
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int | float | complex):
            return _encode_number(value)
        return self._container(value, depth + 1)

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, list):
            return self.items(value, depth)
        if isinstance(value, dict):
            return {"d": [[self.tree(k, depth), self.tree(v, depth)] for k, v in value.items()]}
        for kind, tag in ((tuple, "t"), (set, "s"), (frozenset, "f"), (deque, "q")):
            if isinstance(value, kind):
                return {tag: self.items(value, depth)}
        if isinstance(value, bytes | bytearray):
            return {"b": bytes(value).hex()}
        if isinstance(value, Decimal):
            return {"D": str(value)}
        if isinstance(value, Fraction):
            return {"F": str(value)}
        if isinstance(value, range):
            return {"r": [self.tree(n, depth) for n in (value.start, value.stop, value.step)]}
        if hasattr(type(value), "__next__"):
            return {"g": self.items(value, depth)}
        return {"o": type(value).__name__[:100]}


def encode(value: Any) -> str:
    """JSON text of a value. Subclasses of built-in types become the built-in type; anything not plain becomes opaque.

    Raises NotPlainError for values deeper than MAX_DEPTH or larger than MAX_NODES.
    """
    return json.dumps(_Encoder().tree(value, 0), separators=(",", ":"))


def _decode_tagged(tag: str, body: Any) -> Any:
    simple: dict[str, Any] = {"n": float, "b": bytes.fromhex, "D": Decimal, "F": Fraction, "o": Opaque}
    if tag in simple:
        return simple[tag](body)
    if tag == "i":
        return int(body, 16)
    values = [_decode_tree(item) for item in body] if tag != "d" else []
    containers: dict[str, Any] = {"t": tuple, "s": set, "f": frozenset, "q": deque, "g": iter}
    if tag in containers:
        return containers[tag](values)
    if tag == "r":
        return range(*values)
    if tag == "c":
        return complex(*values)
    if tag == "d":
        return {_decode_tree(key): _decode_tree(value) for key, value in body}
    raise NotPlainError(f"unknown tag {tag!r}")


def _decode_tree(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_decode_tree(item) for item in tree]
    if isinstance(tree, dict):
        if len(tree) != 1:
            raise NotPlainError(f"{len(tree)} keys where one tag belongs")
        return _decode_tagged(*next(iter(tree.items())))
    return tree


def decode(text: str | bytes) -> Any:
    """The value of JSON text that `encode` made. Use it only inside a box: hostile text can cost much time."""
    return _decode_tree(json.loads(text))

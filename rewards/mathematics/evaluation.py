"""Values of expressions: exact fractions if they are rational, else to many digits at given points.

Left out: structure and policy (`rewards.mathematics.comparison`). Whatever could grow without bound (powers,
factorials, exponentials) is checked before it is computed, so a tree of bounded size takes bounded time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath import libmp
from mpmath.ctx_mp import MPContext

from rewards.mathematics.syntax import Apply, Constant, Node, Number, Symbol, UnsupportedError

MAX_BITS = 40_000  # of a rational's numerator or denominator
MAX_FACTORIAL = 3000
MAX_EXPONENT = 10**6  # of exp, sinh and powers, as a natural logarithm
MAX_ANGLE = 10**12


class TooLargeError(Exception):
    """A value too large to compute; no answer of that size is compared."""


class UndefinedError(Exception):
    """No value: a division by zero, a logarithm of zero, infinity minus infinity."""


class Budget:
    """Bits of exact arithmetic that one comparison may still use."""

    def __init__(self) -> None:
        self.bits = 4_000_000

    def spend(self, value: Fraction) -> Fraction:
        size = value.numerator.bit_length() + value.denominator.bit_length()
        self.bits -= size
        if size > MAX_BITS or self.bits < 0:
            raise TooLargeError(f"a rational of {size} bits")
        return value


def exact(node: Node, budget: Budget) -> Fraction | None:
    """The value if arithmetic alone shows that it is rational, else None. Raises TooLargeError, UndefinedError."""
    match node:
        case Number(value=value):
            return value
        case Apply(name=name, args=args):
            rule = _EXACT.get(name)
            if rule is None:
                return None
            values = []
            for arg in args:
                value_of_arg = exact(arg, budget)
                if value_of_arg is None:
                    return None
                values.append(value_of_arg)
            result = rule(*values)
            return None if result is None else budget.spend(result)
        case _:
            return None


def _exact_div(a: Fraction, b: Fraction) -> Fraction:
    if b == 0:
        raise UndefinedError("division by zero")
    return a / b


def _exact_pow(base: Fraction, exponent: Fraction) -> Fraction | None:
    if base == 0 and exponent <= 0:
        raise UndefinedError("zero to a power that is not positive")
    if exponent.denominator != 1:
        root = _exact_root(base, Fraction(exponent.denominator))
        return None if root is None else _exact_pow(root, Fraction(exponent.numerator))
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * size > MAX_BITS and abs(base) != 1 and base != 0:
        raise TooLargeError(f"a power with exponent {exponent if abs(exponent) < 10**9 else 'over 10^9'}")
    return base ** (int(exponent) if abs(base) != 1 else int(exponent) % 2)


def _exact_root(value: Fraction, index: Fraction) -> Fraction | None:
    if index.denominator != 1 or not 1 <= index <= 64:
        return None
    n = int(index)
    if value < 0:
        return None if n % 2 == 0 or (root := _exact_root(-value, index)) is None else -root
    top, bottom = _integer_root(value.numerator, n), _integer_root(value.denominator, n)
    return None if top is None or bottom is None else Fraction(top, bottom)


def _integer_root(value: int, n: int) -> int | None:
    if n == 2:
        root = math.isqrt(value)
    else:
        root = int(libmp.MPZ(round(value ** (1 / n)))) if value.bit_length() < 900 else -1
        if root >= 0:
            root = next((r for r in (root - 1, root, root + 1) if r >= 0 and r**n == value), root)
    return root if root >= 0 and root**n == value else None


def _exact_factorial(n: Fraction) -> Fraction | None:
    if n.denominator != 1 or n < 0:
        return None
    if n > MAX_FACTORIAL:
        raise TooLargeError(f"a factorial of more than {MAX_FACTORIAL}")
    return Fraction(math.factorial(int(n)))


def _exact_binom(n: Fraction, k: Fraction) -> Fraction | None:
    if n.denominator != 1 or k.denominator != 1 or n < 0 or k < 0:
        return None
    if n > MAX_FACTORIAL:
        raise TooLargeError(f"a binomial coefficient of more than {MAX_FACTORIAL}")
    return Fraction(math.comb(int(n), int(k)))


def _integers(function: Callable[..., int]) -> Callable[..., Fraction | None]:
    def rule(*values: Fraction) -> Fraction | None:
        if any(v.denominator != 1 for v in values):
            return None
        return Fraction(function(*(int(v) for v in values)))

    return rule


_EXACT: dict[str, Callable[..., Fraction | None]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": _exact_div,
    "neg": lambda a: -a,
    "pow": _exact_pow,
    "root": _exact_root,
    "factorial": _exact_factorial,
    "binom": _exact_binom,
    "percent": lambda a: a / 100,
    "abs": abs,
    "floor": lambda a: Fraction(math.floor(a)),
    "ceil": lambda a: Fraction(math.ceil(a)),
    "min": lambda *a: min(a),
    "max": lambda *a: max(a),
    "gcd": _integers(math.gcd),
    "lcm": _integers(math.lcm),
}


class Numeric:
    """Evaluates trees to `digits` significant digits, over the complex numbers."""

    def __init__(self, digits: int) -> None:
        self.context = MPContext()
        self.context.dps = digits
        context = self.context
        self._functions = _numeric_functions(context)
        self._constants = {"pi": +context.pi, "e": +context.e, "i": context.j, "inf": context.inf}

    def value(self, node: Node, point: Mapping[str, Fraction], real: bool = False) -> Any:
        """An mpf or mpc. With `real`, any part of the tree whose value is not real counts as undefined.

        Raises: TooLargeError, UndefinedError, UnsupportedError.
        """
        try:
            result = self._value(node, point, real)
        except (ZeroDivisionError, ValueError, OverflowError) as error:
            raise UndefinedError(str(error)) from error
        if self.context.isnan(result):
            raise UndefinedError("not a number")
        return result

    def _value(self, node: Node, point: Mapping[str, Fraction], real: bool) -> Any:
        match node:
            case Number(value=value):
                return self._fraction(value)
            case Constant(name=name):
                return self._constants[name]
            case Symbol(name=name) if name in point:
                return self._fraction(point[name])
            case Apply(name=name, args=args):
                result = self._apply(name, args, [self._value(arg, point, real) for arg in args])
                if real and self.context.im(result):
                    raise UndefinedError("not real")
                return result
            case _:
                raise UnsupportedError(f"no value for {type(node).__name__}")

    def _apply(self, name: str, args: tuple[Node, ...], values: list[Any]) -> Any:
        if name == "pow":
            return self._power(values[0], values[1], args[1])
        if name.startswith("call:"):
            return self._opaque(name, values)
        if name not in self._functions:
            raise UnsupportedError(f"no value for {name}")
        return self._functions[name](*values)

    def _fraction(self, value: Fraction) -> Any:
        return self.context.mpf(value.numerator) / value.denominator

    def _power(self, base: Any, exponent: Any, exponent_node: Node) -> Any:
        context = self.context
        if base == 0:
            if context.re(exponent) <= 0:
                raise UndefinedError("zero to a power that is not positive")
            return context.mpf(0)
        if context.isinf(base) or context.isinf(exponent):
            raise UndefinedError("a power of infinity")
        if abs(exponent) * max(1, abs(_log2(context, base))) > MAX_EXPONENT * 2:
            raise TooLargeError("a power with too large an exponent")
        if not context.im(base) and context.re(base) < 0:
            rational = exact(exponent_node, Budget())
            if rational is not None and rational.denominator % 2:  # (-8)^(1/3) is -2 in every school book
                size = abs(base) ** self._fraction(rational)
                return -size if rational.numerator % 2 else size
        return context.power(base, exponent)

    def _opaque(self, name: str, arguments: list[Any]) -> Any:
        """A function nobody defined: some smooth function, the same for the same name."""
        context = self.context
        seed = zlib.crc32(name.encode())
        total = context.mpf(seed % 97) / 89
        for i, argument in enumerate(arguments):
            if abs(argument) > MAX_EXPONENT:
                raise TooLargeError("a function of a huge argument")
            total += context.cos(argument * (seed % 31 + 3 + i) / 17 + seed % 13) * (seed % 7 + 2 + i)
        return total


def _numeric_functions(context: Any) -> dict[str, Callable[..., Any]]:
    def bounded(function: Callable[..., Any], limit: float) -> Callable[..., Any]:
        def call(argument: Any) -> Any:
            if not abs(argument) <= limit:
                raise TooLargeError(f"an argument over {limit:g}")
            return function(argument)

        return call

    def root(value: Any, index: Any) -> Any:
        n = int(context.re(index))
        if context.im(index) or n != index or not 1 <= n <= 1000:
            return context.power(value, 1 / index)
        if n % 2 and not context.im(value) and context.re(value) < 0:
            return -context.root(-value, n)
        return context.sqrt(value) if n == 2 else context.root(value, n)

    def log(value: Any, base: Any = None) -> Any:
        return context.log(value) if base is None else context.log(value) / context.log(base)

    def reciprocal(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda argument: 1 / function(argument)

    def real_only(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if any(context.im(a) for a in arguments):
                raise UndefinedError("an order of complex numbers")
            return function(*(context.re(a) for a in arguments))

        return call

    angle = {name: bounded(getattr(context, name), MAX_ANGLE) for name in ("sin", "cos", "tan")}
    return {
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "neg": lambda a: -a,
        "root": root,
        "percent": lambda a: a / 100,
        "degree": lambda a: a * context.pi / 180,
        "abs": abs,
        "log": log,
        "log10": lambda a: log(a, context.mpf(10)),
        "exp": bounded(context.exp, MAX_EXPONENT),
        "factorial": bounded(context.factorial, MAX_FACTORIAL),
        "binom": lambda n, k: bounded(lambda _: context.binomial(n, k), MAX_FACTORIAL)(abs(n) + abs(k)),
        **angle,
        "cot": reciprocal(angle["tan"]),
        "sec": reciprocal(angle["cos"]),
        "csc": reciprocal(angle["sin"]),
        **{name: bounded(getattr(context, name), MAX_EXPONENT) for name in ("sinh", "cosh", "tanh")},
        **{name: getattr(context, name) for name in ("asin", "acos", "atan")},
        **{name: real_only(getattr(context, name)) for name in ("floor", "ceil")},
        "min": real_only(min),
        "max": real_only(max),
    }


def _log2(context: Any, value: Any) -> Any:
    return context.log(abs(value), 2)

"""Plain numbers, exactly: integers, decimals, fractions, thousands separators, scientific notation.

Left out: anything with a root, a constant or a letter in it, except that `3.5 million` is spelled out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 4000
MAX_EXPONENT = 4000

SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}

_SCALED = re.compile(
    r"(?P<before>(?:[A-Za-z]\s*=\s*)?[-+]?\s*[$€£¥₹]?\s*)(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)"
    r"(?P<gap>[\s-]*(?:\\text\s*\{)?\s*)(?P<scale>" + "|".join(SCALES) + r")s?\b(?P<behind>\D*)",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"([+-]?)(\d+)(?:\.(\d*))?")
_LEADING_POINT = re.compile(r"([+-]?)\.(\d+)")
_SLASH = re.compile(r"([+-]?\d+)\s*/\s*(\d+)")
_FRAC = re.compile(r"([+-]?)\\frac\s*(?:\{\s*([+-]?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_GROUPED = re.compile(r"([+-]?)([1-9]\d{0,2}(?:,\d{3})+)(?:\.(\d+))?")
_SCIENTIFIC = re.compile(
    r"([+-]?\d+(?:\.\d+)?)(?:[eE]|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*))\s*\{?\s*([+-]?\d+)\s*\}?"
)


@dataclass(frozen=True, slots=True)
class PlainNumber:
    """An exact value and, if it was written as a decimal, with how many decimal places."""

    value: Fraction
    places: int | None = None  # digits after the point; None: an integer or a fraction, so nothing was rounded
    digits: int = 0  # significant digits shown, for decimals


def read_number(text: str) -> PlainNumber | None:
    """The number that the whole (normalised) text spells, or None."""
    text = text.strip()
    if not text or len(text) > MAX_DIGITS or not (text[0] in "+-.\\" or text[0].isdigit()):
        return None
    if match := _PLAIN.fullmatch(text):
        return _decimal(*match.groups(default=""))
    if match := _GROUPED.fullmatch(text):
        sign, whole, places = match.groups(default="")
        return _decimal(sign, whole.replace(",", ""), places)
    if match := _SLASH.fullmatch(text):
        return _quotient("", *match.groups())
    if match := _FRAC.fullmatch(text):
        sign, top, top_digit, bottom, bottom_digit = match.groups()
        return _quotient(sign, top or top_digit, bottom or bottom_digit)
    if match := _LEADING_POINT.fullmatch(text):
        return _decimal(match.group(1), "0", match.group(2))
    if match := _SCIENTIFIC.fullmatch(text):
        return _scientific(match.group(1), int(match.group(2)))
    return None


def spell_out_scale(text: str) -> str:
    """`2 million dollars` as `2000000 dollars`; a text that is not one number with a scale word is left alone."""
    while match := _SCALED.fullmatch(text):
        value = Fraction(match["number"].replace(",", "")) * SCALES[match["scale"].lower()]
        if value.denominator != 1:
            return text
        behind = re.sub(r"\\text\s*\{\s*\}", "", match["gap"].replace("-", " ") + match["behind"])
        text = f"{match['before']}{value}{behind}".rstrip()
    return text


def _decimal(sign: str, whole: str, places: str) -> PlainNumber:
    value = Fraction(int(whole + places), 10 ** len(places))
    if not places:
        return PlainNumber(-value if sign == "-" else value)
    digits = len((whole + places).lstrip("0"))
    return PlainNumber(-value if sign == "-" else value, len(places), digits)


def _quotient(sign: str, top: str, bottom: str) -> PlainNumber | None:
    if int(bottom) == 0:
        return None
    value = Fraction(int(top), int(bottom))
    return PlainNumber(-value if sign == "-" else value)


def _scientific(mantissa: str, exponent: int) -> PlainNumber | None:
    if abs(exponent) > MAX_EXPONENT:
        return None
    number = read_number(mantissa)
    assert number is not None  # _SCIENTIFIC admits only decimals as mantissa
    value = number.value * Fraction(10) ** exponent
    if number.places is None:
        return PlainNumber(value)
    places = number.places - exponent
    return PlainNumber(value, places, number.digits) if places > 0 else PlainNumber(value)

"""Japanese and Chinese numerals: 3万5千, 一億二千万, 三分の二, 3割5分.

Left out: units and words (`units`, `comparison`); full-width digits (`normalisation`).
"""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = {c: i for i, c in enumerate("〇一二三四五六七八九")} | {"零": 0, "両": 2, "两": 2}
_SMALL = {"十": 10, "百": 100, "千": 1000}
_LARGE = {"万": 10**4, "萬": 10**4, "億": 10**8, "亿": 10**8, "兆": 10**12, "京": 10**16}
_NUMERAL = r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|[〇零一二三四五六七八九両两十百千万萬億亿兆京])+"
_CJK = "〇零一二三四五六七八九両两十百千万萬億亿兆京"
_FRACTION = re.compile(rf"([-+]?)({_NUMERAL})\s*(?:分の|分之)\s*({_NUMERAL})")
_WARI = re.compile(r"([-+]?\d+(?:\.\d+)?|[一二三四五六七八九])\s*割(?:\s*(\d|[一二三四五六七八九])\s*分)?(?:引き)?")
_PER = {"時": "h", "分": "min", "秒": "s"}
_SPEED = re.compile(r"^\s*毎?([時分秒])速?(?:は)?\s*([\d.,]+\s*[^\d\s]+)\s*$")
_PERCENT = re.compile(r"\s*(?:パーセント|プロ)")
_MULTIPLIED = re.compile(rf"(?<![\w\u4e00-\u9fff]){_NUMERAL}(?=$|[^0-9])")
_PIECE = re.compile(r"([0-9][0-9,]*(?:\.[0-9]+)?)|(.)")
_WORDS_WITH_NUMERALS = re.compile(r"[一二三四五六七八九十百千万](?:角|次|等辺|辺|月|日|曜|様|般|意|定|致|番|つ|対)")


def convert_numerals(text: str) -> str:
    """The text with its Japanese numerals written as digits, fractions as `a/b` and 割 as percent."""
    if text.isascii():
        return text
    text = _SPEED.sub(lambda m: f"{m[2].strip()}/{_PER[m[1]]}", text)
    text = _FRACTION.sub(_fraction, text)
    text = _WARI.sub(_tenths, text)
    text = _PERCENT.sub("%", text)
    if not any(character in _CJK for character in text) or _WORDS_WITH_NUMERALS.search(text):
        return text
    return _MULTIPLIED.sub(lambda m: _spelled(m.group()), text)


def read_numeral(text: str) -> Fraction | None:
    """The value of a numeral, or None: positional (二〇二五), multiplied (二千二十五) or mixed (3万5千)."""
    if text and all(c in _DIGITS for c in text):
        return Fraction(int("".join(str(_DIGITS[c]) for c in text)))
    total, section, current = Fraction(0), Fraction(0), None
    previous_large = None
    for digits, character in _PIECE.findall(text):
        if digits or character in _DIGITS:
            if current is not None:
                return None
            current = Fraction(digits.replace(",", "")) if digits else Fraction(_DIGITS[character])
        elif character in _SMALL:
            section += (Fraction(1) if current is None else current) * _SMALL[character]
            current = None
        elif character in _LARGE:
            size = _LARGE[character]
            section += current or 0
            if (previous_large is not None and size >= previous_large) or section == 0:
                return None
            total, section, current, previous_large = total + section * size, Fraction(0), None, size
        else:
            return None
    return total + section + (current or 0)


def _spelled(numeral: str) -> str:
    if not any(c in _CJK for c in numeral):
        return numeral
    value = read_numeral(numeral)
    if value is None:
        return numeral
    return str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"


def _fraction(match: re.Match[str]) -> str:
    bottom, top = read_numeral(match[2]), read_numeral(match[3])
    if not bottom or top is None:
        return match.group()
    value = top / bottom
    return f"{match[1]}{value.numerator}/{value.denominator}"


def _tenths(match: re.Match[str]) -> str:
    first, second = read_numeral(match[1].lstrip("+-")), read_numeral(match[2] or "0")
    if first is None or second is None:
        return match.group()
    value = first * 10 + second
    return f"{value.numerator if value.denominator == 1 else float(value)}%"

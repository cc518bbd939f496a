"""Reads a whole answer: its number base, its unit, its formula, or else its words.

Left out: spelling (`normalisation`), formulas (`parsing`), equality (`comparison`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rewards.mathematics.japanese import convert_numerals
from rewards.mathematics.normalisation import normalise
from rewards.mathematics.numbers import read_number, spell_out_scale
from rewards.mathematics.parsing import parse
from rewards.mathematics.syntax import (
    BaseNumber,
    Collection,
    Node,
    Number,
    Quantity,
    Relation,
    Symbol,
    Text,
    UnreadableError,
    UnsupportedError,
)
from rewards.mathematics.units import read_compound, split_unit

_NUMERALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_NUMBER_WORDS = {word: value for value, word in enumerate(_NUMERALS.split())}
_BASE_WORDS = _NUMBER_WORDS | {"binary": 2, "octal": 8, "hex": 16}
_BASE = re.compile(r"(?:\\text\{)?([0-9A-F]+)\}?\s*_\s*(?:\{\s*)?(?:\\text\{\s*)?(\d+|[a-z]+)\s*\}{0,2}")
_REALS = ("all real numbers", "all reals", "real numbers", "全ての実数", "すべての実数", "実数全体")
_TIME = re.compile(r"\d{1,2}:\d{2}(?:\s*[ap]\.?m\.?)?", re.IGNORECASE)
_PROSE_WORD = re.compile(r"(?<!\\)\b[^\W\d_]{3,}\b")
_WORDS_ONLY = re.compile(r"[^\d\\=<>^*/+$%|()\[\]{}]*[^\W\d_][^\d\\=<>^*/+$%|()\[\]{}]*")
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")
_AND = re.compile(r"\s*(?:,|;|\b(?:and|or)\b|、)\s*", re.IGNORECASE)
_CONDITION = re.compile(
    r"[,(\s]*(?:\\text\s*\{\s*)?\b(?:where|for|with)\b(?:\s+(?:all|any|every|some|each))?[\s}:]*"
    r"(?:[a-zA-Z]\s*\\in\s*\\mathbb\{[A-Z]\}|(?:\\text\s*\{)?[\s}]*(?:[a-zA-Z]\s*[\s}]*(?:\\text\s*\{)?\s*)?(?:is|are)?\s*"
    r"(?:an?\s+)?(?:arbitrary\s+)?(?:integers?|real|constant)(?:\s+numbers?|\s+constants?)?(?:\s*\})?\s*[a-zA-Z]?)[)\s.]*$"
)
_PARENTHESISED = re.compile(r"\(([^()\[\]{}\\\d]*)\)")
_LABEL_COLON = re.compile(r"^[A-Za-z ]{4,40}:\s*(?=\S)")
_LABEL = re.compile(  # what an answer may name on the left of its equals sign, besides what `parsing` reads
    r"(?:\\text\s*\{(?!\s*\w\s*\}|[^{}]*\bnot\b)[^{}\d=]*\}(?:\s*_\s*(?:\w|\{\w+\}))?"  # \text{Area}
    r"|\|\s*[A-Z]{2}\s*\|(?=\s*=[^A-Z]*$)|\[\s*(?:(?:\\triangle\b|△)\s*)?[A-Z]{3,5}\s*\]"  # |AB|, [ABC]
    r"|m?\s*(?:\\(?:measured)?angle(?![a-zA-Z])|\\triangle(?![a-zA-Z])|[∠△])\s*(?:[A-Z]{1,3}|\{\s*[A-Z]{1,3}\s*\})"
    r"|[a-zA-Z]'+\s*\(\s*-?\s*\d+\s*\)"  # f'(1)
    r"|\\(?:max|min)\s*(?:\([^(),=]*\)|[a-zA-Z])"
    r")\s*=(?!=)\s*"
)

MIN_PROSE_WORDS = 3  # from so many words on, a text that is no formula is a sentence, and is compared as one


@dataclass(frozen=True, slots=True)
class Answer:
    """A normalised text and, where it could be read, what it says."""

    text: str
    node: Node | None
    unsupported: bool = False  # it is mathematics that only a computer-algebra system can read


@lru_cache(maxsize=1024)  # responses of one group share the ground truth, and often the answer
def read_answer(raw: str, grouping: bool = True) -> Answer:
    """Read what a model or a dataset wrote. Never raises: what cannot be read has no node."""
    text = spell_out_scale(convert_numerals(normalise(raw)))
    try:
        return Answer(text, _read(text, grouping))
    except UnsupportedError:
        return Answer(text, None, unsupported=True)
    except UnreadableError:
        return Answer(text, None)


def _read(text: str, grouping: bool) -> Node:
    if grouping and (number := read_number(text)) is not None:
        return Number(number.value, number.places, number.digits)
    if (match := _BASE.fullmatch(text)) and (base := _base_number(*match.groups())):
        return base
    words = " ".join(_TEXT_COMMAND.sub(r" \1 ", text).split())
    if _TIME.fullmatch(words):
        return Text(words.lower().replace(".", ""))
    if match := _PARENTHESISED.fullmatch(words):
        words = text = match[1].strip()
    if words.lower() in _NUMBER_WORDS:
        return Number(Fraction(_NUMBER_WORDS[words.lower()]))
    try:
        return _read_formula(text, grouping)
    except UnreadableError:
        if _WORDS_ONLY.fullmatch(words):
            return _read_words(words)
        if len(_PROSE_WORD.findall(words)) >= MIN_PROSE_WORDS:
            return Text(_plain_words(words))
        raise


def _base_number(digits: str, base_text: str) -> BaseNumber | None:
    base = int(base_text) if base_text.isdigit() and len(base_text) < 3 else _BASE_WORDS.get(base_text, 0)
    if not 2 <= base <= 36 or any(int(d, 36) >= base for d in digits):
        return None
    return BaseNumber(digits.lstrip("0") or "0", base)


def _read_formula(text: str, grouping: bool) -> Node:
    if match := _LABEL.match(text):
        return _labelled(match.group(), _read_formula(text[match.end() :], grouping))
    if (compound := read_compound(text)) is not None:
        return Quantity(Number(compound[0]), compound[1])
    value, unit, ambiguous = split_unit(text)
    if unit is None:
        return _reread_condition(text, grouping)
    node = parse(value, grouping)
    product = None
    if ambiguous:
        try:
            product = parse(text, grouping)
        except (UnreadableError, UnsupportedError):
            product = None
    if isinstance(node, Relation) and node.operators[-1] == "=":  # x = 3 cm
        return Relation((*node.terms[:-1], Quantity(node.terms[-1], unit, None)), node.operators)
    if isinstance(node, Collection) and node.kind == "list":  # 3 and 4 cm
        return Collection("list", tuple(Quantity(item, unit) for item in node.items))
    return Quantity(node, unit, product, tight=ambiguous and value + text[-1] == text)


def _labelled(label: str, value: Node) -> Node:
    name = re.sub(r"[\s{}=]|\\text", "", label)
    text = Text(name.lower() if "\\text" in label else name)
    if not isinstance(value, Relation):
        return Relation((text, value), ("=",))
    if set(value.operators) <= {"=", "~"}:
        return Relation((text, *value.terms), ("=", *value.operators))
    raise UnreadableError("an inequality behind a label")


def _reread_condition(text: str, grouping: bool) -> Node:
    """A formula, without the condition or label that some answers carry: `2k, where k is whole`."""
    try:
        return parse(text, grouping)
    except UnreadableError:
        for pattern in (_CONDITION, _LABEL_COLON):
            shorter = pattern.sub("", text)
            if shorter != text and shorter.strip():
                return parse(shorter.strip(), grouping)
        raise


def _read_words(words: str) -> Node:
    if _plain_words(words) in _REALS:
        return Symbol("mathbb:R")
    parts = [part for part in _AND.split(words) if part]
    if not parts:
        raise UnreadableError("no words")
    items: list[Node] = [Symbol(part) if len(part) == 1 else Text(_plain_words(part)) for part in parts]
    return items[0] if len(items) == 1 else Collection("list", tuple(items))


def _plain_words(text: str) -> str:
    """Words without case, articles and punctuation."""
    words = re.sub(r"[^\w\s'-]", " ", text.lower()).split()
    return " ".join(w for w in words if w not in ("a", "an", "the")) or text.lower()

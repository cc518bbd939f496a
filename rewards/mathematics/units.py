"""Units of measurement: reading them off the end (or front) of an answer, and whether two of them agree.

Left out: what a missing or wrong unit means for the verdict (`rewards.mathematics.comparison`).
"""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.mathematics.grammar import words
from rewards.mathematics.numbers import SCALES
from rewards.mathematics.syntax import Unit

MAX_WORDS = 8  # of an unknown unit: `12 distinct arithmetic sequences`


DEGREE = Unit(Fraction(1), (("degree", 1),))

# base unit: {factor: spellings}; a plural s is taken off before the look-up, so only irregular plurals stand here
_TABLE: dict[str, dict[str, str]] = {
    "m": {
        "1": "m meter metre メートル 米 м метр mètre metro",
        "1/100": "cm centimeter centimetre センチメートル センチ 厘米 см",
        "1/1000": "mm millimeter millimetre ミリメートル ミリ 毫米 мм",
        "1000": "km kilometer kilometre キロメートル 公里 千米 км",
        "1/1000000": "µm μm micrometer micron",
        "1/1000000000": "nm nanometer",
        "127/5000": "inch inches in",
        "381/1250": "ft foot feet フィート",
        "1143/1250": "yd yard ヤード",
        "201168/125": "mile mi マイル",
    },
    "g": {
        "1": "g gram gramme グラム 克 г",
        "1000": "kg kilogram kilo キログラム 千克 公斤 кг",
        "1/1000": "mg milligram ミリグラム",
        "1000000": "ton tonne トン",
        "45359237/100000": "lb lbs pound ポンド",
        "45359237/1600000": "oz ounce オンス",
    },
    "s": {
        "1": "s sec second 秒",
        "60": "min minute 分 分钟",
        "3600": "h hr hour 時間 小时",
        "86400": "day 日 日間 天",
        "604800": "week 週間 週",
        "1/1000": "ms millisecond",
    },
    "month": {"1": "month か月 ヶ月 ヵ月 カ月 个月", "12": "year yr 年 年間"},
    "years old": {"1": "歳 才"},
    "liter": {
        "1": "l L liter litre リットル 升",
        "1/10": "dl dL デシリットル",
        "1/1000": "ml mL milliliter millilitre ミリリットル",
    },
    "degree": {"1": "degree deg 度"},
    "rad": {"1": "rad radian ラジアン"},
    "°C": {"1": "°C celsius"},
    "°F": {"1": "°F fahrenheit"},
    "dollar": {"1": "dollar usd $ ドル", "1/100": "cent ¢"},
    "euro": {"1": "euro eur € ユーロ"},
    "gbp": {"1": "£ gbp"},
    "yen": {"1": "yen jpy ¥ 円"},
    "yuan": {"1": "元 yuan"},
    "rupee": {"1": "₹ rupee rs"},
    "N": {"1": "N newton ニュートン"},
    "J": {"1": "J joule ジュール", "1000": "kJ"},
    "W": {"1": "W watt ワット", "1000": "kW"},
    "V": {"1": "V volt ボルト"},
    "A": {"1": "A amp ampere アンペア"},
    "Pa": {"1": "Pa pascal パスカル"},
    "Hz": {"1": "Hz hertz ヘルツ"},
    "mol": {"1": "mol mole モル"},
    "K": {"1": "K kelvin"},
    "person": {"1": "person people 人 名"},
    "thing": {"1": "unit units 個 つ 个 件"},
    "long thing": {"1": "本"},
    "flat thing": {"1": "枚"},
    "animal": {"1": "匹 頭 羽"},
    "way": {"1": "way 通り 种"},
    "time": {"1": "time 回 次"},
    "fold": {"1": "倍"},
    "point": {"1": "point 点 分数"},
    "volume": {"1": "冊"},
    "machine": {"1": "台"},
    "page": {"1": "page ページ 頁"},
    "place": {"1": "番目 番 位"},
}  # fmt: skip
_UNITS: dict[str, tuple[str, Fraction]] = {
    spelling: (base, Fraction(factor))
    for base, factors in _TABLE.items()
    for factor, spellings in factors.items()
    for spelling in spellings.split()
}
ARITHMETIC_WORDS = words(  # they change the number in front of them
    "squared cubed plus minus divided multiplied factorial choose modulo mod doubled tripled halved halves thirds "
    "quarters fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths millionths"
)
_SCALE_WORDS = frozenset(SCALES) | {scale + "s" for scale in SCALES}
_NOT_UNITS = (
    ARITHMETIC_WORDS
    | _SCALE_WORDS
    | words("or and if else i e pi cup cap than not nor but versus to sqrt sin cos tan log ln x y z")
    | words("is isn are aren was were be over under above below")
)
_NOT_LAST = words(  # 5 negative numbers are a count, 5 negative is none
    "positive negative wrong incorrect false less fewer most least half third quarter fourth fifth sixth tenth "
    "zero one two three four five six seven eight nine ten eleven twelve twenty"
)
_AMBIGUOUS_LETTERS = words("m g s h l L N J W V A K")

_WORD = (
    r"(?:\\text\s*\{[^{}]*\}|\^\{\\circ\}\s*(?:\\text\s*\{\s*)?[CF](?:\s*\})?(?![a-zA-Z])"
    r"|[A-Za-zµ\u00c0-\u024f\u0370-\u04ff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]+)"
)
_FACTOR = _WORD + r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_UNIT = re.compile(_FACTOR + r"(?:\s*(?:/|\\cdot|\*|-|\s)\s*" + _FACTOR + r"){0,8}")
_PIECE = re.compile(r"(?P<word>[^\W\d_]+|°[CF])(?:\^(?P<power>-?\d))?|(?P<slash>/)")
_CURRENCY = re.compile(r"([-+]?)\s*(?:US|CA|AU)?\s*([$€£¥₹])\s*([-+]?[\d.(\\].*)", re.DOTALL)
_CURRENCY_BEHIND = re.compile(r"(.*\d)\s*([$€£¥₹¢])", re.DOTALL)
_HIRAGANA = re.compile("[\u3041-\u309f]")  # inflection: 5ではない is a sentence, not a unit
_SQUARE = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
_COMPOUND = re.compile(rf"(\d+(?:\.\d+)?)\s*({_WORD})(?:\s*(?:,|and\b|と)?\s*)")
_PLAIN_VALUE = re.compile(r"[-+]?[\d.,]+(?:\s*/\s*\d+)?|[-+]?\d*\s*\\frac\s*\{?\d+\}?\s*\{?\d+\}?")


def split_unit(text: str) -> tuple[str, Unit | None, bool]:
    """(value, unit, ambiguous) of a normalised answer; ambiguous if the unit is a letter that may be a variable.

    A word that is in no table is a unit only after a plain number: `7 apples`.
    """
    if match := _CURRENCY.fullmatch(text):
        sign, symbol, rest = match.groups()
        return sign + rest, read_unit(symbol), False
    if match := _CURRENCY_BEHIND.fullmatch(text):
        return match[1].rstrip(), read_unit(match[2]), False
    for match in re.finditer(_WORD, text):
        start = match.start()
        if start == 0 or not _UNIT.fullmatch(text, start):
            continue
        before = text[start - 1]
        if before.isalpha() and not re.search(r"\\pi$", text[:start]):
            continue
        value, suffix = text[:start].rstrip(), text[start:]
        if not value or not re.search(r"(?:[\d)}\]!%]|\\pi)$", value):
            continue
        unit = _unit_after(value, suffix)
        if unit is not None:
            letter = re.match(r"[A-Za-z]", suffix)
            single = letter is not None and not re.match(r"[A-Za-z]{2}", suffix)
            if single and suffix[0] not in _AMBIGUOUS_LETTERS:
                return text, None, False
            return value, unit, single
        return text, None, False
    return text, None, False


def _unit_after(value: str, suffix: str) -> Unit | None:
    known = read_unit(suffix)
    if known is not None:
        return known
    names = _words(suffix).lower().split()
    if not _PLAIN_VALUE.fullmatch(value) or not names or len(names) > MAX_WORDS:
        return None
    if names[-1] in _NOT_LAST or any(
        name in _NOT_UNITS or (len(name) == 1 and name.isascii()) or _HIRAGANA.search(name) for name in names
    ):
        return None
    return Unit(Fraction(1), ((" ".join(_singular(name) for name in names), 1),))


def read_compound(text: str) -> tuple[Fraction, Unit] | None:
    """(value, unit) of `1 hour 30 minutes`, in its first unit; None if it is not several units of one kind."""
    pieces, position = list[tuple[Fraction, Unit]](), 0
    while position < len(text):
        match = _COMPOUND.match(text, position)
        unit = read_unit(match[2]) if match else None
        if match is None or unit is None or (pieces and not unit.same_dimension(pieces[0][1])):
            return None
        pieces.append((Fraction(match[1]), unit))
        position = match.end()
    if len(pieces) < 2:
        return None
    first = pieces[0][1]
    return sum((value * unit.factor for value, unit in pieces), Fraction(0)) / first.factor, first


def read_unit(text: str) -> Unit | None:
    """The unit that a text spells, if every word of it is in the table."""
    if text in _UNITS:
        base, factor = _UNITS[text]
        return Unit(factor, ((base, 1),))
    plain = re.sub(r"\bmph\b", "mi/h", re.sub(r"\bkm?ph\b", "km/h", _words(text)))
    factor, dimensions = Fraction(1), dict[str, int]()
    sign, pending, position, seen = 1, 1, 0, False
    for match in _PIECE.finditer(plain):
        if plain[position : match.start()].strip(" ·*-"):
            return None
        position = match.end()
        word = match["word"]
        if match["slash"] or (word and word.lower() in ("per", "毎")):
            sign = -1
            continue
        word, pending = _take_square(word, pending)
        if not word:
            continue
        found = _UNITS.get(word) or _UNITS.get(_singular(word)) or _UNITS.get(_singular(word.lower()))
        if found is None:
            return None
        power = int(match["power"] or 1) * pending * sign
        factor *= found[1] ** power
        dimensions[found[0]] = dimensions.get(found[0], 0) + power
        pending, seen = 1, True
    if not seen or plain[position:].strip(" ."):
        return None
    return Unit(factor, tuple(sorted((base, power) for base, power in dimensions.items() if power)))


def _take_square(word: str, pending: int) -> tuple[str, int]:
    """Take "square" or "cubic" off the front of a word (平方メートル is one word)."""
    for name, power in _SQUARE.items():
        if word.lower() == name:
            return "", power
        if not name.isascii() and word.startswith(name):
            return word[len(name) :], power
    return word, pending


def _words(text: str) -> str:
    r"""The unit without LaTeX: `\text{ cm}^{2}` becomes `cm^2`."""
    text = re.sub(r"\^\{\\circ\}\s*(?:\\text\s*\{\s*)?([CF])\b", r" °\1", text)
    text = re.sub(r"\\text\s*\{\s*([^{}]*?)\s*\}", r" \1 ", text)
    text = text.replace("\\cdot", " ").replace("{", "").replace("}", "")
    text = re.sub(r"(?<=[^\W\d_])\s+(squared|cubed)\b", lambda m: "^2" if m[1] == "squared" else "^3", text)
    return re.sub(r"\s*\^\s*", "^", text).strip()


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word

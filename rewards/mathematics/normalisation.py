"""Rewrites an answer into one spelling: ASCII digits and signs, one LaTeX command for each thing, no typography.

Left out: structure and values (`rewards.mathematics.parsing`), Japanese numerals (`rewards.mathematics.japanese`).
"""

# ruff: noqa: E501  tables of one rewrite a line stay readable only on one line
from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ", "0123456789+-()n")
_SUPERSCRIPT_RUN = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_SUBSCRIPT_RUN = re.compile(r"[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ]+")

_SYMBOLS = {
    "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ", "π": r"\pi ", "∞": r"\infty ", "∅": r"\emptyset ",
    "≤": r"\le ", "≦": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "≧": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "≒": r"\approx ", "×": r"\times ", "✕": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "‒": "-", "─": "-", "﹣": "-", "－": "-",
    "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "°": r"^{\circ}", "º": r"^{\circ}",
    "′": "'", "″": "''", "’": "'", "‘": "'", "“": '"', "”": '"', "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ",
    "⁄": "/", "∕": "/", "∶": ":", "、": ",", "。": ".", "「": "", "」": "", "『": "", "』": "", "〜": "~", "～": "~",
    "٪": "%", "٫": ".", "٬": ",", "،": ",", "ℝ": r"\mathbb{R} ", "ℤ": r"\mathbb{Z} ", "ℕ": r"\mathbb{N} ",
    "ℚ": r"\mathbb{Q} ", "ℂ": r"\mathbb{C} ", "→": r"\to ", "↦": r"\to ", "∧": r"\land ", "∨": r"\lor ", "℃": r"^{\circ}C",
    "℉": r"^{\circ}F", "\u00a0": " ", "\u3000": " ", "\ufeff": "", "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "",
    "\u2061": "", "\u2062": "", "ⅈ": "i", "ⅉ": "j", "ⅇ": "e", "ⅆ": "d",
    "㎟": "mm^{2}", "㎠": "cm^{2}", "㎡": "m^{2}", "㎢": "km^{2}", "㎣": "mm^{3}", "㎤": "cm^{3}", "㎥": "m^{3}",
}  # fmt: skip
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ϵ": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ϕ": "phi",
    "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Σ": "Sigma", "Φ": "Phi",
    "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_CHARACTERS = str.maketrans({**_SYMBOLS, **{letter: f"\\{name} " for letter, name in _GREEK.items()}})

_NUMBER_SEPARATORS = [
    (re.compile(r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3})"), ","),  # 14{,}916
    (re.compile(r"(?<=\d),?\s*\\[!,:;]\s*(?=\d{3}(?!\d))"), ","),  # 32,\! 349 and 32\,349
    (re.compile(r"(?<=\d)\s*\{\s*\.\s*\}\s*(?=\d)"), "."),
]
_REWRITES = [
    (re.compile(r"\\(?:left|right|middle|mathopen|mathclose)\s*(?=[\\()\[\]{}|<>/.]|$)\.?"), ""),
    (re.compile(r"\\[bB]igg?[lrm]?\s*(?=[\\()\[\]{}|<>/.])"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|protect|hfill|noindent|centering)\b"), " "),
    (re.compile(r"(?<!\\)\\(?:[,;:!> ]|quad\b|qquad\b|enspace\b|thinspace\b|,)"), " "),
    (re.compile(r"\\hspace\*?\{[^{}]*\}|\\phantom\{[^{}]*\}|\\(?:label|tag)\*?\{[^{}]*\}"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\{\s*([^{}\\]+?)\s*\\choose\s*([^{}\\]+?)\s*\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\\(?:text|textnormal|mbox|hbox|textup|textsf|texttt|textit|textbf|emph|mathrm|mathsf|mathtt|mathit|mathbf|boldsymbol|bm|operatorname\*?|rm|pmb)\s*(?=\{)"), r"\\text"),
    (re.compile(r"\\text\s*\{\s*([$€£¥₹])\s*\}"), r"\1"),
    (re.compile(r"\\(?:rm|bf|it|sf|tt)\b"), " "),
    (re.compile(r"\\(?:degrees?|textdegree|degree)\b|\^\s*\\circ\b|\^\s*\{\s*\\circ\s*\}|\^\s*\{\s*\\degree\s*\}|\\circ\b(?=\s*(?:$|[,.)\]}]))"), r"^{\\circ}"),
    (re.compile(r"\\(?:leqslant|leqq|leq)\b|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geqq|geq)\b|>=|(?<!=)=>"), r"\\ge "),
    (re.compile(r"\\(?:neq|not\s*=)|!=|<>"), r"\\ne "),
    (re.compile(r"\\lt\b"), "<"),
    (re.compile(r"\\gt\b"), ">"),
    (re.compile(r"\\(?:approxeq|simeq|fallingdotseq)\b"), r"\\approx "),
    (re.compile(r"\\(?:lbrace|\{)"), r"\\{"),
    (re.compile(r"\\(?:rbrace|\})"), r"\\}"),
    (re.compile(r"\\(?:lbrack)\b"), "["),
    (re.compile(r"\\(?:rbrack)\b"), "]"),
    (re.compile(r"\\(?:lparen)\b"), "("),
    (re.compile(r"\\(?:rparen)\b"), ")"),
    (re.compile(r"\\(?:lvert|rvert|vert|mid)\b"), "|"),
    (re.compile(r"\\(?:ast)\b"), "*"),
    (re.compile(r"\\(?:varnothing|O(?![a-zA-Z]))|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:exp)\b"), r"\\exp "),
    (re.compile(r"\\(?:imath|mathit\{i\})"), "i"),
    (re.compile(r"\\(?:varepsilon)\b"), r"\\epsilon "),
    (re.compile(r"\\(?:varphi)\b"), r"\\phi "),
    (re.compile(r"\\(?:vartheta)\b"), r"\\theta "),
    (re.compile(r"\\(?:mathbb|Bbb)\s*(?:\{\s*)?([A-Z])\s*\}?"), r"\\mathbb{\1}"),
    (re.compile(r"\\R(?![a-zA-Z])"), r"\\mathbb{R}"),
    (re.compile(r"\\(?:dots|ldots|cdots|dotsc|dotsb)\b|\.\.\.|…"), r"\\dots "),
]  # fmt: skip
_MATH_DELIMITERS = re.compile(r"\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\](?!\d)|(?<!\\)\$(?!\s*\d)|\$(?=\s*$)")
_PERCENT_WORD = re.compile(
    r"(?<=[\d)}\s])\s*(?:\\text\s*\{\s*)?\b(?:per\s?cent|percentage|pct)\b(?:\s*\})?", re.IGNORECASE
)
_PAIRED_DOLLARS = re.compile(r"(?<!\\)\$([^$]*[^$\\\s][^$]*)(?<!\\)\$")
_OUTER_QUOTES = re.compile(r"""^(["'`*_]+)(.*?)\1$""", re.DOTALL)
_ONLY_TEXT = re.compile(r"^(\\text)\s*\{([^{}]*)\}$")
_TRAILING = re.compile(r"(?:[\s.,;:!]|\\\\)+$")


def normalise(text: str) -> str:
    """One spelling of an answer. Idempotent in effect: normalising twice changes nothing that matters."""
    text = to_ascii(text)
    if "\\" in text or "<" in text or ">" in text or "!" in text or "{" in text or "." in text:
        for pattern, replacement in _NUMBER_SEPARATORS:
            text = pattern.sub(replacement, text)
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
    text = _strip_math_delimiters(text)
    text = _PERCENT_WORD.sub("%", text.replace(r"\%", "%"))
    text = text.replace(r"\$", "$").replace(r"\#", "#").replace(r"\&", " and ")
    text = text.replace(r"\_", "_").replace("~", " ~ ").replace("\n", " ").strip()
    while quoted := _OUTER_QUOTES.match(text) or _ONLY_TEXT.match(text):
        text = quoted.group(2).strip()
    return _without_trailing_punctuation(text)


def to_ascii(text: str) -> str:
    """Unicode spellings of digits, signs and letters, in ASCII and LaTeX."""
    if text.isascii():
        return text
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = text.translate(_CHARACTERS)
    out = []
    for character in text:
        if character.isascii():
            out.append(character)
            continue
        decomposition = unicodedata.decomposition(character)
        if decomposition.startswith("<fraction>"):
            numerator, _, denominator = unicodedata.normalize("NFKC", character).partition("\u2044")
            out.append(f"\\frac{{{numerator}}}{{{denominator}}}" if denominator else character)
        elif unicodedata.category(character) == "Nd":
            out.append(str(unicodedata.digit(character)))
        elif unicodedata.category(character) != "Cf":
            out.append(character)
    return unicodedata.normalize("NFKC", "".join(out)).translate(_CHARACTERS)


def _strip_math_delimiters(text: str) -> str:
    """Remove dollar signs and the like around formulas, but keep a dollar sign before a number: it is a currency."""
    stripped = text.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = stripped[len(opening) : len(stripped) - len(closing)]
        enclosed = stripped.startswith(opening) and stripped.endswith(closing) and inner
        if enclosed and opening not in inner.replace(r"\$", ""):
            return inner.strip()
    return _MATH_DELIMITERS.sub(" ", _PAIRED_DOLLARS.sub(r" \1 ", stripped))


def _without_trailing_punctuation(text: str) -> str:
    shorter = _TRAILING.sub("", text)
    if text.endswith("!") and not shorter.endswith("!"):  # a factorial, unless it follows a word
        factorials = text[len(shorter) :].strip(" .,;:")
        if (
            factorials
            and set(factorials) == {"!"}
            and re.search(r"[\d)}a-zA-Z]$", shorter)
            and not re.search(r"[a-zA-Z]{2}$", shorter)
        ):
            return shorter + factorials
    return shorter.strip()

"""Cuts a normalised answer into tokens: numbers, letters, words, commands and signs.

Left out: grammar (`rewards.mathematics.parsing`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from rewards.mathematics.grammar import words
from rewards.mathematics.syntax import UnreadableError

MAX_TOKENS = 600


class Kind(Enum):
    """What a token is."""

    NUMBER = "number"
    LETTER = "letter"  # one variable
    WORD = "word"  # letters that are no product of variables: \text{...}, longer runs, other scripts
    COMMAND = "command"  # a LaTeX command, without its backslash
    SIGN = "sign"
    END = "end"


@dataclass(frozen=True, slots=True)
class Token:
    """One token; `spaced` tells whether white space stood before it, `upright` whether it came from \\text{...}."""

    kind: Kind
    text: str
    spaced: bool = False
    upright: bool = False


_GROUPED_NUMBER = r"[1-9]\d{0,2}(?:,\d{3})+(?![\d,])(?:\.\d+)?|[1-9]\d{0,2}(?: \d{3})+(?!\d)(?:\.\d+)?(?!\s*/)"
_TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<grouped>" + _GROUPED_NUMBER + r")"
    r"|(?P<number>\d+\.\d+|\d+\.(?=\s*\\(?:overline|bar|dot)(?![a-z]))|\d+|\.\d+)"
    r"|(?P<text>\\text\s*\{)"
    r"|(?P<command>\\[A-Za-z]+)"
    r"|(?P<escaped>\\\\|\\[{}|])"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<operator>\*\*|<=|>=|==|!=)"
    r"|(?P<word>[^\W\d_]+)"
    r"|(?P<sign>.)",
    re.DOTALL,
)
_OPENING = {"(", "[", "{", "\\{"}
_CLOSING = {")", "]", "}", "\\}"}
_SIGN_SPELLINGS = {"**": "^", "==": "=", "<=": "le", ">=": "ge", "!=": "ne"}
_KNOWN_WORDS = words(
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan asin acos atan log ln lg exp sqrt abs floor ceil "
    "ceiling pi infinity inf oo and or min max gcd lcm union theta alpha beta gamma omega phi"
)
_SHORT_WORDS = words("no on in is it at as if to of by be up so we an")  # not products of variables


def tokenise(text: str, grouping: bool = True) -> list[Token]:
    """Tokens of a normalised answer, closed by an END token.

    With `grouping`, `1,234` outside of brackets is one number; without it, a comma always separates.

    Raises:
        UnreadableError: more than MAX_TOKENS tokens, or a `\\text{` that is never closed.
    """
    tokens: list[Token] = []
    position, depth, spaced = 0, 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None  # the last alternative takes any character
        kind, value = match.lastgroup, match.group()
        if kind == "space":
            spaced, position = True, match.end()
            continue
        if kind == "grouped" and (not grouping or depth):
            match = re.compile(r"\d+(?:\.\d+)?").match(text, position)
            assert match is not None  # a grouped number starts with digits
            kind, value = "number", match.group()
        position = match.end()
        if kind == "text":
            content, position = _braced(text, position)
            tokens.extend(_upright(content, spaced))
        else:
            depth += (value in _OPENING) - (value in _CLOSING)
            tokens.extend(_tokens_of(str(kind), value, spaced))
        spaced = False
        if len(tokens) > MAX_TOKENS:
            raise UnreadableError(f"more than {MAX_TOKENS} tokens")
    tokens.append(Token(Kind.END, "", spaced))
    return tokens


def _tokens_of(kind: str, value: str, spaced: bool) -> list[Token]:
    match kind:
        case "number":
            return [Token(Kind.NUMBER, value, spaced)]
        case "grouped":
            return [Token(Kind.NUMBER, value.replace(",", "").replace(" ", ""), spaced)]
        case "command":
            return [Token(Kind.COMMAND, value[1:], spaced)]
        case "letters":
            return _letters(value, spaced)
        case "word":
            return [Token(Kind.WORD, value, spaced)]
        case "operator":
            return [Token(Kind.SIGN, _SIGN_SPELLINGS.get(value, value), spaced)]
        case _:
            return [Token(Kind.SIGN, value, spaced)]


def _letters(run: str, spaced: bool) -> list[Token]:
    """A run of letters: a known word, a product of two or three variables, or a word of a sentence."""
    lowered = run.lower()
    if lowered in _KNOWN_WORDS:
        return [Token(Kind.WORD, lowered, spaced)]
    if lowered in _SHORT_WORDS:
        return [Token(Kind.WORD, run, spaced)]
    for name in ("sqrt", "sin", "cos", "tan", "log", "ln", "pi"):
        if lowered.startswith(name) and len(run) - len(name) == 1:  # sinx, sqrtx
            return [Token(Kind.WORD, name, spaced), Token(Kind.LETTER, run[len(name) :])]
        if lowered.endswith(name) and len(run) - len(name) == 1 and name == "pi":
            return [Token(Kind.LETTER, run[0], spaced), Token(Kind.WORD, name)]
    if len(run) <= 2 or (len(run) <= 4 and not re.search("[aeiouAEIOU]", run)):
        return [Token(Kind.LETTER, letter, spaced and i == 0) for i, letter in enumerate(run)]
    return [Token(Kind.WORD, run, spaced)]


def _upright(content: str, spaced: bool) -> list[Token]:
    r"""Tokens of the inside of \text{...}: words stay whole; numbers and brackets become tokens as elsewhere."""
    tokens: list[Token] = []
    for match in _TOKEN.finditer(content):
        kind, value = match.lastgroup, match.group()
        if kind == "space":
            spaced = True
            continue
        if kind in ("letters", "word"):
            single = len(value) == 1 and kind == "letters"
            known = value.lower() if value.lower() in _KNOWN_WORDS else value
            tokens.append(Token(Kind.LETTER if single else Kind.WORD, known, spaced, upright=True))
        else:
            tokens.extend(_tokens_of(str(kind), value, spaced))
        spaced = False
    return tokens


def _braced(text: str, start: int) -> tuple[str, int]:
    """Content of the group whose opening brace ends at `start`, and the index after its closing brace."""
    depth = 1
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start:position], position + 1
    raise UnreadableError("an opening brace is never closed")

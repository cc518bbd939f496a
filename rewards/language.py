"""`language`: is the response written in the wanted language, reasoning and answer alike.

Scripts decide where they can; lingua decides between languages that share one. Left out: code, LaTeX, links and tags,
which belong to no language.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from rewards.api import RewardInput, RewardOutput, register_reward
from rewards.format import nfkc
from rl.errors import ConfigError

# ISO code -> the scripts that the language is written in, by the first word of the Unicode character name.
_SCRIPTS: dict[str, frozenset[str]] = {
    "ja": frozenset({"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"}),
    "zh": frozenset({"CJK"}),
    "ko": frozenset({"HANGUL"}),
    **dict.fromkeys(("ru", "uk", "bg"), frozenset({"CYRILLIC"})),
    **dict.fromkeys(("ar", "fa"), frozenset({"ARABIC"})),
    "el": frozenset({"GREEK"}),
    "he": frozenset({"HEBREW"}),
    "hi": frozenset({"DEVANAGARI"}),
    "th": frozenset({"THAI"}),
    **dict.fromkeys(("en", "fr", "de", "es", "it", "pt", "nl", "pl", "sv", "tr", "id", "vi"), frozenset({"LATIN"})),
}
_KANA = frozenset({"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"})
_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`"  # code
    r"|\$\$.*?\$\$|\$[^$\n]*\$|\\\[(?:(?!\\\[).)*?\\\]|\\\((?:(?!\\\().)*?\\\)"  # mathematics
    r"|\\boxed\{[^{}]*\}|\\[a-zA-Z]+"
    r"|https?://\S+|</?\w+>|<\|[^|>]*\|>",  # links, tags, special tokens
    re.DOTALL,
)
_ENVIRONMENT_MARK = re.compile(r"\\(begin|end)\{(\w+\*?)\}")
_SENTENCE = re.compile(r"[^.!?。!?\n]+[.!?。!?\n]*")
_ACRONYM_OR_SYMBOL = re.compile(r"(?<![A-Za-z0-9])(?:[A-Z][A-Z0-9]{1,7}|[A-Za-z]{1,2})(?![A-Za-z0-9])")
_CHUNK_LETTERS = 60  # enough for lingua to tell related languages apart
_MAX_CHUNK = 2000  # characters
_DECIDABLE = {"CJK": 12}  # characters of a passage or question that tell its language from others of the same script
_SHORT_RUN = re.compile(r"(?<![A-Za-zÀ-ɏΑ-ω])[A-Za-zÀ-ɏΑ-ω]{1,2}(?![A-Za-zÀ-ɏΑ-ω])")  # x, ab, α


@register_reward("language")
class LanguageReward:
    """The share of letters in the wanted language, 0 to 1: the weighted mean of reasoning and answer.

    Letters of another script count against it; so does each passage in the right script that lingua takes for another
    language, or, between Japanese and Chinese, that the kana give away. Acronyms and one- and two-letter names do not
    count in a language of another script.

    Args:
        language: ISO 639-1 code, or "prompt" for the language of the question (see `languages_of`).
        answer_weight: weight of the answer; the rest is the reasoning's. If one has no letters, the other decides.
        min_letters: a response with fewer letters gets 0, so that saying nothing is no way out.
        threshold: give 1 from this share on and 0 below, instead of the share itself.
    """

    shaping = True

    def __init__(
        self,
        *,
        language: str = "prompt",
        answer_weight: float = 0.5,
        min_letters: int = 10,
        threshold: float | None = None,
    ) -> None:
        if language != "prompt" and language not in _SCRIPTS:
            raise ConfigError(f"reward 'language' does not know {language!r}; it knows prompt, {', '.join(_SCRIPTS)}")
        if not 0.0 <= answer_weight <= 1.0 or not (threshold is None or 0.0 < threshold <= 1.0) or min_letters < 1:
            raise ConfigError("reward 'language': answer_weight must be in 0..1, threshold in (0, 1], min_letters >= 1")
        self._language = language
        self._answer_weight = answer_weight
        self._min_letters = min_letters
        self._threshold = threshold

    def __call__(self, sample: RewardInput) -> RewardOutput:
        languages = languages_of(sample.prompt) if self._language == "prompt" else frozenset({self._language})
        reasoning_text, answer_text = split_response(sample)
        reasoning, reasoning_letters = wanted_share(reasoning_text, languages)
        answer, answer_letters = wanted_share(answer_text, languages)
        parts = {"reasoning": reasoning, "answer": answer}
        if reasoning_letters + answer_letters < self._min_letters:
            return RewardOutput(0.0, parts)
        weight = self._answer_weight
        if not reasoning_letters or not answer_letters:
            weight = float(answer_letters > 0)
        share = weight * answer + (1.0 - weight) * reasoning
        return RewardOutput(share if self._threshold is None else float(share >= self._threshold), parts)


def split_response(sample: RewardInput) -> tuple[str, str]:
    """(reasoning, answer): what stands before the final answer, and the answer."""
    start = sample.response.rfind(sample.answer) if sample.answer else len(sample.response)
    return (sample.response[:start] if start >= 0 else sample.response), sample.answer


def wanted_share(text: str, languages: frozenset[str]) -> tuple[float, int]:
    """(share of letters in any of `languages`, letters that were counted); share 1 for a text without any."""
    wanted = counted = 0
    scripts = frozenset().union(*(_SCRIPTS[language] for language in languages))
    for passage, script in _passages(text, scripts):
        letters = sum(1 for c in passage if c.isalpha())
        counted += letters
        if script in scripts and _is_language(passage, languages, script, letters):
            wanted += letters
    return (wanted / counted if counted else 1.0), counted


def languages_of(question: str) -> frozenset[str]:
    """ISO codes of the languages that a question may be in: all that share its script where it is too short to tell
    them apart, and all without exception where it has no words (in Latin or Greek letters: of at least three).

    Raises:
        ValueError: most of it is in a script that no known language has.
    """
    lengths: dict[str, int] = {}
    words = _SHORT_RUN.sub(" ", nfkc(question))
    if any(script not in ("", "LATIN") for script in map(_script, words)):
        words = _ACRONYM_OR_SYMBOL.sub(" ", words)  # "JSONとは" is Japanese
    passages = list(_passages(words, frozenset()))
    for passage, script in passages:
        lengths[script] = lengths.get(script, 0) + len(passage)
    if not lengths:
        return frozenset(_SCRIPTS)
    script = max(lengths, key=lambda name: lengths[name])
    if script in _KANA | {"CJK"} and lengths.keys() & _KANA:
        return frozenset({"ja"})
    candidates = _written_in(script)
    if not candidates:
        raise ValueError(f"the prompt's script ({script}) is unknown; set the reward's option language")
    if len(candidates) < 2 or lengths[script] < _DECIDABLE.get(script, _CHUNK_LETTERS):
        return frozenset(candidates)
    found = _detect(" ".join(passage for passage, part in passages if part == script), candidates)
    return frozenset(candidates if found is None else {found})


def _passages(text: str, wanted_scripts: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(passage, script): pieces of one script each, long enough to be judged if there is enough text.

    Japanese sentences stay whole: their Han and kana come as one passage of kana.
    """
    text = _NO_LANGUAGE.sub(" ", _without_environments(nfkc(text)))
    if wanted_scripts and "LATIN" not in wanted_scripts:
        text = _ACRONYM_OR_SYMBOL.sub(" ", text)
    open_passages: dict[str, str] = {}
    for sentence in _SENTENCE.findall(text):
        for script, piece in _by_script(sentence).items():
            joined = f"{open_passages.get(script, '')} {piece}".strip()
            if len(joined) >= _CHUNK_LETTERS:
                open_passages.pop(script, None)
                for start in range(0, len(joined), _MAX_CHUNK):  # lingua's time is quadratic in a word's length
                    yield joined[start : start + _MAX_CHUNK], script
            else:
                open_passages[script] = joined
    yield from ((passage, script) for script, passage in open_passages.items())


def _without_environments(text: str) -> str:
    r"""The text without what stands between a `\begin{x}` and the next `\end{x}`, both included.

    Not by a regular expression, which would search the rest of the text for each `\begin` that nothing closes.
    """
    marks = list(_ENVIRONMENT_MARK.finditer(text))
    next_end: dict[str, int] = {}
    ends: dict[int, int] = {}  # begin -> end
    for mark in reversed(marks):
        if mark[1] == "end":
            next_end[mark[2]] = mark.end()
        elif mark[2] in next_end:
            ends[mark.start()] = next_end[mark[2]]
    kept, position = [], 0
    for begin, end in sorted(ends.items()):
        if begin >= position:
            kept.append(text[position:begin])
            position = end
    return " ".join([*kept, text[position:]])


def _by_script(sentence: str) -> dict[str, str]:
    """The words of a sentence by script. Example: "xは値 ok" gives {"LATIN": "x ok", "HIRAGANA": "は値"}."""
    runs: list[tuple[str, list[str]]] = []
    for character in sentence:
        script = _script(character)
        if script and runs and runs[-1][0] == script:
            runs[-1][1].append(character)
        elif script:
            runs.append((script, [character]))
        elif runs and character.isspace():
            runs[-1][1].append(" ")
    scripts = {script for script, _ in runs}
    japanese = bool(scripts & _KANA)
    pieces: dict[str, list[str]] = {}
    for script, run in runs:
        name = "HIRAGANA" if japanese and script in _KANA | {"CJK"} else script
        pieces.setdefault(name, []).append("".join(run).strip())
    return {script: ("" if script in ("HIRAGANA", "CJK") else " ").join(parts) for script, parts in pieces.items()}


@functools.lru_cache(maxsize=65536)
def _script(character: str) -> str:
    """ "" for a character that is no letter."""
    return unicodedata.name(character, "").split(" ")[0] if character.isalpha() else ""


def _is_language(passage: str, languages: frozenset[str], script: str, letters: int) -> bool:
    candidates = _written_in(script)
    if languages.issuperset(candidates) or letters < _DECIDABLE.get(script, 24):
        return True
    found = _detect(passage, candidates)
    return found is None or found in languages


def _written_in(script: str) -> tuple[str, ...]:
    return tuple(code for code, scripts in _SCRIPTS.items() if script in scripts)


def _detect(text: str, candidates: tuple[str, ...]) -> str | None:
    found = _detector(candidates).detect_language_of(text)
    return None if found is None else str(found.iso_code_639_1.name).lower()


@functools.cache
def _detector(names: Iterable[str]) -> Any:
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    codes = [getattr(IsoCode639_1, code.upper()) for code in names]
    # The low-accuracy mode is exact enough for passages of this length, and needs a fifth of the memory.
    return LanguageDetectorBuilder.from_iso_codes_639_1(*codes).with_low_accuracy_mode().build()

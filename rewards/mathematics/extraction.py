"""Finds the final answer in a response: the last box, else what follows "the answer is", else the last sentence.

Left out: what the answer means (`rewards.mathematics.parsing`), and thinking tags as the chat template knows them
(`rollout.chat`; only a stray `</think>` is cut here). A search runs in time linear in the text, or over a bounded part.
"""

from __future__ import annotations

import re

from rewards.mathematics.normalisation import normalise
from rewards.mathematics.numbers import SCALES
from rewards.mathematics.units import ARITHMETIC_WORDS, read_unit

MAX_ANSWER_CHARS = 2000  # a longer final answer is no answer
TAIL_CHARS = 4000  # of a response without box or anchor, in which its last sentence and formula are sought

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\w])")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;、，.]|\\[()\[\],;! ]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or|und|et|y|o)\b"
    r"|または|もしくは|および|と|や|か|和|或)*"
)
_PERCENT_AFTER = re.compile(r"\s{0,9}(?:\$|\\\)|\\\])?\s{0,9}(?:\\?[%％]|percent\b|pct\b|percentage\b|パーセント)")
_ANCHOR = re.compile(
    r"(?:"
    r"\banswer\b(?:\s+(?:to|of|for|in)\b[^.:=\n]{0,80}?)?\W{0,6}?(?:\s*\b(?:is|are|was|equals|would\s+be|should\s+be|will\s+be)\b|[:：=])(?:\s*\*+)?"
    r"|(?:\bcorrect|\bright)\s+(?:answer|option|choice)\b\W{0,6}?(?:\s*\bis\b|[:：])"
    r"|\b(?:la\s+)?(?:respuesta|réponse|resposta|risposta|solución|solution)(?:\s+(?:final|finale|correcta|correcte))?\s*(?:\b(?:es|est|é|è)\b|[:：])"
    r"|\b(?:antwort|lösung|ergebnis)\s*(?:\b(?:ist|lautet)\b|[:：])"
    r"|ответ\s*(?:[:：—-]|\bравен\b)"
    r"|(?:最終的な|最終|求める)?(?:答え|答|解答|正解|回答|解|値)"
    r"(?:\s*[】）)\]]\s*[:：]?|\s*(?:は|：|:|＝|=)\s*、?|\s+(?=[-−\d$\\(（]))"
    r"|(?:最终)?(?:答案|答)(?:\s*(?:是|为|為|：|:))"
    r"|(?:정답|답)\s*(?:은|는|:|：)"
    r"|(?<!\#)\#{4}(?!\#)"
    r")\s*",
    re.IGNORECASE | re.MULTILINE,
)
_MATH_SPAN = re.compile(
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$([^$\n]+?)(?<!\\)\$(?![$\d])", re.DOTALL
)
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?]\$)|(?<=[.!?]\$\$)|(?<=[.!?]\\[\])]))(?=\s+(?:[A-Z\"'*(\[$\\]|$))|(?<=[。！？])|\n+"
)
_CLOSING_REMARK = re.compile(
    r"(?:I hope (?:it|this) is correct|Hope this helps|Let me know[^.]*|<\|im_\w+\|>\w*)[.!]?", re.I
)
_ANSWER_TAGS = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_DISPLAYS = [
    (re.compile(opening), closing)
    for opening, closing in ((r"\$\$", "$$"), (r"(?<!\\)\\\[", r"\]"), (r"(?<!\\)\\\(", r"\)"))
]
_HEADING = re.compile(  # after ####: a number and words ("2. Add the rest"), or a word that is no value
    r"[\s*_`\"“(\[]*(?:(?:\d+(?:\.\d+)*|[A-Z])[.):]\s+[^\W\d]"
    r"|(?!(?:true|false|yes|no|infinity|sqrt|log|exp|sin|cos|tan|sec|csc|cot|arc\w+|max|min|gcd|lcm|USD|EUR|GBP|JPY)\b)"
    r"(?:[^\W\d_]{3,}(?!\()|[\u3040-\u30ff\u3400-\u9fff]{2,}))",
    re.IGNORECASE,
)
_OF_A_PART = re.compile(r"\b(?:part|parts|step|case|first|previous)\b|\(\w{1,3}\)", re.IGNORECASE)
_VALUE_FIRST = re.compile(r"[\s*_`]*[-+−－±(\[{|√\s]*(?:[$€£¥￥\\]|\.?\d|[^\W\d_]{1,3}(?:_\{?\w+\}?)?\s*=)")
_BOLD = re.compile(r"(?<![\w)\]}*])\*\*(?=[^\s*])([^*\n]{1,500})(?<=\S)\*\*(?![\w(*])")  # Markdown's bold, not a power
_LONE_CHOICE = re.compile(r"[\s*_]*(?:(?:Option|Choice|Answer)\s+)?\(?([A-J])\)?[\s*_.]*")
_NO_VALUE = re.compile(  # in one clause with a number: the answer is not it, or is only bounded by it
    r"(?:\b(?:not|cannot|never|neither|at\s+most|at\s+least)\b|n't\b"
    r"|\b(?:less|greater|more|fewer|smaller|larger|bigger|higher|lower|other)\s+than\b)[^\d\\$,;:=]*[\d\\$]",
    re.IGNORECASE,
)
_ARITHMETIC_BEFORE = re.compile(  # square root of 5, twice 5, log base 5, half of $5
    r"\b(?:root|twice|half|double|triple|negative|minus|plus|times|over|choose|log|logarithm|sine|cosine|tangent|base"
    r"|divided|multiplied|square|cube|power|inverse|reciprocal|percent|third|quarter|fourth|fifth|tenth)"
    r"(?:\s+(?:of|the|by|to|base|number))*\s+[-$€£¥￥]?\d",
    re.IGNORECASE,
)
_SENTENCE_START = re.compile(r"(?:[AaI]|[A-Za-z]{2,}),?\s+[A-Za-z]{2,}")
_CHAT_MARK = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|end|return)\|>")
_CLAUSE_AFTER = re.compile(
    r"(?:,|;|\s)\s*(?:because|since|where|as\s+(?:we|the|it)|so\s+(?:the|we)|when|given\s+that|that|such|i\.e|namely|after|if\s|という|なぜなら|ので)\b.*$",
    re.DOTALL,
)
_JAPANESE_COPULA = re.compile(
    r"\s*(?:です|となります|となる|になります|になる|である|であり|だ|でした|になりました)(?:。|\.|!|$).*$", re.DOTALL
)
_CHOICE_WITH_TEXT = re.compile(r"\s*(?:\([A-J]\)|[A-J][.):])\s[^\n\\$]{1,200}")
_LEADING_WORD = re.compile(
    r"^(?:(?:so|hence|thus|therefore|then|finally|result)\b|よって|したがって|ゆえに|従って|故に|つまり)[\s,、:]*=?\s*|^=\s*",
    re.IGNORECASE,
)
_ASSERTION = re.compile(
    r"(?:\b(?:is|are|was|equals|equal\s+to|gives?|yields?|gets?|becomes?|obtains?|by|it's|that's)\b:?"
    r"|(?<=[^<>!=])=(?=[^=])|≈|→|⇒|:\s|(?<!また)は|が)\s*"
)
_NUMBER = re.compile(
    r"[-+−－]?[$€£¥￥]?\s?\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?(?:\s?(?:\\?%|％|percent\b))?(?:[a-zA-Zµ°²³]{1,3}(?:\^?[23²³])?\b)?"
)


def extract_answer(text: str) -> str | None:
    """The final answer of a response as the model wrote it, or None if it gives none.

    Several boxes joined by "and", "or" or a comma come back as one list, `a, b`: the comparison decides whether that is
    the answer or a hedge.
    """
    final = _after_thinking(text)
    if final is None:
        return None
    if tagged := _ANSWER_TAGS.findall(final):
        final = tagged[-1]
    text = _CLOSING_REMARK.sub(" ", final).rstrip()
    if _CHOICE_WITH_TEXT.fullmatch(text):
        return text.strip()
    box, box_end = _last_boxes(text)
    anchored = _anchored(text, box_end)
    answer = anchored if anchored is not None else box
    if answer is None and box_end == 0:
        answer = _from_last_sentence(text)
    if answer is None or not answer.strip() or len(answer) > MAX_ANSWER_CHARS:
        return None
    return answer.strip()


def last_box(text: str) -> str | None:
    """The content of the last `\\boxed{...}` by brace matching, or None."""
    return _last_boxes(text)[0]


def _after_thinking(text: str) -> str | None:
    _, closed, rest = text.rpartition("</think>")
    if closed:
        text = rest
    elif "<think>" in text:
        return None  # the thinking never ended
    mark = _CHAT_MARK.search(text)
    return text[: mark.start()] if mark else text


def _last_boxes(text: str) -> tuple[str | None, int]:
    """Content of the last box, or of the last few that form a list, and where it ends; (None, 0) without a box."""
    starts = list(_BOX.finditer(text))[-12:]
    if not starts:
        return None, 0
    contents: list[str] = []
    end = 0
    following = None
    for match in reversed(starts):
        closed = _matching_brace(text, match.end())
        if closed is None:
            if following is None:
                return None, len(text)  # the last box was cut off, so there is no final answer
            break
        if following is not None:
            if closed > following:
                continue  # a box around the box already taken
            if not _BETWEEN_BOXES.fullmatch(text, closed, following):
                break
        else:
            end = closed
        following = match.start()
        content = text[match.end() + 1 : closed - 1] if text[match.end()] == "{" else text[match.end() : closed]
        if _PERCENT_AFTER.match(text, closed):
            content += "%"
        contents.append(content)
    if len(contents) > 1 and len({_spelling(content) for content in contents}) == 1:
        return contents[0], end  # one answer, boxed again
    return ", ".join(reversed(contents)), end


def _spelling(content: str) -> str:
    return normalise(content) if len(content) <= MAX_ANSWER_CHARS else content


def _matching_brace(text: str, start: int) -> int | None:
    """Index just after the group that starts at `start` (or one character if that is no brace); None if it is cut."""
    if text[start] != "{":
        return start + len(re.match(r"\w+", text[start:]).group())  # type: ignore[union-attr]  # _BOX saw a \w
    depth = 0
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position + 1
        position += 1
    return None


def _anchored(text: str, start: int) -> str | None:
    """What follows the last "the answer is" after `start`, if it holds something that can be an answer.

    After a box (`start` > 0) most such statements are remarks, like "the answer is unique", so only one that begins
    with a value counts.
    """
    anchors = [match for match in _ANCHOR.finditer(text, start) if not _is_heading(text, match)]
    for match in reversed(anchors[-6:]):
        content = _first_statement(text[match.end() : match.end() + MAX_ANSWER_CHARS])
        if start == 0 or (_VALUE_FIRST.match(content) and not _OF_A_PART.search(match.group())):
            answer = _answer_in_statement(content)
            if answer:
                return answer
    return None


def _is_heading(text: str, anchor: re.Match[str]) -> bool:
    """Whether a `####` is Markdown's and not GSM8K's: words follow it, and it does not begin the last line."""
    if not anchor.group().startswith("#"):
        return False
    before = text[max(anchor.start() - MAX_ANSWER_CHARS, 0) : anchor.start()].rpartition("\n")[2]
    line, goes_on, _ = text[anchor.end() : anchor.end() + MAX_ANSWER_CHARS].partition("\n")
    if not goes_on and not before.strip(' \t->*_`"'):
        return False
    return _HEADING.match(line) is not None


def _first_statement(text: str) -> str:
    """The first sentence with something in it."""
    text = text.lstrip(" \n*:：>")
    if text.startswith(("$$", "\\[", "$", "\\(")):
        span = _MATH_SPAN.match(text)
        if span:
            rest = re.split(_SENTENCE_END, text[span.end() :], maxsplit=1)[0]
            return span.group() + rest
    return re.split(_SENTENCE_END, text, maxsplit=1)[0]


def _answer_in_statement(statement: str) -> str:
    """The answer in what follows an anchor: what it asserts last, its formulas, its only number, or its words."""
    statement = _BOLD.sub(r"\1", statement)
    spans = list(_MATH_SPAN.finditer(statement))
    verbs = [v for v in _ASSERTION.finditer(statement) if not any(s.start() < v.start() < s.end() for s in spans)]
    if verbs:
        said = statement[verbs[-1].end() :]
        if _MATH_SPAN.search(said) or re.search(r"\d|\\", said):
            statement, spans = said, list(_MATH_SPAN.finditer(said))
    clause = statement if spans else _CLAUSE_AFTER.sub("", statement)
    if _NO_VALUE.search(clause):
        return ""
    if spans:
        return _joined_spans(statement, spans)
    statement = _JAPANESE_COPULA.sub("", clause)
    statement = statement.strip().strip('*_`"“”').rstrip(".。!").strip("*_` ")
    return _only_number(statement) or statement


def _only_number(sentence: str) -> str | None:
    """The only number, with its unit: `3 hours` in "Jane started 3 hours ago". None if words change it, or for more."""
    numbers = list(_NUMBER.finditer(sentence))
    if len(numbers) != 1 or not _SENTENCE_START.match(sentence) or _ARITHMETIC_BEFORE.search(sentence):
        return None
    number = numbers[0].group()
    behind = re.match(r"[\s-]*([A-Za-z]+)", sentence[numbers[0].end() :])
    word = behind[1].lower() if behind else ""
    if word in ARITHMETIC_WORDS:
        return None
    kept = word.removesuffix("s") in SCALES or (len(word) > 2 and read_unit(word))  # not the "in" of "5 in all"
    return f"{number} {word}" if kept else number


def _joined_spans(statement: str, spans: list[re.Match[str]]) -> str:
    """The last formula, and those before it that are joined to it by "and", "or" or a comma."""
    parts = [_span_text(spans[-1])]
    if _PERCENT_AFTER.match(statement, spans[-1].end()):
        parts[0] += "%"
    for before, after in zip(reversed(spans[:-1]), reversed(spans[1:])):
        if not _BETWEEN_BOXES.fullmatch(statement, before.end(), after.start()):
            break
        parts.append(_span_text(before))
    return ", ".join(reversed(parts))


def _span_text(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None).strip()


def _from_last_sentence(text: str) -> str | None:
    """The answer of a response with neither box nor anchor: all of it if short, else what its last sentence says."""
    text = text.strip()
    *before, last_line = text[-TAIL_CHARS:].splitlines() or [""]
    if before and (choice := _LONE_CHOICE.fullmatch(last_line)):
        return choice[1]
    sentences = [s for s in (part.strip() for part in re.split(_SENTENCE_END, text[-TAIL_CHARS:])) if s]
    if not sentences:
        return None
    last = _LEADING_WORD.sub("", _BOLD.sub(r"\1", sentences[-1]).strip("*_ "))
    spans = list(_MATH_SPAN.finditer(last))
    if not spans:
        displayed = _display_at_end(text)
        if displayed:
            return displayed
    if len(sentences) == 1 and not spans and _is_bare(last):
        return last.rstrip(".。")
    if re.search(r"\d|\\|\$", last):
        return _answer_in_statement(last)
    asserted = list(_ASSERTION.finditer(last))
    return last[asserted[-1].end() :].rstrip(".。! ") if asserted else None


def _display_at_end(text: str) -> str | None:
    """The formula that a text ends with, which may run over several lines; a full stop may follow it."""
    tail = text[-TAIL_CHARS:]
    for opening, closing in _DISPLAYS:
        end = tail.rfind(closing, max(0, len(tail) - 4))
        starts = list(opening.finditer(tail, 0, end)) if end > 0 else []
        if starts:
            return tail[starts[-1].end() : end].strip()
    return None


def _is_bare(text: str) -> bool:
    """Whether a text is an answer by itself: a formula, a number with a unit, or a few words."""
    if re.match(r"[-+(\[{\\|.√±]?\s*[-+$€£¥]?\s*\d|\\|[(\[{|√±]", text) and not re.search(
        r"\b(?:is|are|was)\b|は", text
    ):
        return True
    words = re.findall(r"[^\W\d_]{2,}", text)
    if re.search(r"\d|\\|\$", text):
        return len(words) <= 1 and ":" not in text
    return len(words) <= 3 and not _ASSERTION.search(text)

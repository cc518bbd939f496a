"""`format`: is the response laid out as asked: thinking block, answer tags, one boxed answer, or a pattern of your own.

Left out: whether the answer is right.
"""

from __future__ import annotations

import re
import unicodedata

from rewards.api import RewardInput, RewardOutput, register_reward
from rl.errors import ConfigError

_HARMONY_START, _HARMONY_MESSAGE = "<|start|>", "<|message|>"
_HARMONY_END, _HARMONY_RETURN = "<|end|>", "<|return|>"
_HARMONY_HEADER = re.compile(r"\s*(?:assistant\b[^<]*)?<\|channel\|>\s*(\w+)\b[^<]*(?:<\|constrain\|>[^<]*)?")
_MAX_NESTED_BOXES = 100
_NFKC_PIECE = 4096


@register_reward("format")
class FormatReward:
    """1 when the response has the layout asked for, else 0; a response cut at the token limit has none.

    Args:
        thinking: one non-empty block of reasoning at the very beginning, then a non-empty answer; the tags appear
            nowhere else. In harmony, a non-empty message in the analysis channel, and then one in the final channel,
            which is the last.
        prompt_opens_thinking: the chat template itself writes the opening tag, so the response begins inside.
        open_tag, close_tag: the thinking tags.
        answer_tags: the answer has exactly one `<answer>...</answer>`, which is not empty.
        boxed: the answer has exactly one `\\boxed{...}`, which is not empty and has balanced braces.
        pattern: a regular expression that matches the whole response (`.` matches line ends too).
        partial: give the share of the checks that hold, instead of all or nothing.
    """

    shaping = True

    def __init__(
        self,
        *,
        thinking: bool = True,
        prompt_opens_thinking: bool = False,
        open_tag: str = "<think>",
        close_tag: str = "</think>",
        answer_tags: bool = False,
        boxed: bool = False,
        pattern: str | None = None,
        partial: bool = False,
    ) -> None:
        if not (thinking or answer_tags or boxed or pattern):
            raise ConfigError("reward 'format' has nothing to check; set thinking, answer_tags, boxed or pattern")
        if not open_tag or not close_tag or open_tag == close_tag:
            raise ConfigError(f"reward 'format' needs two different tags, not {open_tag!r} and {close_tag!r}")
        try:
            self._pattern = re.compile(pattern, re.DOTALL) if pattern else None
        except re.error as error:
            raise ConfigError(
                f"reward 'format': pattern {pattern!r} is not a valid regular expression: {error}"
            ) from error
        self._thinking = thinking
        self._prompt_opens = prompt_opens_thinking
        self._open, self._close = open_tag, close_tag
        self._answer_tags = answer_tags
        self._boxed = boxed
        self._partial = partial

    def __call__(self, sample: RewardInput) -> RewardOutput:
        checks: dict[str, bool] = {}
        if self._thinking:
            checks["thinking"] = self._thinks(sample)
        if self._answer_tags:
            contents = tagged_contents(sample.answer)
            checks["answer_tags"] = len(contents) == 1 == sample.answer.count("<answer>") and bool(contents[0].strip())
        if self._boxed:
            contents = boxed_contents(sample.answer)
            checks["boxed"] = len(contents) == 1 and bool(contents[0].strip())
        if self._pattern is not None:
            checks["pattern"] = self._pattern.fullmatch(sample.response.strip()) is not None
        if sample.truncated:
            checks = dict.fromkeys(checks, False)
        held = sum(checks.values())
        reward = held / len(checks) if self._partial else float(held == len(checks))
        return RewardOutput(reward, {name: float(holds) for name, holds in checks.items()})

    def _thinks(self, sample: RewardInput) -> bool:
        if _thinks_in_harmony(sample):
            return True
        text = sample.response.strip()
        if self._prompt_opens:
            text = self._open + text
        if not text.startswith(self._open) or text.count(self._open) != 1 or text.count(self._close) != 1:
            return False
        reasoning, _, answer = text.removeprefix(self._open).partition(self._close)
        return bool(reasoning.strip()) and bool(answer.strip())


def _thinks_in_harmony(sample: RewardInput) -> bool:
    """Is the response analysis and then a final message?

    Only an answer that a harmony tokenizer found directly follows `<|message|>`. To any other model these marks are
    text that it may write at will, and its answer is the whole response or follows a closing tag.
    """
    text, answer = sample.response.rstrip(), sample.answer.strip()
    if not text.endswith(answer):
        text = text.removesuffix(_HARMONY_RETURN).removesuffix(_HARMONY_END).rstrip()
    head = text.removesuffix(answer).rstrip()
    if not answer or not text.endswith(answer) or not head.endswith(_HARMONY_MESSAGE):
        return False
    *before, final = head.removesuffix(_HARMONY_MESSAGE).split(_HARMONY_START)
    return _channel(final) == "final" and any(_is_analysis(message) for message in before)


def _is_analysis(message: str) -> bool:
    header, _, content = message.partition(_HARMONY_MESSAGE)
    return _channel(header) == "analysis" and bool(content.partition(_HARMONY_END)[0].strip())


def _channel(header: str) -> str:
    """The channel in the header of an assistant's message; "" for any other header."""
    match = _HARMONY_HEADER.fullmatch(header)
    return match[1] if match else ""


def nfkc(text: str) -> str:
    """Unicode NFKC, piece by piece: as a whole, a long run of combining marks takes time quadratic in its length."""
    pieces = (text[i : i + _NFKC_PIECE] for i in range(0, len(text), _NFKC_PIECE))
    return "".join(unicodedata.normalize("NFKC", piece) for piece in pieces)


def tagged_contents(text: str) -> list[str]:
    """The content of each `<answer>...</answer>`, up to the first closing tag.

    Example: "<answer>3</answer> or <answer>4" gives ["3"].
    """
    contents: list[str] = []
    end = 0
    while (start := text.find("<answer>", end)) >= 0:
        start += len("<answer>")
        end = text.find("</answer>", start)
        if end < 0:
            break
        contents.append(text[start:end])
    return contents


def boxed_contents(text: str) -> list[str]:
    r"""The content of each `\boxed{...}`, by matching braces; "" for a box that is never closed.

    A box inside a hundred others is "", too: contents of any depth would take memory quadratic in the text's length.
    Example: r"\boxed{\frac{1}{2}} or \boxed{3" gives [r"\frac{1}{2}", ""].
    """
    boxes = {match.end() - 1: i for i, match in enumerate(re.finditer(r"\\boxed\s*\{", text))}  # brace -> box
    contents = [""] * len(boxes)
    opened: list[int] = []  # braces
    depth = 0  # of boxes among them
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # an escaped brace is none
        if match[0] == "{":
            opened.append(match.start())
            depth += match.start() in boxes
        elif match[0] == "}" and opened:
            brace = opened.pop()
            if brace in boxes:
                if depth <= _MAX_NESTED_BOXES:
                    contents[boxes[brace]] = text[brace + 1 : match.start()]
                depth -= 1
    return contents

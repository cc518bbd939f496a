"""`format`: is the response laid out as asked: thinking block, answer tags, one boxed answer, or a pattern of your own.

Left out: whether the answer is right.
"""

from __future__ import annotations

import re

from rewards.api import RewardInput, RewardOutput, register_reward
from rl.errors import ConfigError

_HARMONY_CHANNEL = "<|channel|>"


@register_reward("format")
class FormatReward:
    """1 when the response has the layout asked for, else 0; a response cut at the token limit has none.

    Args:
        thinking: one block of reasoning that is not empty, from the first character on, then an answer that is not
            empty; the tags appear nowhere else. In harmony, an analysis channel and a final one.
        prompt_opens_thinking: the chat template itself writes the opening tag, so the response begins inside.
        open_tag, close_tag: the thinking tags.
        answer_tags: the answer has exactly one `<answer>...</answer>`, not empty.
        boxed: the answer has exactly one `\\boxed{...}`, not empty, its braces balanced.
        pattern: a regular expression that matches the whole response (`.` matches line ends too).
        partial: the share of the checks that hold, in place of all or nothing.
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
            raise ConfigError(f"reward 'format': pattern {pattern!r} is no regular expression: {error}") from error
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
            contents = re.findall(r"<answer>(.*?)</answer>", sample.answer, re.DOTALL)
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
        if _HARMONY_CHANNEL in sample.response:
            return f"{_HARMONY_CHANNEL}analysis" in sample.response and bool(sample.answer.strip())
        text = sample.response.strip()
        if self._prompt_opens:
            text = self._open + text
        if not text.startswith(self._open) or text.count(self._open) != 1 or text.count(self._close) != 1:
            return False
        reasoning, _, answer = text.removeprefix(self._open).partition(self._close)
        return bool(reasoning.strip()) and bool(answer.strip())


def boxed_contents(text: str) -> list[str]:
    r"""What stands in each `\boxed{...}`, by matching braces; a box that is never closed is "".

    Example: r"\boxed{\frac{1}{2}} or \boxed{3" gives [r"\frac{1}{2}", ""].
    """
    contents: list[str] = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            character = text[end]
            if character == "\\":
                end += 1
            depth += (character == "{") - (character == "}")
            end += 1
        contents.append(text[match.end() : end - 1] if depth == 0 else "")
    return contents

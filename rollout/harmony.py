"""GPT-OSS's harmony format, read from token ids: messages with a role, a channel and content.

Format: https://cookbook.openai.com/articles/openai-harmony. Left out: decoding content, and rendering prompts (the
checkpoint's chat template does that). openai-harmony is not used: it fetches its vocabulary from a network, and the
checkpoint's own special tokens are enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

STRUCTURE_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>")
_REQUIRED = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


@dataclass(frozen=True, slots=True)
class HarmonyTokens:
    """The special token ids of a harmony checkpoint."""

    start: int
    channel: int
    message: int
    ends: frozenset[int]  # <|end|>, <|return|>, <|call|>: each closes a message
    marks: frozenset[int]  # all of the above and <|constrain|>: each ends a piece of a header

    @classmethod
    def find(cls, vocabulary: Mapping[str, int]) -> HarmonyTokens | None:
        """From a vocabulary (token -> id); None if it is not a harmony vocabulary."""
        if any(token not in vocabulary for token in _REQUIRED):
            return None
        ends = frozenset(vocabulary[t] for t in ("<|end|>", "<|return|>", "<|call|>") if t in vocabulary)
        marks = ends | {vocabulary[t] for t in STRUCTURE_TOKENS if t in vocabulary}
        return cls(vocabulary["<|start|>"], vocabulary["<|channel|>"], vocabulary["<|message|>"], ends, marks)


@dataclass(frozen=True, slots=True)
class HarmonyMessage:
    """One message; `content` is a range of positions in the parsed token ids."""

    role: str
    channel: str  # "" where the header names none
    content: range


def parse(
    token_ids: Sequence[int], tokens: HarmonyTokens, decode: Callable[[Sequence[int]], str]
) -> list[HarmonyMessage]:
    """The messages in `token_ids`, which begin at a message's `<|start|>` or inside a header of the assistant.

    A header is `<|start|>role [to=recipient]`, `<|channel|>channel [to=recipient]`, perhaps `<|constrain|>type`; it
    ends at `<|message|>`. Content lasts until an end token or the next `<|start|>`. Tokens between messages are
    skipped. No input is an error: a model may write anything. `decode` is only called on pieces of headers.
    """
    messages: list[HarmonyMessage] = []
    role, channel, in_header, begin = "assistant", "", True, -1  # begin: the content's; negative outside content
    marks = [i for i, token in enumerate(token_ids) if token in tokens.marks]
    for position, next_position in itertools.pairwise([*marks, len(token_ids)]):
        mark = token_ids[position]
        if begin >= 0 and (mark in tokens.ends or mark == tokens.start):
            messages.append(HarmonyMessage(role, channel, range(begin, position)))
            begin = -1
        if begin >= 0:
            continue  # a channel or message token inside content is part of it
        if mark in tokens.ends:
            in_header = False
        elif mark == tokens.start:
            role, channel, in_header = _first_word(decode(token_ids[position + 1 : next_position])), "", True
        elif mark == tokens.channel and in_header:
            channel = _first_word(decode(token_ids[position + 1 : next_position]))
        elif mark == tokens.message and in_header:
            begin, in_header = position + 1, False
    if begin >= 0:
        messages.append(HarmonyMessage(role, channel, range(begin, len(token_ids))))
    return messages


def final_content(messages: Sequence[HarmonyMessage]) -> range | None:
    """The content of the last message that the assistant wrote to the final channel; None without one."""
    return next((m.content for m in reversed(messages) if m.role == "assistant" and m.channel == "final"), None)


def open_message(prompt_ids: Sequence[int], tokens: HarmonyTokens) -> Sequence[int]:
    """The end of a prompt that belongs to the response's first message: everything from the last `<|start|>` on.
    Empty if the prompt's last message is closed."""
    for i in range(len(prompt_ids) - 1, -1, -1):
        if prompt_ids[i] in tokens.ends:
            return ()
        if prompt_ids[i] == tokens.start:
            return prompt_ids[i:]
    return ()


def _first_word(text: str) -> str:
    return text.split(maxsplit=1)[0] if text.strip() else ""

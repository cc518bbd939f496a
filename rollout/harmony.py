"""GPT-OSS's harmony format, read from token ids: messages with a role, a channel and content.

Format: https://cookbook.openai.com/articles/openai-harmony. Left out: decoding content, and rendering prompts (the
checkpoint's chat template does that). openai-harmony is not used: it fetches its vocabulary from a network, and the
checkpoint's own special tokens are enough.
"""

from __future__ import annotations

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
    marks: frozenset[int]  # everything that ends a piece of a message's header

    @classmethod
    def find(cls, vocabulary: Mapping[str, int]) -> HarmonyTokens | None:
        """From a vocabulary (token -> id); None when it is not a harmony one."""
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
    closed: bool  # False where the tokens ended first


def parse(
    token_ids: Sequence[int], tokens: HarmonyTokens, decode: Callable[[Sequence[int]], str]
) -> list[HarmonyMessage]:
    """The messages in `token_ids`, which begin at a message's `<|start|>` or inside a header, after the role.

    A header is `role [to=recipient]`, `<|channel|>`, `channel [to=recipient]`, perhaps `<|constrain|>type`; it ends at
    `<|message|>`. Tokens that belong to no message (after a closed one, before the next start) are skipped. Nothing is
    an error: a model may write anything. `decode` is only called on pieces of headers.
    """
    messages: list[HarmonyMessage] = []
    position, size = 0, len(token_ids)
    while position < size:
        role, channel, position = _parse_header(token_ids, position, tokens, decode)
        if position == size or token_ids[position] != tokens.message:
            # A header that ends without content: go on at the next message's start.
            position = _find(token_ids, {tokens.start}, position + 1)
            continue
        begin = position + 1
        end = _find(token_ids, tokens.ends | {tokens.start}, begin)
        closed = end < size and token_ids[end] in tokens.ends
        messages.append(HarmonyMessage(role, channel, range(begin, end), closed))
        position = _find(token_ids, {tokens.start}, end)
    return messages


def final_content(messages: Sequence[HarmonyMessage]) -> range | None:
    """The content of the last message that the assistant wrote to the final channel; None without one."""
    return next((m.content for m in reversed(messages) if m.role == "assistant" and m.channel == "final"), None)


def open_message(prompt_ids: Sequence[int], tokens: HarmonyTokens) -> Sequence[int]:
    """The end of a prompt that belongs to the response's first message: what follows the last `<|start|>`, itself
    included. Empty for a prompt whose last message is closed."""
    for i in range(len(prompt_ids) - 1, -1, -1):
        if prompt_ids[i] in tokens.ends:
            return ()
        if prompt_ids[i] == tokens.start:
            return prompt_ids[i:]
    return ()


def _parse_header(
    token_ids: Sequence[int], position: int, tokens: HarmonyTokens, decode: Callable[[Sequence[int]], str]
) -> tuple[str, str, int]:
    """(role, channel, position of the token that ended the header)"""
    role, channel = "assistant", ""
    while position < len(token_ids):
        mark = token_ids[position]
        if mark not in tokens.marks:  # the response begins inside the role's piece: nothing to read there
            position = _find(token_ids, tokens.marks, position)
            continue
        if mark == tokens.message or mark in tokens.ends:
            break
        piece_end = _find(token_ids, tokens.marks, position + 1)
        words = decode(token_ids[position + 1 : piece_end]).split()
        first = words[0] if words else ""
        if mark == tokens.start:
            role, channel = first, ""
        elif mark == tokens.channel:
            channel = first
        position = piece_end
    return role, channel, position


def _find(token_ids: Sequence[int], wanted: frozenset[int] | set[int], position: int) -> int:
    """Position of the first wanted token from `position` on; the length where there is none."""
    return next((i for i in range(position, len(token_ids)) if token_ids[i] in wanted), len(token_ids))

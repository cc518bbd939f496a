"""From rows to supervised examples: a prompt and the response to learn, tokenized as the chat template writes them.

Left out: batching and the loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from rl.batch import IntArray
from rl.config import SftDataConfig
from rl.errors import DataError
from rl.prompts.generated import is_generated
from rl.prompts.messages import parse_messages, prompt_messages
from rl.prompts.rows import Row, dataset_name, missing_field, read_rows
from rl.prompts.template import ChatTemplate, Message

_ROWS_PER_BATCH = 1024
_THINKING = ("reasoning_content", "reasoning", "thinking")  # message keys from which templates read thinking
_END_OF_THINKING = "</think>"
_EMPTY_BLOCK = re.compile(r"^\s*<think>\s*</think>\s*")


@dataclass(frozen=True, slots=True)
class SftExample:
    """One worked example. Every response token is learned, including the end-of-turn token; no prompt token is."""

    prompt_ids: IntArray  # [P] int32, exactly what a rollout of the same prompt starts from
    response_ids: IntArray  # [R] int32, ends with the end-of-turn token


@dataclass(frozen=True, slots=True)
class SftSet:
    """One dataset of worked examples."""

    name: str
    examples: tuple[SftExample, ...]  # in row order, never empty
    num_dropped_too_long: int  # rows left out for more than max_tokens
    num_verbatim: int  # examples whose response the template would have altered, dropped ones included


def load_sft_examples(config: SftDataConfig, tokenizer: Any, *, chat_template_options: Mapping[str, Any]) -> SftSet:
    """Load worked examples: rows with a prompt and a response, or `messages` that end with the assistant's.

    The prompt is tokenized as for a rollout. The response is what the template writes after it for an assistant turn,
    up to the end-of-turn token, so that prompt_ids + response_ids is the template's own tokenization of the
    conversation. If the template would not write the response after that prompt, the response is encoded as it stands
    and counted in `num_verbatim`.

    Raises:
        DataError: nothing to read, a broken row (with file and line), or no example left.
        ConfigError: a chat template option that the template never reads.
    """
    if is_generated(config.train):
        raise DataError(
            f"dataset {config.train.shown_path}: reasoning_gym makes problems without worked responses; use them with "
            "`fledge train`, or write responses into a file (as launch/quickstart.py does)"
        )
    template = ChatTemplate(tokenizer, chat_template_options)
    examples: list[SftExample] = []
    num_rows, num_verbatim, longest = 0, 0, 0
    rows = read_rows(config.train)
    while chunk := list(islice(rows, _ROWS_PER_BATCH)):
        num_rows += len(chunk)
        turns = [_turn(row, config, template) for row in chunk]
        num_verbatim += sum(turn.verbatim for turn in turns)
        for example in _encode(turns, template):
            length = len(example.prompt_ids) + len(example.response_ids)
            longest = max(longest, length)
            if length <= config.max_tokens:
                examples.append(example)
    if not num_rows:
        raise DataError(f"dataset {config.train.shown_path} holds no rows")
    if not examples:
        raise DataError(
            f"dataset {config.train.shown_path}: all {num_rows} examples are longer than "
            f"data.max_tokens={config.max_tokens} (the longest has {longest} tokens); raise data.max_tokens"
        )
    return SftSet(dataset_name(config.train), tuple(examples), num_rows - len(examples), num_verbatim)


@dataclass(frozen=True, slots=True)
class _Turn:
    prompt: str  # rendered, with the generation prompt
    completion: str  # what follows the prompt
    verbatim: bool  # the completion is the row's text, not the template's


def _turn(row: Row, config: SftDataConfig, template: ChatTemplate) -> _Turn:
    messages, response = _split(row, config)
    prompt = template.render(messages, row.location, add_generation_prompt=True)
    if prompt.rstrip().endswith(_END_OF_THINKING):  # drop an empty block that the prompt already has
        response = {**response, "content": _EMPTY_BLOCK.sub("", response["content"])}
    full = template.render([*messages, response], row.location, add_generation_prompt=False)
    return _completion(prompt, full, response, template.keys_read(_THINKING), row.location)


def _completion(prompt: str, full: str, response: Message, keys: Sequence[str], location: str) -> _Turn:
    """The prompt and what follows it: the template's text, if it continues the prompt and keeps the response's words.

    Otherwise (the template cuts the thinking out of the turn, or opens <think> only in the generation prompt) what
    follows is the response's content as it stands, without a <think> tag that the prompt has already opened. `keys` are
    those from which the template reads thinking.
    """
    content = response["content"]
    given = [key for key in _THINKING if isinstance(response.get(key), str)]
    parts = [content, *(response[key] for key in given)]
    tools = [call.get("function", call)["name"] for call in response.get("tool_calls") or ()]
    completion = full.removeprefix(prompt)
    remedy = _where_thinking_goes(prompt, [key for key in keys if key not in given])
    if full.startswith(prompt) and all(_words(part) in _words(completion) for part in parts + tools):
        if not given or "<think>" in content:
            _check_thinking(prompt, completion, content, remedy, location)
        return _Turn(prompt, completion, verbatim=False)
    if tools:
        raise DataError(f"{location}: the chat template does not write the response's tool calls; remove the row")
    if given:
        raise DataError(
            f"{location}: the chat template does not write the response's thinking after its own generation prompt; "
            f"{remedy}"
        )
    text = content
    if prompt.rstrip().endswith("<think>"):
        if _END_OF_THINKING not in content:
            raise DataError(
                f"{location}: the chat template opens <think> in the prompt, but the response has no </think>"
            )
        text = content.lstrip().removeprefix("<think>").lstrip("\n")
    _check_thinking(prompt, text, content, remedy, location)
    return _Turn(prompt, text, verbatim=True)


def _check_thinking(prompt: str, completion: str, content: str, remedy: str, location: str) -> None:
    """Raise DataError if thinking in the text would be learned as part of the answer: after a block that the template
    has closed, or within harmony's final channel."""
    closed = int(prompt.rstrip().endswith(_END_OF_THINKING)) + completion.count(_END_OF_THINKING)
    if _END_OF_THINKING in content and (closed > content.count(_END_OF_THINKING) or "<|channel|>" in completion):
        raise DataError(
            f"{location}: the response's text contains {_END_OF_THINKING}, but the chat template does not separate "
            f"the thinking from the text, so it would be learned as part of the answer; {remedy}"
        )


def _where_thinking_goes(prompt: str, keys: Sequence[str]) -> str:
    if prompt.rstrip().endswith(_END_OF_THINKING):
        return "the prompt has turned thinking off, so turn it on, or remove the thinking"
    if keys:
        return f"put the thinking into the key that the template reads ({' or '.join(keys)})"
    return "put the thinking into content, as text between <think> tags"


def _words(text: str) -> str:
    """The text without white space, which templates trim and add around thinking."""
    return "".join(text.split())


def _split(row: Row, config: SftDataConfig) -> tuple[list[Message], Message]:
    """(prompt messages, the assistant's final message)"""
    field = config.train.prompt_field
    value = row.fields.get(field)
    if value is None:
        field, value = "messages", row.fields.get("messages")
    if value is None:
        raise missing_field(row, config.train.prompt_field, "prompt_field")
    response = row.fields.get(config.response_field)
    if response is None:
        messages = parse_messages(value, field, row.location)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            if field == "messages":
                raise DataError(f"{row.location}: messages must consist of a prompt and the assistant message to learn")
            raise missing_field(row, config.response_field, "data.response_field")
        return prompt_messages(messages[:-1], config.train, row.location), messages[-1]
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    parsed = parse_messages(response, config.response_field, row.location)
    if len(parsed) != 1 or parsed[0]["role"] != "assistant":
        raise DataError(f"{row.location}: {config.response_field} must be text or one assistant message")
    return prompt_messages(value, config.train, row.location), parsed[0]


def _encode(turns: Sequence[_Turn], template: ChatTemplate) -> list[SftExample]:
    prompts = template.encode([turn.prompt for turn in turns])
    wholes = template.encode([turn.prompt + turn.completion for turn in turns])
    examples = []
    for turn, prompt, whole in zip(turns, prompts, wholes, strict=True):
        # If a token spans the border, encode the response alone: a rollout starts from the prompt's own tokens.
        exact = whole[: len(prompt)] == prompt
        response = whole[len(prompt) :] if exact else template.encode([turn.completion])[0]
        examples.append(
            SftExample(np.array(prompt, dtype=np.int32), np.array(_end_turn(response, template), dtype=np.int32))
        )
    return examples


def _end_turn(response: list[int], template: ChatTemplate) -> list[int]:
    """Cut what templates write after the end-of-turn token (white space, a conversation's EOS); append the token if it
    is missing."""
    end = template.end_of_turn_id
    for i in range(len(response) - 1, -1, -1):
        if response[i] == end:
            if not template.tokenizer.decode(response[i + 1 :], skip_special_tokens=True).strip():
                return response[: i + 1]
            break
    return [*response, end]

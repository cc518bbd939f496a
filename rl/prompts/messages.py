"""From a row's fields to checked chat messages, with the dataset's system prompt and suffix applied.

Left out: reading rows and rendering templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.config import DatasetConfig
from rl.errors import DataError
from rl.prompts.rows import Row
from rl.prompts.template import Message


def prompt_messages(value: Any, config: DatasetConfig, location: str) -> list[Message]:
    """The messages of a prompt (a string is one user message), ready for a generation prompt.

    `config.system_prompt` goes in front unless the row has a system message of its own; `config.prompt_suffix` is
    appended to the last user message.

    Raises:
        DataError: the value is not text or messages, is empty, or does not end in a message for the model to answer.
    """
    messages = parse_messages(value, config.prompt_field, location)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{location}: {config.prompt_field} ends with an assistant message; it must end with a message for the "
            "model to answer"
        )
    if config.system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    last = _last_user_message(messages)
    if last is None:
        raise DataError(f"{location}: {config.prompt_field} has no user message")
    last["content"] += config.prompt_suffix
    return messages


def parse_messages(value: Any, field: str, location: str) -> list[Message]:
    """Convert a string or a list of messages to a new list of messages.

    Raises:
        DataError: a message has no role, or neither text nor tool calls.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple):
        raise DataError(f"{location}: {field} must be text or a list of messages, not {_kind(value)}")
    if not value:
        raise DataError(f"{location}: {field} is an empty list of messages")
    return [_parse_message(message, f"{location}: {field}[{i}]") for i, message in enumerate(value)]


def question_text(messages: list[Message]) -> str:
    """The text of the last user message; empty if there is none."""
    last = _last_user_message(messages)
    return "" if last is None else last["content"]


def optional_text(row: Row, field: str) -> str | None:
    """The field's text; None if it is absent or null. Raises DataError for any other type."""
    value = row.fields.get(field)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{row.location}: {field} must be text, not {_kind(value)}")
    return value


def _parse_message(message: Any, location: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{location} must be an object with role and content, not {_kind(message)}")
    # A null stands for an absent key, and templates test for presence.
    present = {key: value for key, value in message.items() if value is not None}
    calls = present.get("tool_calls") or []
    if not isinstance(calls, list) or not all(_is_tool_call(call) for call in calls):
        raise DataError(f"{location}: tool_calls must be a list of objects with name, or with function.name")
    if calls:  # a turn with tool calls often has no content
        present.setdefault("content", "")
    for key in ("role", "content"):
        if not isinstance(present.get(key), str):
            raise DataError(f"{location}: {key} must be text, not {_kind(present.get(key))}")
    if not present["content"].strip() and not calls:
        raise DataError(f"{location}: content is empty")
    for key, value in present.items():
        if isinstance(value, str) and not _is_encodable(value):
            raise DataError(f"{location}: {key} contains half of a surrogate pair, which is not valid Unicode")
    return present


def _is_tool_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _last_user_message(messages: list[Message]) -> Message | None:
    return next((m for m in reversed(messages) if m["role"] == "user"), None)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"

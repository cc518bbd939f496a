"""Tokenizers and chat templates: from messages to text to token ids.

Left out: reading rows (`rl.prompts.rows`) and parsing responses (`rollout.chat`).
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.config import ModelConfig
from rl.config.types import looks_local
from rl.errors import ConfigError, DataError

Message = dict[str, Any]  # {"role": ..., "content": ...}, and other keys that the template reads

# The date that templates which print today's (GPT-OSS, Llama 3) get, so that a run's prompts, and therefore its
# weights, do not depend on the day it starts or resumes. `chat_template_options.current_date` overrides it.
DEFAULT_DATE = datetime.date(2026, 1, 1)

_REASONING_EFFORTS = ("low", "medium", "high")


def load_tokenizer(model: ModelConfig) -> Any:
    """The checkpoint's tokenizer (a transformers PreTrainedTokenizerBase), with `model.chat_template` applied.

    Raises:
        ConfigError: the tokenizer cannot be loaded, makes no tokens, or has no EOS token; or the chat template is
            missing, cannot be read, or never reads `messages`.
    """
    from transformers import AutoTokenizer

    _check_local_path(model.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its backends' own errors here
        raise ConfigError(
            f"model.path {model.path}: cannot load a tokenizer: {_first_line(error)}; give a local Hugging Face "
            "checkpoint folder, or a hub name that this machine can reach or has cached"
        ) from error
    if model.chat_template is not None:
        tokenizer.chat_template = _read_template(model.chat_template)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model.path {model.path}: the tokenizer has no chat template (a base model?); use an instruct checkpoint, "
            "or set model.chat_template to a file with a Jinja chat template"
        )
    if not _reads(tokenizer.get_chat_template(), "messages"):
        raise ConfigError(
            f"{model.chat_template or model.path}: the chat template never reads messages, so every prompt would be "
            "the same; it must be a Jinja template over `messages`"
        )
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ConfigError(
            f"model.path {model.path}: the tokenizer produces no tokens for a text; is tokenizer.json missing?"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path {model.path}: the tokenizer has no EOS token, so no response could end")
    return tokenizer


class ChatTemplate:
    """One tokenizer's chat template with fixed options (enable_thinking, reasoning_effort, ...)."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for an option that the template never reads."""
        self.tokenizer = tokenizer
        source = tokenizer.get_chat_template()
        # None unsets an option that an extended file has set; it must go, because a template may only test for
        # presence.
        options = {name: value for name, value in options.items() if value is not None}
        for name in options:
            if not _reads(source, "strftime_now" if name == "current_date" else name):
                raise ConfigError(
                    f"model.chat_template_options.{name}: the model's chat template never reads {name}, so it would "
                    "change nothing; remove it or check its spelling in the template"
                )
        date = _date(options.pop("current_date", DEFAULT_DATE))
        effort = options.get("reasoning_effort")
        if effort is not None and "<|channel|>" in source and effort not in _REASONING_EFFORTS:
            raise ConfigError(
                f"model.chat_template_options.reasoning_effort is {effort!r}; harmony models accept "
                f"{', '.join(_REASONING_EFFORTS)}"
            )
        self._options = {**options, "strftime_now": date.strftime}

    def keys_read(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that the template reads from a message, as `.name` or "name"."""
        source = self.tokenizer.get_chat_template()
        return [name for name in names if re.search(rf"\.{name}\b|['\"]{name}['\"]", source)]

    def render(self, messages: Sequence[Message], location: str, *, add_generation_prompt: bool) -> str:
        """The conversation as text. Raises DataError, naming `location`, if the template refuses the messages."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **self._options
            )
        except Exception as error:  # templates are programs
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise DataError(
                f"{location}: the chat template refuses these messages ({roles}): {_first_line(error)}"
            ) from error

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that the template rendered. Special tokens in them are recognised, but none are added."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]

    @functools.cached_property
    def end_of_turn_id(self) -> int:
        """The token that ends an assistant turn: the one that the template writes after it, else the tokenizer's EOS.

        The two differ for base models with an added chat template (Qwen's <|im_end|> and <|endoftext|>).
        """
        said = "0.1.2"  # a text that no template contains
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
        text = self.render(messages, "chat template", add_generation_prompt=False).rpartition(said)[2]
        special = set(self.tokenizer.all_special_ids)
        special |= {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        ids = self.encode([text])[0]
        # The first special token: some templates write the EOS of the whole conversation after it (Phi-3).
        first = next((i for i, token in enumerate(ids) if token in special), None)
        if first is None or self.tokenizer.decode(ids[:first]).strip():
            return self.tokenizer.eos_token_id
        return ids[first]


def _reads(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _check_local_path(path: str) -> None:
    """Refuse a mistyped folder before asking the hub for it."""
    if looks_local(path) and not Path(path).expanduser().is_dir():
        raise ConfigError(f"model.path {path} is not a folder (looked in {Path.cwd()})")


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template {path}: cannot read it: {error}") from error


def _date(value: Any) -> datetime.date:
    if isinstance(value, datetime.date):
        return value
    try:
        return datetime.date.fromisoformat(str(value))
    except ValueError as error:
        raise ConfigError(
            f"model.chat_template_options.current_date is {value!r}; write a date like 2026-01-31"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""From rows to prompts: Fledge's row format and verl's, rendered with the chat template.

Left out: where rows come from (`rl.prompts.rows`), supervised examples (`rl.prompts.sft`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rl.batch import Prompt
from rl.config import DatasetConfig
from rl.errors import DataError, FledgeError
from rl.prompts.generated import is_generated
from rl.prompts.messages import optional_text, prompt_messages, question_text
from rl.prompts.rows import Row, dataset_name, missing_field, read_rows
from rl.prompts.template import ChatTemplate, Message

_IDENTIFIER = re.compile(r"(?:.*_)?(?:id|idx|index|uid|uuid)")
_ROWS_PER_BATCH = 1024  # rows tokenized together; fast tokenizers use every core for a batch

# Raises DataError (rewards.api.GroundTruthError is one) when the reward cannot use the prompt's ground truth.
Validate = Callable[[Prompt], None]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """One dataset, ready for generation."""

    name: str  # its name in metrics
    prompts: tuple[Prompt, ...]  # in row order, never empty
    num_dropped_too_long: int  # rows left out for more than max_prompt_tokens
    num_repeated: int = 0  # rows left out as equal to an earlier one except for identifiers


def load_prompts(
    config: DatasetConfig,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    chat_template_options: Mapping[str, Any],
    validate: Validate | None = None,
    drop_repeated: bool = False,
) -> PromptSet:
    """Load a dataset and tokenize its prompts with the chat template.

    Args:
        tokenizer: the result of `load_tokenizer`.
        max_prompt_tokens: longer prompts, template included, are dropped and counted.
        validate: called with every prompt that is kept, so that a reward can refuse a ground truth before the run
            starts.
        drop_repeated: keep only the first of rows that are equal except for their identifiers. Some published datasets
            hold each problem a hundred times, which teaches nothing more, costs time and memory, and hides from a
            curriculum that the problem was seen. Generated rows are always kept: their repetitions are part of the
            task's distribution.

    Raises:
        DataError: nothing to read, a broken row (with file and line), or no prompt left.
        ConfigError: a chat template option that the template never reads.
    """
    name = dataset_name(config)
    template = ChatTemplate(tokenizer, chat_template_options)
    prompts: list[Prompt] = []
    num_rows, num_repeated, longest = 0, 0, 0
    seen: set[bytes] = set()
    rows = read_rows(config)
    while chunk := list(islice(rows, _ROWS_PER_BATCH)):
        num_rows += len(chunk)
        if drop_repeated and not is_generated(config):
            kept = [row for row in chunk if _is_new(row, config, seen)]
            num_repeated += len(chunk) - len(kept)
            chunk = kept
        for row, prompt in _tokenize(chunk, config, name, template):
            if len(prompt.token_ids) > max_prompt_tokens:
                longest = max(longest, len(prompt.token_ids))
                continue
            if validate is not None:
                _validate(validate, prompt, row)
            prompts.append(prompt)
    if not num_rows:
        raise DataError(f"dataset {config.shown_path} holds no rows")
    if not prompts:
        raise DataError(
            f"dataset {config.shown_path}: all {num_rows} prompts are longer than "
            f"data.max_prompt_tokens={max_prompt_tokens} (the longest has {longest} tokens with its chat "
            "template); raise data.max_prompt_tokens"
        )
    return PromptSet(name, tuple(prompts), num_rows - num_repeated - len(prompts), num_repeated)


def drop_held_out(prompts: Sequence[Prompt], held_out: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """The prompts, in order, whose tokens differ from those of every prompt in `held_out`."""
    known = {prompt.token_ids for prompt in held_out}
    return tuple(prompt for prompt in prompts if prompt.token_ids not in known)


def _is_new(row: Row, config: DatasetConfig, seen: set[bytes]) -> bool:
    """Whether no earlier row had the same content; remembers this one.

    All fields except identifiers are compared, because a reward may judge by any of them; the ground truth always
    counts, whatever its field is called.
    """
    truth = [row.fields.get(name) for name in (config.ground_truth_field, "reward_model") if name]
    try:
        said = json.dumps([_without_identifiers(row.fields), truth], sort_keys=True, default=repr)
    except RecursionError as error:
        raise DataError(f"{row.location}: the row is nested too deeply") from error
    key = hashlib.blake2b(said.encode(), digest_size=16).digest()
    if key in seen:
        return False
    seen.add(key)
    return True


def _without_identifiers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_identifiers(v) for k, v in value.items() if not _IDENTIFIER.fullmatch(str(k).lower())}
    return [_without_identifiers(item) for item in value] if isinstance(value, list) else value


def _tokenize(
    rows: Sequence[Row], config: DatasetConfig, name: str, template: ChatTemplate
) -> Iterator[tuple[Row, Prompt]]:
    conversations = [_conversation(row, config) for row in rows]
    texts = [
        template.render(messages, row.location, add_generation_prompt=True)
        for row, messages in zip(rows, conversations, strict=True)
    ]
    for row, messages, ids in zip(rows, conversations, template.encode(texts), strict=True):
        yield row, _prompt(row, messages, ids, config, f"{name}:{row.index}")


def _conversation(row: Row, config: DatasetConfig) -> list[Message]:
    value = row.fields.get(config.prompt_field)
    if value is None:
        raise missing_field(row, config.prompt_field, "prompt_field")
    return prompt_messages(value, config, row.location)


def _prompt(row: Row, messages: list[Message], ids: list[int], config: DatasetConfig, prompt_id: str) -> Prompt:
    ground_truth, extra = _ground_truth_and_extra(row, config)
    return Prompt(
        prompt_id=prompt_id,
        token_ids=tuple(ids),
        text=question_text(messages),
        ground_truth=ground_truth,
        data_source=optional_text(row, "data_source") or "",
        reward=optional_text(row, "reward") or config.reward,
        extra=extra,
    )


def _ground_truth_and_extra(row: Row, config: DatasetConfig) -> tuple[Any, dict[str, Any]]:
    """The ground truth, from its own field or else from verl's `reward_model.ground_truth`, and every other field."""
    used = {"prompt", "data_source", "reward"}  # a prompt field of another name stays: a reward may ask for it
    extra = {key: value for key, value in row.fields.items() if key not in used}
    field = config.ground_truth_field
    if field is None:
        return None, extra
    ground_truth = extra.get(field)
    if field == "ground_truth":  # a field of another name stays: a reward may ask for it
        extra.pop(field, None)
    reward_model = extra.get("reward_model")
    if ground_truth is None and isinstance(reward_model, Mapping):
        ground_truth = reward_model.get("ground_truth")
        extra["reward_model"] = {key: value for key, value in reward_model.items() if key != "ground_truth"}
    # Some reasoning_gym tasks have no answer and are scored by their metadata.
    if ground_truth is None and not is_generated(config):
        if field in row.fields or isinstance(reward_model, Mapping):
            raise DataError(
                f"{row.location}: {field} is null; give the row a ground truth, or set ground_truth_field to null if "
                "the rewards need none"
            )
        raise missing_field(row, field, "ground_truth_field")
    return ground_truth, extra


def _validate(validate: Validate, prompt: Prompt, row: Row) -> None:
    try:
        validate(prompt)
    except FledgeError as error:  # about the ground truth, or a reward that the row names
        raise type(error)(f"{row.location}: {error}") from error

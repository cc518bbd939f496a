"""Score the rows of a JSONL file, a window at a time. Left out: the command around it (`launch.reward_commands`)."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewards.api import RewardInput
from rewards.local import LocalScorer
from rl.batch import Score
from rl.config import RewardConfig
from rl.errors import ConfigError, DataError
from rl.prompts.rows import read_jsonl
from rollout.chat import think_answer

Row = dict[str, Any]
_FINAL_CHANNEL = "<|channel|>final<|message|>"
_WRITTEN_FIELDS = ("reward", "breakdown", "error")  # in a file that was scored before
_KNOWN_FIELDS = {
    # field -> (types it may have, what they are called)
    "prompt": ((str, list), "a string or a list of messages"),
    "answer": ((str,), "a string"),
    "data_source": ((str,), "a string"),
    "group_id": ((str, int), "a string or an integer"),
    "num_tokens": ((int,), "an integer"),
    "truncated": ((bool,), "true or false"),
}


def score_file(input_path: Path, output_path: Path, config: RewardConfig) -> tuple[collections.Counter[str], float]:
    """Write each input row with `reward`, `breakdown` and, where it failed, `error` and a reward of null.

    Rows with one `group_id` that follow each other are scored together, so that rewards can compare them. Returns the
    number of rows of each status, and the sum of the rewards.

    Raises:
        DataError: no such file, or a broken row (file and line). The rows before it are in the output.
        ConfigError, RewardError: the reward cannot be loaded, or the output cannot be written.
    """
    if not input_path.is_file():
        raise DataError(f"there is no file {input_path}")
    if output_path.exists() and output_path.samefile(input_path):
        raise ConfigError(f"--output {output_path} is the input; choose another file")
    counts: collections.Counter[str] = collections.Counter()
    total = 0.0
    with LocalScorer(config) as scorer:
        try:
            output = output_path.open("w", encoding="utf-8", errors="backslashreplace")  # half surrogate pairs
        except OSError as error:
            raise ConfigError(f"--output {output_path} cannot be written: {error.strerror}") from error
        with output:
            for window in _windows(input_path, config.batch_size * config.num_workers):
                scores = scorer.score([sample for _, sample in window])
                for (row, _), score in zip(window, scores, strict=True):
                    output.write(json.dumps(_scored(row, score), ensure_ascii=False) + "\n")
                    counts[score.status.value] += 1
                    total += score.reward if score.ok else 0.0
                output.flush()
    if not counts:
        raise DataError(f"{input_path} holds no rows")
    return counts, total


def _scored(row: Row, score: Score) -> Row:
    row = {key: value for key, value in row.items() if key not in _WRITTEN_FIELDS}
    if not score.ok:
        return {**row, "reward": None, "breakdown": {}, "error": f"{score.status.value}: {score.error}"}
    return {**row, "reward": score.reward, "breakdown": dict(score.breakdown)}


def _windows(path: Path, size: int) -> Iterator[list[tuple[Row, RewardInput]]]:
    """At least `size` rows at a time, never cutting a group; a broken row comes after all rows before it."""
    window: list[tuple[Row, RewardInput]] = []
    try:
        for row, sample in _read(path):
            if len(window) >= size and (sample.group_id is None or sample.group_id != window[-1][1].group_id):
                yield window
                window = []
            window.append((row, sample))
    except DataError:
        if window:
            yield window
        raise
    if window:
        yield window


def _read(path: Path) -> Iterator[tuple[Row, RewardInput]]:
    for location, row in read_jsonl(path):
        yield row, _sample(row, location)


def _sample(row: Row, location: str) -> RewardInput:
    if "response" not in row:
        raise DataError(f"{location}: the row has no field response; it has {', '.join(row) or 'none'}")
    if not isinstance(row["response"], str):
        raise DataError(f"{location}: response is {str(row['response'])[:80]!r}, but must be a string")
    for field, (types, called) in _KNOWN_FIELDS.items():
        value = row.get(field)
        is_bool = isinstance(value, bool) and bool not in types
        if value is not None and (is_bool or not isinstance(value, types)):
            raise DataError(f"{location}: {field} is {str(value)[:80]!r}, but must be {called}")
    nested = row.get("reward_model")
    ground_truth = row.get("ground_truth", row.get("tests"))
    if ground_truth is None and isinstance(nested, dict):  # verl's row format
        ground_truth = nested.get("ground_truth")
    response = row["response"]
    used = {*_KNOWN_FIELDS, *_WRITTEN_FIELDS, "response", "ground_truth", "tests"}
    return RewardInput(
        prompt=_text(row.get("prompt") or ""),
        response=response,
        answer=row["answer"] if row.get("answer") is not None else final_answer_of(response),
        ground_truth=ground_truth,
        data_source=row.get("data_source") or "",
        extra={key: value for key, value in row.items() if key not in used},
        num_tokens=row.get("num_tokens") or 0,
        truncated=row.get("truncated") or False,
        group_id=row.get("group_id"),
    )


def _text(prompt: str | list[Any]) -> str:
    """The last user message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    contents = [m.get("content") for m in prompt if isinstance(m, dict) and m.get("role") == "user"]
    return str(contents[-1]) if contents else ""


def final_answer_of(response: str) -> str:
    """The final answer in a response's text: harmony's last final channel, else what follows the thinking block."""
    if _FINAL_CHANNEL in response:
        return response.rpartition(_FINAL_CHANNEL)[2].partition("<|")[0].strip()
    return think_answer(response)

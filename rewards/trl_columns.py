"""TRL's reward functions, called as its trainer calls them: keyword columns of the batch. Left out: TRL itself."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.api import GroundTruthError, RewardInput, RewardOutput
from rl.errors import RewardError

_ALWAYS = ("prompts", "completions", "completion_ids", "ground_truth", "data_source", "log_extra", "log_metric")


class TrlFunction:
    """`reward(prompts, completions, completion_ids, **columns)`; returns a number or None (not applicable) per row.

    Columns are the rows' own fields, `ground_truth` and `data_source`. If the function requires just one other column,
    and not `ground_truth`, then that is its name for the ground truth (`solution`, `answer`), which it gets from rows
    that lack such a field.

    Completions are lists of one message if the function reads messages, else plain strings. (TRL goes by the dataset,
    which here is always conversational.) Its annotation decides, else whether its code, or a function of its module
    that it calls, names the key "content".

    Numbers that it logs with `log_extra` and `log_metric` join the breakdown.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._function = function
        self._options = dict(options)
        self._parameters = inspect.signature(function).parameters
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        self._messages = reads_messages(function)
        self._required = [
            p.name for p in self._parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        ]
        if "trainer_state" in self._required and "trainer_state" not in self._options:
            raise RewardError(
                "a TRL reward function asks for trainer_state, the state of TRL's trainer, which there is not "
                "here; give the parameter a default, or set it in the reward's options"
            )
        own = [name for name in self._required if name not in _ALWAYS and name not in self._options]
        self._columns = own if len(own) != 1 or "ground_truth" in self._required else []
        self._truth = own[0] if own and not self._columns else None  # the column that the ground truth can stand for

    def check_row(self, ground_truth: Any, extra: Mapping[str, Any]) -> None:
        """Raise GroundTruthError where the row lacks a column that the function needs."""
        if missing := [name for name in self._columns if name not in extra]:
            there = ", ".join(extra) or "no fields of its own"
            raise GroundTruthError(
                f"the function needs the column {', '.join(missing)}; the row has {there}. Where it does not apply to "
                "a row, set it to null"
            )

    def call(self, samples: Sequence[RewardInput]) -> list[Any]:
        logged: list[dict[str, float]] = [{} for _ in samples]
        return _with_logged(self._function(**self._arguments(samples, logged)), logged)

    async def call_async(self, samples: Sequence[RewardInput]) -> list[Any]:
        logged: list[dict[str, float]] = [{} for _ in samples]
        return _with_logged(await self._function(**self._arguments(samples, logged)), logged)

    def _arguments(self, samples: Sequence[RewardInput], logged: list[dict[str, float]]) -> dict[str, Any]:
        def log_extra(column: str, values: Sequence[Any]) -> None:
            for parts, value in zip(logged, values, strict=True):
                if isinstance(value, int | float):
                    parts[column] = float(value)

        def log_metric(name: str, value: float) -> None:
            for parts in logged:
                parts[name] = float(value)

        columns: dict[str, Any] = {key: None for sample in samples for key in sample.extra}
        columns = {
            key: [sample.extra.get(key) for sample in samples] for key in columns if key not in ("prompt", "completion")
        }
        columns |= {
            "ground_truth": [sample.ground_truth for sample in samples],
            "data_source": [sample.data_source for sample in samples],
            "prompts": [_as(self._messages, "user", sample.prompt) for sample in samples],
            "completions": [_as(self._messages, "assistant", sample.response) for sample in samples],
            "completion_ids": [[int(token) for token in sample.token_ids] for sample in samples],
            "log_extra": log_extra,
            "log_metric": log_metric,
        }
        arguments = columns if self._takes_all else {k: v for k, v in columns.items() if k in self._parameters}
        arguments = {**arguments, **self._options}
        if self._truth is not None:
            # Row by row, so that a sample's reward does not depend on the others.
            return {**arguments, self._truth: [s.extra.get(self._truth, s.ground_truth) for s in samples]}
        if missing := [name for name in self._required if name not in arguments]:
            raise KeyError(f"the function needs the column {', '.join(missing)}; the rows have {', '.join(columns)}")
        return arguments


def supplied_columns(function: Callable[..., Any], options: Mapping[str, Any]) -> set[str]:
    """Parameters that the batch fills: any without a default may be a column of the rows, unless an option fills it."""
    parameters = inspect.signature(function).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    return (required - set(options)) | set(_ALWAYS)


def reads_messages(function: Callable[..., Any]) -> bool:
    """Whether a TRL reward function expects completions as lists of messages rather than as strings."""
    plain = inspect.unwrap(function) if callable(function) else function
    if not isinstance(plain, types.FunctionType | types.MethodType):
        plain = plain.__call__
    annotation = str(getattr(plain, "__annotations__", {}).get("completions", ""))
    if "dict" in annotation or "Dict" in annotation:
        return True
    if annotation and "str" in annotation:
        return False
    code, module = plain.__code__, getattr(plain, "__globals__", None) or plain.__func__.__globals__
    callees = [module[name].__code__ for name in code.co_names if isinstance(module.get(name), types.FunctionType)]
    return any(_names_content(c) for c in (code, *callees))


def _names_content(code: types.CodeType) -> bool:
    constants = code.co_consts
    return "content" in constants or any(_names_content(c) for c in constants if isinstance(c, types.CodeType))


def _as(messages: bool, role: str, text: str) -> Any:
    return [{"role": role, "content": text}] if messages else text


def _with_logged(results: Any, logged: list[dict[str, float]]) -> Any:
    if not any(logged) or not isinstance(results, Sequence) or len(results) != len(logged):
        return results
    return [
        RewardOutput(float(result), parts) if isinstance(result, int | float) and parts else result
        for result, parts in zip(results, logged)
    ]

"""Turn any function or object with a known signature into a `Reward` that the combination can call.

Known: ours (one `RewardInput`, a batch of them, or a group), verl's `compute_score(data_source, solution_str,
ground_truth, extra_info)` and its batch form, and TRL's `reward(completions, **columns)`; each may be a coroutine.
Left out: finding them by name (`rewards.loading`), and deadlines (`rewards.scoring_process`).
"""

from __future__ import annotations

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from rewards.api import RewardInput
from rewards.trl_columns import TrlFunction, supplied_columns
from rl.errors import ConfigError, RewardError

Mode = Literal["sample", "batch", "group"]

KNOWN_FORMS = (
    "reward(sample, **options), score_batch(samples), score_group(samples, task_rewards), "
    "compute_score(data_source, solution_str, ground_truth, extra_info) or reward(completions, **columns)"
)
_VERL_SAMPLE = ("data_source", "solution_str", "ground_truth", "extra_info")
_VERL_BATCH = ("data_sources", "solution_strs", "ground_truths", "extra_infos")


@dataclass(frozen=True, slots=True)
class Reward:
    """A loaded reward, its options bound.

    `call` takes one RewardInput (mode "sample"), a sequence of them ("batch"), or a sequence of them and their task
    rewards ("group"), and returns raw results, one per sample; with `is_async`, a coroutine of them.
    """

    name: str
    mode: Mode
    is_async: bool
    call: Callable[..., Any]
    shaping: bool = False
    max_concurrent: int | None = None  # how many coroutines run at once; each gets the whole deadline
    may_abstain: bool = False  # TRL: None means that the reward does not apply to the sample
    validate_ground_truth: Callable[[Any, Mapping[str, Any]], None] | None = None
    close: Callable[[], None] | None = None


def adapt(name: str, target: Any, options: Mapping[str, Any]) -> Reward:
    """The `Reward` behind a function, or behind an object with `__call__`, `score_batch` or `score_group`.

    Raises:
        RewardError: `target` has none of the known forms.
        ConfigError: an option is unknown to the function, missing, or of the wrong type.
    """
    mode, function = _entry(name, target)
    if inspect.isasyncgenfunction(_code_of(function)):
        raise RewardError(f"reward {name!r} is an asynchronous generator; return the results instead of yielding them")
    max_concurrent = getattr(target, "max_concurrent", None)
    if max_concurrent is not None and (not isinstance(max_concurrent, int) or max_concurrent < 1):
        raise RewardError(f"reward {name!r} has max_concurrent {max_concurrent!r}; it must be a whole number above 0")
    parameters = _parameters(name, function)
    names = {p.name for p in parameters}
    is_async = inspect.iscoroutinefunction(_code_of(function))
    call: Callable[..., Any]
    validate = getattr(target, "validate_ground_truth", None)
    if "completions" in names:
        trl = TrlFunction(function, checked_options(name, function, options, supplied_columns(function, options)))
        mode, call = "batch", trl.call_async if is_async else trl.call
        validate = validate or trl.check_row
    elif "solution_str" in names or "solution_strs" in names:
        mode = "sample" if "solution_str" in names else "batch"
        supplied = _VERL_SAMPLE if mode == "sample" else _VERL_BATCH
        bound = checked_options(name, function, options, supplied)
        call = _verl_call(function, mode, bound, supplied)
    else:
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        num_arguments = 2 if mode == "group" else 1
        if len(positional) < num_arguments:
            raise RewardError(f"reward {name!r} has the signature {_show(function)}; known forms are {KNOWN_FORMS}")
        if mode == "sample" and _takes_batch(function, positional[0]):
            mode = "batch"
        bound = checked_options(name, function, options, [p.name for p in positional[:num_arguments]])
        call = _with_options(function, bound)
    return Reward(
        name=name,
        mode=mode,
        is_async=is_async,
        call=call,
        shaping=bool(getattr(target, "shaping", False)),
        max_concurrent=max_concurrent,
        may_abstain="completions" in names,
        validate_ground_truth=validate,
        close=getattr(target, "close", None),
    )


def checked_options(
    name: str, function: Callable[..., Any], options: Mapping[str, Any], supplied: Iterable[str] = ()
) -> dict[str, Any]:
    """`options`, each converted to its parameter's annotation; `supplied` names are filled by the caller.

    Raises ConfigError naming the option, its value and what the function takes.
    """
    supplied = set(supplied)
    parameters = {p.name: p for p in _parameters(name, function) if p.name not in supplied}
    named = {
        key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and key != "self"
    }
    takes = f"it takes {', '.join(named)}" if named else "it takes no options"
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in options:
            if key not in named:
                near = difflib.get_close_matches(key, named, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(f"reward {name!r} does not take the option {key!r}; {hint}{takes}")
    elif clash := sorted(supplied & set(options)):
        raise ConfigError(f"reward {name!r}: {', '.join(clash)} come from the sample and cannot be options; {takes}")
    if missing := [key for key, p in named.items() if p.default is p.empty and key not in options]:
        raise ConfigError(f"reward {name!r} needs the option {', '.join(missing)}; {takes}")
    hints = _type_hints(function)
    return {key: _convert(name, key, value, hints.get(key)) for key, value in options.items()}


def _entry(name: str, target: Any) -> tuple[Mode, Callable[..., Any]]:
    for attribute, mode in (("score_group", "group"), ("score_batch", "batch")):
        if callable(getattr(target, attribute, None)):
            return typing.cast(Mode, mode), getattr(target, attribute)
    if callable(target):
        return "sample", target
    raise RewardError(f"reward {name!r} is a {type(target).__name__}, which cannot be called; known: {KNOWN_FORMS}")


def _parameters(name: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name!r} has no signature that can be read: {error}") from error


def _show(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__name__', type(function).__name__)}{inspect.signature(function)}"


def _code_of(function: Callable[..., Any]) -> Any:
    """The function itself, or the `__call__` of an object."""
    is_plain = isinstance(function, types.FunctionType | types.MethodType | functools.partial)
    return function if is_plain else type(function).__call__


def _type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else _code_of(function))
    except (NameError, TypeError):  # names that exist only for a type checker: go without the check
        return {}


def _convert(name: str, key: str, value: Any, annotation: Any) -> Any:
    if annotation is None:
        return value
    try:
        return TypeAdapter(annotation).validate_python(value)
    except PydanticUserError:  # an annotation that pydantic has no rule for
        return value
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(f"reward {name!r}: option {key} is {value!r}: {message[0].lower()}{message[1:]}") from None


def _takes_batch(function: Callable[..., Any], parameter: inspect.Parameter) -> bool:
    annotation = _type_hints(function).get(parameter.name, parameter.annotation)
    if annotation is parameter.empty:
        return parameter.name == "samples"
    return typing.get_origin(annotation) in (list, tuple, Sequence, Iterable) and RewardInput in typing.get_args(
        annotation
    )


def _with_options(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments, **options)


def _verl_call(
    function: Callable[..., Any], mode: Mode, options: Mapping[str, Any], supplied: Sequence[str]
) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def fields(sample: RewardInput) -> tuple[Any, ...]:
        nested = sample.extra.get("extra_info")
        extra_info = dict(nested if isinstance(nested, Mapping) else sample.extra)
        return sample.data_source, sample.response, sample.ground_truth, extra_info

    def call(samples: Any) -> Any:
        values = fields(samples) if mode == "sample" else [list(column) for column in zip(*map(fields, samples))]
        arguments = {key: value for key, value in zip(supplied, values) if takes_all or key in parameters}
        return function(**arguments, **options)

    return call


def iterate_results(results: Any) -> Iterator[Any]:
    """The results of a batch call one by one. Raises TypeError unless they are a sequence or iterator of results."""
    if isinstance(results, str | Mapping) or not isinstance(results, Iterable):
        raise TypeError(f"a batch reward must return one result per sample, not a {type(results).__name__}")
    return iter(results)

"""Tests of one problem: parsed once from a row's ground truth, turned into tasks for a box, judged one by one.

Three forms: {"inputs", "outputs"} for standard input and output, the same with "fn_name" for calls, and a list of
`assert` statements. Left out: running (`rewards.code`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from rewards.api import GroundTruthError
from rewards.sandbox import asserts, grading
from rewards.sandbox.api import CallTask, EvaluateTask, RunResult, RunStatus, StdinTask, Task
from rewards.sandbox.inside import plain

Judgement = tuple[str, str]  # a trusted program that defines `judge`, and the encoded arguments to call it with


@dataclass(frozen=True, slots=True)
class Test:
    """One test: what the box is asked, and who says whether the answer is right."""

    task: Task
    judge: Callable[[RunResult, float], bool | Judgement]  # (result, float tolerance); only asked about OK results


def parse_tests(ground_truth: Any, language: str, packages: Collection[str] = ()) -> tuple[Test, ...]:
    """The tests of a row, in order.

    Args:
        ground_truth: one of the three forms, or its JSON text.
        language: of the programs; anything but standard input and output needs "python".
        packages: what assert tests may import besides the standard library.

    Raises GroundTruthError, saying what is wrong, for anything else.
    """
    if isinstance(ground_truth, str):
        try:
            ground_truth = json.loads(ground_truth)
        except ValueError as error:
            raise GroundTruthError(f"the tests are a string that is not JSON: {error}") from error
    if isinstance(ground_truth, list | tuple) and all(isinstance(test, str) for test in ground_truth):
        tests = _assert_tests(list(ground_truth), packages)
        needs_python = "assert statements"
    elif isinstance(ground_truth, dict):
        inputs, outputs = _inputs_and_outputs(ground_truth)
        name = ground_truth.get("fn_name")
        if not name:
            return tuple(_stdin_test(i, o) for i, o in zip(inputs, outputs, strict=True))
        tests = _call_tests(name, inputs, outputs)
        needs_python = "fn_name"
    else:
        raise GroundTruthError(
            f"the tests are of type {type(ground_truth).__name__}; expected a mapping with inputs and outputs, or a "
            "list of assert statements"
        )
    if language != "python":
        raise GroundTruthError(f"{needs_python} need Python programs, but the language is {language}")
    return tests


def _inputs_and_outputs(ground_truth: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    inputs, outputs = ground_truth.get("inputs"), ground_truth.get("outputs")
    if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple):
        raise GroundTruthError(
            f"tests need the lists inputs and outputs; the keys are {sorted(map(str, ground_truth))}"
        )
    if len(inputs) != len(outputs) or not inputs:
        raise GroundTruthError(
            f"the tests have {len(inputs)} inputs and {len(outputs)} outputs; give one output per input"
        )
    return list(inputs), list(outputs)


def _stdin_test(given: Any, expected: Any) -> Test:
    stdin, wanted = _text(given, "input"), _text(expected, "output")
    return Test(StdinTask(stdin), lambda result, tolerance: grading.same_output(result.stdout, wanted, tolerance))


def _text(value: Any, what: str) -> str:
    """Text of one input or output; a list holds its lines, as in some datasets."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if isinstance(value, str):
        return value
    raise GroundTruthError(f"a test's {what} is a {type(value).__name__}; expected text, or a list of lines")


def _call_tests(name: Any, inputs: list[Any], outputs: list[Any]) -> tuple[Test, ...]:
    if not isinstance(name, str) or not name.isidentifier():
        raise GroundTruthError(f"fn_name {name!r} is not a valid function name")
    pairs = [_call_values(i, o) for i, o in zip(inputs, outputs, strict=True)]
    # some datasets put every expected value into a list of one; if all values are such lists, either form is right
    wrapped = all(isinstance(expected, list) and len(expected) == 1 for _, expected in pairs)
    return tuple(_call_test(name, arguments, expected, wrapped) for arguments, expected in pairs)


def _call_values(given: Any, expected: Any) -> tuple[list[Any], Any]:
    """Arguments and expected value. Text holds JSON, one argument per line; anything else is taken as it is."""
    if not isinstance(given, str):
        if not isinstance(given, list | tuple):
            raise GroundTruthError(f"a call's input is a {type(given).__name__}; expected a list of arguments")
        return [_with_integer_keys(argument) for argument in given], _expected_with_integer_keys(expected)
    try:
        arguments = [json.loads(line) for line in given.split("\n") if line.strip()]
        return arguments, json.loads(expected) if isinstance(expected, str) else expected
    except (ValueError, RecursionError) as error:
        raise GroundTruthError(f"a call's input or output is text but not JSON: {error}") from error


def _expected_with_integer_keys(expected: Any) -> Any:
    if isinstance(expected, list) and len(expected) == 1:  # often only a wrapper
        return [_with_integer_keys(expected[0])]
    return _with_integer_keys(expected)


def _with_integer_keys(value: Any) -> Any:
    """APPS went through JSON, which made every key text; like its own grader, turn keys back if all are integers."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return value
    try:
        integers = {key: int(key) for key in value}
    except ValueError:
        return value
    if any(str(integer) != key for key, integer in integers.items()):  # "007" never was an integer
        return value
    return {integers[key]: item for key, item in value.items()}


def _call_test(name: str, arguments: list[Any], expected: Any, wrapped: bool) -> Test:
    try:
        task = CallTask(name, plain.encode(arguments))
        trees = [grading.tree_of(expected)] + ([grading.tree_of(expected[0])] if wrapped else [])
    except (plain.NotPlainError, RecursionError) as error:
        raise GroundTruthError(f"a test of {name} holds data that cannot be passed to the program: {error}") from error

    def judge(result: RunResult, tolerance: float) -> bool:
        try:
            produced = grading.parse_value(result.value)
        except plain.NotPlainError:
            return False
        return any(grading.same_value(produced, tree, tolerance, lists_are_tuples=True) for tree in trees)

    return Test(task, judge)


def _assert_tests(statements: list[str], packages: Collection[str]) -> tuple[Test, ...]:
    return tuple(_assert_test(test) for test in asserts.split_asserts(statements, packages))


def _assert_test(test: asserts.AssertTest) -> Test:
    def judge(result: RunResult, tolerance: float) -> bool | Judgement:
        verdict = asserts.judge_here(test, result.value, tolerance)
        if verdict is not None:
            return verdict
        return asserts.judge_source(test), (result.value or b"").decode("ascii", "replace")

    return Test(EvaluateTask(test.imports, test.calls, test.roots), judge)


def judged_true(results: Iterable[RunResult]) -> bool:
    """Whether the run of a judgement returned true."""
    return all(result.status is RunStatus.OK and result.value == b"true" for result in results)

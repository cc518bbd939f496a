"""The reward `code`: extraction, forms of tests, judgement outside the program, scoring, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.api import GroundTruthError, RewardInput, RewardOutput, registered_rewards
from rewards.code import CodeReward, extract_program
from rewards.sandbox import grading
from rewards.sandbox.inside import plain
from rewards.sandbox.suite import parse_tests
from rl.errors import ConfigError

ADD = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
LIMITS = {"cpu_s": 2, "wall_s": 60}


def sample(program: str, ground_truth: Any, tag: str = "python", **extra: Any) -> RewardInput:
    return RewardInput("", "", f"Here:\n```{tag}\n{program}\n```\n", ground_truth, extra=extra)


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    made = CodeReward(score="share", limits=LIMITS, total_s=120)
    yield made
    made.close()


def scores(reward: CodeReward, *samples: RewardInput) -> list[float]:
    outputs = list(reward.score_batch(samples))
    assert all(isinstance(output, RewardOutput) for output in outputs), outputs
    return [output.reward for output in outputs]  # type: ignore[union-attr]


def test_it_is_registered_by_name() -> None:
    assert registered_rewards()["code"] is CodeReward


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\nthen\n```py\nb\n```\nend", "b\n"),
        ("```python\na\n```\n```cpp\nb\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\nExample output:\n```\n4\n```", "a\n"),
        ("```\n4\n```\n```python\na\n```\n```text\n4\n```", "a\n"),
        ("```\na\n```\n```\nb\n```\n```cpp\nc\n```", "b\n"),
        ("~~~~python\na\n~~~\n````\nb\n~~~~~", "a\n~~~\n````\nb\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("```python\na\n```\n```python\ncut off", "a\n"),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''\n"),
        ("  ```Python3 title=x\na\n  ```", "a\n"),
        ("```python\r\na\r\n```\r\n", "a\n"),
        ("print(1)", None),
        ("```python\na", None),
        ("```json\n{}\n```", None),
        ("`python` ```inline```", None),
        ("", None),
    ],
)
def test_the_program_is_the_last_complete_block_of_the_language(text: str, program: str | None) -> None:
    assert extract_program(text, "python") == program


FLOODS = ("~", "~~~ ", "`", "```\n", "```a", "``` ", "~~~\n~~~~\n", "    ")


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("end", ["", "`", "x`", "\n~~~"])
def test_a_flood_of_fence_marks_is_read_in_one_pass(flood: str, end: str) -> None:
    """With a search that goes back over the marks, the worst of these never ends."""
    flooded = "```python\na\n```\n" + (flood * (200_000 // len(flood))) + end
    assert extract_program(flooded, "python") == "a\n"
    extract_program(flood * (200_000 // len(flood)) + end, "python")


@given(st.text(alphabet="`~ \npythoncp+a", max_size=200))
@settings(max_examples=200, deadline=None)
def test_extraction_takes_any_text(text: str) -> None:
    program = extract_program(text, "python")
    assert program is None or program.strip("\n") in text.replace("\r\n", "\n")


def test_each_form_of_tests_scores_right_programs(reward: CodeReward) -> None:
    call = {"fn_name": "f", "inputs": [[1, 2], [3, 4]], "outputs": [[1, 2], [3, 4]]}
    assert scores(
        reward,
        sample("print(sum(map(int, input().split())))", ADD),
        sample("print(3)", ADD),
        sample("print(sum(map(int, input().split())))", json.dumps(ADD)),
        sample("def f(a, b): return a, b", call),
        sample("class Solution:\n    def f(self, a, b): return [a, b]", call),
        sample("def f(a, b): return [b, a]", call),
        sample("def f(a, b): return a + b", {"fn_name": "f", "inputs": ["1\n2"], "outputs": ["3"]}),
        sample("def f(a): return a", {"fn_name": "f", "inputs": [["x"], ["y"]], "outputs": [["x"], ["y"]]}),
        sample("def f(a): return a + 1", ["assert f(1) == 2", "assert f(1) == 3", "assert f(2)", "assert not f(-1)"]),
    ) == [1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.75]


def test_no_program_no_reward(reward: CodeReward) -> None:
    (output,) = reward.score_batch([RewardInput("", "", "print(3)", ADD)])
    assert isinstance(output, RewardOutput)
    assert (output.reward, output.breakdown["extracted"]) == (0.0, 0.0)


def test_all_stops_at_the_first_failure_and_pays_nothing_for_a_share() -> None:
    made = CodeReward(score="all", limits=LIMITS)
    try:
        assert scores(made, sample("print(7)", ADD), sample("print(sum(map(int, input().split())))", ADD)) == [0.0, 1.0]
    finally:
        made.close()


def test_identical_programs_run_once(reward: CodeReward) -> None:
    runs = []
    service, original = reward._service, reward._service.run

    def counting(*args: Any) -> Any:
        runs.append(args[0])
        return original(*args)

    service.run = counting  # type: ignore[method-assign]
    try:
        same = [sample("print(sum(map(int, input().split())))  # once", ADD)] * 6
        assert scores(reward, *same) == [1.0] * 6
        assert scores(reward, *same) == [1.0] * 6
    finally:
        service.run = original  # type: ignore[method-assign]
    assert len(runs) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_row_may_name_its_language(reward: CodeReward) -> None:
    program = '#include <cstdio>\nint main() { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); }'
    assert scores(
        reward, sample(program, ADD, "cpp", language="C++"), sample("int main(", ADD, "cpp", language="cpp")
    ) == [1, 0]
    (error,) = reward.score_batch([sample(program, ADD, language="cobol")])
    assert isinstance(error, GroundTruthError)


@pytest.mark.parametrize(
    ("ground_truth", "message"),
    [
        (None, "NoneType"),
        ("{", "not JSON"),
        ({}, "need the lists"),
        ({"inputs": [], "outputs": []}, "0 inputs"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [3], "outputs": ["3"]}, "input is a int"),
        ({"inputs": [3], "outputs": [3], "fn_name": "f"}, "expected a list of arguments"),
        ({"inputs": ["{"], "outputs": ["3"], "fn_name": "f"}, "not JSON"),
        ({"inputs": [[3]], "outputs": [3], "fn_name": "f()"}, "not a valid function name"),
        ([], "no assert statement"),
        (["x = f(1)"], "Assign"),
        (["assert f("], "not Python"),
        (["assert 1 == 1"], "does not use the program"),
        (["assert all(f(i) for i in range(3))"], "comprehension or lambda"),
        (["import math"], "no assert statement"),
        (["assert np.allclose(f(2), 4.0)"], "uses np, which the sandbox does not have"),
        (["assert f(2) == pytest.approx(4.0)"], "uses pytest, which the sandbox does not have"),
        (["assert f(numpy.array([2])) == 4"], "uses numpy, which the sandbox does not have"),
        (["assert math.gcd(4, 6) == 2"], "does not use the program"),
        (["import numpy as np\nassert np.allclose(f(1), 2)"], "imports numpy, which the sandbox does not have"),
        (["from . import f\nassert f(1) == 2"], "a relative module"),
        ([3], "list"),
    ],
)
def test_broken_ground_truths_are_found_before_any_run(reward: CodeReward, ground_truth: Any, message: str) -> None:
    with pytest.raises(GroundTruthError, match=message):
        reward.validate_ground_truth(ground_truth)
    (error,) = reward.score_batch([sample("print(3)", ground_truth)])
    assert isinstance(error, GroundTruthError)


def test_calls_need_python() -> None:
    with pytest.raises(GroundTruthError, match="need Python programs"):
        parse_tests(["assert f(1) == 2"], "cpp")


def test_asserts_are_judged_where_the_program_is_not(reward: CodeReward) -> None:
    patched = """
import builtins, math
class Yes:
    def __eq__(self, other): return True
    def __lt__(self, other): return True
    def __sub__(self, other): return self
    def __len__(self): return 3
    def __iter__(self): return iter(())
builtins.abs = builtins.sorted = builtins.isinstance = builtins.all = builtins.len = lambda *a, **k: Yes()
math.isclose = lambda *a, **k: True
def f(x): return Yes()
"""
    tests = [
        "import math",
        "assert f(1) == 2",
        "assert abs(f(1) - 2) < 1e-9",
        "assert sorted(f(1)) == [1, 2, 3]",
        "assert isinstance(f(1), int)",
        "assert math.isclose(f(1), 2)",
        "assert len(f(1)) == 3",
        "assert f(1) != 3",
        "assert f(1)",
        "assert f(1) in [Ellipsis, 2]",
    ]
    assert scores(
        reward, sample(patched, tests), sample("def f(x): return 2", ["import math", tests[5], tests[2]])
    ) == [0, 1]


def test_no_program_brings_the_library_that_judges_it(reward: CodeReward) -> None:
    close, counted, infinite = (
        ["assert math.isclose(f(2), 4.0)"],
        ["assert Counter(f(2)) == Counter('aab')"],
        ["assert f(2) == inf"],
    )
    assert scores(
        reward,
        sample("import math\ndef f(x): return math.sqrt(16.0)", close),
        sample("def f(x): return 2.0 * x", close),
        sample("class math: isclose = lambda *a, **k: True\ndef f(x): return 0", close),
        sample("import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 0", close),
        sample("from collections import Counter\ndef f(x): return ['a', 'b', 'a']", counted),
        sample("Counter = lambda x: 1\ndef f(x): return 0", counted),
        sample("from math import inf\ndef f(x): return inf", infinite),
        sample("inf = 1\ndef f(x): return inf", infinite),
        sample("def gcd(a, b): return gcd(b, a % b) if b else a", ["assert gcd(4, 6) == 2"]),
        sample("import math\ndef f(x): return x", ["assert f(math.pi) == 3.141592653589793"]),
    ) == [1, 1, 0, 0, 1, 0, 1, 0, 1, 1]


def test_calls_get_the_integer_keys_that_json_made_text(reward: CodeReward) -> None:
    def rows(argument: Any, expected: Any) -> dict[str, Any]:
        return {"fn_name": "f", "inputs": [[argument]], "outputs": [expected]}

    text = {"fn_name": "f", "inputs": ['{"1": 2}'], "outputs": ["2"]}
    assert scores(
        reward,
        sample("def f(d): return d[1]", rows({"1": 2}, 2)),
        sample("def f(d): return d[1]", json.dumps(rows({"1": 2}, 2))),
        sample("def f(d): return d", rows({"-1": 2, "10": 3}, {"-1": 2, "10": 3})),
        sample("def f(d): return {1: 2}", rows({}, [{"1": 2}])),
        sample("def f(d): return {'1': 2}", rows({}, {"1": 2})),
        sample("def f(d): return d['1'] + d['a']", rows({"1": 2, "a": 3}, 5)),
        sample("def f(d): return d['007']", rows({"007": 2}, 2)),
        sample("def f(d): return d['1']", text),
    ) == [1, 1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("produced", "expected", "same"),
    [
        ("3\n", "3", True),
        ("3 \n\n", "3\n", True),
        ("3\r\n4\r\n", "3\n4", True),
        (" 3", "3", False),
        ("3\n4", "3", False),
        ("", "3", False),
        ("3", "3\n4", False),
        ("0.3333333", "0.33333333333", True),
        ("0.3334", "0.33333333333", False),
        ("3.0", "3", False),
        ("3", "3.0", True),
        ("nan", "3.0", False),
        ("inf", "1e400", False),
        ("1_0.0", "10.0", False),
        ("yes", "YES", False),
        ("1  2", "1 2", False),
    ],
)
def test_output_comparison(produced: str, expected: str, same: bool) -> None:
    assert grading.same_output(produced.encode(), expected, 1e-6) is same


@pytest.mark.parametrize(
    ("produced", "expected", "same"),
    [
        (1, 1.0, True),
        (True, 1, True),
        (1.0000001, 1.0, True),
        (1, 2, False),
        (1.0000001, 1, False),
        (2**80, 2**80, True),
        (2**80, 2**80 + 1, False),
        (float("nan"), float("nan"), False),
        (float("inf"), 1.0, False),
        (float("inf"), float("inf"), True),
        (2**2000, 1.5, False),
        ((1, 2), [1, 2], False),
        ({1, 2}, {2, 1.0}, True),
        (frozenset({1}), {1}, True),
        ({1: [2]}, {1.0: [2]}, True),
        ({1: 2}, {1: 3}, False),
        ({1: 2}, {1: 2, 3: 4}, False),
        ({"a": {(1, "b"): None}}, {"a": {(1, "b"): None}}, True),
        (b"a", "a", False),
        (1 + 2j, 1 + 2j, True),
        (1 + 2j, 1 + 3j, False),
        (object(), object(), False),
        (iter([1]), [1], False),
        ("1", 1, False),
        (None, 0, False),
    ],
)
def test_value_comparison(produced: Any, expected: Any, same: bool) -> None:
    trees = grading.tree_of(produced), grading.tree_of(expected)
    assert grading.same_value(*trees, tolerance=1e-6, lists_are_tuples=False) is same


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("tsfdibnrqgoDFcx") | st.text(max_size=3), inner),
    max_leaves=15,
)


@given(JSON, JSON)
@settings(max_examples=200, deadline=None)
def test_any_json_can_be_compared(produced: Any, expected: Any) -> None:
    same = grading.same_value(produced, expected, tolerance=1e-6, lists_are_tuples=True)
    assert same == grading.same_value(produced, expected, tolerance=1e-6, lists_are_tuples=True)
    assert not grading.same_value(produced, grading.tree_of("never produced"), 1e-6, True)


ASSERTS = st.lists(st.from_regex(r"assert [a-z0-9()=., \[\]]{1,40}", fullmatch=True) | st.text(max_size=30), max_size=2)


@given(JSON | ASSERTS)
@settings(max_examples=200, deadline=None)
def test_any_ground_truth_is_parsed_or_refused(ground_truth: Any) -> None:
    try:
        tests = parse_tests(ground_truth, "python")
    except GroundTruthError:
        return
    assert tests


def test_hostile_values_are_no_values() -> None:
    for text in (b"", b"[" * 100_000, b"{", b"\xff", b"9" * 5000, b"[" + b"0," * 1_000_000 + b"0]"):
        with pytest.raises(plain.NotPlainError):
            grading.parse_value(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "some"}, "score is 'some'"),
        ({"language": "cobol"}, "language is 'cobol'"),
        ({"isolation": "maybe"}, "isolation is 'maybe'"),
        ({"sandbox": "ftp://x"}, "sandbox is 'ftp://x'"),
        ({"limits": {"ram": 1}}, "no limit 'ram'"),
        ({"limits": {"cpu_s": 0}}, "cpu_s is 0"),
        ({"slots": 0}, "slots >= 1"),
        ({"total_s": 0}, "total_s > 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodeReward(**options)

"""The math reward from response to number: errors, options, hostile answers, and the pairs that state the truth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards.api import GroundTruthError, InfrastructureError, RewardInput
from rewards.math import MathReward
from rewards.mathematics.worker_pool import SymbolicPool, WorkerLostError

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def reward():
    reward = MathReward(deadline_s=2.0)
    yield reward
    reward.close()


def score(reward, truth, response, prompt=""):
    return reward(RewardInput(prompt, response, response, truth)).reward


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_agrees_with_every_pair_of_our_own_and_seldom_asks_computer_algebra(reward):
    pairs = rows("math_pairs.jsonl")
    assert len(pairs) >= 300
    wrong, asked = [], 0
    for row in pairs:
        sample = RewardInput(row.get("prompt", ""), row["response"], row["response"], row["ground_truth"])
        output = reward(sample)
        asked += output.breakdown["symbolic"]
        if output.reward != row["equal"]:
            wrong.append((row["category"], row["ground_truth"], row["response"][:60]))
    assert wrong == []
    assert asked < 0.02 * len(pairs)


def test_agrees_with_the_public_suites(reward):
    pairs = [row for row in rows("math_public_pairs.jsonl") if "differs" not in row]
    verdicts = [(score(reward, row["ground_truth"], row["response"]), row["equal"]) for row in pairs]
    assert sum(got == expected for got, expected in verdicts) >= 0.99 * len(pairs)
    assert not any(got and not expected for got, expected in verdicts)


def test_cases_left_out_of_the_public_suites_are_few_and_say_why():
    left_out = [row for row in rows("math_public_pairs.jsonl") if "differs" in row]
    assert len(left_out) <= 8
    assert all(len(row["differs"]) > 20 for row in left_out)


@pytest.mark.parametrize(
    ("truth", "response"),
    [
        (r"\frac12", r"\boxed{\int_0^1 x\,dx}"),
        ("e", r"\boxed{\lim_{n\to\infty}\left(1+\frac1n\right)^n}"),
        (r"\frac{n(n+1)}{2}", r"\boxed{\sum_{k=1}^n k}"),
    ],
)
def test_what_only_computer_algebra_can_judge(reward, truth, response):
    output = reward(RewardInput("", response, response, truth))
    assert (output.reward, output.breakdown["symbolic"]) == (1.0, 1.0)


def test_computer_algebra_that_runs_too_long_costs_only_its_own_sample(reward):
    hostile = r"\boxed{\int_0^1\int_0^1\int_0^1 \sin(\sin(\sin(xyz)))e^{e^{xyz}}\,dx\,dy\,dz}"
    output = reward(RewardInput("", hostile, hostile, "1"))
    assert (output.reward, output.breakdown["symbolic_lost"]) == (0.0, 1.0)
    assert score(reward, r"\frac12", r"\boxed{\int_0^1 x\,dx}") == 1.0


@pytest.mark.parametrize(
    "unit", [r"\( x", r"\[ ", "$$ x", " \n", "<answer>", r"\boxed{", "the answer is not ", "5 million "]
)
@pytest.mark.parametrize(("before", "behind"), [("", ""), (r"\boxed{6}", "x"), ("", "$$")])
def test_a_flood_is_a_wrong_answer_and_no_timeout(reward, unit, before, behind):
    flood = before + unit * (200_000 // len(unit)) + behind
    assert score(reward, "5", flood) == 0.0


def test_a_box_over_the_length_of_an_answer_is_none():
    boxed_only = MathReward(require_box=True)
    try:
        response = r"\boxed{" + "1" * 3000 + "}"
        assert boxed_only(RewardInput("", response, response, "5")).breakdown["answered"] == 0.0
    finally:
        boxed_only.close()


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("  ", "empty"),
        (None, "NoneType"),
        (float("nan"), "not a finite number"),
        ({"answer": 1}, "dict"),
        ([], "list of 0"),
        (r"\frac{1}{2", "neither a formula nor words"),
        ("3 +* 4", "neither a formula nor words"),
        ("x" * 3000, "more than 2000"),
    ],
)
def test_a_broken_ground_truth_is_found_before_scoring(reward, truth, message):
    with pytest.raises(GroundTruthError, match=message):
        reward.validate_ground_truth(truth)


@pytest.mark.parametrize(
    "truth",
    [
        "42",
        42,
        0.5,
        True,
        ["1/2", "0.5"],
        "Evelyn",
        "B",
        r"\sum_{k=1}^n k",
        "the lines are parallel",
        "#### 7",
    ],
)
def test_a_good_ground_truth_passes(reward, truth):
    reward.validate_ground_truth(truth, {})


def test_a_broken_ground_truth_is_no_wrong_answer(reward):
    with pytest.raises(GroundTruthError):
        score(reward, None, r"\boxed{1}")


def test_formulas_that_nothing_joins_to_the_last_one_are_no_part_of_the_answer(reward):
    assert score(reward, "5", "The final answer is $2$, $3$ with sum $5$.") == 1.0
    assert score(reward, "2, 3, 5", "The final answer is $2$, $3$ and $5$.") == 1.0


@pytest.mark.parametrize(
    ("truth", "answers", "spelled"),
    [
        ("1/2", [r"\frac{1}{2}", "1/2", "0.5", "50%"], {"1/2"}),
        (["x=3", "-3"], ["3", "-3", "-3.0"], {"x=3", "-3"}),
        ("7", ["1,000", "1000", "1000.00", "10^3"], {"1000"}),
        ("7", ["2^{10^9}", "9^{9999}"], {"2^{10^9}", "9^{9999}"}),  # too long to spell out
    ],
)
def test_equal_answers_have_one_spelling(reward, truth, answers, spelled):
    """A majority is counted by it."""
    samples = [RewardInput("", rf"\boxed{{{answer}}}", rf"\boxed{{{answer}}}", truth) for answer in answers]
    assert {reward(sample).extracted for sample in samples} == spelled


def test_any_ground_truth_of_a_list_will_do(reward):
    assert score(reward, ["2", "two pairs"], r"\boxed{\text{two pairs}}") == 1.0
    assert score(reward, ["2", "two pairs"], r"\boxed{3}") == 0.0


@pytest.mark.parametrize(
    ("options", "truth", "answer", "by_default"),
    [
        ({"significant_digits": 4}, r"\frac13", "0.3333", 0.0),
        ({"percent_sign_optional": False}, r"28\%", "28", 1.0),
        ({"unit_optional": False}, r"15\text{ cm}", "15", 1.0),
        ({"convert_units": False}, r"5\text{ m}", r"500\text{ cm}", 1.0),
    ],
)
def test_each_option_turns_one_verdict(reward, options, truth, answer, by_default):
    other = MathReward(**options)
    response = rf"\boxed{{{answer}}}"
    try:
        assert score(reward, truth, response) == by_default
        assert score(other, truth, response) == 1.0 - by_default
    finally:
        other.close()


def test_a_box_can_be_required(reward):
    boxed_only = MathReward(require_box=True)
    try:
        assert score(reward, "42", "The answer is 42.") == 1.0
        assert score(boxed_only, "42", "The answer is 42.") == 0.0
        assert score(boxed_only, "42", r"\boxed{42}") == 1.0
    finally:
        boxed_only.close()


@pytest.mark.parametrize("options", [{"significant_digits": 0}, {"deadline_s": 0.0}, {"memory_mib": 1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must be at least"):
        MathReward(**options)


def test_scores_from_many_threads_and_leaves_the_signal_handlers_alone(reward):
    before = [signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGCHLD, signal.SIGPROF)]
    with ThreadPoolExecutor(4) as threads:
        verdicts = list(threads.map(lambda n: score(reward, r"\frac12", rf"\boxed{{\int_0^{n} x\,dx}}"), [1, 2, 1, 2]))
    assert verdicts == [1.0, 0.0, 1.0, 0.0]
    assert [signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGCHLD, signal.SIGPROF)] == before


@pytest.mark.parametrize("hostile", ["(" * 1000 + "1" + ")" * 1000, r"\sum_{n=1}^{10^9}\sin(n!)"])
def test_what_slips_past_the_guard_dies_alone(reward, hostile):
    with pytest.raises(WorkerLostError):
        reward._pool.equal("1", hostile)
    (pid,) = reward._pool.pids()
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""
    assert reward._pool.equal("x+x", "2x") is True


def test_a_worker_killed_from_outside_is_replaced(reward):
    assert reward._pool.equal("x+x", "2x") is True
    (pid,) = reward._pool.pids()
    os.kill(pid, signal.SIGKILL)
    assert reward._pool.equal("x+x", "3x") is False
    assert reward._pool.pids() != [pid]


def test_a_closed_pool_says_so():
    pool = SymbolicPool(size=1, deadline_s=1.0, memory_mib=1024)
    pool.close()
    with pytest.raises(InfrastructureError, match="closed"):
        pool.equal("1", "x")


def test_close_ends_the_worker_process():
    reward = MathReward()
    score(reward, "1", r"\boxed{1}")
    (pid,) = reward._pool.pids()
    reward.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_worker_ends_with_its_parent():
    program = (
        "import os; from rewards.math import MathReward; from rewards.api import RewardInput\n"
        "reward = MathReward(); reward(RewardInput('', '1', '1', '1'))\n"
        "print(*reward._pool.pids(), flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    pid = int(done.stdout)
    gone = threading.Event()
    for _ in range(300):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        gone.wait(0.1)
    else:
        pytest.fail(f"worker {pid} outlived its parent by 30 s")

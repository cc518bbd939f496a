"""Hard deadlines in child processes: who is blamed for a hang or a crash, who is scored again, what is left."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.api import RewardInput
from rewards.local import LocalScorer
from rewards.scoring_process import ScoringProcess, ScoringSpec
from rl.batch import RewardStatus
from rl.config import RewardConfig, RewardFunctionConfig
from rl.errors import ConfigError, RewardError

OK, TIMEOUT, LOST = RewardStatus.OK, RewardStatus.TIMEOUT, RewardStatus.INFRASTRUCTURE_ERROR

PLUGIN = textwrap.dedent(
    """
    import os, re, signal, subprocess, sys, time

    def act(text):
        if text == "sleep":
            time.sleep(600)
        if text == "regex":
            re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter lock
        if text == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if text == "exit":
            os._exit(0)
        if text == "leave a child":
            return float(subprocess.Popen(["sleep", "600"]).pid)
        print("noise on stdout")
        return 1.0

    def reward(sample):
        return act(sample.response)

    def batch(samples):
        return [act(sample.response) for sample in samples]
    """
)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "acting.py"
    path.write_text(PLUGIN)
    return path


def spec(plugin: Path, function: str) -> ScoringSpec:
    return ScoringSpec((RewardFunctionConfig(name=f"{plugin}:{function}"),), None, timeout_s=0.5)


@pytest.fixture(scope="module")
def process(plugin: Path) -> Iterator[ScoringProcess]:
    process = ScoringProcess(spec(plugin, "reward"))
    yield process
    process.close()


def samples(*texts: str) -> list[RewardInput]:
    return [RewardInput(prompt="", response=text, answer=text, ground_truth=None) for text in texts]


def statuses(process: ScoringProcess, *texts: str) -> list[RewardStatus]:
    return [result.status for result in process.score(samples(*texts))]


def test_hangs_and_crashes_cost_their_sample_only_and_say_where(process: ScoringProcess) -> None:
    results = process.score(samples("a", "sleep", "segfault", "regex", "b"))
    assert [result.status for result in results] == [OK, TIMEOUT, LOST, TIMEOUT, OK]
    assert results[1].error == "no result within the deadline of 0.5 s (acting.py:6 in act)"
    assert results[2].error == "the reward process ended with signal SIGSEGV while it scored this sample"
    assert process.restarts == 3  # two hangs, and a crash that is tried again last; the next call restarts once more
    assert process.score([]) == []


def test_many_hangs_in_a_row_give_the_rest_up(process: ScoringProcess) -> None:
    results = process.score(samples("a", "sleep", "sleep", "sleep", "b", "c"))
    assert [r.status for r in results] == [OK] + [TIMEOUT] * 5
    assert "3 samples in a row timed out" in results[-1].error


def test_a_batch_that_hangs_is_scored_one_by_one(plugin: Path) -> None:
    process = ScoringProcess(spec(plugin, "batch"))
    try:
        assert statuses(process, "a", "sleep", "b") == [OK, TIMEOUT, OK]
        assert statuses(process, "a", "exit", "b") == [OK, LOST, OK]
    finally:
        process.close()


def test_closing_ends_the_processes_that_a_plugin_left(plugin: Path) -> None:
    process = ScoringProcess(spec(plugin, "reward"))
    [result] = process.score(samples("leave a child"))
    pids = [process.pid, int(result.outputs["reward"].reward)]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    process.close()
    end = time.monotonic() + 10.0
    while any(_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(_alive(pid) for pid in pids)


def test_files_of_the_working_directory_hide_no_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "six.py").write_text("raise RuntimeError('not the installed one')")
    (tmp_path / "beside.py").write_text("VALUE = 2.0")
    (tmp_path / "uses.py").write_text("import beside, six\ndef reward(sample):\n    return beside.VALUE")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as Ray does in its workers
    process = ScoringProcess(ScoringSpec((RewardFunctionConfig(name="uses:reward"),), None, timeout_s=5.0))
    try:
        [result] = process.score(samples("a"))
        assert result.outputs["reward"].reward == 2.0
    finally:
        process.close()


def test_rewards_that_cannot_load_raise_their_own_error(plugin: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="has no 'rewrad'; it defines act, reward, batch"):
        ScoringProcess(spec(plugin, "rewrad"))
    (tmp_path / "exits.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(RewardError, match="ended with code 3 while it loaded"):
        ScoringProcess(spec(tmp_path / "exits.py", "reward"))
    (tmp_path / "stays.py").write_text(
        "import sys, threading, time\nthreading.Thread(target=time.sleep, args=[600]).start()\nsys.exit(3)\n"
    )
    with pytest.raises(RewardError, match="did not exit when it was done while it loaded"):
        ScoringProcess(spec(tmp_path / "stays.py", "reward"))


def test_local_scorer_keeps_the_order_over_several_processes(plugin: Path) -> None:
    functions = (RewardFunctionConfig(name="exact"), RewardFunctionConfig(name=f"{plugin}:reward", weight=0.5))
    inputs = [RewardInput(prompt="", response=f"{i}", answer=f"{i % 3}", ground_truth="1") for i in range(20)]
    with LocalScorer(RewardConfig(functions=functions, num_workers=2, batch_size=3)) as scorer:
        scores = scorer.score(inputs)
    assert [score.reward for score in scores] == [1.5 if i % 3 == 1 else 0.5 for i in range(20)]


def test_options_are_checked_before_any_process_starts() -> None:
    functions = (RewardFunctionConfig(name="exact", options={"ignore_cases": True}),)
    with pytest.raises(ConfigError, match="did you mean ignore_case"):
        LocalScorer(RewardConfig(functions=functions))


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

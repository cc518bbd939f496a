"""`fledge reward list`, `score` and `new`, as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launch.reward_commands import reward_app
from launch.reward_files import final_answer_of
from rewards.loading import BUILTIN_REWARDS
from rl.errors import ConfigError, DataError, FledgeError, RewardError


def fledge_reward(*arguments: str) -> Result:
    result = CliRunner().invoke(reward_app, list(arguments))
    if isinstance(result.exception, FledgeError):
        raise result.exception
    return result


def score(folder: Path, rows: list[Any] | str, name: str, *options: str) -> list[dict[str, Any]]:
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    result = fledge_reward("score", name, "--input", str(source), "--output", str(target), "--workers", "1", *options)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_list_names_every_built_in_reward_and_its_options() -> None:
    lines = fledge_reward("list").output.splitlines()
    assert {f"{name} (built in)" for name in BUILTIN_REWARDS} <= set(lines)
    assert "    options: ignore_case=True, ignore_punctuation=True, ignore_articles=False, pattern=None" in lines


def test_score_writes_the_same_rows_with_reward_breakdown_and_error(tmp_path: Path) -> None:
    rows = [
        {"response": "<think>so 4</think>four", "ground_truth": "Four", "id": 1},
        {"response": "five", "ground_truth": "four", "answer": "four", "reward": 0.5, "error": "of an earlier scoring"},
        {"response": "four", "ground_truth": None, "id": 3},
        {"response": "four", "reward_model": {"ground_truth": "four"}},
    ]
    right, answered, broken, verl = score(tmp_path, rows, "exact", "ignore_case=true")
    assert right == {**rows[0], "reward": 1.0, "breakdown": {"exact": 1.0}}
    assert (answered["reward"], "error" in answered) == (1.0, False)
    assert (broken["reward"], broken["breakdown"], broken["id"]) == (None, {}, 3)
    assert broken["error"].startswith("ground_truth_error: exact: GroundTruthError: exact: the ground truth must be")
    assert verl["reward"] == 1.0


def test_half_a_surrogate_pair_is_written_as_it_is_spelled(tmp_path: Path) -> None:
    rows = (
        '{"response": "four", "ground_truth": "four", "id": "\\ud800"}\n{"response": "five", "ground_truth": "four"}\n'
    )
    assert [row["reward"] for row in score(tmp_path, rows, "exact")] == [1.0, 0.0]


def test_options_are_taken_as_they_are_typed(tmp_path: Path) -> None:
    """As on the command line of a run: YAML would read a comment."""
    rows = [{"response": "so it is\n#### 42", "ground_truth": "42"}]
    assert score(tmp_path, rows, "exact", "pattern=#### (.*)")[0]["reward"] == 1.0
    assert score(tmp_path, rows, "exact", r"pattern=\n#### (\d+)")[0]["reward"] == 1.0


def test_score_by_file_with_tests_and_the_rows_other_fields(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "def reward(sample, scale: float = 1.0):\n"
        "    return scale * (len(sample.ground_truth['inputs']) + sample.extra['level'])\n"
    )
    [row] = score(
        tmp_path, [{"response": "x", "tests": {"inputs": ["1"]}, "level": 2}], f"{plugin}:reward", "scale=0.5"
    )
    assert row["breakdown"] == {"reward": 1.5}


def test_score_keeps_groups_together(tmp_path: Path) -> None:
    rows = [{"response": "a " * n, "num_tokens": n, "group_id": n // 100} for n in (10, 20, 110, 130)]
    scored = score(tmp_path, rows, "length", "max_tokens=130", "buffer_tokens=30", "brevity=1.0")
    assert [row["breakdown"]["length/overlong"] for row in scored] == [0.0, 0.0, pytest.approx(-1 / 3), -1.0]
    assert [row["breakdown"]["length/brevity"] for row in scored] == [0.0, -0.5, 0.0, -0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"response": "a", "ground_truth": "a"}\n{"response": ', r"in\.jsonl:2: broken JSON"),
        ("[1]\n", r"in\.jsonl:1: a row must be a JSON object, not a list"),
        ('\n{"answer": "a"}\n', r"in\.jsonl:2: the row has no field response; it has answer"),
        ('{"response": null}', r"in\.jsonl:1: response is 'None', but must be a string"),
        ('{"response": "a", "num_tokens": true}', r"num_tokens is 'True', but must be an integer"),
        ("\n\n", r"in\.jsonl holds no rows"),
    ],
)
def test_broken_rows_are_named_and_the_rows_before_them_kept(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        score(tmp_path, text, "exact")
    assert caught.value.exit_code == 2
    written = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(written) == (1 if ":2: broken" in str(caught.value) else 0)


def test_errors_of_the_user_have_their_own_exit_codes(tmp_path: Path) -> None:
    rows = [{"response": "a", "ground_truth": None}]
    with pytest.raises(RewardError, match="none of the 1 rows could be scored") as nothing:
        score(tmp_path, rows, "exact")
    assert nothing.value.exit_code == 4
    with pytest.raises(RewardError, match="did you mean exact"):
        score(tmp_path, rows, "exakt")
    with pytest.raises(ConfigError, match="did you mean ignore_case"):
        score(tmp_path, rows, "exact", "ignore_cases=true")
    with pytest.raises(ConfigError, match="'fast' is not key=value"):
        score(tmp_path, rows, "exact", "fast")
    with pytest.raises(DataError, match="there is no file"):
        fledge_reward("score", "exact", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="is the input"):
        path = str(tmp_path / "in.jsonl")
        fledge_reward("score", "exact", "--input", path, "--output", path)


def test_final_answers_in_plain_text() -> None:
    assert final_answer_of("<think>a</think> b ") == "b"
    assert final_answer_of("<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b<|return|>") == "b"


def test_new_makes_a_package_whose_own_tests_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = fledge_reward("new", "short-answer").output.splitlines()
    assert "short-answer/src/short_answer/__init__.py" in printed
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"],
        cwd=tmp_path / "short-answer",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in run.stdout, run.stdout + run.stderr
    project = (tmp_path / "short-answer" / "pyproject.toml").read_text()
    assert 'short-answer = "short_answer:ShortAnswerReward"' in project


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My Reward", "must be lower-case words joined by hyphens"),
        ("math", "is the name of a built-in reward"),
        ("taken", "already exists"),
        ("json", "is a name that Python uses itself"),
        ("class", "is a name that Python uses itself"),
    ],
)
def test_new_refuses_names_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match=message):
        fledge_reward("new", name)

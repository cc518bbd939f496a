"""The quickstart's worked examples: what reasons is right, what guesses is near, and the config asks the same task."""

from __future__ import annotations

import json
import re
from pathlib import Path

from launch.quickstart import (
    GUESSES_MISS_BY,
    REASONING_SHARE,
    TASK,
    TASK_OPTIONS,
    held_out_questions,
    worked_example,
    write_examples,
)
from rl.config import TrainConfig
from rl.config.loading import load_config

ROOT = Path(__file__).parents[3]


def test_examples_reason_rightly_or_guess_nearby(tmp_path: Path) -> None:
    assert worked_example("5 + 3 + 6 + 1") == "<think>5+3=8;8+6=14;14+1=15</think>15"
    write_examples(tmp_path / "examples.jsonl", 400, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    reasoned = guessed_right = 0
    for row in rows:
        terms = [int(term) for term in re.findall(r"\d+", row["prompt"])]
        reasoning, answer = row["response"].removeprefix("<think>").split("</think>")
        if reasoning:
            reasoned += 1
            assert row["response"] == worked_example(" + ".join(map(str, terms)))
            assert all(eval(left) == int(right) for left, right in re.findall(r"([\d+]+)=(\d+)", reasoning))
            assert int(answer) == sum(terms)
        else:
            assert abs(int(answer) - sum(terms)) <= GUESSES_MISS_BY
            guessed_right += int(answer) == sum(terms)
    assert len(rows) == 400
    assert abs(reasoned / 400 - REASONING_SHARE) < 0.1
    assert 0 < guessed_right / (400 - reasoned) < 0.3


def test_the_config_trains_and_evaluates_on_the_same_task() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", [], TrainConfig)
    (held_out,) = config.data.eval
    for dataset in (config.data.train, held_out):
        assert dataset.path == f"reasoning_gym:{TASK}"
        assert dataset.options == TASK_OPTIONS
    assert abs(held_out.seed - config.data.train.seed) > config.data.train.size


def test_no_worked_example_is_of_a_held_out_problem(tmp_path: Path) -> None:
    held_out = held_out_questions()
    assert len(held_out) > 100
    questions = []
    for seed in (0, 1):
        write_examples(tmp_path / "examples.jsonl", 4000, seed=seed)
        rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
        assert len(rows) == 4000
        questions.append([row["prompt"] for row in rows])
    assert not held_out & {question for drawn in questions for question in drawn}
    assert questions[0][:3] != questions[1][:3]
    assert questions[0][1:4] != questions[1][:3]  # not the same draws, shifted by one

"""The live display is whole at the width of an ordinary terminal, and plain lines go elsewhere."""

import errno
import io
import re
import time

import pytest
from rich.console import Console

from launch.display import ProgressDisplay

METRICS = {
    "reward/mean": 0.93751,
    "learner/loss": -0.01234,
    "rollout/length_mean": 812.3,
    "rollout/tokens_per_s": 16923.0,
    "learner/tokens_per_s": 51890.0,
    "learner/grad_norm": 0.0912,
    "rollout/logprob_diff_max": 5.7e-06,
    "time/step_s": 81.72,
}
SHOWN = ("reward 0.938", "loss -0.0123", "tok/s 16,923", "tok/s 51,890", "grad 0.09", "diff 5.7e-06", "s/step 81.7")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_terminal_shows_step_metrics_and_time_left(width):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with ProgressDisplay("a-run-of-some-name", console) as display:
        display.expect(30)
        display.step(5, METRICS)
        display.message("evaluation step_000005: held_out/avg@4 0.5")
    text = out.getvalue()
    for shown in ("a-run-of-some-name", "5/30", "left", "evaluation step_000005", *SHOWN):
        assert shown in text
    assert "…" not in text


def test_without_a_terminal_every_step_is_one_line():
    out = io.StringIO()
    with ProgressDisplay("run", Console(file=out, width=80, soft_wrap=True)) as display:
        display.expect(30)
        display.step(5, METRICS)
        display.step(6, METRICS)
    first, second = out.getvalue().splitlines()
    assert first.startswith("run step 5/30  reward 0.938")
    assert all(shown in second for shown in ("step 6/30", *SHOWN))
    assert "left 0:" in second


def test_what_a_run_does_is_shown_on_a_terminal_at_once():
    out = io.StringIO()
    with ProgressDisplay("run", Console(file=out, force_terminal=True, width=80, color_system=None)) as display:
        display.expect(30)
        display.now("3 of 8 prompts have their responses")
    assert "3 of 8 prompts have their responses" in out.getvalue()


def test_without_a_terminal_a_long_silence_is_broken_by_what_the_run_does(monkeypatch):
    monkeypatch.setattr("launch.display._SILENCE_S", 0.5)
    monkeypatch.setattr("launch.display._SHOW_FOR_S", 0.7)
    out = io.StringIO()
    with ProgressDisplay("run", Console(file=out, width=80, soft_wrap=True)) as display:
        display.now("too short to be told of")
        display.now("3 of 8 prompts have their responses")
        deadline = time.monotonic() + 20
        while out.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    first, *_, last = out.getvalue().splitlines()
    assert first.startswith("run: 3 of 8 prompts have their responses")
    assert re.fullmatch(r"run: 3 of 8 prompts have their responses, for 0:00:\d\d", last)


def test_a_run_that_says_something_is_not_interrupted(monkeypatch):
    monkeypatch.setattr("launch.display._SILENCE_S", 1.0)
    out = io.StringIO()
    with ProgressDisplay("run", Console(file=out, width=80, soft_wrap=True)) as display:
        display.now("something")
        for number in range(15):
            display.message(f"line {number}")
            time.sleep(0.1)
    assert out.getvalue().splitlines() == [f"line {number}" for number in range(15)]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("error", [BrokenPipeError, OSError(errno.EIO, "the terminal was closed")])
def test_a_run_goes_on_when_nobody_reads_what_it_says(terminal, error):
    """Ctrl-C ends the `tee` behind a run, too, and what was learned is still to be saved."""

    class Reader(io.StringIO):
        gone = False

        def write(self, text):
            if self.gone:
                raise error
            return super().write(text)

    reader = Reader()
    with ProgressDisplay("run", Console(file=reader, force_terminal=terminal)) as display:
        display.expect(3)
        reader.gone = True
        display.message("saving what was learned before stopping")
        display.step(1, METRICS)

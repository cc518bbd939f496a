"""Progress for people: a live line on a terminal, plain lines elsewhere. Left out: everything that is kept on disk."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_SHOWN = (  # metric, label, format
    ("reward/mean", "reward", "{:.3f}"),
    ("learner/loss", "loss", "{:.4f}"),
    ("rollout/length_mean", "length", "{:.0f}"),
    ("rollout/tokens_per_s", "gen tok/s", "{:,.0f}"),
    ("learner/tokens_per_s", "train tok/s", "{:,.0f}"),
    ("learner/grad_norm", "grad", "{:.2f}"),
    ("rollout/logprob_diff_max", "diff", "{:.1e}"),
    ("time/step_s", "s/step", "{:.1f}"),
)


_SILENCE_S = 60.0  # after which a line says what a run without a terminal is doing
_SHOW_FOR_S = 10.0  # what is done for less long is shown without its duration

# A closed terminal or pipe (Ctrl-C ends `tee`, too) must not keep a run from saving. rich ends the process for it.
_NOBODY_READS = suppress(OSError, SystemExit)


class _BarOverMetrics(Progress):
    """The bar on a line of its own: beside the metrics, a terminal of 80 columns would have room for neither."""

    now: Callable[[], str]  # what the run is doing

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield Columns(task.fields["metrics"], padding=(0, 2))
            if now := self.now():
                yield Text(now, style="dim", no_wrap=True, overflow="ellipsis")


class ProgressDisplay:
    """Implements `rl.run.Display`. Use it as a context manager."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._total: int | None = None
        self._console = console or Console(file=sys.stderr, soft_wrap=True)
        self._started = time.monotonic()
        self._first_step: int | None = None
        self._last_line = time.monotonic()
        self._now, self._since = "", self._last_line
        self._ended = threading.Event()
        self._speaker = threading.Thread(target=self._break_silences, name="display", daemon=True)
        self._bar: _BarOverMetrics | None = None
        if self._console.is_terminal:
            self._bar = _BarOverMetrics(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.now = self._what_now

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, metrics=())
        else:
            self._speaker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._bar is None:
            self._speaker.join()
        else:
            with _NOBODY_READS:
                self._bar.stop()

    def expect(self, total_steps: int) -> None:
        """How many steps there will be."""
        self._total = total_steps
        if self._bar is not None:
            self._bar.update(self._task, total=total_steps)

    def message(self, text: str) -> None:
        """One line, whatever the terminal."""
        self._last_line = time.monotonic()
        with _NOBODY_READS:
            self._console.print(text, highlight=False, markup=False, emoji=False)

    def now(self, text: str) -> None:
        """Show what the run is doing: on a terminal at once, elsewhere whenever nothing was said for a while."""
        if text != self._now:
            self._now, self._since = text, time.monotonic()

    def _what_now(self) -> str:
        seconds = time.monotonic() - self._since
        return f"{self._now}, for {_duration(seconds)}" if self._now and seconds > _SHOW_FOR_S else self._now

    def _break_silences(self) -> None:
        while not self._ended.wait(_SILENCE_S / 10):
            if self._now and time.monotonic() > self._last_line + _SILENCE_S:
                self.message(f"{self._title}: {self._what_now()}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step (counted from 1)."""
        if self._first_step is None:
            self._first_step = step - 1
            self._started = time.monotonic() - metrics.get("time/step_s", 0.0)  # what came before was the start
        shown = [f"{label} {form.format(metrics[name])}" for name, label, form in _SHOWN if name in metrics]
        if self._bar is not None:
            with _NOBODY_READS:
                self._bar.update(self._task, completed=step, metrics=shown)
        else:
            assert self._total is not None
            left = self._time_left(step, self._total - step)
            self.message("  ".join((f"{self._title} step {step}/{self._total}", *shown, f"left {left}")))

    def _time_left(self, step: int, steps_left: int) -> str:
        done = step - (self._first_step or 0)
        return _duration((time.monotonic() - self._started) / max(done, 1) * steps_left)


def _duration(seconds: float) -> str:
    """As h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"

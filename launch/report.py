"""`fledge report`: one self-contained HTML page of a run: curves, evaluation, samples, configuration.

Left out: anything that needs a server or a second file.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from rl.errors import DataError
from rl.metrics import read_metrics

REPORT_FILE = "report.html"
_CURVES = (  # title, metrics drawn together
    ("Reward", ("reward/mean", "reward/generated_mean", "reward/std")),
    ("Response length (tokens)", ("rollout/length_mean", "rollout/length_max")),
    ("Loss", ("learner/loss", "eval/loss")),
    ("Entropy", ("learner/entropy",)),
    ("KL to the reference", ("learner/kl_ref",)),
    ("Gradient norm", ("learner/grad_norm",)),
    ("Clipped and ratio", ("learner/clip_frac", "learner/clip_high_frac", "learner/ratio_mean")),
    ("Loss of the critic", ("critic/loss",)),
    ("Values and returns", ("critic/value_mean", "critic/return_mean")),
    ("Explained variance of the critic", ("critic/explained_variance",)),
    ("Rollout against learner log-probabilities", ("rollout/logprob_diff_mean", "rollout/logprob_diff_max")),
    ("Tokens per second", ("rollout/tokens_per_s", "learner/tokens_per_s")),
    ("Seconds per step", ("time/step_s", "time/rollout_s", "time/reward_s", "time/update_s", "time/sync_s")),
)
_LOGARITHMIC = {"Rollout against learner log-probabilities"}
_MOST_SAMPLES = 12


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory and return its path.

    Raises DataError when there is nothing to show.
    """
    rows = read_metrics(run_dir)
    if not rows:
        raise DataError(f"{run_dir} has no metrics.jsonl with rows in it; is it a run directory?")
    steps = max(row["step"] for row in rows)
    environment = Environment(loader=PackageLoader("launch"), autoescape=select_autoescape())
    config = run_dir / "config.yaml"
    page = environment.get_template("report.html").render(
        name=run_dir.name,
        steps=steps,
        evaluations=evaluation_table(rows),
        curves=[(title, svg) for title, names in _curves(rows) if (svg := _draw(title, names, rows))],
        samples=_last_samples(run_dir, int(steps)),
        config=config.read_text() if config.exists() else "",
        final=sorted((k, v) for k, v in rows[-1].items() if isinstance(v, float) and k != "time"),
    )
    path = run_dir / REPORT_FILE
    try:
        path.write_text(page)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
    return path


def evaluation_table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(metric, first value, last value) of every evaluation score that was measured at least once."""
    names = sorted({name for row in rows for name in row if name.startswith("eval/") and "@" in name})
    table = []
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            table.append((name.removeprefix("eval/"), values[0], values[-1]))
    return table


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    evaluated = tuple(f"eval/{name}" for name, _, _ in evaluation_table(rows))
    return [("Evaluation", evaluated), *_CURVES]


def _draw(title: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """An inline SVG, or an empty string when no row has any of the metrics."""
    from matplotlib.figure import Figure

    series = {name: [(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in names}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 12 else None, markersize=3)
    if title in _LOGARITHMIC and all(value > 0 for points in series.values() for _, value in points):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return "<svg" + buffer.getvalue().partition("<svg")[2]  # without the XML prologue


def _last_samples(run_dir: Path, last_step: int) -> list[dict[str, Any]]:
    files = sorted((run_dir / "samples").glob("step_[0-9]*.jsonl"))
    # Later files are from before the run was killed; since it resumed, it has not reached their steps again.
    files = [file for file in files if int(file.stem.removeprefix("step_")) <= last_step]
    if not files:
        return []
    with files[-1].open() as lines:  # not `splitlines`, which also splits a response at U+2028 and the like
        try:
            return [json.loads(line) for line in itertools.islice(lines, _MOST_SAMPLES)]
        except ValueError as error:
            raise DataError(f"{files[-1]} is damaged: {error}; remove it") from error

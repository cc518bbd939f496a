"""Every algorithm on the quickstart's task, from the same warm start: a table, and a picture of the curves.

    make quickstart
    python benchmarks/algorithms.py [NAME ...] [--steps 24] [--picture docs/benchmarks/algorithms.svg]

A run that already exists (`runs/algorithms/NAME`) is not repeated. The task is small and there is only one seed, so the
table shows that an algorithm learns, not which one is best. Left out: the warm start.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from rl.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder holds a rewards.py, which would hide the project's package of that name
RUNS = Path("runs/algorithms")
# Advantage, loss and aggregation of docs/algorithms.md's recipes. Two optimizer steps a batch, so that clipping has
# something to do.
RECIPES: dict[str, dict[str, Any]] = {
    "PPO": {
        "algorithm": {"advantage": "gae", "loss": "ppo_clip", "whiten_advantages": True},
        "critic": {"optimizer": {"lr": 1e-3}, "warmup_steps": 2},
    },
    "GRPO": {"algorithm": {"advantage": "grpo", "loss": "grpo"}},
    "Dr. GRPO": {"algorithm": {"advantage": "dr_grpo", "loss": "dr_grpo"}},
    "DAPO": {"algorithm": {"advantage": "grpo", "loss": "dapo"}},
    "GSPO": {"algorithm": {"advantage": "grpo", "loss": "gspo"}},
    "CISPO": {"algorithm": {"advantage": "grpo", "loss": "cispo"}},
    "GMPO": {"algorithm": {"advantage": "grpo", "loss": "gmpo"}},
    "RLOO": {"algorithm": {"advantage": "rloo", "loss": "ppo_clip", "aggregation": "sequence_mean_token_sum"}},
    "REINFORCE++": {"algorithm": {"advantage": "reinforce_plus_plus", "loss": "ppo_clip"}},
}
ENDS = 3  # the table shows the mean reward of this many steps at either end


def run_dir(name: str) -> Path:
    return RUNS / "".join(c if c.isalnum() else "_" for c in name)


def train(name: str, model: Path, steps: int) -> None:
    """One run of `fledge train`, unless it already exists."""
    from launch import commands
    from rl.config import TrainConfig
    from rl.config.loading import load_config

    metrics = run_dir(name) / METRICS_FILE
    if metrics.exists() and len(read_metrics(run_dir(name))) == steps:
        return
    shutil.rmtree(run_dir(name), ignore_errors=True)
    config = load_config(ROOT / "configs" / "quickstart.yaml", [], TrainConfig).model_dump()
    changes: dict[str, Any] = {
        "run_dir": str(run_dir(name)),
        "name": name,
        "total_steps": steps,
        "model": {"path": str(model)},
        "learner": {"mini_batches": 2},
        "evaluation": {"every": 0, "at_start": False},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False, "samples_every": 0},
    }
    for section, values in [*changes.items(), *RECIPES[name].items()]:
        config[section] = {**(config[section] or {}), **values} if isinstance(values, dict) else values
    commands.train(TrainConfig.model_validate(config), resume=False)


def ends(name: str) -> tuple[float, float]:
    """Mean reward of the first and of the last steps."""
    rewards = [row["reward/mean"] for row in read_metrics(run_dir(name))]
    return statistics.fmean(rewards[:ENDS]), statistics.fmean(rewards[-ENDS:])


def table(names: list[str]) -> str:
    lines = [f"| algorithm | reward, first {ENDS} steps | last {ENDS} steps | change |", "|---|---|---|---|"]
    for name in names:
        first, last = ends(name)
        lines.append(f"| {name} | {first:.3f} | {last:.3f} | {last - first:+.3f} |")
    return "\n".join(lines)


def draw(names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in names:
        rows = read_metrics(run_dir(name))
        axes.plot([row["step"] for row in rows], [row["reward/mean"] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="mean reward of the step's rollouts")
    axes.legend(ncols=2)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/sft/model"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    names = arguments.names or list(RECIPES)
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"no recipe {unknown}; there are {list(RECIPES)}")
    if not arguments.model.exists():
        parser.error(f"{arguments.model} does not exist; run `make quickstart` first, or name a model")

    from launch.environment import keep_worker_priority, quiet_frameworks, secure_ray

    quiet_frameworks()
    secure_ray(None)  # before Ray is imported
    keep_worker_priority()
    from launch.cluster import ray_cluster
    from rl.config import RayConfig

    with ray_cluster(RayConfig()):
        for name in names:
            train(name, arguments.model, arguments.steps)
    print(table(names))
    if arguments.picture:
        draw(names, arguments.picture)
    if fell := [name for name in names if ends(name)[1] <= ends(name)[0]]:
        sys.exit(f"{fell} did not raise the reward")


if __name__ == "__main__":
    main()

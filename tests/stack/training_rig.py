"""Configurations of tiny real runs, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import psutil
import yaml
from safetensors.torch import load_file

from launch.compose import training_run
from launch.data import checked_training
from launch.tiny_models import Family, build_tiny_model
from rl.config import TrainConfig
from rl.run import TrainingRun

REWARD_FILES = Path(__file__).parent / "reward_files"
# As users of verl and TRL write them. Dense, so that every step of an untrained model has something to learn.
REWARDS = [
    {"name": f"{REWARD_FILES / 'verl_reward.py'}:compute_score"},
    {"name": f"{REWARD_FILES / 'trl_reward.py'}:reward_short_words"},
]


def write_rows(path: Path, count: int = 12) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} + {i} =", "ground_truth": str(2 * i)}) + "\n" for i in range(count))
    )
    return path


def config_dict(directory: Path, family: Family = "qwen3", **sections: dict[str, Any] | Any) -> dict[str, Any]:
    """A run of a few steps on a tiny random model; sections are merged key by key."""
    model = directory / family
    if not model.exists():
        build_tiny_model(family, model)
    config: dict[str, Any] = {
        "name": "tiny",
        "run_dir": str(directory / "run"),
        "total_steps": 3,
        "seed": 3,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": {"path": str(write_rows(directory / "rows.jsonl"))}, "max_prompt_tokens": 64},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 4,
            "max_response_tokens": 24,
            "kv_cache_gib": 0.1,
            "enforce_eager": True,
        },
        "reward": {"functions": REWARDS, "num_workers": 1},
        # Large enough that one missed sync moves the log-probabilities far beyond what rounding could.
        "learner": {"num_workers": 2, "max_tokens_per_microbatch": 512, "optimizer": {"lr": 0.01}},
        "sync": {"probe_every": 1},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False},
    }
    for name, value in sections.items():
        config[name] = config[name] | value if isinstance(value, dict) and name in config else value
    return config


class Quiet:
    """A display that keeps its messages."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.done: list[str] = []

    def message(self, text: str) -> None:
        self.told.append(text)

    def now(self, text: str) -> None:
        self.done.append(text)

    def step(self, step: int, metrics: Any) -> None:
        pass


def run_here(config: dict[str, Any], display: Quiet | None = None) -> Any:
    """A context manager with the running parts, in this process and its Ray cluster."""
    display = display or Quiet()
    validated = TrainConfig.model_validate(config)
    Path(validated.run_dir).mkdir(parents=True, exist_ok=True)
    return training_run(checked_training(validated, display), display)


def finish(run: TrainingRun, run_dir: Path) -> dict[str, Any]:
    """Execute the run; returns the tensors of the exported model."""
    run.execute()
    run.controller.learners.export_hf(run_dir / "model")
    return load_file(run_dir / "model" / "model.safetensors")


class Command:
    """`fledge ...` in a process group of its own, which `end_all` ends if its test has failed to."""

    _started: ClassVar[list[Command]] = []

    def __init__(self, directory: Path, *arguments: str, **environment: str) -> None:
        self.log = directory / "command.log"
        self._temporary = tempfile.TemporaryDirectory(prefix="t")  # short, for the sake of the sockets in it
        env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                # A shell's background jobs, and so their children, ignore Ctrl-C; `env` makes them heed it again.
                ["env", "--default-signal=INT", sys.executable, "-m", "launch.cli", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env | {"TMPDIR": self._temporary.name} | environment,
                start_new_session=True,
            )
        self._started.append(self)

    @classmethod
    def end_all(cls, grace_s: float = 60.0) -> None:
        """End all commands in an orderly way, then kill what is still there."""
        while cls._started:
            process = cls._started.pop().process
            if process.poll() is None:
                descendants = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                _, alive = psutil.wait_procs([psutil.Process(process.pid), *descendants], timeout=grace_s)
                for left in alive:
                    left.kill()
                process.wait()

    def wait(self, timeout_s: float = 400.0) -> int:
        return self.process.wait(timeout=timeout_s)

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, path: Path, text: str = "", timeout_s: float = 400.0) -> None:
        """Until `path` exists and holds `text`."""
        deadline = time.monotonic() + timeout_s
        while not (path.exists() and (path.is_dir() or text in path.read_text())):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, f"{path} did not appear: {self.output()}"
            time.sleep(0.05)

    def descendants(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """(all processes under it except Ray's node agents, those agents): agents take a minute to notice that their
        node was killed."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        agents = [p for p in processes if p.cmdline()[0] in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]
        return [p for p in processes if p not in agents], agents

    def wait_with_descendants(self, timeout_s: float = 400.0) -> list[psutil.Process]:
        """Wait for the end; returns every process that was under it for more than a moment."""
        seen: set[psutil.Process] = set()
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.output()
            seen.update(psutil.Process(self.process.pid).children(recursive=True))
            time.sleep(0.3)
        return list(seen)

    def kill(self) -> None:
        self.process.kill()

    def files_left(self) -> list[str]:
        """Files in the temporary directory, but for Ray's logs and torch's cache. (Weight buckets have no names.)"""
        temporary = [p.name for p in Path(self._temporary.name).iterdir()]
        return [name for name in temporary if not re.match(r"ray$|torchinductor_", name)]


def undocumented(row: dict[str, Any]) -> list[str]:
    """Metrics of a row that docs/metrics.md does not name. A reward's parts have names of their own."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"`(\w+/\w+)`", page))
    of_datasets = {name.split("@")[0] for name in re.findall(r"`(\w+(?:@[nk])?)`", page.split("(`eval/NAME/…`)")[1])}
    prefixes = tuple(re.findall(r"`(\w+/\w*)…`", page))
    return [
        name
        for name in row
        if name not in known | {"step", "time"}
        and not name.startswith(prefixes)
        and not re.fullmatch(r"reward/[\w/]+_mean", name)
        and not (name.startswith("eval/") and name.split("/")[2].split("@")[0] in of_datasets)
    ]


def gone(processes: list[psutil.Process], timeout_s: float = 60.0) -> list[str]:
    """Names of the processes that are still there after the deadline."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [f"{p.pid} {' '.join(p.cmdline())[:80]}" for p in alive if p.is_running()]


def save_config(directory: Path, config: dict[str, Any]) -> Path:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path

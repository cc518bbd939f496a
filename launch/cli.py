"""The `fledge` command: parses arguments, and turns errors into exit codes. Left out: what the commands do."""

from __future__ import annotations

import errno
import math
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from launch.environment import (
    check_temporary_directory,
    installed_version,
    keep_worker_priority,
    quiet_frameworks,
    refuse_hidden,
    secure_ray,
)
from launch.reward_commands import reward_app
from rl.config import RunConfig, SftConfig, TrainConfig
from rl.config.loading import load_config
from rl.errors import ConfigError, FledgeError

_WAYS_OUT = ("_sitebuiltins.py", "_sitebuiltins>", "exit_hooks.py")  # files of exit() and of W&B's sys.exit
# What a file system says, and no fault of ours: rights, kinds of files, room.
_OF_THE_MACHINE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
)
Config = TypeVar("Config", bound=RunConfig)

app = typer.Typer(
    name="fledge",
    help="Reinforcement learning post-training of reasoning models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(reward_app)

ConfigPath = Annotated[Path, typer.Argument(help="YAML configuration file", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="keys to override, for example rollout.group_size=16", metavar="[KEY=VALUE]..."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="continue from the newest checkpoint in run_dir, if there is one")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="check the configuration, model, data and rewards, and show what would run, without starting anything",
    ),
]

INTERRUPTED = 130
_ONE_INTERRUPT_S = 5.0


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fledge {installed_version('fledge')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="show the version and exit", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """What every command shares."""


@app.command()
def train(config: ConfigPath, overrides: Overrides = None, *, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Train a model with reinforcement learning."""
    loaded = _load(config, overrides, TrainConfig)
    if dry_run:
        _refuse_resume(resume)
        from launch.dry_run import describe_training

        describe_training(loaded)
        return
    from launch.commands import train as run

    _print_metrics(run(loaded, resume=resume), ("reward/mean", "eval/"))


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None, *, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Warm a model up on worked examples."""
    loaded = _load(config, overrides, SftConfig)
    if dry_run:
        _refuse_resume(resume)
        from launch.dry_run import describe_sft

        describe_sft(loaded)
        return
    from launch.commands import sft as run

    _print_metrics(run(loaded, resume=resume), ("learner/loss", "eval/"))


@app.command(name="eval")
def evaluate(config: ConfigPath, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Evaluate a model on the config's evaluation data: avg@n, pass@k, maj@n."""
    loaded = _load(config, overrides, TrainConfig)
    if dry_run:
        from launch.dry_run import describe_evaluation

        describe_evaluation(loaded)
        return
    from launch.commands import evaluate as run

    _print_metrics(run(loaded), ("eval/",))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="the run_dir of a run")],
    out_dir: Annotated[Path, typer.Argument(help="new or empty folder to write the Hugging Face checkpoint to")],
    *,
    step: Annotated[
        int | None, typer.Option(min=1, help="step of the checkpoint to export; default: the newest checkpoint")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="export the best one by checkpoint.keep_best")] = False,
) -> None:
    """Turn a run's checkpoint into a Hugging Face checkpoint."""
    from launch.commands import export as run

    if best and step is not None:
        raise ConfigError("--best and --step choose a checkpoint in two ways; leave one out")
    checkpoint = run(run_dir, out_dir, step=step, best=best)
    typer.echo(f"{checkpoint} -> {out_dir}")


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="the run_dir of a run")]) -> None:
    """Write report.html, one self-contained page of the run, and show its first and last evaluation."""
    from launch.report import evaluation_table, write_report
    from rl.metrics import read_metrics

    path = write_report(run_dir)
    for name, first, last in evaluation_table(read_metrics(run_dir)):
        if name.count("/") == 1:  # of a whole set, not of one of its data sources
            typer.echo(f"{name:40s} {first:.3f} -> {last:.3f}")
    typer.echo(f"report {path}")


@app.command()
def doctor() -> None:
    """Check whether this machine is able to run; exit code 1 when something that every run needs is missing."""
    from launch.doctor import examine

    failed = False
    for finding in examine():
        mark = "ok     " if finding.ok else "MISSING" if finding.required else "absent "
        typer.echo(f"{mark} {finding.what}" + ("" if finding.ok else f"; {finding.remedy}"))
        failed |= finding.required and not finding.ok
    if failed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: every known error is one message and its kind's exit code; Ctrl-C, SIGTERM or SIGHUP end it."""
    quiet_frameworks()
    interrupt = _Interrupt()
    signal.signal(signal.SIGTERM, interrupt)
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in a shell's background, and under nohup
            signal.signal(number, interrupt)
    try:
        # Outside its standalone mode, typer turns Ctrl-C and typer.Exit into a return value; commands return nothing.
        exit_code = app(standalone_mode=False) or 0
    except FledgeError as error:
        for note in getattr(error, "__notes__", ()):  # the traceback of another process
            _say(note)
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except SystemExit as error:  # nothing of ours raises it within the app
        if isinstance(error.__context__, BrokenPipeError):  # rich, where a pager has gone
            raise
        frames = traceback.extract_tb(error.__traceback__)
        frame = next(frame for frame in reversed(frames) if not frame.filename.endswith(_WAYS_OUT))
        _say(
            f"error: {frame.filename}, line {frame.lineno}, ended the process with {error.code!r}; rewards and "
            "plugins must not call exit, and code that only a script should run belongs under `if __name__ == "
            "'__main__':`"
        )
        sys.exit(ConfigError.exit_code)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:  # of a write to an open file
            places = f"run_dir or in {tempfile.gettempdir()}"
            _say(f"error: {error.strerror}, in {places}; free some space there, then --resume")
        elif error.errno in _OF_THE_MACHINE and error.filename is not None:
            _say(f"error: {error.filename}: {error.strerror}")
        else:
            raise
        sys.exit(ConfigError.exit_code)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            if message := error.format_message():  # without arguments the help has been shown, and there is none
                _say(f"error: {message}")
            sys.exit(2)
        raise
    if exit_code == INTERRUPTED:
        _say("interrupted")
    sys.exit(exit_code)


def _load(path: Path, overrides: list[str] | None, schema: type[Config]) -> Config:
    """Load and validate before any framework is imported: a typo costs a moment, not a minute."""
    config = load_config(path, overrides or [], schema)
    refuse_hidden(Path.cwd())
    check_temporary_directory(config.ray.address)
    secure_ray(config.ray.address)
    keep_worker_priority()
    return config


def _refuse_resume(resume: bool) -> None:
    if resume:
        raise ConfigError(
            "--resume has no effect with --dry-run, which looks at neither run_dir nor its checkpoints; leave "
            "--resume out"
        )


class _Interrupt:
    """Handles SIGINT (Ctrl-C), SIGTERM and SIGHUP.

    Schedulers, `timeout` and closed terminals signal a process and then its group, and a second interrupt would give up
    what the first one saves. So a SIGTERM or SIGHUP shortly after another signal belongs to it.
    """

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT or now - self._last > _ONE_INTERRUPT_S:
            self._last = now
            raise KeyboardInterrupt


def _say(text: str) -> None:
    with suppress(OSError):  # a terminal that was closed
        sys.stderr.write(text + "\n")


def _print_metrics(metrics: dict[str, float], prefixes: tuple[str, ...]) -> None:
    for name, value in sorted(metrics.items()):
        if name.startswith(prefixes):
            typer.echo(f"{name:40s} {value:.4f}")


if __name__ == "__main__":
    main()

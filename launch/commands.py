"""What the commands do, as functions: train, sft, eval, export. Left out: argument parsing (`launch.cli`)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import typer

from launch.cluster import ray_cluster, resolve_device
from launch.compose import (
    checkpoint_store,
    evaluator_of,
    open_sinks,
    run_plan,
    shape_data,
    start_learners,
    training_run,
)
from launch.data import CheckedRun, checked_evaluation, checked_sft, checked_training
from launch.display import ProgressDisplay
from launch.placement import place_learners
from rl.checkpoint import LEARNER, naming_a_full_disk, read_state
from rl.config import SftConfig, TrainConfig
from rl.config.loading import load_config, to_yaml
from rl.errors import CheckpointError, ConfigError
from rl.learner_checkpoint import LAST_WRITTEN
from rl.metrics import METRICS_FILE
from rl.run import row_is_whole
from rl.supervised import SupervisedPlan, SupervisedRun
from rl.workers import LearnerSpec

MODEL = "model"  # the folder of the exported model in a run directory
_CONFIG = "config.yaml"
CRITIC = "critic"  # and of the exported critic, if there is one
_LOCK = ".lock"  # locked while a run is alive; names its process
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems on which nobody can claim a folder
_JOB_FOLDER = "working_dir_files"  # Ray's, where it unpacks --working-dir


def train(config: TrainConfig, *, resume: bool) -> dict[str, float]:
    """`fledge train`: run to the end, export the model, return the last step's metrics."""
    with _claimed_run_dir(config, resume=resume) as run_dir, ProgressDisplay(config.name) as display:
        exported = (MODEL, CRITIC) if config.critic is not None else (MODEL,)

        def is_finished(known: TrainConfig) -> bool:
            finished = resume and _is_finished(known, known.total_steps, exported)
            if finished:
                display.message(_nothing_to_do(run_dir, "total_steps or total_epochs"))
            return finished

        if config.total_epochs is None and is_finished(config):  # even if the data has since gone
            return {}
        checked = checked_training(config, display)
        if is_finished(checked.config):
            return {}
        display.expect(checked.config.total_steps)
        return _train(checked, run_dir, display, resume=resume)


def _train(checked: CheckedRun, run_dir: Path, display: ProgressDisplay, *, resume: bool) -> dict[str, float]:
    config = checked.config
    if resume and (newest := checkpoint_store(config, run_dir).latest()):
        source, _ = shape_data(config, checked.prompts)
        source.load_state_dict(read_state(newest)["prompt_source"])  # before any worker starts: is it the same data?
    with training_run(checked, display) as run:
        _warn_of_a_lost_run_dir(run_dir, display)
        if resume and not run.restore():
            display.message(_no_checkpoint(run_dir))
        _write_config(run_dir, config)
        metrics = run.execute()
        with _exporting(run_dir):
            run.controller.learners.export_hf(run_dir / MODEL)
            display.message(f"model {run_dir / MODEL}")
            if config.critic is not None:
                run.controller.learners.export_critic(run_dir / CRITIC)
                display.message(f"critic {run_dir / CRITIC}")
        return metrics


def sft(config: SftConfig, *, resume: bool) -> dict[str, float]:
    """`fledge sft`: run to the end, export the model, return the last step's metrics."""
    with ExitStack() as stack:
        run_dir = stack.enter_context(_claimed_run_dir(config, resume=resume))
        display = stack.enter_context(ProgressDisplay(config.name))
        checked = checked_sft(config, display)
        display.expect(checked.total_steps)
        if resume and _is_finished(config, checked.total_steps, (MODEL,)):
            display.message(_nothing_to_do(run_dir, "epochs"))
            return {}
        _warn_of_a_lost_run_dir(run_dir, display)
        stack.enter_context(ray_cluster(config.ray))
        device = resolve_device(config)
        placement = place_learners(config.learner.num_workers, config.ray, device=device, report=display.message)
        stack.callback(placement.release)
        spec = LearnerSpec(
            config.learner,
            config.model,
            None,
            seed=config.seed,
            deterministic=config.deterministic,
            device=device,
            total_optimizer_steps=checked.total_steps,
        )
        learners = start_learners(spec, actor_options=placement.learners, tell=display.now)
        stack.callback(learners.shutdown)
        learners.check_run_dir(run_dir)
        run = SupervisedRun(
            SupervisedPlan(
                config.epochs, config.batch_size, config.seed, config.checkpoint.every, config.evaluation.every
            ),
            checked.examples,
            learners,
            checkpoints=checkpoint_store(config, run_dir),
            display=display,
            held_out=checked.held_out,
        )
        if resume and not run.restore():
            display.message(_no_checkpoint(run_dir))
        _write_config(run_dir, config)
        metrics = run.execute(lambda done_steps: open_sinks(config, run_dir, done_steps))
        with _exporting(run_dir):
            learners.export_hf(run_dir / MODEL)
            display.message(f"model {run_dir / MODEL}")
        return metrics


def _exporting(run_dir: Path) -> AbstractContextManager[None]:
    way_out = f"Every step is saved: free some space there, then --resume, or `fledge export {run_dir} OUT_DIR`"
    return naming_a_full_disk(run_dir, "the trained model", way_out)


def evaluate(config: TrainConfig) -> dict[str, float]:
    """`fledge eval`: score the model of the config on its evaluation data; samples and metrics go to run_dir."""
    run_dir = Path(config.run_dir)
    _make_run_dir(run_dir)
    results = run_dir / "eval.json"
    if results.exists():
        raise ConfigError(
            f"run_dir {run_dir} already holds an evaluation ({results.name}); choose another run_dir, or remove that "
            "file"
        )
    with (
        ProgressDisplay(config.name) as display,
        evaluator_of(checked_evaluation(config, display), display) as evaluator,
    ):
        metrics = evaluator.evaluate(run_dir / "samples", "final")
    (run_dir / "eval_config.yaml").write_text(to_yaml(config))
    results.write_text(json.dumps({"model": config.model.path, **metrics}, indent=1) + "\n")
    return metrics


def export(run_dir: Path, out_dir: Path, *, step: int | None = None, best: bool = False) -> Path:
    """`fledge export`: write a step's checkpoint, the best or the newest, as a Hugging Face folder. Starts no
    worker."""
    from rl.learner_checkpoint import export_checkpoint

    config_file = run_dir / _CONFIG
    if not config_file.is_file():
        raise CheckpointError(f"{run_dir} has no config.yaml, so it is not a run directory")
    config = load_config(config_file, (), TrainConfig if _is_train_config(config_file) else SftConfig)
    store = checkpoint_store(config, run_dir)
    checkpoints = store.complete()
    if not checkpoints:
        raise CheckpointError(f"{run_dir / 'checkpoints'} holds no complete checkpoint; see checkpoint.every")
    if best and (step := store.best_of(checkpoints)) is None:
        metric, there = config.checkpoint.keep_best or "not set", ", ".join(map(str, checkpoints))
        raise CheckpointError(
            f"no checkpoint of {run_dir} is known to be the best: checkpoint.keep_best is {metric}, and steps {there} "
            "are there; choose one with --step"
        )
    step = step or max(checkpoints)
    if step not in checkpoints:
        there = ", ".join(map(str, checkpoints))
        raise CheckpointError(
            f"{run_dir / 'checkpoints'} holds no checkpoint of step {step}; it has those of steps {there}"
        )
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if next(out_dir.iterdir(), None) is not None:
            raise ConfigError(f"{out_dir} already holds files; choose another folder, or remove it")
    except OSError as error:
        raise ConfigError(f"{out_dir} cannot be written: {error}; choose another folder") from error
    try:
        with naming_a_full_disk(out_dir, "the model", "Free some space there, or choose another folder"):
            export_checkpoint(checkpoints[step] / LEARNER, config.model, out_dir)
    except BaseException:
        shutil.rmtree(out_dir, ignore_errors=True)  # a part of a model, which would be in the way of another try
        raise
    return checkpoints[step]


def _is_train_config(path: Path) -> bool:
    return any(line.startswith("rollout:") for line in path.read_text().splitlines())


def _is_finished(config: TrainConfig | SftConfig, total_steps: int, exported: Sequence[str]) -> bool:
    """Whether the newest checkpoint covers all steps, and every folder of `exported` was finished after it."""
    run_dir = Path(config.run_dir)
    newest = checkpoint_store(config, run_dir).latest()
    if newest is None or (step := read_state(newest)["step"]) < total_steps:
        return False
    if isinstance(config, TrainConfig) and not row_is_whole(run_plan(config, run_dir), step):
        return False
    last_written = [run_dir / folder / LAST_WRITTEN for folder in exported]
    return all(file.is_file() and file.stat().st_mtime >= newest.stat().st_mtime for file in last_written)


def _nothing_to_do(run_dir: Path, setting: str) -> str:
    return (
        f"nothing to do: all steps of {run_dir} are done, and {run_dir / MODEL} is their result; raise {setting} to "
        "continue"
    )


def _no_checkpoint(run_dir: Path) -> str:
    return f"no checkpoint in {run_dir / 'checkpoints'}; starting from the beginning"


@contextmanager
def _claimed_run_dir(config: TrainConfig | SftConfig, *, resume: bool) -> Iterator[Path]:
    """Create the run directory, and keep other runs out of it while the block lasts. The caller writes config.yaml
    there once nothing can refuse the configuration any more.

    Raises:
        ConfigError: the directory cannot be written, already holds a run that is not to be resumed, or belongs to a
            run that is alive; nothing is overwritten.
        CheckpointError: the run to be resumed had another configuration.
    """
    run_dir = Path(config.run_dir)
    with _locked(run_dir, is_new=_make_run_dir(run_dir)):
        store = checkpoint_store(config, run_dir)
        if not resume and ((run_dir / METRICS_FILE).exists() or store.latest() is not None):
            raise ConfigError(
                f"run_dir {run_dir} already holds a run; add --resume to continue it, choose another run_dir, or "
                "remove this one"
            )
        if resume:
            store.resume()
        try:
            yield run_dir
        except KeyboardInterrupt:
            newest = store.latest()
            where = f"continues from {newest}" if newest else "starts at the beginning: there is no checkpoint yet"
            with suppress(OSError):  # the terminal may be gone
                typer.echo(f"--resume {where}", err=True)
            raise


def _write_config(run_dir: Path, config: TrainConfig | SftConfig) -> None:
    (run_dir / _CONFIG).write_text(to_yaml(config))


def _warn_of_a_lost_run_dir(run_dir: Path, display: ProgressDisplay) -> None:
    if not run_dir.is_absolute() and _JOB_FOLDER in Path.cwd().parts:
        display.message(
            f"warning: run_dir {run_dir} is relative, and after this job Ray removes its copy of the working "
            f"directory, {Path.cwd()}, with everything in it; set run_dir to an absolute path"
        )


@contextmanager
def _locked(run_dir: Path, *, is_new: bool) -> Iterator[None]:
    """Claim a run directory while the block lasts. A new one is removed if no configuration was written into it."""
    try:
        lock = (run_dir / _LOCK).open("a+")  # keeps what a living run has written into it
    except OSError as error:  # another user's, say
        raise ConfigError(f"run_dir {run_dir} cannot be written: {error}; choose another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError as error:
            lock.seek(0)
            raise ConfigError(
                f"run_dir {run_dir} belongs to a run that is still alive ({lock.read() or 'of an unknown process'}); "
                "choose another run_dir, or end that run first. A network file system can take a while to notice that "
                f"a node is lost: if that run's node is, remove {run_dir / _LOCK}"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            if is_new and not (run_dir / _CONFIG).exists():
                shutil.rmtree(run_dir, ignore_errors=True)


def _make_run_dir(run_dir: Path) -> bool:
    """Create it; if it exists and cannot be written to, fail now. Returns whether it is new."""
    is_new = not run_dir.exists()
    try:
        for folder in (run_dir, run_dir / "samples"):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written: {error}; choose another") from error
    return is_new

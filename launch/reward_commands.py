"""`fledge reward`: list the rewards, try one on a file, start a plugin package. Left out: training with them."""

from __future__ import annotations

import keyword
import re
import string
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.environment import refuse_hidden
from launch.reward_files import score_file
from rewards.loading import BUILTIN_REWARDS, absolute_name, list_rewards
from rl.config import RewardConfig
from rl.config.loading import overridden
from rl.errors import ConfigError, RewardError

reward_app = typer.Typer(
    name="reward", help="List rewards, try one on a file, or start a plugin package.", no_args_is_help=True
)


@reward_app.command(name="list")
def list_command() -> None:
    """Show every reward that has a name: this package's, then those of installed packages."""
    for listing in list_rewards():
        typer.echo(f"{listing.name} ({listing.source})")
        if listing.error:
            typer.echo(f"    cannot be loaded: {listing.error}")
            continue
        typer.echo(f"    {listing.summary}")
        if listing.options:
            typer.echo(f"    options: {listing.options}")
    typer.echo("Your own: package.module:function or path/to/file.py:function")


@reward_app.command()
def score(
    name: Annotated[str, typer.Argument(help="a listed name, package.module:function or path/to/file.py:function")],
    options: Annotated[
        list[str] | None,
        typer.Argument(help="options of the reward, for example max_tokens=4096", metavar="[KEY=VALUE]..."),
    ] = None,
    *,
    input_path: Annotated[
        Path, typer.Option("--input", help="JSONL file whose rows hold response, and ground_truth or tests")
    ],
    output_path: Annotated[
        Path, typer.Option("--output", help="file to write: the same rows with reward, breakdown and error")
    ],
    workers: Annotated[int, typer.Option(min=1, help="number of scoring processes")] = 2,
    timeout: Annotated[float, typer.Option(min=0.001, max=1e9, help="seconds allowed for scoring one sample")] = 30.0,
) -> None:
    """Score the responses of a JSONL file.

    Rows may also have prompt, answer (else it is read from the response), data_source, group_id, num_tokens and
    truncated; their other fields reach the reward as the row's own.
    """
    refuse_hidden(Path.cwd())
    function = {"name": absolute_name(name), "options": _parse_options(options or [])}
    config = RewardConfig.model_validate({"functions": [function], "num_workers": workers, "timeout_s": timeout})
    counts, total = score_file(input_path, output_path, config)
    num_rows, num_ok = sum(counts.values()), counts.pop("ok", 0)
    failures = "".join(f", {count} {status}" for status, count in sorted(counts.items()))
    mean = f", mean reward {total / num_ok:.4f}" if num_ok else ""
    typer.echo(f"{num_rows} rows: {num_ok} scored{failures}{mean} -> {output_path}", err=True)
    if not num_ok:
        raise RewardError(f"none of the {num_rows} rows could be scored; see the field `error` in {output_path}")


@reward_app.command()
def new(
    name: Annotated[str, typer.Argument(help="name of the package and of its reward, for example my-reward")],
) -> None:
    """Start a plugin package in the folder NAME: a reward, its entry point and its tests."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(f"reward name {name!r} must be lower-case words joined by hyphens, for example my-reward")
    if name in BUILTIN_REWARDS:
        raise ConfigError(f"{name!r} is the name of a built-in reward; choose another")
    package = name.replace("-", "_")
    if package in sys.stdlib_module_names or keyword.iskeyword(package):
        raise ConfigError(f"{name!r} is a name that Python uses itself, so a package cannot have it; choose another")
    folder = Path(name)
    if folder.exists():
        raise ConfigError(f"{folder} already exists in {Path.cwd()}; choose another name")
    class_name = "".join(word.capitalize() for word in name.split("-"))
    class_name += "" if class_name.endswith("Reward") else "Reward"
    files = {
        "pyproject.toml": folder / "pyproject.toml",
        "README.md": folder / "README.md",
        "__init__.py": folder / "src" / package / "__init__.py",
        "test_reward.py": folder / "tests" / f"test_{package}.py",
    }
    templates = resources.files("launch") / "templates" / "reward"
    for template, path in files.items():
        text = (templates / f"{template}.template").read_text(encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            string.Template(text).substitute(name=name, package=package, class_name=class_name), encoding="utf-8"
        )
        typer.echo(str(path))
    typer.echo(f"next: cd {name} && pip install -e . && pytest", err=True)


def _parse_options(options: list[str]) -> dict[str, object]:
    for item in options:
        key, separator, _ = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"option {item!r} is not key=value, for example max_tokens=4096")
    config = OmegaConf.create({})
    for item in options:
        config = overridden(config, item)
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the options {' '.join(options)} cannot be read: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if value is not None}  # null: the default

"""Find a reward by name and bind its options: this package's, an installed package's entry point (group
`fledge.rewards`), `package.module:function`, or `path/to/file.py:function`. Left out: combining and running them.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import platform
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.api import registered_rewards
from rewards.signatures import Reward, adapt, checked_options
from rl.errors import ConfigError, FledgeError, RewardError
from rl.plugins import import_user_code

ENTRY_POINT_GROUP = "fledge.rewards"
MAX_ERROR_CHARACTERS = 300
OWN_PACKAGES = ("launch", "rewards", "rl", "rollout")  # Fledge's, at the top level
BUILTIN_REWARDS = {
    name: f"rewards.{name}"
    for name in (
        "math",
        "code",
        "exact",
        "choice",
        "reasoning_gym",
        "judge",
        "format",
        "length",
        "language",
        "repetition",
    )
}


@dataclass(frozen=True, slots=True)
class RewardListing:
    """One line of `fledge reward list`."""

    name: str
    source: str  # "built in", or the distribution that offers it
    summary: str
    options: str
    error: str = ""  # why it cannot be loaded


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """The reward called `name`, with `options` bound.

    Raises:
        RewardError: nothing has that name, its code cannot be imported, or it has none of the known forms.
        ConfigError: an option is unknown, missing, or of the wrong type or value.
    """
    options = dict(options or {})
    target = find_reward(name)
    if not _makes_rewards(target):
        return adapt(name, target, options)
    bound = checked_options(name, target, options)
    try:
        reward = target(**bound)
    except FledgeError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward {name!r} does not accept its options {options}: {error}") from error
    except Exception as error:
        raise RewardError(f"reward {name!r} cannot be made: {describe_error(error)}") from error
    return adapt(name, reward, {})


def find_reward(name: str) -> Any:
    """The function, class or object that `name` stands for. Raises RewardError when there is none."""
    location, separator, attribute = name.rpartition(":")
    if separator:
        module = _load_file(name, location) if location.endswith(".py") else _load_module(name, location)
        return _attribute(name, module, attribute)
    if name.endswith(".py"):
        raise RewardError(f"reward {name!r} names a file but no function in it; write {name}:FUNCTION")
    if name in BUILTIN_REWARDS and name not in registered_rewards():
        _load_module(name, BUILTIN_REWARDS[name])
    if name in registered_rewards():
        return registered_rewards()[name]
    points = _entry_points()
    if name in points:
        try:
            return points[name].load()
        except Exception as error:
            raise RewardError(f"reward {name!r} ({points[name].value}): {describe_error(error)}") from error
    known = sorted({*BUILTIN_REWARDS, *registered_rewards(), *points})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RewardError(
        f"there is no reward {name!r}; {hint}known: {', '.join(known)}; "
        "your own: package.module:function or path/to/file.py:function"
    )


def absolute_name(name: str) -> str:
    """`name` with the path of a plugin file made absolute, so that it holds in processes that start elsewhere."""
    location, separator, attribute = name.rpartition(":")
    if not separator or not location.endswith(".py"):
        return name
    return f"{Path(location).expanduser().absolute()}:{attribute}"


def list_rewards() -> list[RewardListing]:
    """Every reward that has a name, built in and installed, in that order."""
    points = _entry_points()
    sources = dict.fromkeys(BUILTIN_REWARDS, "built in")
    sources |= {name: point.dist.name if point.dist else "unknown" for name, point in points.items()}
    return [_listing(name, source) for name, source in sources.items()]


def describe_error(error: BaseException) -> str:
    """One line of bounded length: the exception and the innermost place it came from."""
    text = " ".join(str(error).split())
    if len(text) > MAX_ERROR_CHARACTERS:
        text = f"{text[:MAX_ERROR_CHARACTERS]} ..."
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}{': ' + text if text else ''}{place}"


def _makes_rewards(target: Any) -> bool:
    return inspect.isclass(target) or any(target is factory for factory in registered_rewards().values())


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _listing(name: str, source: str) -> RewardListing:
    try:
        target = find_reward(name)
    except RewardError as error:
        return RewardListing(name, source, "", "", error=str(error))
    summary = (inspect.getdoc(target) or "").split("\n", maxsplit=1)[0]
    return RewardListing(name, source, summary, _options_of(target))


def _options_of(target: Callable[..., Any]) -> str:
    parameters = inspect.signature(target).parameters.values()
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in options)


def _load_module(name: str, module: str) -> ModuleType:
    try:
        return import_user_code(module)
    except Exception as error:
        package = module.partition(".")[0]
        remedy = ""
        if package in OWN_PACKAGES:
            remedy = f"; {package} is Fledge's own package: refer to a file of your own by its path"
        elif isinstance(error, ModuleNotFoundError) and error.name in (module, package):
            remedy = f"; it is neither installed nor in {Path.cwd()}: a file is given as path/to/file.py:function"
        raise RewardError(f"reward {name!r}: importing {module} failed: {describe_error(error)}{remedy}") from error


def _load_file(name: str, location: str) -> ModuleType:
    path = Path(location).expanduser().absolute()
    if not path.is_file():
        raise RewardError(
            f"reward {name!r}: there is no file {path} on {platform.node()}; on a cluster, put it on a shared file "
            "system or in Ray's working_dir"
        )
    try:
        return import_user_code(location)
    except Exception as error:
        raise RewardError(f"reward {name!r}: importing {path} failed: {describe_error(error)}") from error


def _attribute(name: str, module: ModuleType, attribute: str) -> Any:
    found: Any = module
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        own = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise RewardError(
            f"reward {name!r}: {module.__file__} has no {attribute!r}; it defines {', '.join(own) or 'no function'}"
        ) from None
    return found

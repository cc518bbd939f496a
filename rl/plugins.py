"""Loading users' own code by module name or file; the errors for a name that nobody registered, and for options.

Left out: the registries; importing a plugin is what makes it register.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rl.errors import ConfigError


def load_plugins(paths: Iterable[str]) -> None:
    """Import each plugin: a module name, or the path of a .py file. Loading one twice does nothing.

    Errors: ConfigError that names the plugin, when it is not found or raises while it is imported.
    """
    for path in paths:
        try:
            if path.endswith(".py"):
                _load_file(Path(path).expanduser().resolve())
            else:
                importlib.import_module(path)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"algorithm.plugins: {path!r} cannot be imported: {type(error).__name__}: {error}; give a module that "
                "is on the Python path, or the path of a .py file"
            ) from error


def _load_file(path: Path) -> None:
    # The name depends on the whole path, so that two files of the same name do not take each other's place.
    name = f"fledge_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    if not path.is_file():
        raise ConfigError(f"algorithm.plugins: there is no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"algorithm.plugins: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not registered, with the nearest ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}"
    return ConfigError(f"there is no {what} {name!r}; {hint} (verl's by verl:NAME)")


def check_options(what: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise ConfigError unless every option is a keyword-only argument of `function`."""
    allowed = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ConfigError(f"{what} does not take {', '.join(unknown)}; it takes {', '.join(allowed) or 'no options'}")

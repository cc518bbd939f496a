"""Load users' own code by module name or file; errors for unregistered names and for unknown options.

Left out: the registries; plugins register themselves when they are imported.
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
from types import ModuleType
from typing import Any

from rl.errors import ConfigError


def load_plugins(paths: Iterable[str]) -> None:
    """Import each plugin: a module name, or the path of a .py file. Loading one twice does nothing.

    Raises ConfigError, naming the plugin, if it is not found or its import fails.
    """
    for path in paths:
        if path.endswith(".py") and not Path(path).expanduser().is_file():
            raise ConfigError(f"algorithm.plugins: there is no file {path}")
        try:
            import_user_code(path)
        except Exception as error:
            raise ConfigError(
                f"algorithm.plugins: {path!r} cannot be imported: {type(error).__name__}: {error}; give a module that "
                "is on the Python path, or the path of a .py file"
            ) from error


def import_user_code(location: str) -> ModuleType:
    """Import a module by name (the working directory is searched too) or a .py file, whose folder becomes importable.

    Raises whatever the code raises, or Python's own error if there is no such module.
    """
    if not location.endswith(".py"):
        _make_importable(Path.cwd())
        return importlib.import_module(location)
    path = Path(location).expanduser().absolute()
    # The module name depends on the whole path, so that two files of the same name do not replace each other.
    name = f"fledge_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # holds for a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _make_importable(path.parent)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_importable(folder: Path) -> None:
    """Add a folder at the end of the path, so that it never hides an installed package."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not registered, with the most similar ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"available are {', '.join(names)}"
    return ConfigError(f"there is no {what} {name!r}; {hint} (verl:NAME selects one of verl's)")


def check_options(what: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise ConfigError unless every option is a keyword-only argument of `function`."""
    allowed = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ConfigError(f"{what} does not take {', '.join(unknown)}; it takes {', '.join(allowed) or 'no options'}")

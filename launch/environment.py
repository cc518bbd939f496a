"""What must be in the environment, and what must not be in the working directory, before frameworks are imported.

Imports no framework itself.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import secrets
from pathlib import Path

from rewards.loading import OWN_PACKAGES
from rl.errors import ConfigError

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",  # a warning for each try at a host that does not answer
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # from calls given up because another one failed, which is reported
}
_SOCKET_BYTES = 107  # of a socket's path on Linux
_RAY_SOCKET = "ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # its longest, under RAY_TMPDIR
_TOKEN_VARIABLES = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}


def quiet_frameworks() -> None:
    """Keep the frameworks' banners and progress bars out of the terminal, unless the user has asked for them."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # it sets its logger's level itself, which would not last


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def keep_worker_priority() -> None:
    """Undo Ray's niceness of 15 for its workers: beside other load they would starve, and here they are the load."""
    os.environ.setdefault("RAY_worker_niceness", "0")


def installed_version(package: str) -> str | None:
    """The package's version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def refuse_hidden(folder: Path) -> None:
    """Refuse a working directory that hides Fledge: Ray's workers look for modules there first.

    Raises:
        ConfigError: a module in `folder` has the name of one of Fledge's packages.
    """
    if (folder / "launch" / Path(__file__).name).exists():  # Fledge itself, or a job's copy of it
        return
    for package in OWN_PACKAGES:
        for path in (folder / f"{package}.py", folder / package / "__init__.py"):
            if path.exists():
                raise ConfigError(
                    f"{path} would hide Fledge's own package {package} from the workers; rename it, or start from "
                    "another directory"
                )


def check_temporary_directory(configured_address: str | None) -> None:
    """Refuse a temporary directory in which Ray could not start a cluster on this machine.

    Raises:
        ConfigError: it is too long for the path of a socket, or it cannot be written to.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)  # as Ray looks for it
    if name is None or cluster_address(configured_address) is not None:
        return
    folder = os.environ[name]
    if (length := len(os.fsencode(os.path.join(folder, _RAY_SOCKET)))) > _SOCKET_BYTES:  # noqa: PTH118 (as Ray does)
        raise ConfigError(
            f"{name} {folder} is too long: Ray's sockets are in it, whose paths would have {length} bytes, and at most "
            f"{_SOCKET_BYTES} are possible. Set RAY_TMPDIR to a folder of at most "
            f"{_SOCKET_BYTES - len(_RAY_SOCKET) - 1}, for example RAY_TMPDIR=/tmp"
        )
    present = next((path for path in (Path(folder), *Path(folder).parents) if os.path.lexists(path)), Path())
    if not Path(folder).is_absolute() or not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name} {folder!r} is not a folder that Ray could write to; give the absolute path of one, or unset it"
        )


def cluster_address(configured: str | None) -> str | None:
    """The cluster to join: the configured one, RAY_ADDRESS, or None for a local one (Ray's word is "local")."""
    address = configured or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def secure_ray(configured_address: str | None) -> None:
    """Give the local cluster that a run is about to start its own token, or present the user's token to a cluster that
    the run joins. Ray reads the token when it is imported.

    `ray start` asks for a token if the user has one, but `ray.init` with an address presents none by itself. A cluster
    that asks for none ignores it. Does nothing if the user has chosen a mode (RAY_AUTH_MODE).
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if cluster_address(configured_address) is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif _TOKEN_VARIABLES & os.environ.keys() or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ["RAY_AUTH_MODE"] = "token"

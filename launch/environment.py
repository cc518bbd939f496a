"""What must be in the environment, and not in the working directory, before the frameworks are imported.

Imports none of them itself.
"""

from __future__ import annotations

import importlib.metadata
import os
import secrets
from pathlib import Path

from rewards.loading import OWN_PACKAGES
from rl.errors import ConfigError

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TQDM_DISABLE": "1",
    "DS_LOG_LEVEL": "error",
    "PYTHONWARNINGS": "ignore",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of calls that were given up, because one beside them failed and is reported
}
_TOKEN_VARIABLES = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}


def quiet_frameworks() -> None:
    """Keep the frameworks' banners and progress bars out of the terminal, unless the user has asked for them."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def keep_worker_priority() -> None:
    """Ray starts its workers at niceness 15, so beside any other load they starve; here they are the load."""
    os.environ.setdefault("RAY_worker_niceness", "0")


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def refuse_hidden(folder: Path) -> None:
    """Ray's workers look for modules in the driver's working directory first, and so do scoring processes.

    Raises:
        ConfigError: something there has the name of one of Fledge's packages.
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


def cluster_address(configured: str | None) -> str | None:
    """The cluster to join: the configured one, RAY_ADDRESS, or None for a local one."""
    return configured or os.environ.get("RAY_ADDRESS")


def secure_ray(configured_address: str | None) -> None:
    """Give the local cluster that a run is about to start a token of its own, or show a cluster that it joins the
    user's. Ray reads it when it is imported.

    `ray start` asks for a token wherever the user has one, but `ray.init` with an address shows none by itself. A
    cluster that asks for none does not mind. Does nothing when the user has chosen a mode.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if cluster_address(configured_address) is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif _TOKEN_VARIABLES & os.environ.keys() or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ["RAY_AUTH_MODE"] = "token"

"""What must be in the environment before the frameworks are imported. Imports none of them itself."""

from __future__ import annotations

import os
import secrets

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_LOG_LEVEL": "error",
    "PYTHONWARNINGS": "ignore",
}


def quiet_frameworks() -> None:
    """Keep the frameworks' banners and progress bars out of the terminal, unless the user has asked for them."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def keep_worker_priority() -> None:
    """Ray starts its workers at niceness 15, so beside any other load they starve; here they are the load."""
    os.environ.setdefault("RAY_worker_niceness", "0")


def cluster_address(configured: str | None) -> str | None:
    """The cluster to join: the configured one, RAY_ADDRESS, or None for a local one."""
    return configured or os.environ.get("RAY_ADDRESS")


def secure_local_ray(configured_address: str | None) -> None:
    """Give the local cluster that a run is about to start a token of its own. Ray reads it when it is imported.

    Does nothing when the run joins a cluster, whose own settings hold, or when the user has chosen a mode.
    """
    if cluster_address(configured_address) is not None or "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

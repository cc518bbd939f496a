"""What the tests on the real stack share: one local Ray cluster per session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from launch.cluster import engine_for_gpus


@pytest.fixture(scope="session", autouse=True)
def engine_for_cpus() -> None:
    if version := engine_for_gpus():
        pytest.skip(f"these run on CPUs, and vllm {version} is a build for GPUs; tests/gpu is for this environment")


@pytest.fixture(autouse=True)
def no_command_left() -> Iterator[None]:
    """End any `fledge` that a failed test has left running: it would take the cores from the tests that follow."""
    yield
    from training_rig import Command

    Command.end_all()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster of 4 logical CPUs, whatever the machine has; ended with the session."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()

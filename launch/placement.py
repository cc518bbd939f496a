"""Where the workers of a run go on a Ray cluster.

On GPUs all of a run's workers are reserved at once, in a placement group, so that two runs cannot each hold half of
what both need. Left out: the cluster (`launch.cluster`), and what the workers do.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.cluster import refuse_gpu_engine
from launch.environment import cluster_address
from rl.config import RayConfig, TrainConfig
from rl.errors import ConfigError, UnavailableError

_CPUS_PER_WORKER = 0.01  # on machines without GPUs the workers take turns on the same cores
_LOOK_EVERY_S = 2.0

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each worker goes: arguments for `ActorClass.options`, per worker. Ranks on one node are
    consecutive; with ray.colocate those beside an engine come first."""

    learners: tuple[dict[str, Any], ...]
    rollouts: tuple[dict[str, Any], ...]
    group: PlacementGroup | None = None

    def release(self) -> None:
        if self.group is not None:
            remove_placement_group(self.group)


def place_train_workers(config: TrainConfig, *, device: str, report: Report) -> Placement:
    """Reserve what the learner and rollout workers need.

    On GPUs one placement group holds a bundle per learner (one GPU) and a bundle per rollout worker
    (tensor_parallel_size GPUs); with ray.colocate one learner and one rollout worker share a bundle of one GPU.

    `report` is called with what the run waits for.

    Raises:
        ConfigError: this machine does not have the resources; gives the numbers.
        UnavailableError: a cluster that was joined does not have them within ray.placement_timeout_s.
    """
    learners, rollouts = config.learner.num_workers, config.rollout.num_workers
    if device == "cpu":
        refuse_gpu_engine()
    elif config.ray.colocate:
        return _place_together(learners, rollouts, config.ray, report)
    width = config.rollout.tensor_parallel_size
    return _place_apart(learners, rollouts, width, config.ray, device=device, report=report)


def place_rollouts(config: TrainConfig, *, device: str, report: Report) -> Placement:
    """Reserve what the rollout workers of an evaluation need; it has no learner."""
    if device == "cpu":
        refuse_gpu_engine()
    rollout = config.rollout
    width = rollout.tensor_parallel_size
    return _place_apart(0, rollout.num_workers, width, config.ray, device=device, report=report)


def place_learners(count: int, config: RayConfig, *, device: str, report: Report) -> Placement:
    """Reserve what the learner workers of a supervised run need."""
    return _place_apart(count, 0, 1, config, device=device, report=report)


def _place_together(learners: int, rollouts: int, config: RayConfig, report: Report) -> Placement:
    bundles = [{"CPU": 2.0, "GPU": 1.0, **config.learner_resources} for _ in range(learners)]
    for bundle in bundles[:rollouts]:
        for key, amount in config.rollout_resources.items():
            bundle[key] = bundle.get(key, 0.0) + amount
    group = _reserve(bundles, config, report)
    nodes = _nodes(group)
    shared = sorted(range(rollouts), key=lambda i: (nodes[i], i))
    alone = sorted(range(rollouts, learners), key=lambda i: (nodes[i], i))
    return Placement(
        tuple(_in_bundle(group, i, num_gpus=0.5, resources=config.learner_resources) for i in shared + alone),
        tuple(_in_bundle(group, i, num_gpus=0.5, resources=config.rollout_resources) for i in shared),
        group,
    )


def _place_apart(
    learners: int, rollouts: int, width: int, config: RayConfig, *, device: str, report: Report
) -> Placement:
    """`width`: how many GPUs a rollout worker has."""
    if device == "cpu":
        return Placement(
            tuple(_on_cpu(config.learner_resources) for _ in range(learners)),
            tuple(_on_cpu(config.rollout_resources) for _ in range(rollouts)),
        )
    bundles = [{"CPU": 1.0, "GPU": 1.0, **config.learner_resources} for _ in range(learners)]
    bundles += [{"CPU": 1.0, "GPU": float(width), **config.rollout_resources} for _ in range(rollouts)]
    group = _reserve(bundles, config, report)
    of_learners, of_rollouts = gather_learners(bundles, _nodes(group), learners)
    return Placement(
        tuple(_in_bundle(group, i, num_gpus=1, resources=config.learner_resources) for i in of_learners),
        tuple(_in_bundle(group, i, num_gpus=width, resources=config.rollout_resources) for i in of_rollouts),
        group,
    )


def gather_learners(
    bundles: Sequence[Mapping[str, float]], nodes: Sequence[str], learners: int
) -> tuple[list[int], list[int]]:
    """Which bundles the learners take, and which are left to the engines, both grouped by node.

    Ray keeps a group on few nodes but promises no order among equal bundles, and one learner away from the others slows
    every gather down. So, of the bundles that suit them, learners take those on the nodes that have the most of these.

    Args:
        bundles: the learners' come first.
        nodes: [bundle] the node on which Ray has put it.
        learners: how many there are.
    """
    suited = [i for i, bundle in enumerate(bundles) if learners and bundle == bundles[0]]
    crowd = Counter(nodes[i] for i in suited)
    chosen = sorted(suited, key=lambda i: (-crowd[nodes[i]], nodes[i], i))[:learners]
    left = sorted(set(range(len(bundles))) - set(chosen), key=lambda i: (nodes[i], i))
    return chosen, left


def _nodes(group: PlacementGroup) -> list[str]:
    """[bundle] the node that it is on."""
    table: dict[Any, str] = placement_group_table(group)["bundles_to_node_id"]
    return [table[index] for index in range(group.bundle_count)]


def _on_cpu(resources: dict[str, float]) -> dict[str, Any]:
    """Options for a worker that must not see a GPU, even if there is one and its torch could use it."""
    hidden = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}} if torch.backends.cuda.is_built() else {}
    return {"num_cpus": _CPUS_PER_WORKER, "resources": resources, **hidden}


def _reserve(bundles: Sequence[dict[str, float]], config: RayConfig, report: Report) -> PlacementGroup:
    """Reserve the bundles, and wait for them: a joined cluster's nodes may be on their way, or yet to be autoscaled."""
    joined = cluster_address(config.address) is not None
    group = placement_group(list(bundles), strategy="PACK")
    deadline = time.monotonic() + config.placement_timeout_s
    told = False
    while not group.wait(_LOOK_EVERY_S):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        lack = lacking(bundles, nodes)
        waited = time.monotonic() >= deadline
        if waited or (lack and not joined):
            remove_placement_group(group)
            kind = UnavailableError if joined else ConfigError
            raise kind(
                f"the cluster has no room for the run: {lack or _in_use(bundles)}"
                + (f" (after ray.placement_timeout_s {config.placement_timeout_s:g} s)" if waited else "")
            )
        if not told:
            report(
                f"waiting up to {config.placement_timeout_s:g} s for room on the cluster: {lack or _in_use(bundles)}"
            )
        told = True
    return group


def lacking(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> str:
    """What the cluster has no room for even if it were empty; "" if nothing is known to be lacking.

    Args:
        bundles: what must fit; each bundle must be on one node.
        nodes: the total resources of each node.
    """
    for bundle in bundles:
        if not any(all(node.get(key, 0.0) >= amount for key, amount in bundle.items()) for node in nodes):
            most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
            wanted = ", ".join(f"{amount:g} {key}" for key, amount in bundle.items())
            return (
                f"one worker needs a node with {wanted} (engines: rollout.tensor_parallel_size GPUs), which none of "
                f"{len(nodes)} nodes has; the most GPUs on one node are {most:g}"
            )
    for key in dict.fromkeys(itertools.chain.from_iterable(bundles)):
        needed, there = (sum(one.get(key, 0.0) for one in those) for those in (bundles, nodes))
        if needed > there:
            return (
                f"the run needs {needed:g} {key}{'s' * (key in ('CPU', 'GPU'))} in all (GPUs: learner.num_workers for "
                "learners, and rollout.num_workers x rollout.tensor_parallel_size for engines that do not share them), "
                f"but the cluster has {there:g}"
            )
    return ""


def _in_use(bundles: Sequence[Mapping[str, float]]) -> str:
    free = ray.available_resources()
    keys = dict.fromkeys(itertools.chain.from_iterable(bundles))
    return "what it needs is in use, or free on nodes that cannot hold a whole worker each; free in all: " + ", ".join(
        f"{free.get(key, 0.0):g} {key}" for key in keys
    )


def _in_bundle(group: PlacementGroup, index: int, *, num_gpus: float, resources: dict[str, float]) -> dict[str, Any]:
    return {
        "num_cpus": 1,
        "num_gpus": num_gpus,
        "resources": resources,
        # If a cluster tells Ray not to hide the other GPUs from an actor, all actors would work on the first one.
        "runtime_env": {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=index, placement_group_capture_child_tasks=True
        ),
    }

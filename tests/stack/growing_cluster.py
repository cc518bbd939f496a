"""Writes, as JSON, how a run is placed on a cluster whose GPU nodes join while it waits for them. The GPUs need not
exist for Ray to count them.

A process of its own, because a process has one cluster.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.cluster_utils import Cluster

from launch.cluster import ray_cluster
from launch.placement import place_train_workers
from rl.config import TrainConfig
from rl.errors import UnavailableError

VARIABLE = "NCCL_SOCKET_IFNAME"


@ray.remote(max_restarts=0)
class Worker:
    def where(self) -> tuple[str, str | None]:
        return ray.get_runtime_context().get_node_id(), os.environ.get(VARIABLE)


def run(**sections: dict[str, Any]) -> TrainConfig:
    minimal: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"train": {"path": "d"}},
        "learner": {"num_workers": 3},
        "rollout": {"num_workers": 3},
        "ray": {"placement_timeout_s": 60},
    }
    return TrainConfig.model_validate(minimal | sections)


def place(config: TrainConfig) -> dict[str, Any]:
    told: list[str] = []
    try:
        placement = place_train_workers(config, device="cuda", report=told.append)
    except UnavailableError as error:
        return {"told": told, "error": str(error)}
    kinds = {"learners": placement.learners, "rollouts": placement.rollouts}
    workers = {kind: [Worker.options(**one).remote() for one in options] for kind, options in kinds.items()}
    found = {kind: ray.get([worker.where.remote() for worker in those]) for kind, those in workers.items()}
    placement.release()
    return {"told": told, **found}


if __name__ == "__main__":
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    os.environ.update({"RAY_ADDRESS": cluster.address, VARIABLE: "of the shell"})
    config = run()
    with ray_cluster(config.ray), ThreadPoolExecutor() as threads:
        del os.environ[VARIABLE]  # the nodes that have yet to start must not have it
        waits = threads.submit(place, config)
        time.sleep(3)
        for _ in range(2):
            cluster.add_node(num_cpus=4, num_gpus=3, include_dashboard=False)
        waited = waits.result()
        wide = {"rollout": {"tensor_parallel_size": 4}, "ray": {"placement_timeout_s": 1}}
        sys.stdout.write(json.dumps({"waited": waited, "too wide": place(run(**wide))}))
    cluster.shutdown()

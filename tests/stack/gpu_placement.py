"""Writes, as JSON, which GPUs of a Ray cluster the workers of each run get. The GPUs need not exist for Ray to
count them.

Arguments: GPUs of the cluster; then, as JSON, [configuration file, overrides ...] of each run.
A process of its own, because a process has one cluster.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray

from launch.placement import Placement, place_train_workers
from rl.config import TrainConfig
from rl.config.loading import load_config
from rl.errors import ConfigError


@ray.remote(max_restarts=0)
class Worker:
    def gpus(self) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]

    def resources(self) -> dict[str, Any]:
        return ray.get_runtime_context().get_assigned_resources()


def describe(placement: Placement) -> dict[str, Any]:
    kinds = {"learners": placement.learners, "rollouts": placement.rollouts}
    workers = {kind: [Worker.options(**one).remote() for one in options] for kind, options in kinds.items()}
    placed = {
        "gpus": {kind: ray.get([worker.gpus.remote() for worker in those]) for kind, those in workers.items()},
        "resources": {kind: ray.get(those[0].resources.remote()) for kind, those in workers.items()},
        "free_gpus": ray.available_resources().get("GPU", 0.0),
    }
    placement.release()
    return placed


def place(config_path: str, *overrides: str) -> Any:
    config = load_config(config_path, overrides, TrainConfig)
    try:
        return describe(place_train_workers(config, device="cuda", report=print))
    except ConfigError as error:
        return str(error)


if __name__ == "__main__":
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        "local",
        num_cpus=16,
        num_gpus=int(sys.argv[1]),
        resources={"fast": 8},
        include_dashboard=False,
        log_to_driver=False,
    )
    sys.stdout.write(json.dumps([place(*run) for run in json.loads(sys.argv[2])]))
    ray.shutdown()

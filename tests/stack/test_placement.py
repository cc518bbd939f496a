"""Where Ray puts the workers of runs with GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.stack

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
RUNS = {
    "apart": [CONFIGS / "gpt_oss_20b.yaml", "ray.learner_resources.fast=1"],
    "colocated": [
        *(CONFIGS / "qwen3_8b.yaml", "ray.colocate=true", "rollout.gpu_memory_utilization=0.4"),
        *("learner.num_workers=8", "rollout.num_workers=5"),
    ],
    "too large": [CONFIGS / "qwen3_8b.yaml", "learner.num_workers=5"],
}


@pytest.fixture(scope="module")
def placed() -> dict[str, Any]:
    """What `gpu_placement` says of each run on a cluster with 8 GPUs."""
    runs = json.dumps(list(RUNS.values()), default=str)
    return dict(zip(RUNS, output_of("gpu_placement.py", "8", runs), strict=True))


def output_of(script: str, *arguments: str) -> Any:
    """What a script in this folder writes as JSON; it has a cluster of its own."""
    ended = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        | {"PYTHONPATH": str(HERE.parents[1]), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"},  # as some clusters
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_every_worker_has_gpus_of_its_own(placed: dict[str, Any]) -> None:
    learners, rollouts = placed["apart"]["gpus"].values()
    assert all(len(gpus.split(",")) == 1 for gpus in learners)
    assert all(len(gpus.split(",")) == 2 for gpus in rollouts)  # tensor_parallel_size
    assert sorted(",".join(learners + rollouts).split(",")) == [str(gpu) for gpu in range(8)]
    assert placed["apart"]["free_gpus"] == 0
    resources = placed["apart"]["resources"]
    assert resources["learners"]["fast"] == 1 and "fast" not in resources["rollouts"]


def test_colocated_workers_share_the_gpu_that_cuda_ipc_needs_them_to_share(placed: dict[str, Any]) -> None:
    learners, rollouts = placed["colocated"]["gpus"].values()
    assert sorted(learners) == [str(gpu) for gpu in range(8)]
    assert rollouts == learners[:5]


def test_too_few_gpus_are_an_error_with_the_numbers(placed: dict[str, Any]) -> None:
    assert "the run needs 9 GPUs" in placed["too large"] and "but the cluster has 8" in placed["too large"]


def test_nodes_that_join_late_are_waited_for_and_learners_share_one() -> None:
    placed = output_of("growing_cluster.py")
    [told] = placed["waited"]["told"]
    assert told.startswith("waiting up to 60 s for room on the cluster: one worker needs a node with 1 CPU, 1 GPU")
    learners, rollouts = placed["waited"]["learners"], placed["waited"]["rollouts"]
    assert len({node for node, _ in learners}) == 1
    assert len({node for node, _ in learners + rollouts}) == 2
    assert {value for _, value in learners + rollouts} == {"of the shell"}
    assert "1 CPU, 4 GPU (engines: rollout.tensor_parallel_size GPUs), which none of 3" in placed["too wide"]["error"]
    assert "(after ray.placement_timeout_s 1 s)" in placed["too wide"]["error"]

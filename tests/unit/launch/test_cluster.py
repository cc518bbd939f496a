"""What is asked of a cluster, and what it is told."""

import importlib.metadata
import json

import pytest
import ray
import torch
from ray._private.utils import check_version_info

from launch.cluster import _forwarded, _object_store_bytes, ray_cluster, resolve_device
from launch.placement import gather_learners, lacking, place_learners, place_rollouts, place_train_workers
from rl.config import RayConfig, RunConfig, TrainConfig
from rl.errors import ConfigError, UnavailableError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "shared_memory", "expected"),
    [
        (4 * GIB, 2 * GIB, GIB // 2),  # a small machine: the least that rollouts need
        (64 * GIB, 32 * GIB, 4 * GIB),
        (512 * GIB, 256 * GIB, 8 * GIB),
        (256 * GIB, 64 << 20, GIB // 2),  # a container with Docker's 64 MiB: on disk, and little of it
        (256 * GIB, 5 * GIB, int(4.5 * GIB)),
    ],
)
def test_the_object_store_fits(memory, shared_memory, expected):
    assert _object_store_bytes(memory, shared_memory) == expected


def run_on(device, **settings):
    return RunConfig(model={"path": "m", "dtype": "float32"}, device=device, **settings)


@pytest.mark.parametrize(
    ("gpus", "torch_for_gpus", "wanted", "found"),
    [
        (0, False, "auto", "cpu"),
        (8, False, "auto", "cpu"),  # as after `make setup` on a workstation
        (0, True, "auto", "cpu"),
        (8, True, "auto", "cuda"),
        (8, True, "cpu", "cpu"),
        (0, True, "cuda", "this machine has no GPU"),
        (8, False, "cuda", "is a build for CPUs"),
    ],
)
def test_the_device_is_one_that_the_cluster_has_and_torch_can_use(monkeypatch, gpus, torch_for_gpus, wanted, found):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": gpus} if gpus else {})
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: torch_for_gpus)
    if found in ("cpu", "cuda"):
        assert resolve_device(run_on(wanted)) == found
    else:
        with pytest.raises(ConfigError, match=found):
            resolve_device(run_on(wanted))
    if found == "cuda":
        with pytest.raises(ConfigError, match="which GPUs cannot guarantee"):
            resolve_device(run_on(wanted, deterministic=True))


@pytest.mark.parametrize(("version", "refused"), [("0.31.0", True), ("0.31.0+cpu", False), (None, False)])
def test_a_run_on_cpus_needs_an_engine_that_has_a_build_for_them(monkeypatch, version, refused):
    def installed(name):
        if name == "vllm" and version:
            return version
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    config = TrainConfig(model={"path": "m"}, data={"train": {"path": "d"}}, rollout={"num_workers": 2})
    for place in (place_train_workers, place_rollouts):
        if refused:
            with pytest.raises(ConfigError, match=r"the installed vllm 0.31.0 is a build for GPUs"):
                place(config, device="cpu", report=print)
        else:
            assert len(place(config, device="cpu", report=print).rollouts) == 2


@pytest.mark.parametrize(("torch_for_gpus", "environment"), [(False, None), (True, {"CUDA_VISIBLE_DEVICES": ""})])
def test_workers_on_cpus_do_not_see_gpus_that_their_torch_could_use(monkeypatch, torch_for_gpus, environment):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: torch_for_gpus)
    options = place_learners(1, RayConfig(), device="cpu", report=print).learners[0]
    assert options.get("runtime_env", {}).get("env_vars") == environment


@pytest.mark.parametrize(("address", "origin"), [("192.0.2.1:6379", "ray.address"), (None, "RAY_ADDRESS")])
def test_a_cluster_that_does_not_answer_is_named_with_the_setting_it_comes_from(monkeypatch, address, origin):
    asked = []

    def refuse(**options):
        asked.append(options["address"])
        raise ConnectionError("nobody there")

    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.2:6379")
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the stack tests' cluster may be there
    with (
        pytest.raises(
            UnavailableError, match=rf"no Ray cluster answers at 192.0.2.\d:6379 \(from {origin}\): nobody there"
        ),
        ray_cluster(RayConfig(address=address)),
    ):
        pass
    assert asked == [address or "192.0.2.2:6379"]


def test_a_cluster_of_another_environment_is_named_with_both(monkeypatch):
    theirs = {"ray_version": ray.__version__, "python_version": "3.12.1"}
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.2:6379")
    monkeypatch.setattr(ray, "init", lambda **options: check_version_info(theirs, "this process"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(ConfigError, match=r"(?s)at 192.0.2.2:6379 was started from another environment: .*3\.12\.1.*"),
        ray_cluster(RayConfig()),
    ):
        pass


def test_what_no_local_cluster_has_is_not_waited_for(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(ConfigError, match="asks for fast, which a local cluster on this machine does not have"),
        ray_cluster(RayConfig(rollout_resources={"fast": 1})),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="no Ray cluster answers at nonsense"),
        ray_cluster(RayConfig(address="nonsense")),
    ):
        pass


def test_a_joined_cluster_may_get_its_gpus_later(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.2:6379")
    assert resolve_device(run_on("cuda")) == "cuda"


def test_workers_of_a_joined_cluster_get_the_variables_that_are_named(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    for name in ("NCCL_SOCKET_IFNAME", "HF_HOME", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "x")
    assert _forwarded(("NCCL_*", "HF_HOME")) == {"HF_HOME": "x", "NCCL_SOCKET_IFNAME": "x"}
    assert _forwarded(("NCCL", "hf_home")) == {}
    assert {"NCCL_SOCKET_IFNAME", "HF_HOME"} <= _forwarded(RayConfig().forward_env).keys()
    job = {"runtime_env": {"env_vars": {"HF_HOME": "y"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert _forwarded(("NCCL_*", "HF_HOME")) == {"NCCL_SOCKET_IFNAME": "x"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    assert _forwarded(("HF_HOME",)) == {"HF_HOME": "x"}


LEARNER, ENGINE = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("bundles", "nodes", "learners", "expected"),
    [
        # as Ray has packed 4 + 4 equal bundles: a learner would be alone on another node
        ([LEARNER] * 8, "bbaabaab", 4, ([2, 3, 5, 6], [0, 1, 4, 7])),
        ([LEARNER] * 5, "baaab", 2, ([1, 2], [3, 0, 4])),  # the fullest node
        ([LEARNER] * 4 + [ENGINE] * 2, "babacc", 4, ([1, 3, 0, 2], [4, 5])),  # ranks of a node are neighbours
        ([ENGINE] * 3, "bab", 0, ([], [1, 0, 2])),
    ],
)
def test_learners_stay_together(bundles, nodes, learners, expected):
    assert gather_learners(bundles, list(nodes), learners) == expected


def test_what_a_cluster_lacks_is_told_with_the_numbers():
    small, large = {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 8.0}
    assert lacking([LEARNER] * 8 + [ENGINE] * 2, [small, large]) == ""
    assert "the run needs 14 GPUs" in (text := lacking([LEARNER] * 8 + [ENGINE] * 3, [small, large]))
    assert "but the cluster has 12" in text
    wide = {"CPU": 1.0, "GPU": 16.0}
    assert "1 CPU, 16 GPU" in (text := lacking([LEARNER, wide], [large] * 4))
    assert "none of 4 nodes has; the most GPUs on one node are 8" in text
    assert "1 fast" in lacking([{**LEARNER, "fast": 1.0}], [large])
    assert "none of 0 nodes" in lacking([LEARNER], [])
    assert "the run needs 8 CPUs in all" in lacking([LEARNER] * 8, [{"CPU": 4.0, "GPU": 8.0}])
    assert "the run needs 3 fast in all" in lacking([{**LEARNER, "fast": 1.0}] * 3, [{**large, "fast": 2.0}])

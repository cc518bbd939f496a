"""The whole loop on one GPU that learner and engine share: exact in float32 on every step, for every family."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stack"))  # the rigs are shared with the tests on CPU
from training_rig import config_dict, run_here

from launch.tiny_models import FAMILIES, Family

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
log = logging.getLogger(__name__)  # figures: pytest --log-cli-level=INFO tests/gpu


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init("local", include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_and_learner_agree_on_every_step(family: Family, tmp_path: Path, ray_cluster: None) -> None:
    config = config_dict(tmp_path, family, total_steps=4, ray={"colocate": True}, learner={"num_workers": 1})
    with run_here(config) as run:
        run.controller.sync_weights()
        for step in range(4):
            metrics = run.controller.step(step).update.metrics
            log.info("%s step %d: %.1e at most", family, step, metrics["rollout/logprob_diff_max"])
            assert metrics["rollout/logprob_diff_max"] < 1e-3
            assert metrics["learner/grad_norm"] > 0

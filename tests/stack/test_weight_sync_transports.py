"""Every transport, and tensor parallelism: the engine must follow the model as in `test_weight_sync`.

The GPU transports run over host memory (`cuda_on_host`). One engine start a case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cuda_on_host
import numpy as np
import psutil
import pytest
import torch
from engine_rig import PROMPT, EngineRig, LoopClient

from rl.errors import WeightSyncError
from rl.weight_sync.sender import WeightSender
from rollout.engine import GenerationRequest, SamplingParameters

pytestmark = pytest.mark.stack

EXACT, VISIBLE = 1e-4, 1e-3  # as in test_weight_sync

# Each slices something else among its tensor-parallel workers: experts and sinks, fused experts, a tied head.
CASES = {"shm-tp2": ("gpt_oss", "shm", 2), "nccl-tp2": ("qwen3_moe", "nccl", 2), "ipc": ("qwen3", "ipc", 1)}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRig]:
    family, transport, width = request.param
    directory = tmp_path_factory.mktemp(family)
    with pytest.MonkeyPatch.context() as patch:
        if transport != "shm":
            cuda_on_host.install(patch.setattr)
            patch.setattr("tempfile.tempdir", str(directory))
            cuda_on_host.make_plugin(directory)
            patch.syspath_prepend(directory)
        rig = EngineRig(family, directory / "model", transport=transport, tensor_parallel_size=width)
        yield rig
        rig.close()


def test_every_parameter_group_arrives_exactly(rig: EngineRig) -> None:
    rig.check_following(EXACT, VISIBLE)


def test_what_it_generates_is_what_the_model_would(rig: EngineRig) -> None:
    prompt = rig.token_ids[0, :PROMPT]
    request = GenerationRequest(tuple(prompt.tolist()), 0)
    (result,) = rig.run(rig.engine.generate([request], SamplingParameters(max_tokens=24, ignore_eos=True)))
    row = torch.cat((prompt, torch.from_numpy(result.token_ids).long()))
    assert np.abs(result.logprobs - rig.reference_logprobs(row)[PROMPT - 1 :].numpy()).max() < EXACT


@pytest.mark.timeout(60)
def test_an_engine_that_cannot_connect_is_reported_though_the_sender_waits_for_it(rig: EngineRig) -> None:
    if rig.transport != "nccl":
        pytest.skip("only NCCL's sender waits for the engines to join")
    client = LoopClient(rig)

    def refuse(init_info: dict[str, Any]) -> None:
        raise WeightSyncError("engine 0 is out of memory")

    client.init_weight_transfer_engine = refuse  # type: ignore[method-assign]
    sender = WeightSender(rig.source(), "nccl", client, tensor_parallel_size=2, timeout_s=3600)
    with pytest.raises(WeightSyncError, match=r"rank 0: connecting to the engines failed: .*out of memory"):
        sender.send(rig.version + 1)
    rig.perturb("")
    rig.sync()
    assert rig.difference() < EXACT


def test_no_worker_outlives_a_killed_engine_core(rig: EngineRig) -> None:
    core = rig.core()
    processes = [core, *core.children(recursive=True)]
    assert len(processes) >= rig.engine._spec.rollout.tensor_parallel_size
    core.kill()
    rig.run(rig.engine.shutdown())
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []

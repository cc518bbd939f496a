"""Every transport, and tensor parallelism: the engine must follow the model as in `test_weight_sync`.

The GPU transports run over host memory (`cuda_on_host`). One engine start per case.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_on_host
import numpy as np
import psutil
import pytest
import torch
from engine_rig import PROMPT, EngineRig, LoopClient

from rl.errors import WeightSyncError
from rl.weight_sync import gpu_transports
from rl.weight_sync.sender import WeightSender
from rollout.engine import GenerationRequest, SamplingParameters

pytestmark = pytest.mark.stack

EXACT, VISIBLE = 1e-4, 1e-3  # as in test_weight_sync

# Each covers something else: sliced experts and sinks, sliced fused experts, a tied head.
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


def test_a_rank_without_an_engine_joins_every_gather_and_exports_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch keeps an exported buffer until somebody has mapped it, and nobody would map this rank's."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine

    cuda_on_host.install(monkeypatch.setattr)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = [(f"w{i}", torch.zeros(n)) for i, n in enumerate((3, 5, 1, 8, 2, 2, 2, 2, 7, 1))]
    gathered: list[list[dict[str, Any]]] = []
    for kind in (IPCTrainerWeightTransferEngine, gpu_transports._bystander()):
        handles: list[dict[str, Any]] = []
        passes: list[int] = []
        engine: Any = kind(client=None, source=source, is_sender=False, packed=True, packed_buffer_size_bytes=32)  # type: ignore[arg-type]
        engine._all_gather_and_merge_handles = lambda own, seen=handles: seen.extend(own) or own
        engine._post_send_sync = lambda seen=passes: seen.append(1)
        engine._send_packed(source)
        assert len(passes) == len(handles)
        gathered.append(handles)
    assert len(gathered[0]) == len(gathered[1]) == 5
    assert all(gathered[0]) and not any(gathered[1])


def test_no_worker_outlives_a_killed_engine_core(rig: EngineRig) -> None:
    core = rig.core()
    processes = [core, *core.children(recursive=True)]
    assert len(processes) >= rig.engine._spec.rollout.tensor_parallel_size
    core.kill()
    rig.run(rig.engine.shutdown())
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []

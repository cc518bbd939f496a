"""Weight sync between GPUs (NCCL) and on a shared GPU (CUDA IPC): the engine must follow the model as on CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stack"))  # the rig is shared with the tests on CPU
from engine_rig import EngineRig

from rl.weight_sync.digest import digest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CLOSE = 0.1  # bfloat16, two implementations, on log-probabilities of a random model
VISIBLE = 0.3


def test_digest_is_the_same_on_both_devices() -> None:
    for tensor in (torch.randn(1000, 1025), torch.randn(7).to(torch.bfloat16), torch.arange(13, dtype=torch.int8)):
        assert digest(tensor.cuda()) == digest(tensor)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_engine_follows_the_model(family: Any, transport: Any, tmp_path: Path) -> None:
    if transport == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each side")
    device = torch.device("cuda", 1 if transport == "nccl" else 0)  # the engine takes the first
    torch.cuda.set_device(device)
    rig = EngineRig(family, tmp_path, transport=transport, dtype="bfloat16", device=str(device))
    try:
        assert rig.difference() < CLOSE
        for part in ("embed_tokens", "self_attn", "mlp", "norm"):
            rig.perturb(part)
            assert rig.difference() > VISIBLE
            rig.sync()
            assert rig.difference() < CLOSE, part
    finally:
        rig.close()

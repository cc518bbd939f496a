"""Weight sync between GPUs (NCCL) and on a shared GPU (CUDA IPC): the engine must follow the model as on CPU."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stack"))  # the rigs are shared with the tests on CPU
from engine_rig import EngineRig

from launch.tiny_models import FAMILIES
from rl.weight_sync.digest import digest
from rollout.reload_mends import GPT_OSS_EXPERTS, GPT_OSS_SINKS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
log = logging.getLogger(__name__)  # figures: pytest --log-cli-level=INFO tests/gpu

# dtype -> (differences of two implementations, in log-probability; what an update that was not served must exceed).
# In bfloat16 they are means: on a CPU with AVX-512 0.045 at most, and 0.23 at least of an update of BROAD_PARTS.
BOUNDS = {"float32": (1e-3, 3e-3), "bfloat16": (0.1, 0.2)}
MULTI_RANK_NCCL = 23000  # the first that can serve two ranks on one GPU, when asked to
BROAD_PARTS = ("embed_tokens", "self_attn", "mlp", "norm")  # one part alone does not show through bfloat16's rounding


def test_digest_is_the_same_on_both_devices() -> None:
    for tensor in (torch.randn(1000, 1025), torch.randn(7).to(torch.bfloat16), torch.arange(13, dtype=torch.int8)):
        assert digest(tensor.cuda()) == digest(tensor)


def nccl_version() -> int:
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return int(NCCLLibrary().ncclGetRawVersion())


@pytest.fixture(
    scope="module", params=[(f, t, d) for d in BOUNDS for t in ("ipc", "nccl") for f in FAMILIES], ids="-".join
)
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRig]:
    family, transport, dtype = request.param
    shared = torch.cuda.device_count() < 2
    if transport == "nccl" and shared and nccl_version() < MULTI_RANK_NCCL:
        pytest.skip(
            "NCCL before 2.30 needs a GPU for each side; a newer libnccl.so.2 may be named in VLLM_NCCL_SO_PATH"
        )
    device = torch.device("cuda", 0 if transport == "ipc" or shared else 1)  # the engine takes the first
    torch.cuda.set_device(device)
    with pytest.MonkeyPatch.context() as patch:
        if transport == "nccl" and shared:
            patch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        rig = EngineRig(family, tmp_path_factory.mktemp(family), transport=transport, dtype=dtype, device=str(device))
        yield rig
        rig.close()


def test_engine_follows_the_model(rig: EngineRig) -> None:
    close, visible = BOUNDS[rig.dtype_name]
    log.info("%s %s: %.1e before any update", rig.family, rig.dtype_name, rig.difference())
    worst = rig.check_following(close, visible, () if rig.dtype_name == "float32" else BROAD_PARTS)
    log.info("%s %s: %.1e at most after an update of every part", rig.family, rig.dtype_name, worst)


def test_mends_that_are_not_for_cpus_are_still_needed(rig: EngineRig) -> None:
    if rig.family != "gpt_oss" or rig.dtype_name != "float32":
        pytest.skip("these are GPT-OSS's, and its sinks do not show through bfloat16's rounding")
    close, visible = BOUNDS[rig.dtype_name]
    for mend, part in ((GPT_OSS_EXPERTS, "experts"), (GPT_OSS_SINKS, "sinks")):
        wrong = rig.difference_without({mend}, part)
        assert rig.difference() < close
        assert wrong > visible, f"vLLM no longer needs the mend {mend!r}: delete this mend"

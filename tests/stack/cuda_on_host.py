"""vLLM's NCCL and CUDA IPC weight transfer without a GPU: host memory takes the place of CUDA's.

Only the CUDA calls are replaced. Trainer and worker engines, packing, handshakes and messages are vLLM's own, and all
of our code is real. What this cannot show is CUDA's part: the order of streams, mapped device memory, NCCL; `tests/gpu`
covers that.

Engine processes install it as a vLLM plugin (`make_plugin`), a test with `install(monkeypatch.setattr)`.
"""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FROM_ANOTHER_DEVICE, _DEVICE_FIELD = "the exporter's", 6  # the importer must put its own device into that field
_exported: dict[int, tuple[str, int]] = {}  # address -> file, size


class Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None: ...


class TorchWithCudaMemory(types.ModuleType):
    """`torch`, except that tensors made on "cuda" lie in a file that other processes can map."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: int, *, dtype: torch.dtype, device: Any) -> Tensor:
        if torch.device(device).type != "cuda":
            return torch.empty(size, dtype=dtype, device=device)
        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.truncate(size)
        tensor = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
        _exported[tensor.data_ptr()] = (file.name, size)
        return tensor


def export_memory(tensor: Tensor) -> tuple[None, tuple[Any, ...]]:
    """Like `torch.multiprocessing.reductions.reduce_tensor`: the function that rebuilds, and its arguments."""
    arguments: list[Any] = [*_exported[tensor.data_ptr()], *[None] * 5]
    arguments[_DEVICE_FIELD] = _FROM_ANOTHER_DEVICE
    return None, tuple(arguments)


def import_memory(path: str, size: int, *rest: Any) -> Tensor:
    """Like `torch.multiprocessing.reductions.rebuild_cuda_tensor`."""
    assert rest[_DEVICE_FIELD - 2] != _FROM_ANOTHER_DEVICE, "the importer must name its own device"
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


class Communicator:
    """Like vLLM's `PyNcclCommunicator`, but through the store at which its members have met."""

    def __init__(self, group: Any, device: Any) -> None:
        self._group: Any = group
        group.barrier()

    def destroy(self) -> None:
        self._group = None

    def broadcast(self, tensor: Tensor, src: int) -> None:
        assert tensor.dtype == torch.uint8
        if self._group.rank == src:
            self._group.broadcast_obj(tensor.numpy().tobytes(), src)
        else:
            tensor.copy_(torch.frombuffer(bytearray(self._group.broadcast_obj(None, src)), dtype=torch.uint8))


def install(replace: Callable[[object, str, Any], None] = setattr) -> None:
    from torch.multiprocessing import reductions
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    for module, name, value in (
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "synchronize", lambda: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="GPU-0")),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "stream", lambda stream: nullcontext()),
        (torch.cuda, "current_stream", Stream),
        (torch.cuda, "ipc_collect", lambda: None),
        (reductions, "rebuild_cuda_tensor", import_memory),
        (packed_tensor, "torch", TorchWithCudaMemory("torch")),
        (packed_tensor, "reduce_tensor", export_memory),
        (pynccl, "PyNcclCommunicator", Communicator),
    ):
        replace(module, name, value)


def make_plugin(directory: Path) -> None:
    """Write what makes vLLM's processes install this at their start, into a directory of the inherited `sys.path`."""
    metadata = directory / "cuda_on_host-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cuda-on-host\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\ncuda_on_host = cuda_on_host:install\n")

"""`Zero3WeightSource`: a model's full weights in checkpoint names, gathered from ZeRO-3 shards a bucket at a time.

Left out: sending them. DeepSpeed is imported only when the module is partitioned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rl.errors import WeightSyncError
from rl.weight_sync.api import ParameterInfo
from rl.weight_sync.buckets import consecutive


class Zero3WeightSource:
    """Full tensors of a transformers model, partitioned by ZeRO-3 or plain, as a checkpoint would hold them.

    Names and shapes are those of the checkpoint: fused experts are taken apart again (`revert_weight_conversion`), a
    tied output head is not repeated. Floating tensors are cast to `dtype`, the engine's. Iteration is a collective: all
    ranks iterate in step, and only those that keep the data yield anything. At most `bucket_bytes` (or one parameter,
    where one is larger) are gathered at a time, and the same again is held by the copies that are being yielded.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        dtype: torch.dtype,
        bucket_bytes: int = 256 << 20,
        rank: int = 0,
        keep: Literal["sender", "all"] = "sender",
    ) -> None:
        """
        Args:
            module: the transformers model (of a DeepSpeed engine: `engine.module`).
            dtype: of floating tensors on the wire.
            bucket_bytes: how much is gathered at a time.
            rank: of this process; rank 0 is the sender.
            keep: who yields tensors. CUDA IPC needs "all", because every GPU's engine reads its own neighbour.
        """
        self._module = module
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._keeps = keep == "all" or rank == 0
        # named_parameters() yields a shared parameter once, under its first name: a tied head goes with the embedding.
        self._parameters = list(module.named_parameters())
        self._metadata = [
            ParameterInfo(name, tensor.dtype, tuple(tensor.shape))
            for original, parameter in self._parameters
            for name, tensor in self._to_checkpoint(original, torch.empty(_full_shape(parameter), device="meta"))
        ]
        names = [info.name for info in self._metadata]
        if len(set(names)) != len(names):
            raise WeightSyncError(
                f"{type(module).__name__} has parameters that map to the same checkpoint name: "
                f"{sorted({name for name in names if names.count(name) > 1})}"
            )

    def metadata(self) -> list[ParameterInfo]:
        """Name, dtype and shape of everything iteration yields, in its order; transfers nothing."""
        return list(self._metadata)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        # Equal on every rank, because full sizes are.
        for group in consecutive(self._parameters, lambda item: _num_bytes(item[1]), self._bucket_bytes):
            self._wait_for_gpu()  # copies of the last group may still be read, on a stream that the allocator ignores
            yield from self._gather(group)

    @torch.no_grad()
    def _gather(self, group: list[tuple[str, nn.Parameter]]) -> list[tuple[str, Tensor]]:
        with _gathered([parameter for _, parameter in group]):
            if not self._keeps:
                return []
            # Checkpoint pieces can be views of the gathered storage, which goes when the gather ends: copy them now.
            copies = [
                (checkpoint_name, tensor.clone(memory_format=torch.contiguous_format))
                for name, parameter in group
                for checkpoint_name, tensor in self._to_checkpoint(name, parameter.data)
            ]
        self._wait_for_gpu()
        return copies

    def _wait_for_gpu(self) -> None:
        """vLLM's NCCL sender takes turns between two streams, and pulls tensors on one that it reads on the other."""
        if self._parameters[0][1].is_cuda:
            torch.cuda.synchronize()

    def _to_checkpoint(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """One parameter in memory -> its checkpoint tensors, in the wire dtype."""
        from transformers.core_model_loading import revert_weight_conversion

        pieces: dict[str, Tensor] = revert_weight_conversion(cast(Any, self._module), {name: tensor})
        return [(key, piece.to(self._dtype) if piece.is_floating_point() else piece) for key, piece in pieces.items()]


def _full_shape(parameter: Any) -> torch.Size:
    """The unpartitioned shape (ZeRO-3 keeps it in `ds_shape`)."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _num_bytes(parameter: nn.Parameter) -> int:
    """Of the whole parameter."""
    return _full_shape(parameter).numel() * parameter.element_size()


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
    return context

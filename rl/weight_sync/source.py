"""`Zero3WeightSource`: a model's full weights under checkpoint names, gathered from ZeRO-3 shards bucket by bucket.

Left out: sending them. DeepSpeed is imported only when the module is partitioned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rl.errors import WeightSyncError
from rl.progress import WORK
from rl.weight_sync.api import ParameterInfo
from rl.weight_sync.buckets import consecutive


class Zero3WeightSource:
    """Full tensors of a transformers model (partitioned by ZeRO-3 or not), as a checkpoint would hold them.

    Names and shapes are those of the checkpoint: fused experts are split again (`revert_weight_conversion`), and a tied
    output head is not repeated. Floating-point tensors are cast to `dtype`, the engine's. Iteration is a collective:
    all ranks iterate in step, and only those that keep the data yield anything. At most `bucket_bytes` (or one larger
    parameter) are gathered at a time, and the copies being yielded take as much again.
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
            module: the transformers model (for a DeepSpeed engine, `engine.module`).
            dtype: the dtype of floating-point tensors on the wire.
            bucket_bytes: how much is gathered at a time.
            rank: this process's rank; rank 0 is the sender.
            keep: which ranks yield tensors. CUDA IPC needs "all", because each engine reads from the learner on its own
                GPU.
        """
        self._module = module
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._keeps = keep == "all" or rank == 0
        # named_parameters() yields a shared parameter once, under its first name, so a tied head travels as the
        # embedding.
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
        """Name, dtype and shape of everything that iteration yields, in the same order. Transfers nothing."""
        return list(self._metadata)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        # Groups are equal on every rank, because full sizes are.
        for group in consecutive(self._parameters, lambda item: _num_bytes(item[1]), self._bucket_bytes):
            WORK.begin(f"gathering the weights {group[0][0]} to {group[-1][0]}")
            self._wait_for_gpu()  # the last group's copies may still be read on a stream unknown to the allocator
            yield from self._gather(group)

    @torch.no_grad()
    def _gather(self, group: list[tuple[str, nn.Parameter]]) -> list[tuple[str, Tensor]]:
        with _gathered([parameter for _, parameter in group]):
            if not self._keeps:
                return []
            # Checkpoint tensors can be views of the gathered storage, which is freed when the gather ends: copy them.
            copies = [
                (checkpoint_name, tensor.clone(memory_format=torch.contiguous_format))
                for name, parameter in group
                for checkpoint_name, tensor in self._to_checkpoint(name, parameter.data)
            ]
        self._wait_for_gpu()
        return copies

    def _wait_for_gpu(self) -> None:
        """Synchronise, because vLLM's NCCL sender alternates between two streams, and may read a tensor on one that was
        gathered on the other."""
        if self._parameters[0][1].is_cuda:
            torch.cuda.synchronize()

    def _to_checkpoint(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """The checkpoint tensors of one parameter in memory, in the wire dtype."""
        from transformers.core_model_loading import revert_weight_conversion

        pieces: dict[str, Tensor] = revert_weight_conversion(cast(Any, self._module), {name: tensor})
        return [(key, piece.to(self._dtype) if piece.is_floating_point() else piece) for key, piece in pieces.items()]


def _full_shape(parameter: Any) -> torch.Size:
    """The unpartitioned shape (ZeRO-3 keeps it in `ds_shape`)."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _num_bytes(parameter: nn.Parameter) -> int:
    """Size of the whole parameter."""
    return _full_shape(parameter).numel() * parameter.element_size()


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
    return context

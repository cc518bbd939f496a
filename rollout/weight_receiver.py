"""The receiving half of weight sync: vLLM worker engines that load, and digest, what the learner sends.

Three transports share one base. vLLM's workers load it through `rollout.vllm_plugin`.
Left out: the mends of vLLM's reload (`rollout.reload_mends`) and the sending half (`rl.weight_sync`).
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_consumer, packed_nccl_broadcast_consumer
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rl.memory import memory_peak_gib
from rl.weight_sync.buckets import open_bucket
from rl.weight_sync.digest import digest_tensor, digest_values
from rollout.process_tie import note_meeting
from rollout.reload_mends import ALL_MENDS, ReloadMends, restore_unfinished_layers


class WorkerExtension:
    """Methods that every vLLM worker of ours gets (`worker_extension_cls`), for `collective_rpc`."""

    def fledge_received_digests(self) -> dict[str, int]:
        """Checkpoint name -> digest of every tensor that arrived at this worker in the last update."""
        engine: Any = self.weight_transfer_engine  # type: ignore[attr-defined]
        return engine.received_digests()

    def fledge_abandon_update(self) -> None:
        """Forget an update that was left unfinished because the sender or another engine failed. Does nothing if there
        is none."""
        worker: Any = self
        worker.weight_transfer_engine.abandon_update()
        worker._weight_update_active = False  # vLLM's own flag

    def fledge_note_meeting(self) -> str:
        worker: Any = self
        return note_meeting(worker.distributed_init_method)

    def fledge_memory_peak_gib(self) -> float:
        return memory_peak_gib()

    def fledge_set_mends(self, names: list[str]) -> None:
        """Use only these mends from now on; the tests that watch upstream switch one off at a time."""
        engine: Any = self.weight_transfer_engine  # type: ignore[attr-defined]
        engine.enabled_mends = frozenset(names)


class VerifiedReceiver(WeightTransferEngine):
    """The lifecycle of one update: start, load (any number of times), finish; with a digest of every tensor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.enabled_mends = ALL_MENDS
        self._mends: ReloadMends | None = None  # of the update in progress
        self._digests: dict[str, Tensor] = {}

    def start_weight_update(self) -> None:
        """Begin vLLM's layerwise reload of the model."""
        self._digests = {}
        initialize_layerwise_reload(self.model)
        self._mends = ReloadMends(self.model, self.device, self.enabled_mends)
        self._mends.after_start()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Digest full checkpoint tensors and hand them to the model's own loaders."""
        assert self._mends is not None, "load outside an update"
        batch = list(weights)
        for name, tensor in batch:
            self._digests[name] = digest_tensor(tensor)
        with torch.no_grad():
            self._mends.before_load([name for name, _ in batch])
            cast(Any, self.model).load_weights(batch)
            self._mends.after_load([name for name, _ in batch])
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the next chunk of a layer may be loaded on another stream

    def finish_weight_update(self) -> None:
        assert self._mends is not None, "finish outside an update"
        with torch.no_grad():
            self._mends.before_finish()
            finalize_layerwise_reload(self.model, self.model_config)
            self._mends.after_finish()
        self._mends = None

    def abandon_update(self) -> None:
        """Put the old tensors back wherever an unfinished update has not replaced them yet. The weights are then a mix
        that must not be served, but the next complete update replaces all of them."""
        if self._mends is not None:
            restore_unfinished_layers(self.model)
            self._mends = None

    def received_digests(self) -> dict[str, int]:
        """The digests of the last update, as 0 <= value < 2**64."""
        return digest_values(self._digests)

    def shutdown(self) -> None:
        self._digests = {}


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """One bucket, as `rl.weight_sync.buckets.SharedBucket.update_info` describes it."""

    pid: int
    fd: int
    index: int
    num_bytes: int
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


class ShmReceiver(VerifiedReceiver):
    """Maps each bucket from the sender's memory."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Does nothing: there is nobody to connect to."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As upstream, but without `torch.accelerator.synchronize()`, which fails where there is no accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        self.load(open_bucket(vars(update_info)))


class NcclReceiver(VerifiedReceiver, NCCLWeightTransferEngine):
    """Receives packed broadcasts from the learner's rank 0."""

    init_info_cls = NCCLWeightTransferInitInfo
    update_info_cls = NCCLWeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        self._leave_group()
        NCCLWeightTransferEngine.init_transfer_engine(self, init_info)

    def _leave_group(self) -> None:
        """Destroy the communicator: vLLM would only drop its reference, which does not free the memory."""
        group = cast(Any, self).model_update_group
        self.model_update_group = None
        if group is not None:
            group.destroy()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        if self.model_update_group is None:
            raise RuntimeError("init_weight_transfer must come before the first update")
        infos = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        packed_nccl_broadcast_consumer(
            iterator=((name, (shape, getattr(torch, dtype))) for name, dtype, shape in infos),
            group=self.model_update_group,
            src=0,
            post_unpack_func=self.load,
            buffer_size_bytes=self.packed_buffer_size_bytes,
            num_buffers=self.packed_num_buffers,
            device=self.device,
        )

    def shutdown(self) -> None:
        VerifiedReceiver.shutdown(self)
        self._leave_group()


@dataclass
class IpcUpdateInfo(WeightTransferUpdateInfo):
    """One packed chunk. The handles are pickled by the learner, because vLLM's wire format cannot carry them."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    tensor_sizes: list[int]
    handles: str  # base64 of the pickled {GPU uuid: arguments of rebuild_cuda_tensor}


class IpcReceiver(VerifiedReceiver, IPCWeightTransferEngine):
    """Maps the learner's packed buffer on the GPU that both share."""

    update_info_cls = IpcUpdateInfo

    def receive_weights(self, update_info: IpcUpdateInfo) -> None:
        # The sender is our own learner on our own cluster, whose actors already exchange pickles.
        handles = pickle.loads(base64.b64decode(update_info.handles))
        self.load(
            packed_ipc_consumer(
                ipc_handle=handles,
                names=update_info.names,
                shapes=update_info.shapes,
                dtype_names=update_info.dtype_names,
                tensor_sizes=update_info.tensor_sizes,
                device_index=self.device.index,
                importer=self._packed_importer,
            )
        )

    def finish_weight_update(self) -> None:
        VerifiedReceiver.finish_weight_update(self)
        self._packed_importer.close()  # gives the learner's staging buffer back
        torch.cuda.empty_cache()  # of the copies made from it: the learner needs the memory for its next update

    def shutdown(self) -> None:
        VerifiedReceiver.shutdown(self)
        IPCWeightTransferEngine.shutdown(self)

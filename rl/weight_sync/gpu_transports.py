"""The GPU transports, built on vLLM's own trainer engines: NCCL between GPUs, CUDA IPC on a shared GPU.

This is the only module here that imports vllm, and it does so only when a run with GPUs connects. Left out: shared
memory (`rl.weight_sync.shm_transport`).
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rl.errors import BrokenSyncError, WeightSyncError
from rl.weight_sync.api import ParameterInfo, WeightSource, WeightSyncClient
from rl.weight_sync.background import finish_call, start_call
from rl.weight_sync.digest import digest_tensor, digest_values
from rl.weight_sync.shm_transport import SendReport

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine

T = TypeVar("T")


class DigestingSource:
    """A `WeightSource` that digests every tensor it passes on; the digests stay on the device until `report`."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._digests: dict[str, Tensor] = {}
        self._num_bytes = 0
        self.last_name = "nothing yet"

    def metadata(self) -> list[ParameterInfo]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._digests, self._num_bytes = {}, 0
        for name, tensor in self._source:
            self._digests[name] = digest_tensor(tensor)
            self._num_bytes += tensor.numel() * tensor.element_size()
            self.last_name = name
            if tensor.is_cuda:
                # vLLM packs on two streams in turn. Once dropped, a tensor that was gathered on the other stream would
                # be free for that stream's next allocation, although this stream's copy of it may still be pending.
                tensor.record_stream(torch.cuda.current_stream())
            yield name, tensor

    def report(self, received: dict[int, dict[str, int]]) -> SendReport:
        return SendReport(digest_values(self._digests), received, self._num_bytes)


class TrainerClient:
    """Adapts a `WeightSyncClient` to vLLM's `VLLMWeightSyncClient`: adds fields, and keeps the engines' digests.

    vLLM's trainer sees an engine's error only when its own half is done, and over NCCL that half waits for the failed
    engine forever. So `failure` receives the error as well.
    """

    def __init__(self, client: WeightSyncClient, extra_init_info: dict[str, Any]) -> None:
        self._client = client
        self._extra_init_info = extra_init_info
        self.policy_version = -1
        self.received: dict[int, dict[str, int]] = {}
        self.failure: Future[Any] = Future()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        with self._noting_failure():
            self._client.init_weight_transfer_engine(init_info | self._extra_init_info)

    def start_weight_update(self) -> None:
        with self._noting_failure():
            self._client.start_weight_update()

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Send CUDA IPC handles pickled, as text: they hold torch types, which vLLM's own wire format refuses."""
        assert isinstance(update_info, dict), "only vLLM's sharded transports send a list"
        if "ipc_handles" in update_info:
            handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
            kept = ("names", "dtype_names", "shapes", "tensor_sizes")
            update_info = {key: update_info[key] for key in kept} | {"handles": handles}
        with self._noting_failure():
            self._client.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        with self._noting_failure():
            self.received = self._client.finish_weight_update(self.policy_version)

    def late(self) -> str:
        return self._client.late()

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.failure.done():
                self.failure.set_exception(error)
            raise


class GpuTransport:
    """One of vLLM's trainer engines, run with a deadline. Subclasses choose the engine."""

    def __init__(
        self,
        source: WeightSource,
        client: WeightSyncClient,
        rank: int,
        bucket_bytes: int,
        timeout_s: float,
        **extra_init_info: Any,  # sent to the engines in addition to vLLM's
    ) -> None:
        self._source = DigestingSource(source)
        self._client = TrainerClient(client, extra_init_info)
        self._rank = rank
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._engine: TrainerWeightTransferEngine[Any] | None = None

    def _init_info(self) -> TrainerInitInfo:
        raise NotImplementedError

    def _trainer(self) -> TrainerWeightTransferEngine[Any]:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        return WeightTransferTrainerFactory.trainer_init(self._init_info(), client=self._client, source=self._source)

    def connect(self) -> None:
        """Connect to the engines, on every rank. Call it once: a group that has lost a member cannot be used again."""
        self._engine = self._run(self._trainer, "connecting to the engines")

    def send(self, policy_version: int) -> SendReport:
        """Send everything; the deadline covers the whole transfer."""
        engine = self._engine
        if engine is None:
            raise WeightSyncError("send before connect")
        self._client.policy_version = policy_version
        self._run(engine.send_weights, f"sending policy version {policy_version}")
        return self._source.report(self._client.received) if self._rank == 0 else SendReport()

    def close(self) -> None:
        """Release what the connection holds on the GPU. vLLM's shutdown only drops its reference to the communicator,
        which does not free it."""
        if self._engine is None:
            return
        group = getattr(self._engine, "model_update_group", None)
        self._engine.shutdown()
        self._engine = None
        if group is not None:
            group.destroy()

    def _run(self, call: Callable[[], T], what: str) -> T:
        device = torch.cuda.current_device()
        failure = self._client.failure = Future()

        def on_device() -> T:
            torch.cuda.set_device(device)  # each thread has its own current device
            return call()

        try:
            future = start_call(on_device, "weight-sync")
            return finish_call(future, f"rank {self._rank}: {what}", self._timeout_s, self._client.late, failure)
        except WeightSyncError as error:
            raise BrokenSyncError(f"{error}; the last parameter gathered was {self._source.last_name}") from error


class NcclTransport(GpuTransport):
    """Packed broadcasts from rank 0 to every worker of every engine, in a process group of their own."""

    def __init__(
        self,
        source: WeightSource,
        client: WeightSyncClient,
        rank: int,
        bucket_bytes: int,
        timeout_s: float,
        group_size: int,
        rank_offsets: list[int],
        address: str,
    ) -> None:
        super().__init__(source, client, rank, bucket_bytes, timeout_s, rank_offsets=rank_offsets)
        self._group_size = group_size
        self._address = address

    def _init_info(self) -> TrainerInitInfo:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        return NCCLTrainerInitInfo(
            rank=self._rank,
            master_address=self._address,
            master_port=get_open_port(),
            world_size=self._group_size,
            packed=True,
            packed_buffer_size_bytes=self._bucket_bytes,
        )


class IpcTransport(GpuTransport):
    """One packed buffer on each GPU that a learner shares with an engine, which maps the buffer."""

    def __init__(
        self,
        source: WeightSource,
        client: WeightSyncClient,
        rank: int,
        bucket_bytes: int,
        timeout_s: float,
        *,
        has_engine: bool,
    ) -> None:
        super().__init__(source, client, rank, bucket_bytes, timeout_s)
        self._has_engine = has_engine

    def _trainer(self) -> TrainerWeightTransferEngine[Any]:
        if self._has_engine:
            return super()._trainer()
        return _bystander().trainer_init(self._init_info(), client=self._client, source=self._source)

    def _init_info(self) -> TrainerInitInfo:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        largest = max(info.num_bytes for info in self._source.metadata())
        return IPCTrainerInitInfo(
            rank=self._rank, packed=True, packed_buffer_size_bytes=max(self._bucket_bytes, largest)
        )


def _bystander() -> type[IPCTrainerWeightTransferEngine]:
    """The trainer for a rank without an engine on its GPU.

    vLLM's own trainer exports a buffer on every rank, and torch keeps an exported buffer until somebody has mapped it.
    Here nobody would, so every sync would leak a buffer.
    """
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine

    class Bystander(IPCTrainerWeightTransferEngine):
        def _send_packed(self, source: Any) -> None:
            """Join the gathers of every chunk, with the same chunk boundaries as `packed_ipc_producer`."""
            total = 0
            for _, tensor in source:
                size = tensor.numel() * tensor.element_size()
                if total and total + size > self.packed_buffer_size_bytes:
                    self._pass()
                    total = 0
                total += size
            if total:
                self._pass()

        def _pass(self) -> None:
            self._all_gather_and_merge_handles([{}])
            self._post_send_sync()

    return Bystander

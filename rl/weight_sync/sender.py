"""`WeightSender`: the learner's half of a weight sync, over shared memory, NCCL or CUDA IPC.

Every learner rank calls `send`; rank 0 drives the engines through the client and compares digests; then all ranks
return the same `WeightVersion` or raise. Left out: reaching the engines (the client) and serving the weights
(`RolloutEngine.activate`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch.distributed as dist

from rl.batch import WeightVersion
from rl.errors import BrokenSyncError, WeightSyncError
from rl.weight_sync.api import Transport, WeightSource, WeightSyncClient, check_digests
from rl.weight_sync.shm_transport import SendReport, ShmTransport

T = TypeVar("T")


class SendsWeights(Protocol):
    """A transport. `connect` and `send` are collectives over the learner's ranks; `close` is not."""

    def connect(self) -> None: ...
    def close(self) -> None: ...
    def send(self, policy_version: int) -> SendReport: ...


class WeightSender:
    """Sends the source's weights to all engines and proves that they arrived."""

    def __init__(  # noqa: PLR0913  # all but three are keywords with defaults
        self,
        source: WeightSource,
        transport: Transport,
        client: WeightSyncClient,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_engines: int = 1,
        tensor_parallel_size: int = 1,
        bucket_bytes: int = 256 << 20,
        timeout_s: float = 300.0,
        address: str = "127.0.0.1",
    ) -> None:
        """
        Args:
            source: this rank's part in gathering the weights; for ipc its `keep` must be "all".
            transport: see `rl.weight_sync.api.resolve_transport`.
            client: reaches the engines; only rank 0 drives them through it.
            rank, world_size: the learner's, in torch's default process group.
            num_engines, tensor_parallel_size: determine the receivers: the size of the NCCL group, and the ranks with
                an engine on their GPU for ipc.
            bucket_bytes: the largest size of one message (a larger tensor travels alone).
            timeout_s: limit of each wait: for one call, one bucket, or a whole transfer over NCCL or CUDA IPC.
            address: at which the engines' nodes reach this one, for the NCCL group.
        """
        self._rank = rank
        self._world_size = world_size
        self._connected = False
        self._transport: SendsWeights
        if transport == "shm":
            self._transport = ShmTransport(source, client, rank, bucket_bytes, timeout_s)
            return
        from rl.weight_sync.gpu_transports import IpcTransport, NcclTransport

        if transport == "nccl":
            offsets = [1 + index * tensor_parallel_size for index in range(num_engines)]
            group_size = 1 + num_engines * tensor_parallel_size
            self._transport = NcclTransport(source, client, rank, bucket_bytes, timeout_s, group_size, offsets, address)
        else:
            # Engine i is on the GPU of learner i (`launch.placement`), and none is ever missing (`rollout.roster`).
            has_engine = rank < num_engines
            self._transport = IpcTransport(source, client, rank, bucket_bytes, timeout_s, has_engine=has_engine)

    def close(self) -> None:
        """Disconnect for good: after an engine has been replaced, a new sender connects to the current ones. Not a
        collective."""
        self._transport.close()

    def send(self, policy_version: int) -> WeightVersion:
        """Transfer every tensor, finish the update on every engine, and compare digests.

        Returns the version that has arrived, on every rank. The engines stay paused: serve the weights with `activate`.
        Raises WeightSyncError, on every rank, when an engine fails, is late, or holds anything other than what was
        sent; the engines must then be restarted. A broken transfer between GPUs raises BrokenSyncError, possibly on one
        rank alone.
        """
        if not self._connected:
            self._agree(self._transport.connect)
            self._connected = True
        return self._agree(lambda: self._send(policy_version))

    def _send(self, policy_version: int) -> WeightVersion:
        started = time.monotonic()
        report = self._transport.send(policy_version)
        if self._rank == 0:
            check_digests(policy_version, report.sent, report.received)
        return WeightVersion(policy_version, report.num_bytes, time.monotonic() - started)

    def _agree(self, action: Callable[[], T]) -> T:
        """Run `action` on this rank; every rank returns rank 0's result, or raises rank 0's error or else its own.

        A BrokenSyncError, which ends the run, is raised only where it happened: the other ranks may still be in a
        gather of the same group, where no verdict would reach them.
        """
        result: T | None = None
        error: WeightSyncError | None = None
        try:
            result = action()
        except BrokenSyncError:
            raise
        except WeightSyncError as caught:
            error = caught
        if self._world_size > 1:
            verdict = [(result, error)]
            dist.broadcast_object_list(verdict, src=0)
            result, first_error = verdict[0]
            error = first_error or error
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None only where T is None

"""The Ray actors of the learner. A `LearnerWorker` is one rank of the ZeRO-3 process group. No mathematics here.

Left out: their group (`rl.learner_group`), and vLLM; rollout workers are only handles here, to which weights are sent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from rl.actors import Crew
from rl.batch import (
    Annotations,
    FloatArray,
    TokenPair,
    TokenSequence,
    UpdateResult,
    WeightVersion,
)
from rl.batching import Layout, MiniBatchShare
from rl.config import AlgorithmConfig, CriticConfig, LearnerConfig, ModelConfig, SyncConfig
from rl.errors import WeightSyncError
from rl.machine import usable_cores
from rl.progress import WORK, Position
from rl.shared_files import not_seen
from rl.weight_sync.api import Transport, init_info_at

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from rl.learner import Learner
    from rl.weight_sync.sender import WeightSender


WATCH = "watch"  # the concurrency group whose thread answers while another one works
_RECEIVERS = Crew("rollout worker", WeightSyncError)


@dataclass(frozen=True, slots=True)
class SyncSpec:
    """How weights reach the rollout workers."""

    config: SyncConfig
    transport: Transport
    tensor_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """What every rank is built from."""

    learner: LearnerConfig
    model: ModelConfig
    algorithm: AlgorithmConfig | None  # None: supervised training
    seed: int
    deterministic: bool
    device: str  # "cpu" or "cuda"
    total_optimizer_steps: int
    temperature: float = 1.0  # of the rollouts; log-probabilities are computed at it
    fixed_length: int = 1  # tokens, the divisor of the fixed_length aggregation
    critic: CriticConfig | None = None
    sync: SyncSpec | None = None  # None: weights are not sent to any rollout worker


class LearnerWorker:
    """One rank of the learner, as a Ray actor in its own process, with the concurrency group `WATCH`."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._spec: LearnerSpec
        self._store: TCPStore  # where all ranks meet; served by rank 0
        self._learner: Learner
        self._sender: WeightSender | None = None
        self._receivers: dict[int, ActorHandle] = {}

    @ray.method(concurrency_group=WATCH)
    def position(self) -> Position:
        """How far this rank is."""
        return WORK.position

    @ray.method(concurrency_group=WATCH)
    def report(self) -> tuple[Position, str]:
        """How far this rank is, and what it executes at the moment, like a traceback."""
        return WORK.position, WORK.stack()

    def meet(self) -> tuple[str, int]:
        """The address of this rank's node and, for rank 0, the port of the store at which the process group meets (else
        0).

        The store is served from here on: if a free port were only looked up, another program could take it before all
        ranks have loaded torch.
        """
        address = ray.util.get_node_ip_address()
        if self._rank != 0:
            return address, 0
        from torch.distributed import TCPStore

        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return address, self._store.port

    def start(self, spec: LearnerSpec, address: tuple[str, int], *, ranks_here: int) -> Layout:
        """Join the process group and load the model; returns the layout of its micro-batches.

        Args:
            spec: the same for all ranks.
            address: host and port of the store.
            ranks_here: number of ranks on this node, which share its cores.
        """
        os.environ.update(
            RANK=str(self._rank),
            WORLD_SIZE=str(self._world_size),
            LOCAL_RANK="0",  # Ray shows each actor only its own GPU
            MASTER_ADDR=address[0],
            MASTER_PORT=str(address[1]),
            TORCHELASTIC_USE_AGENT_STORE="True",  # torchrun's; the store is already being served
        )
        import torch

        from rl.critic import LearnerWithCritic
        from rl.learner import Learner
        from rl.plugins import load_plugins

        self._spec = spec
        if spec.algorithm is not None:
            load_plugins(spec.algorithm.plugins)
        if spec.device == "cpu" or spec.learner.offload_optimizer:  # Ray gives an actor one thread
            threads = spec.learner.threads_per_worker or max(1, usable_cores() // ranks_here)
            torch.set_num_threads(threads)
        learner_class = Learner if spec.critic is None else partial(LearnerWithCritic, critic=spec.critic)
        self._learner = learner_class(
            spec.learner,
            spec.model,
            spec.algorithm,
            seed=spec.seed,
            deterministic=spec.deterministic,
            device=spec.device,
            total_optimizer_steps=spec.total_optimizer_steps,
            temperature=spec.temperature,
            fixed_length=spec.fixed_length,
        )
        return self._learner.layout

    def leave_mark(self, directory: str) -> bool:
        """Create a file named after this rank in a directory that the driver has made; False if that does not
        appear."""
        path = Path(directory)
        if not_seen([path]):
            return False
        (path / str(self._rank)).touch()
        return True

    def annotate(self, sequences: Sequence[TokenSequence], *, old_logprobs: bool) -> Annotations:
        annotations = self._learner.annotate(list(sequences), old_logprobs=old_logprobs)
        self._leave_room()
        return annotations

    def score_logprobs(self, pairs: Sequence[TokenPair]) -> list[FloatArray]:
        logprobs = self._learner.score_logprobs(pairs)
        self._leave_room()
        return logprobs

    def update(self, shares: Sequence[MiniBatchShare]) -> UpdateResult:
        result = self._learner.update(list(shares))
        self._leave_room()
        return result

    def publish_weights(self, receivers: Mapping[int, ActorHandle]) -> WeightVersion:
        """Send the weights to every rollout worker, given by its index. A collective over the ranks."""
        if self._sender is None or receivers != self._receivers:
            self._sender, self._receivers = self._connect(receivers), dict(receivers)
        self._leave_room()
        version = self._sender.send(self._learner.policy_version)
        self._leave_room()
        return version

    def _leave_room(self) -> None:
        """Release cached memory for an engine on the same GPU, which cannot use what torch only caches here; vLLM,
        including a newly started engine, expects to find it free. (Over NCCL learners and engines have separate
        GPUs.)"""
        sync = self._spec.sync
        if self._spec.device == "cuda" and sync is not None and sync.transport != "nccl":
            import torch

            torch.cuda.empty_cache()

    def _connect(self, receivers: Mapping[int, ActorHandle]) -> WeightSender:
        import torch

        from rl.weight_sync.sender import WeightSender
        from rl.weight_sync.source import Zero3WeightSource

        sync = self._spec.sync
        if sync is None:
            raise WeightSyncError("this learner was started without rollout workers to send weights to")
        if self._sender is not None:
            self._sender.close()
            if self._spec.device == "cuda":  # NCCL allocates outside torch, whose cache is as large as the last update
                torch.cuda.empty_cache()
        bucket_bytes = sync.config.bucket_mib << 20
        source = Zero3WeightSource(
            self._learner.module,
            dtype=getattr(torch, self._spec.model.dtype),
            bucket_bytes=bucket_bytes,
            rank=self._rank,
            keep="all" if sync.transport == "ipc" else "sender",
        )
        return WeightSender(
            source,
            sync.transport,
            RayWeightSyncClient(receivers, sync.config.timeout_s),
            rank=self._rank,
            world_size=self._world_size,
            num_engines=len(receivers),
            tensor_parallel_size=sync.tensor_parallel_size,
            bucket_bytes=bucket_bytes,
            timeout_s=sync.config.timeout_s,
            address=ray.util.get_node_ip_address(),
        )

    def save_checkpoint(self, directory: str) -> int:
        """Returns the policy version that was saved."""
        self._learner.save_checkpoint(Path(directory))
        return self._learner.policy_version

    def load_checkpoint(self, directory: str) -> int:
        """Returns the saved policy version."""
        self._learner.load_checkpoint(Path(directory))
        return self._learner.policy_version

    def export_hf(self, directory: str) -> None:
        self._learner.export_hf(Path(directory))

    def export_critic(self, directory: str) -> None:
        self._learner.export_critic(Path(directory))  # type: ignore[attr-defined]

    def close(self) -> None:
        self._learner.close()


class RayWeightSyncClient:
    """A `rl.weight_sync.api.WeightSyncClient` for rollout actors. Every call waits for all of them, up to a
    deadline."""

    def __init__(self, receivers: Mapping[int, ActorHandle], timeout_s: float) -> None:
        """`receivers`: the actors by index, which errors name."""
        self._receivers = dict(receivers)
        self._timeout_s = timeout_s
        self._calls: list[Any] = []  # Ray references of the current call, or the last one, in the receivers' order

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [init_info_at(place, init_info) for place in range(len(self._receivers))]
        self._wait("init_weight_transfer", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, policy_version: int) -> dict[int, dict[str, int]]:
        return dict(zip(self._receivers, self._call("finish_weight_update", policy_version), strict=True))

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return self._wait(method, [arguments] * len(self._receivers))

    def _wait(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call every receiver with its own arguments."""
        self._calls = [
            getattr(receiver, method).remote(*own)
            for receiver, own in zip(self._receivers.values(), arguments, strict=True)
        ]
        return _RECEIVERS.wait(
            self._calls,
            f"answer {method}",
            timeout_s=self._timeout_s,
            setting="sync.timeout_s",
            members=list(self._receivers),
        )

    def late(self) -> str:
        calls = self._calls
        _, waiting = ray.wait(calls, num_returns=len(calls), timeout=0) if calls else ([], [])
        members = [index for index, call in zip(self._receivers, calls, strict=False) if call in waiting]
        return f"{_RECEIVERS.member}s {members} have not answered" if members else ""

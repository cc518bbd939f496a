"""Ray learner actors, and their group, which the controller drives as one learner. No mathematics here.

A `LearnerWorker` is one rank of the ZeRO-3 process group. Left out: vLLM; the rollout workers are only handles here, to
which rank 0 sends weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.actor import ActorHandle

from rl.actors import Crew, end_actors
from rl.batch import (
    Annotations,
    FloatArray,
    ScoredBatch,
    TokenPair,
    TokenSequence,
    TrainBatch,
    UpdateResult,
    WeightVersion,
)
from rl.batching import Layout, MiniBatchShare, balance, collect, plan_update
from rl.config import AlgorithmConfig, CriticConfig, LearnerConfig, ModelConfig, SyncConfig
from rl.errors import FledgeError, LearnerError, WeightSyncError
from rl.weight_sync.api import Transport

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from rl.learner import Learner
    from rl.weight_sync.sender import WeightSender


_EXIT_TIMEOUT_S = 20.0
_LEARNERS = Crew(
    "learner rank",
    LearnerError,
    passing=(FledgeError,),
    remedy="; --resume goes on from the last checkpoint",
    collective=True,
)
_RECEIVERS = Crew("rollout worker", WeightSyncError)


@dataclass(frozen=True, slots=True)
class SyncSpec:
    """How rank 0 reaches the rollout workers."""

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
    temperature: float = 1.0  # of the rollouts, because log-probabilities are taken at it
    fixed_length: int = 1  # tokens, the divisor of the fixed_length aggregation
    critic: CriticConfig | None = None
    sync: SyncSpec | None = None  # None: no rollout worker gets the weights


class LearnerWorker:
    """One rank of the learner, in a Ray actor of its own process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._spec: LearnerSpec
        self._store: TCPStore  # that all ranks meet at, in rank 0
        self._learner: Learner
        self._sender: WeightSender | None = None
        self._receivers: list[ActorHandle] = []

    def host_store(self) -> tuple[str, int]:
        """Serve the store that the process group meets at, from now on: a port that is only looked for can be another
        program's by the time all ranks have loaded torch. Returns its address and port."""
        from torch.distributed import TCPStore

        address = ray.util.get_node_ip_address()
        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return address, self._store.port

    def start(self, spec: LearnerSpec, address: tuple[str, int]) -> Layout:
        """Join the process group and load the model; the layout of its micro-batches."""
        os.environ.update(
            RANK=str(self._rank),
            WORLD_SIZE=str(self._world_size),
            LOCAL_RANK="0",  # Ray shows each actor its own GPU only
            MASTER_ADDR=address[0],
            MASTER_PORT=str(address[1]),
            TORCHELASTIC_USE_AGENT_STORE="True",  # torchrun's: the store is served already
        )
        import torch

        from rl.critic import LearnerWithCritic
        from rl.learner import Learner
        from rl.plugins import load_plugins

        self._spec = spec
        if spec.algorithm is not None:
            load_plugins(spec.algorithm.plugins)
        if spec.device == "cpu" or spec.learner.offload_optimizer:  # Ray leaves an actor one thread
            threads = spec.learner.threads_per_worker or max(1, (os.cpu_count() or 1) // self._world_size)
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

    def publish_weights(self, receivers: Sequence[ActorHandle]) -> WeightVersion:
        """Send the weights to every rollout worker; a collective over the ranks."""
        if self._sender is None or list(receivers) != self._receivers:
            self._sender, self._receivers = self._connect(receivers), list(receivers)
        self._leave_room()
        version = self._sender.send(self._learner.policy_version)
        self._leave_room()
        return version

    def _leave_room(self) -> None:
        """An engine on the same GPU cannot have what torch only caches here; vLLM counts on finding it free, one that
        is started anew too. (Over NCCL each has GPUs of its own.)"""
        sync = self._spec.sync
        if self._spec.device == "cuda" and sync is not None and sync.transport != "nccl":
            import torch

            torch.cuda.empty_cache()

    def _connect(self, receivers: Sequence[ActorHandle]) -> WeightSender:
        import torch

        from rl.weight_sync.sender import WeightSender
        from rl.weight_sync.source import Zero3WeightSource

        sync = self._spec.sync
        if sync is None:
            raise WeightSyncError("this learner was started without rollout workers to send weights to")
        if self._sender is not None:
            self._sender.close()
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

    def save_checkpoint(self, directory: str) -> None:
        self._learner.save_checkpoint(Path(directory))

    def load_checkpoint(self, directory: str) -> int:
        """Returns the policy version that was saved."""
        self._learner.load_checkpoint(Path(directory))
        return self._learner.policy_version

    def export_hf(self, directory: str) -> None:
        self._learner.export_hf(Path(directory))

    def export_critic(self, directory: str) -> None:
        self._learner.export_critic(Path(directory))  # type: ignore[attr-defined]

    def close(self) -> None:
        self._learner.close()


class RayWeightSyncClient:
    """`rl.weight_sync.api.WeightSyncClient` over rollout actors. Every call waits for all of them, up to a deadline."""

    def __init__(self, receivers: Sequence[ActorHandle], timeout_s: float) -> None:
        self._receivers = list(receivers)
        self._timeout_s = timeout_s
        self._calls: list[Any] = []  # of the call that is running, or of the last one

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, policy_version: int) -> list[dict[str, int]]:
        return self._call("finish_weight_update", policy_version)

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        self._calls = [getattr(receiver, method).remote(*arguments) for receiver in self._receivers]
        return _RECEIVERS.wait(self._calls, f"answer {method}", timeout_s=self._timeout_s, setting="sync.timeout_s")

    def late(self) -> str:
        calls = self._calls
        _, waiting = ray.wait(calls, num_returns=len(calls), timeout=0) if calls else ([], [])
        members = [index for index, call in enumerate(calls) if call in waiting]
        return f"{_RECEIVERS.member}s {members} have not answered" if members else ""


@dataclass(slots=True)
class LearnerGroup:
    """N learner workers as one; implements `rl.controller.Learners`.

    Build it with `LearnerGroup.start`. `receivers` gives the rollout workers that hold the weights now, because lost
    ones are replaced during a run.
    """

    spec: LearnerSpec
    workers: list[ActorHandle]
    receivers: Callable[[], Sequence[ActorHandle]] = field(default=lambda: ())
    policy_version: int = 0
    empty_in_a_row: int = 0  # updates without a token to learn from
    share_prefixes: bool = False  # whether a prompt costs a rank once, however many of its samples the rank has

    @classmethod
    def start(
        cls,
        start_worker: Callable[[int], ActorHandle],
        spec: LearnerSpec,
        *,
        receivers: Callable[[], Sequence[ActorHandle]] = lambda: (),
    ) -> LearnerGroup:
        """Start all ranks and wait until the model is loaded. Raises LearnerError (or ConfigError) naming the rank."""
        group = cls(spec, [start_worker(rank) for rank in range(spec.learner.num_workers)], receivers)
        try:
            address = group._wait(
                [group.workers[0].host_store.remote()], "serve the process group's store", "start_timeout_s"
            )[0]
            layouts = group._all("start", spec, address, setting="start_timeout_s")
        except BaseException:
            group.shutdown()
            raise
        group.share_prefixes = layouts[0] == "shared_prefix"
        return group

    @property
    def needs_old_logprobs(self) -> bool:
        """With more than one optimizer step a batch, the first one moves the policy that the rest compares with."""
        learner, algorithm = self.spec.learner, self.spec.algorithm
        return learner.epochs * learner.mini_batches > 1 or (
            algorithm is not None and algorithm.kl.placement == "reward"
        )

    def annotate(self, scored: ScoredBatch) -> Annotations:
        """See `rl.controller.Learners`; does no work when the algorithm needs nothing.

        Samples that are not valid get zeros: an engine that gave a request up has recorded no experts for it.
        """
        algorithm = self.spec.algorithm
        needs_reference = algorithm is not None and algorithm.kl.placement != "none"
        if not (self.needs_old_logprobs or needs_reference or self.spec.critic):
            return Annotations()
        rollouts = scored.batch.rollouts
        valid = [i for i, is_valid in enumerate(scored.valid) if is_valid]
        sequences = [
            TokenSequence(
                np.asarray(scored.batch.prompt_of(rollouts[i]).token_ids, dtype=np.int32),
                rollouts[i].token_ids,
                rollouts[i].routed_experts,
            )
            for i in valid
        ]
        shares = balance(sequences, len(self.workers), share_prefixes=self.share_prefixes)
        parts = self._wait(
            [
                w.annotate.remote([sequences[i] for i in share], old_logprobs=self.needs_old_logprobs)
                for w, share in zip(self.workers, shares, strict=True)
            ],
            "annotate",
        )
        places, lengths = [[valid[i] for i in share] for share in shares], [r.length for r in rollouts]
        return Annotations(
            old_logprobs=collect([p.old_logprobs for p in parts], places, lengths),
            ref_logprobs=collect([p.ref_logprobs for p in parts], places, lengths),
            values=collect([p.values for p in parts], places, lengths),
            kl_coefficient=parts[0].kl_coefficient,  # every rank adapts it by the same, global KL
        )

    def update(self, batch: TrainBatch) -> UpdateResult:
        """All optimizer steps of one batch. Raises LearnerError when too many batches in a row had nothing to learn."""
        started = time.perf_counter()
        learner = self.spec.learner
        self._count_empty(batch)
        plan = plan_update(
            batch,
            num_ranks=len(self.workers),
            mini_batches=learner.mini_batches,
            epochs=learner.epochs,
            seed=self.spec.seed + self.policy_version,
            share_prefixes=self.share_prefixes,
        )
        results: list[UpdateResult] = self._wait(
            [w.update.remote(shares) for w, shares in zip(self.workers, plan, strict=True)], "update"
        )
        self.policy_version = results[0].policy_version
        return UpdateResult(self.policy_version, results[0].metrics, time.perf_counter() - started)

    def _count_empty(self, batch: TrainBatch) -> None:
        """A batch without a token to learn from moves nothing; too many of them in a row end the run."""
        self.empty_in_a_row = 0 if batch.num_loss_tokens else self.empty_in_a_row + 1
        if self.empty_in_a_row > self.spec.learner.max_skipped_steps:
            raise LearnerError(
                f"none of the {len(batch.samples)} samples has a token to learn from (all aborted, unscored, rejected "
                f"or masked), in {self.empty_in_a_row} steps in a row (learner.max_skipped_steps "
                f"{self.spec.learner.max_skipped_steps}); see the status and error fields of the last samples file"
            )

    def publish_weights(self) -> WeightVersion:
        """Send the weights to the rollout workers. Raises WeightSyncError when one did not receive what was sent."""
        versions: list[WeightVersion] = self._all("publish_weights", list(self.receivers()))
        return versions[0]

    def score_logprobs(self, pairs: Sequence[TokenPair]) -> list[FloatArray]:
        """[pair] -> [R] at temperature 1. All ranks compute all pairs: a probe is small, and gathers are collective."""
        return self._all("score_logprobs", list(pairs))[0]

    def save_checkpoint(self, directory: Path) -> None:
        self._all("save_checkpoint", str(directory.resolve()))

    def load_checkpoint(self, directory: Path) -> None:
        """Load parameters, optimizer, schedule, random state and the policy version."""
        versions = self._all("load_checkpoint", str(directory.resolve()))
        self.policy_version = versions[0]

    def export_hf(self, directory: Path) -> None:
        """Write a Hugging Face checkpoint."""
        self._all("export_hf", str(directory.resolve()))

    def export_critic(self, directory: Path) -> None:
        """Write the critic as a Hugging Face checkpoint, for `critic.path` of another run."""
        self._all("export_critic", str(directory.resolve()))

    def shutdown(self) -> None:
        """End every rank. Never raises: it runs while other errors are on their way out."""
        calls: list[Any] = [worker.close.remote() for worker in self.workers]
        ray.wait(calls, num_returns=len(calls), timeout=_EXIT_TIMEOUT_S)
        end_actors(self.workers)
        self.workers = []

    def _all(self, method: str, *arguments: Any, setting: str = "timeout_s") -> list[Any]:
        return self._wait([getattr(worker, method).remote(*arguments) for worker in self.workers], method, setting)

    def _wait(self, calls: Sequence[Any], what: str, setting: str = "timeout_s") -> list[Any]:
        """Results by rank, within a deadline of the learner's."""
        timeout_s = getattr(self.spec.learner, setting)
        return _LEARNERS.wait(calls, what, timeout_s=timeout_s, setting=f"learner.{setting}")

"""The learner workers combined into one learner, which the controller drives.

Left out: what a rank does (`rl.workers`), and where it runs (`launch.placement`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from rl.actors import Crew, end_actors, uninterrupted
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
from rl.batching import balance, collect, plan_update
from rl.errors import ConfigError, EmptyBatchesError, FledgeError, LearnerError, WeightSyncError
from rl.shared_files import not_seen
from rl.stall_watch import StallWatch
from rl.workers import LearnerSpec

_EXIT_TIMEOUT_S = 20.0
_LEARNERS = Crew(
    "learner rank",
    LearnerError,
    passing=(FledgeError,),
    remedy="; --resume continues from the last checkpoint",
    collective=True,
)


@dataclass(slots=True)
class LearnerGroup:
    """N learner workers combined; implements `rl.controller.Learners`.

    Build it with `LearnerGroup.start`. `receivers` returns the rollout workers that serve at the moment, by
    index, because lost ones are replaced during a run.
    """

    spec: LearnerSpec
    workers: list[ActorHandle]
    receivers: Callable[[], Mapping[int, ActorHandle]] = dict
    policy_version: int = 0
    empty_in_a_row: int = 0  # consecutive updates without a token to learn from
    nodes: list[str] = field(default_factory=list)  # [rank] -> address of its node
    last_update: UpdateResult | None = None
    updating: list[Any] = field(default_factory=list)  # calls of an unfinished update, by rank
    share_prefixes: bool = False  # whether a rank computes a prompt once for all its samples
    tell: Callable[[str], None] = lambda text: None  # called every few seconds with what the ranks do

    @classmethod
    def start(
        cls,
        start_worker: Callable[[int], ActorHandle],
        spec: LearnerSpec,
        *,
        receivers: Callable[[], Mapping[int, ActorHandle]] = dict,
        meanwhile: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> LearnerGroup:
        """Start all ranks and wait until the model is loaded. Raises LearnerError (or ConfigError) naming the rank.

        `meanwhile` is called every few seconds, and may raise what else has failed.
        """
        group = cls(spec, [start_worker(rank) for rank in range(spec.learner.num_workers)], receivers, tell=tell)
        try:
            meetings: list[tuple[str, int]] = group._all("meet", setting="start_timeout_s")
            group.nodes = [node for node, _ in meetings]
            ranks_on = Counter(group.nodes)
            starts = [
                worker.start.remote(spec, meetings[0], ranks_here=ranks_on[node])
                for worker, node in zip(group.workers, group.nodes, strict=True)
            ]
            layouts = group._wait(starts, "start", "start_timeout_s", meanwhile)
        except BaseException:
            group.shutdown()
            raise
        group.share_prefixes = layouts[0] == "shared_prefix"
        return group

    def check_run_dir(self, run_dir: Path) -> None:
        """Raise ConfigError if the driver and a rank do not see each other's files in the run directory; otherwise the
        first checkpoint would fail, hours later."""
        ranks = range(len(self.workers))
        run_dir.mkdir(parents=True, exist_ok=True)  # programs that call no command have not made it
        with TemporaryDirectory(prefix=".shared_", dir=run_dir, ignore_cleanup_errors=True) as made:
            directory = Path(made).absolute()
            sees = self._all("leave_mark", str(directory), setting="start_timeout_s")
            unseen = not_seen([directory / str(rank) for rank in ranks if sees[rank]])
        blind = [rank for rank in ranks if not sees[rank] or directory / str(rank) in unseen]
        if blind:
            nodes = ", ".join(sorted({self.nodes[rank] for rank in blind}))
            raise ConfigError(
                f"learner ranks {blind} on {nodes} do not share run_dir {run_dir.absolute()} with this process: "
                "neither sees what the other writes there, so no checkpoint could be saved; choose a folder on a file "
                "system that every node shares"
            )

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the update needs log-probabilities from before it: for the KL in the reward, or if a batch takes
        several optimizer steps, because the first one moves the policy that the others compare with."""
        learner, algorithm = self.spec.learner, self.spec.algorithm
        return learner.epochs * learner.mini_batches > 1 or (
            algorithm is not None and algorithm.kl.placement == "reward"
        )

    def annotate(self, scored: ScoredBatch) -> Annotations:
        """See `rl.controller.Learners`; does no work if the algorithm needs nothing.

        Samples that are not valid get zeros: an engine that gave up a request has recorded no experts for it.
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
        with uninterrupted():
            calls = [
                w.annotate.remote([sequences[i] for i in share], old_logprobs=self.needs_old_logprobs)
                for w, share in zip(self.workers, shares, strict=True)
            ]
        parts = self._wait(calls, "annotate", meanwhile=self._look())
        places, lengths = [[valid[i] for i in share] for share in shares], [r.length for r in rollouts]
        return Annotations(
            old_logprobs=collect([p.old_logprobs for p in parts], places, lengths),
            ref_logprobs=collect([p.ref_logprobs for p in parts], places, lengths),
            values=collect([p.values for p in parts], places, lengths),
            kl_coefficient=parts[0].kl_coefficient,  # every rank adapts it by the same global KL
        )

    def update(self, batch: TrainBatch) -> UpdateResult:
        """All optimizer steps of one batch. Raises LearnerError after too many batches in a row with nothing to
        learn."""
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
        with uninterrupted():
            self.updating = [w.update.remote(shares) for w, shares in zip(self.workers, plan, strict=True)]
        return self._updated(started)

    @property
    def is_updating(self) -> bool:
        """Whether an interrupt left an update unfinished."""
        return bool(self.updating)

    def finish_update(self) -> UpdateResult | None:
        """See `rl.controller.Learners`."""
        return self._updated(time.perf_counter()) if self.updating else self.last_update

    def _updated(self, started: float) -> UpdateResult:
        results: list[UpdateResult] = self._wait(self.updating, "update", meanwhile=self._look())
        self.policy_version = results[0].policy_version
        self.last_update = UpdateResult(self.policy_version, results[0].metrics, time.perf_counter() - started)
        self.updating = []
        return self.last_update

    def _count_empty(self, batch: TrainBatch) -> None:
        """Count batches without a token to learn from, which change nothing; too many in a row end the run."""
        self.empty_in_a_row = 0 if batch.num_loss_tokens else self.empty_in_a_row + 1
        if self.empty_in_a_row > self.spec.learner.max_skipped_steps:
            raise EmptyBatchesError(
                f"none of the {len(batch.samples)} samples has a token to learn from (all aborted, unscored, rejected "
                f"or masked), for {self.empty_in_a_row} steps in a row (learner.max_skipped_steps "
                f"{self.spec.learner.max_skipped_steps}); see the status and error fields of the last samples file"
            )

    def publish_weights(self) -> WeightVersion:
        """Send the weights to the rollout workers. Raises WeightSyncError if one did not receive what was sent, or if
        there is none."""
        receivers = dict(self.receivers())
        if not receivers:
            raise WeightSyncError("there is no rollout worker to send weights to")
        self.tell("the weights are sent")
        sync = self.spec.sync
        look = self._look(sync_timeout_s=sync.config.timeout_s if sync else 0.0)
        versions: list[WeightVersion] = self._all("publish_weights", receivers, meanwhile=look)
        return versions[0]

    def score_logprobs(self, pairs: Sequence[TokenPair]) -> list[FloatArray]:
        """[pair] -> [R] at temperature 1; the ranks divide the pairs."""
        arrays = [[np.asarray(ids, dtype=np.int32) for ids in pair] for pair in pairs]
        sequences = [TokenSequence(prompt, response) for prompt, response in arrays]
        shares = balance(sequences, len(self.workers), share_prefixes=self.share_prefixes)
        with uninterrupted():
            calls = [
                w.score_logprobs.remote([pairs[i] for i in share])
                for w, share in zip(self.workers, shares, strict=True)
            ]
        parts = self._wait(calls, "score_logprobs", meanwhile=self._look())
        return list(collect(parts, shares, [len(response) for _, response in pairs]) or ())

    def save_checkpoint(self, directory: Path) -> int:
        """Returns the policy version that was saved."""
        self.tell("a checkpoint is saved")
        versions: list[int] = self._all("save_checkpoint", str(directory.absolute()))
        return versions[0]

    def load_checkpoint(self, directory: Path) -> None:
        """Load parameters, optimizer, schedule, random state and the policy version."""
        versions = self._all("load_checkpoint", str(directory.absolute()))
        self.policy_version = versions[0]

    def export_hf(self, directory: Path) -> None:
        """Write a Hugging Face checkpoint."""
        self._all("export_hf", str(directory.absolute()))

    def export_critic(self, directory: Path) -> None:
        """Write the critic as a Hugging Face checkpoint, for `critic.path` of another run."""
        self._all("export_critic", str(directory.absolute()))

    def shutdown(self) -> None:
        """End every rank. Never raises, because it runs while other errors propagate."""
        calls: list[Any] = [worker.close.remote() for worker in self.workers]
        ray.wait(calls, num_returns=len(calls), timeout=_EXIT_TIMEOUT_S)
        end_actors(self.workers)
        self.workers = []

    def _all(
        self,
        method: str,
        *arguments: Any,
        setting: str = "timeout_s",
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        with uninterrupted():
            calls = [getattr(worker, method).remote(*arguments) for worker in self.workers]
        return self._wait(calls, method, setting, meanwhile)

    def _look(self, *, sync_timeout_s: float = 0.0) -> Callable[[], None]:
        """What raises if the ranks stop moving for longer than they may, or may wait for the engines."""
        limit, settings = self.spec.learner.hang_timeout_s, "learner.hang_timeout_s"
        if sync_timeout_s:  # they wait for an engine up to three times in a row
            limit, settings = limit + 3 * sync_timeout_s, f"{settings} and 3 x sync.timeout_s"
        return StallWatch(self.workers, limit, settings, self.tell).look

    def _wait(
        self,
        calls: Sequence[Any],
        what: str,
        setting: str = "timeout_s",
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Results by rank, within a time limit from the learner's section."""
        timeout_s = getattr(self.spec.learner, setting)
        return _LEARNERS.wait(calls, what, timeout_s=timeout_s, setting=f"learner.{setting}", meanwhile=meanwhile)

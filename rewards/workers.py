"""Ray reward workers and their pool: a batch of rollouts goes in, and comes out with one score per rollout.

Each worker is a Ray actor around one `ScoringProcess`, which holds the deadlines. Left out: torch and vLLM, which must
never be imported here; combining (`rewards.combine`); the controller.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from rewards.api import RewardInput
from rewards.combine import CombinedReward, PartResults
from rewards.loading import absolute_name
from rewards.scoring_process import START_TIMEOUT_S, ScoringProcess, ScoringSpec
from rl.actors import end_actors
from rl.batch import FinishReason, Prompt, RewardStatus, Rollout, RolloutBatch, Score, ScoredBatch
from rl.config import RewardConfig
from rl.errors import RewardError

T = TypeVar("T")
_CPUS = 0.01  # with 0, workers could also land on a head node that was started with 0 CPUs to be left alone
ACTOR_START_TIMEOUT_S = START_TIMEOUT_S + 60.0  # a Ray worker process starts first


class RewardWorker:
    """The Ray actor: scores one chunk at a time in its own child process. Holds no batch between calls."""

    def __init__(self, spec: ScoringSpec) -> None:
        self._process = ScoringProcess(spec)

    def score(self, samples: Sequence[RewardInput]) -> list[PartResults]:
        return self._process.score(samples)

    def child_pid(self) -> int:
        """The id of the scoring process; answers once the rewards are loaded."""
        return self._process.pid


# How many workers may try a chunk: when a node is lost, the next idle worker may have been on it too. A sample that
# ends its scoring process does not cost a worker (`rewards.scoring_process`).
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class _Begun:
    """A rollout that was handed out before the batch was whole, and where its results will be."""

    rollout: Rollout  # held, so that no other rollout gets its id()
    results: asyncio.Task[list[PartResults]]
    position: int


class RewardPool:
    """Reward workers, spread over the cluster.

    One event loop in a thread of its own owns the workers. Chunks wait for an idle worker: that is the back-pressure.

    Raises:
        ConfigError, RewardError: a reward cannot be loaded, here or on a worker; before any sample is scored.
    """

    def __init__(self, config: RewardConfig) -> None:
        functions = tuple(f.model_copy(update={"name": absolute_name(f.name)}) for f in config.functions)
        self._config = config
        self._spec = ScoringSpec(functions, config.clip, config.timeout_s)
        self._combined = CombinedReward(functions, config.clip)
        self._actor = ray.remote(max_restarts=0, num_cpus=_CPUS, scheduling_strategy="SPREAD")(RewardWorker)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-pool", daemon=True)
        self._thread.start()
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        self._workers: set[Any] = set()
        self._begun: dict[int, _Begun] = {}  # by the identity of the rollout
        self._waiting: list[tuple[Prompt, Rollout]] = []  # for an idle worker, or for their batch
        self.num_replaced = 0
        try:
            self._submit(self._start_workers(config.num_workers)).result()
        except BaseException:
            self.close()
            raise

    def begin(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> None:
        """Start to score a group while others are still being generated; see `rl.controller.RewardPool`."""
        live = [(prompt, rollout) for rollout in rollouts if rollout.finish_reason is not FinishReason.ABORT]
        self._loop.call_soon_threadsafe(self._begin, live)

    def score(self, batch: RolloutBatch, *, earlier: Sequence[Score] = ()) -> ScoredBatch:
        """Score a step's rollouts, or one round of them; `earlier` holds the scores of the rounds before.

        Raises RewardError when more than `max_error_fraction` of the step's samples so far cannot be scored: one bad
        prompt in a small last round must not end the run.
        """
        scored = self._submit(self._score(batch)).result()
        check_error_fraction([*earlier, *scored.scores], self._config.max_error_fraction)
        return scored

    def metrics(self) -> dict[str, float]:
        """Metrics of the workers, so far in this run."""
        return {"reward/worker_restarts": float(self.num_replaced)}

    def worker_handles(self) -> tuple[Any, ...]:
        """The actors that are alive now."""
        return tuple(self._workers)

    def close(self) -> None:
        """End the workers. The pool cannot be used afterwards."""
        if self._loop.is_closed():
            return
        # First cancel what an interrupt has left under way: it would replace the workers that end here.
        self._submit(_cancel_others()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if ray.is_initialized():
            end_actors(tuple(self._workers))
        self._workers.clear()
        self._combined.close()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _start_workers(self, count: int) -> None:
        await asyncio.gather(*(self._add_worker() for _ in range(count)))

    async def _add_worker(self) -> None:
        worker: Any = self._actor.remote(self._spec)
        self._workers.add(worker)
        try:
            await asyncio.wait_for(worker.child_pid.remote(), ACTOR_START_TIMEOUT_S)
        except TimeoutError:
            raise RewardError(
                f"a reward worker did not start within {ACTOR_START_TIMEOUT_S:g} s; `ray status` shows why"
            ) from None
        except RayActorError as error:
            self._workers.discard(worker)
            raise _cause(error) from error
        self._idle.put_nowait(worker)

    def _begin(self, samples: Sequence[tuple[Prompt, Rollout]] = ()) -> None:
        """Hand waiting samples to idle workers, in the loop. What is left waits for a worker, or is scored with its
        batch: a call for every group would be too many if each call has its own cost, as with coroutine rewards."""
        self._waiting += samples
        while self._waiting and not self._idle.empty():
            size = self._chunk_size(len(self._waiting))
            chunk, self._waiting = self._waiting[:size], self._waiting[size:]
            inputs = [_reward_input(prompt, rollout) for prompt, rollout in chunk]
            results = self._loop.create_task(self._score_chunk(inputs, self._idle.get_nowait()))
            for position, (_, rollout) in enumerate(chunk):
                self._begun[id(rollout)] = _Begun(rollout, results, position)

    def _chunk_size(self, num_samples: int) -> int:
        """Small enough that every worker gets some."""
        return min(self._config.batch_size, -(-num_samples // self._config.num_workers) or 1)

    async def _score(self, batch: RolloutBatch) -> ScoredBatch:
        begun, self._begun, self._waiting = self._begun, {}, []
        samples = [_reward_input(batch.prompt_of(rollout), rollout) for rollout in batch.rollouts]
        results = [PartResults(status=RewardStatus.SKIPPED, error="the rollout was aborted") for _ in samples]
        live = [i for i, r in enumerate(batch.rollouts) if r.finish_reason is not FinishReason.ABORT]
        rest = [i for i in live if id(batch.rollouts[i]) not in begun]
        size = self._chunk_size(len(rest))
        chunks = [rest[i : i + size] for i in range(0, len(rest), size)]
        calls = [self._score_chunk([samples[i] for i in chunk]) for chunk in chunks]
        # Await all, even results that are not asked for: an error means that lost workers could not be replaced.
        answers = await asyncio.gather(*calls, *{one.results for one in begun.values()})
        for chunk, answer in zip(chunks, answers):
            for index, result in zip(chunk, answer, strict=True):
                results[index] = result
        for index in live:
            if (one := begun.get(id(batch.rollouts[index]))) is not None:
                results[index] = one.results.result()[one.position]
        return ScoredBatch(batch, await self._finish(samples, results))

    async def _finish(self, samples: Sequence[RewardInput], results: Sequence[PartResults]) -> tuple[Score, ...]:
        """Compare and combine, in a thread: a plugin that hangs there must block neither the loop nor the exit of this
        process. Unlike a scoring process, a thread cannot be killed, so a plugin that hangs ends the run."""
        scores: concurrent.futures.Future[tuple[Score, ...]] = concurrent.futures.Future()
        num_compared = seen = 0

        def compared() -> None:
            nonlocal num_compared
            num_compared += 1

        def run() -> None:
            try:
                scores.set_result(self._combined.finish(samples, results, compared=compared))
            except BaseException as error:  # noqa: BLE001  raised where it is awaited
                scores.set_exception(error)

        threading.Thread(target=run, name="reward-groups", daemon=True).start()
        waiting = asyncio.wrap_future(scores)
        while not (await asyncio.wait([waiting], timeout=self._config.timeout_s))[0]:
            if seen == num_compared:
                raise RewardError(
                    "a reward that compares a group's responses (score_group) has not come back within "
                    f"reward.timeout_s {self._config.timeout_s:g}; it must be cheap (docs/rewards/writing-a-reward.md)"
                )
            seen = num_compared
        return waiting.result()

    async def _score_chunk(self, samples: Sequence[RewardInput], worker: Any = None) -> list[PartResults]:
        """Score on `worker` or an idle one. A worker that is lost is replaced, and the chunk is tried on another."""
        error = ""
        for _ in range(_ATTEMPTS):
            worker = worker or await self._idle.get()
            try:
                reply = worker.score.remote(list(samples))
                answer: list[PartResults] = await asyncio.wait_for(reply, self._chunk_deadline_s(len(samples)))
            except (RayError, TimeoutError) as failure:
                error = f"the reward worker was lost: {_one_line(failure)}"
                await self._replace(worker)
                worker = None
            else:
                self._idle.put_nowait(worker)
                self._begin()
                return answer
        return [PartResults(status=RewardStatus.INFRASTRUCTURE_ERROR, error=error)] * len(samples)

    def _chunk_deadline_s(self, num_samples: int) -> float:
        """After this long the worker itself must be stuck: its own deadlines would have ended every sample twice."""
        return 2 * num_samples * (self._config.timeout_s + 5.0) + START_TIMEOUT_S

    async def _replace(self, worker: Any) -> None:
        self._workers.discard(worker)
        await asyncio.to_thread(end_actors, [worker])  # a worker that is only cut off must not go on
        self.num_replaced += 1
        await self._add_worker()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def check_error_fraction(scores: Sequence[Score], limit: float) -> None:
    """Raise RewardError, naming the commonest error, when more than `limit` of the scores failed (SKIPPED aside)."""
    tried = [score for score in scores if score.status is not RewardStatus.SKIPPED]
    failed = [score for score in tried if not score.ok]
    if len(failed) <= limit * len(tried):
        return
    (status, error), count = collections.Counter((s.status.value, s.error) for s in failed).most_common(1)[0]
    raise RewardError(
        f"{len(failed)} of {len(tried)} samples could not be scored, more than reward.max_error_fraction {limit:g} "
        f"allows; the most common error ({count} of {len(failed)}) is {status}: {error}"
    )


def _reward_input(prompt: Prompt, rollout: Rollout) -> RewardInput:
    return RewardInput(
        prompt=prompt.text,
        response=rollout.text,
        answer=rollout.answer,
        ground_truth=prompt.ground_truth,
        data_source=prompt.data_source,
        extra=prompt.extra,
        num_tokens=rollout.length,
        truncated=rollout.finish_reason is FinishReason.LENGTH,
        token_ids=rollout.token_ids,
        group_id=rollout.group_id,
        reward=None if prompt.reward is None else absolute_name(prompt.reward),
    )


def _cause(error: RayActorError) -> RewardError:
    """The worker's own error, which Ray wraps into text when a constructor raises."""
    cause = getattr(error, "cause", None)
    text = str(cause or error).strip().splitlines()[-1]
    return RewardError(f"a reward worker could not start: {text}")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if isinstance(error, RayTaskError) else lines[0]  # a task error's text is a traceback

"""The pool of rollout workers that the controller drives: routes groups to workers, and replaces workers that died.

Left out: what a worker does (`rollout.workers`), rewards, and the learner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from rl.actors import Crew, end_actors, has_failed
from rl.batch import FloatArray, OnGroup, Prompt, Rollout, RolloutBatch, TokenPair, WeightVersion
from rl.config import EvaluationConfig, RolloutConfig
from rl.errors import FledgeError, RolloutError, WeightSyncError
from rollout.engine import SamplingParameters
from rollout.workers import GroupRequest

_CREW = Crew("rollout worker", RolloutError, passing=(WeightSyncError,))
_HEALTH_TIMEOUT_S = 90.0  # more than the engine's own limit (`VLLMEngine`, 60 s), which a long step may use up
_MORE_FAILURES_S = 5.0
_SHUTDOWN_TIMEOUT_S = 30.0  # for an orderly end of an engine


def group_requests(
    prompts: Sequence[Prompt], *, group_size: int, seed: int, step: int, first_prompt: int = 0
) -> list[GroupRequest]:
    """One request per prompt. A sample's 31-bit seed depends on the run's seed and the sample's place (step, place of
    its prompt within the step, place in the group), never on the worker; `first_prompt` is the first prompt's place.
    """

    def sample_seed(prompt: int, sample: int) -> int:
        return int(np.random.SeedSequence([seed, step + 1, prompt, sample]).generate_state(1)[0] >> 1)

    return [
        GroupRequest(i, prompt.token_ids, tuple(sample_seed(first_prompt + i, j) for j in range(group_size)))
        for i, prompt in enumerate(prompts)
    ]


class RolloutPool:
    """N rollout workers as one. Their engines start in the background; call `wait_until_ready` before anything else.

    Args:
        start_worker: starts the Ray actor with a given index (placement and resources are the caller's business).
        config: the rollout settings.
        training: sampling parameters of training steps.
        evaluation: sampling parameters of evaluation.
        evaluation_samples: responses per prompt in evaluation.
        seed: the run's; every sample's own seed is derived from it.
        deterministic: fixed routing, one call per worker.
        report: called with a message when workers are lost, before others start in their place.
    """

    def __init__(
        self,
        start_worker: Callable[[int], ActorHandle],
        config: RolloutConfig,
        *,
        training: SamplingParameters,
        evaluation: SamplingParameters,
        evaluation_samples: int = 1,
        seed: int = 0,
        deterministic: bool = False,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._start_worker = start_worker
        self._report = report
        self._config = config
        self._training = training
        self._evaluation = evaluation
        self._evaluation_samples = evaluation_samples
        self._seed = seed
        self._deterministic = deterministic
        self._restarts = 0
        self._losses_in_a_row = 0  # without a batch in between; many workers lost at once, as with a node, are one loss
        self._memory_peak_gib = 0.0
        self._finished: dict[GroupRequest, list[Rollout]] = {}  # what a failed call had already got
        self._policy_version: int | None = None  # of the weights that `_finished` comes from
        self.workers: list[ActorHandle] = [start_worker(index) for index in range(config.num_workers)]
        self._starts: list[Any] = [worker.start.remote() for worker in self.workers]
        self._starting_since = time.monotonic()

    def wait_until_ready(self) -> None:
        """Wait for the engines, which begin to start when the pool is made.

        Raises:
            RolloutError: an engine did not start; the first failure is raised.
        """
        self._wait(self._starts, "start its engine", "start_timeout_s", since=self._starting_since)

    def raise_if_failed(self) -> None:
        """Raise RolloutError if an engine has already failed to start."""
        for index, call in enumerate(self._starts):
            if has_failed(call):
                _CREW.get(call, index, "start its engine")

    # Generation

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        step: int,
        first_prompt: int = 0,
        on_group: OnGroup = lambda prompt, rollouts: None,
    ) -> RolloutBatch:
        """One group of `group_size` responses per prompt; see `rl.controller.RolloutPool`.

        Raises:
            RolloutError: a worker died or missed its deadline; `replace_lost_workers` repairs the pool.
        """
        groups = group_requests(prompts, group_size=group_size, seed=self._seed, step=step, first_prompt=first_prompt)
        return self._generate(prompts, groups, self._training, on_group)

    def generate_eval(
        self, prompts: Sequence[Prompt], *, on_group: OnGroup = lambda prompt, rollouts: None
    ) -> RolloutBatch:
        """Like `generate`, with the evaluation's sampling parameters; seeds do not depend on the step."""
        groups = group_requests(prompts, group_size=self._evaluation_samples, seed=self._seed, step=-1)
        return self._generate(prompts, groups, self._evaluation, on_group)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[GroupRequest],
        parameters: SamplingParameters,
        on_group: OnGroup,
    ) -> RolloutBatch:
        started = time.perf_counter()
        if self._deterministic:  # all groups arrive at once, so `on_group` has no use
            made = self._generate_fixed(groups, parameters)
        else:
            made = self._generate_balanced(groups, parameters, lambda g: on_group(prompts[g[0].prompt_index], g))
        self._losses_in_a_row = 0
        rollouts = [rollout for group in made for rollout in group]
        rollouts.sort(key=lambda r: (r.prompt_index, r.sample_index))
        return RolloutBatch(tuple(prompts), tuple(rollouts), time.perf_counter() - started)

    def _generate_fixed(self, groups: Sequence[GroupRequest], parameters: SamplingParameters) -> list[list[Rollout]]:
        """Round-robin, everything at once: which engine draws a sample, and beside which, never changes."""
        most = sum(len(group.seeds) for group in groups[:: len(self.workers)])
        waves = -(-most // self._config.max_concurrent_sequences)
        calls: list[Any] = [
            worker.generate.remote(groups[index :: len(self.workers)], parameters)
            for index, worker in enumerate(self.workers)
        ]
        try:
            return [group for part in self._wait(calls, "generate", waves=waves) for group in part]
        except RolloutError:
            for call in calls:  # else the survivors' unfinished samples share batches with the next call's
                ray.cancel(call)
            raise

    def _generate_balanced(
        self,
        groups: Sequence[GroupRequest],
        parameters: SamplingParameters,
        on_group: Callable[[list[Rollout]], None],
    ) -> list[list[Rollout]]:
        """Each group goes to the worker with the fewest samples in flight, longest prompts first; a worker holds no
        more than its engine runs at once, so that a slow worker does not hoard work that an idle one could do.

        The deadline is for progress: an evaluation set may take hours, but some group must finish in time. When a
        worker is lost, the groups that are finished are kept for a repeated call under the same weights."""
        finished = self._finished
        waiting = [group for group in groups if group not in finished]
        waiting.sort(key=lambda g: len(g.prompt_ids))  # popped from the end: longest first
        in_flight = [0] * len(self.workers)
        calls: dict[Any, tuple[int, GroupRequest]] = {}
        try:
            while waiting or calls:
                self._submit(waiting, calls, in_flight, parameters)
                ready, _ = ray.wait(list(calls), timeout=self._config.timeout_s)
                if not ready:
                    slow = sorted({index for index, _ in calls.values()})
                    raise RolloutError(
                        f"rollout workers {slow} finished none of {len(calls)} groups within rollout.timeout_s "
                        f"{self._config.timeout_s:g}; raise it, or lower rollout.max_response_tokens"
                    )
                for call in ready:
                    index, group = calls.pop(call)
                    in_flight[index] -= len(group.seeds)
                    [finished[group]] = _CREW.get(call, index, "generate")
                    on_group(finished[group])
            return [finished.pop(group) for group in groups]
        finally:
            for call in calls:  # empty unless an error propagates
                ray.cancel(call)

    def _submit(
        self,
        waiting: list[GroupRequest],
        calls: dict[Any, tuple[int, GroupRequest]],
        in_flight: list[int],
        parameters: SamplingParameters,
    ) -> None:
        """Hand out waiting groups until every worker is full."""
        while waiting:
            index = min(range(len(self.workers)), key=in_flight.__getitem__)
            size = len(waiting[-1].seeds)
            if in_flight[index] and in_flight[index] + size > self._config.max_concurrent_sequences:
                return
            group = waiting.pop()
            in_flight[index] += size
            calls[self.workers[index].generate.remote([group], parameters)] = (index, group)

    # Weights

    def load_weights(self, version: WeightVersion) -> None:
        """Serve the weights that the learner has just sent; see `rl.controller.RolloutPool`."""
        if version.policy_version != self._policy_version:
            self._finished = {}
        self._policy_version = version.policy_version
        calls = [worker.activate.remote(version.policy_version) for worker in self.workers]
        self._memory_peak_gib = max(self._wait(calls, f"activate policy version {version.policy_version}"))

    def score_logprobs(self, pairs: Sequence[TokenPair]) -> list[list[FloatArray]]:
        """[worker][pair] -> [R]; see `rl.controller.RolloutPool`."""
        return self._wait([worker.score_logprobs.remote(pairs) for worker in self.workers], "score the probe")

    def metrics(self) -> dict[str, float]:
        """How many workers were lost and replaced so far in this run, and the most memory that one has held."""
        return {
            "rollout/worker_restarts": float(self._restarts),
            "rollout/memory_peak_gib": self._memory_peak_gib,
        }

    # Failures

    def replace_lost_workers(self) -> int:
        """Start a new worker in place of every one that does not answer; returns how many.

        A new worker serves the initial weights: sync before generating.

        Raises:
            RolloutError: more than rollout.max_restarts losses in a row, or a new worker did not start.
        """
        checks: list[Any] = [worker.check_health.remote() for worker in self.workers]
        ray.wait(checks, num_returns=len(checks), timeout=_HEALTH_TIMEOUT_S)
        lost = [index for index, check in enumerate(checks) if not _is_well(check)]
        if lost:
            self._start_again(lost)
        return len(lost)

    def _start_again(self, lost: Sequence[int]) -> None:
        """Start new workers in these places, again if one fails to start, as often as rollout.max_restarts allows."""
        starts: dict[int, Any] = {}
        failed = list(lost)
        while True:
            self._count_loss(failed)
            self._report(
                f"rollout workers {failed} are lost; others are started in their place, which may take up to "
                f"rollout.start_timeout_s {self._config.start_timeout_s:g} s (`ray status` shows whether there is room)"
            )
            # An orderly end, if still possible, frees an engine's memory and files before its successor starts.
            _end_workers([self.workers[index] for index in failed])
            for index in failed:
                self.workers[index] = self._start_worker(index)
                starts[index] = self.workers[index].start.remote()
            try:
                self._wait([starts[index] for index in lost], "start again", "start_timeout_s", members=lost)
                return
            except RolloutError as error:
                # A node or an image that is broken fails all of them, within moments: that is one loss.
                ray.wait(list(starts.values()), num_returns=len(starts), timeout=_MORE_FAILURES_S)
                failed = [index for index in lost if has_failed(starts[index])]
                if not failed:  # none failed, they are late, and another try would be late, too
                    raise
                self._report(str(error))

    def _count_loss(self, lost: Sequence[int]) -> None:
        self._restarts += len(lost)
        self._losses_in_a_row += 1
        if self._losses_in_a_row > self._config.max_restarts:
            raise RolloutError(
                f"rollout workers {lost} are lost, and rollout.max_restarts {self._config.max_restarts} is used up: "
                "only that many losses in a row, without a finished batch in between, are tolerated"
            )

    def _wait(
        self,
        calls: Sequence[Any],
        what: str,
        setting: str = "timeout_s",
        *,
        waves: int = 1,
        members: Sequence[int] | None = None,
        since: float | None = None,
    ) -> list[Any]:
        name = f"rollout.{setting}" if waves == 1 else f"{waves} x rollout.{setting}"
        timeout_s = getattr(self._config, setting) * waves
        return _CREW.wait(calls, what, timeout_s=timeout_s, setting=name, members=members, since=since)

    def shutdown(self) -> None:
        """End the engines, then the actors. Never raises: it may run while another error propagates."""
        _end_workers(self.workers)
        self.workers = []


def _end_workers(workers: Sequence[ActorHandle]) -> None:
    calls: list[Any] = [worker.shutdown.remote() for worker in workers]
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=_SHUTDOWN_TIMEOUT_S)
    end_actors(workers)


def _is_well(check: Any) -> bool:
    try:
        ray.get(check, timeout=0)
    except (RayError, FledgeError):  # GetTimeoutError is a RayError
        return False
    return True


def sampling_parameters(config: RolloutConfig, end_of_turn_id: int) -> SamplingParameters:
    """The training rollouts' sampling parameters. The engine itself stops at the checkpoint's EOS tokens, but a base
    model's chat template may end the assistant's turn with another token: `end_of_turn_id`."""
    return SamplingParameters(
        max_tokens=config.max_response_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        stop=config.stop,
        stop_token_ids=(end_of_turn_id,),
    )


def evaluation_parameters(training: SamplingParameters, config: EvaluationConfig) -> SamplingParameters:
    """The evaluation's sampling parameters: its own distribution, training's stops, and training's length limit unless
    it has its own."""
    return replace(
        training,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        max_tokens=config.max_response_tokens or training.max_tokens,
    )

"""The pool of rollout workers that the controller drives: routes groups to workers, away from those that are lost.

Left out: which workers there are (`rollout.roster`), what a worker does (`rollout.workers`), rewards, and the learner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import ray
from ray.actor import ActorHandle

from rl.batch import FloatArray, OnGroup, Prompt, Rollout, RolloutBatch, TokenPair, WeightVersion
from rl.config import EvaluationConfig, RolloutConfig
from rl.errors import EnginesLostError, RolloutError
from rollout.engine import SamplingParameters
from rollout.roster import CREW, Roster
from rollout.workers import GroupRequest

T = TypeVar("T")
_ADMIT_EVERY_S = 5.0  # where no sync lets new workers serve
_LOOK_S = 5.0  # between two looks for engines that hang, while no group is finished


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
    """N rollout workers as one. Their engines start in the background: wait for the roster before anything else.

    Args:
        roster: the workers.
        config: the rollout settings.
        training: sampling parameters of training steps.
        evaluation: sampling parameters of evaluation.
        evaluation_samples: responses per prompt in evaluation.
        seed: the run's; every sample's own seed is derived from it.
        deterministic: fixed routing, one call per worker; the roster must need all its workers.
        trained: a learner sends weights, so that a new worker must not generate before the next sync.
    """

    def __init__(
        self,
        roster: Roster,
        config: RolloutConfig,
        *,
        training: SamplingParameters,
        evaluation: SamplingParameters,
        evaluation_samples: int = 1,
        seed: int = 0,
        deterministic: bool = False,
        trained: bool = True,
    ) -> None:
        self.roster = roster
        self._trained = trained
        self.tell: Callable[[str], None] = lambda text: None  # called every few seconds with how much is generated
        self._config = config
        self._training = training
        self._evaluation = evaluation
        self._evaluation_samples = evaluation_samples
        self._seed = seed
        self._deterministic = deterministic
        self._memory_peak_gib = 0.0
        self._finished: dict[GroupRequest, list[Rollout]] = {}  # what a failed call had already got
        self._policy_version: int | None = None  # of the weights that `_finished` comes from

    @property
    def workers(self) -> dict[int, ActorHandle]:
        """The workers that serve, by index."""
        return self.roster.workers

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
            RolloutError: a worker died whose share the others cannot take over, or one missed its deadline;
                `replace_lost_workers` repairs the pool.
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
            self.tell(f"{len(groups)} prompts get their responses")
            made = self._generate_fixed(groups, parameters)
        else:
            made = self._generate_balanced(groups, parameters, lambda g: on_group(prompts[g[0].prompt_index], g))
        self.roster.batch_finished()
        rollouts = [rollout for group in made for rollout in group]
        rollouts.sort(key=lambda r: (r.prompt_index, r.sample_index))
        return RolloutBatch(tuple(prompts), tuple(rollouts), time.perf_counter() - started)

    def _generate_fixed(self, groups: Sequence[GroupRequest], parameters: SamplingParameters) -> list[list[Rollout]]:
        """Round-robin, everything at once: which engine draws a sample, and beside which, never changes."""
        count = len(self.workers)
        waves = -(-sum(len(group.seeds) for group in groups[::count]) // self._config.max_concurrent_sequences)
        calls: list[Any] = [
            worker.generate.remote(groups[place::count], parameters)
            for place, worker in enumerate(self.workers.values())
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
        worker is lost, the others take over its unfinished groups; if they cannot, the groups that are finished are
        kept for a repeated call under the same weights."""
        finished = self._finished
        waiting = [group for group in groups if group not in finished]
        waiting.sort(key=lambda g: len(g.prompt_ids))  # popped from the end: longest first
        calls: dict[Any, tuple[int, GroupRequest]] = {}
        admitted = time.monotonic()
        try:
            while waiting or calls:
                if not self._trained and time.monotonic() > admitted + _ADMIT_EVERY_S:
                    self.roster.admit()
                    admitted = time.monotonic()
                self._submit(waiting, calls, parameters)
                done = f"{len(groups) - len(waiting) - len(calls)} of {len(groups)} prompts have their responses"
                try:
                    self._take_finished(calls, on_group, meanwhile=partial(self.tell, done))
                except RolloutError as error:
                    if not self._goes_on_after(error):
                        raise
                    for call in [call for call, (index, _) in calls.items() if index not in self.workers]:
                        waiting.append(calls.pop(call)[1])
            self.tell(f"all {len(groups)} prompts have their responses")
            return [finished.pop(group) for group in groups]
        finally:
            for call in calls:  # empty unless an error propagates
                ray.cancel(call)

    def _submit(
        self,
        waiting: list[GroupRequest],
        calls: dict[Any, tuple[int, GroupRequest]],
        parameters: SamplingParameters,
    ) -> None:
        """Hand out waiting groups until every worker is full."""
        in_flight = dict.fromkeys(self.workers, 0)
        for index, group in calls.values():
            in_flight[index] += len(group.seeds)
        while waiting:
            index = min(in_flight, key=in_flight.__getitem__)
            size = len(waiting[-1].seeds)
            if in_flight[index] and in_flight[index] + size > self._config.max_concurrent_sequences:
                return
            group = waiting.pop()
            in_flight[index] += size
            calls[self.workers[index].generate.remote([group], parameters)] = (index, group)

    def _take_finished(
        self,
        calls: dict[Any, tuple[int, GroupRequest]],
        on_group: Callable[[list[Rollout]], None],
        *,
        meanwhile: Callable[[], None],
    ) -> None:
        """Wait until some groups are finished, and keep them. `meanwhile` is called every few seconds."""
        deadline = time.monotonic() + self._config.timeout_s
        ready: list[Any] = []
        while not ready:
            meanwhile()
            self.roster.raise_if_hung()
            left = max(deadline - time.monotonic(), 0.0)
            ready, _ = ray.wait(list(calls), timeout=min(left, _LOOK_S))
            if not ready and left <= _LOOK_S:
                slow = sorted({index for index, _ in calls.values()})
                raise RolloutError(
                    f"rollout workers {slow} finished none of {len(calls)} groups within rollout.timeout_s "
                    f"{self._config.timeout_s:g}; raise it, or lower rollout.max_response_tokens"
                )
        for call in ready:
            index, group = calls[call]
            [self._finished[group]] = CREW.get(call, index, "generate")
            del calls[call]
            on_group(self._finished[group])

    def _goes_on_after(self, error: RolloutError) -> bool:
        """Whether workers are lost and the others can draw their groups. All serve the same weights."""
        if not self.roster.can_spare():
            return False
        lost = self.roster.find_lost()
        if not lost or not self.roster.can_spare(len(lost)):
            return False
        self.roster.replace(lost, str(error))
        return True

    # Weights

    def load_weights(self, version: WeightVersion) -> None:
        """Serve the weights that the learner has just sent; see `rl.controller.RolloutPool`."""
        if version.policy_version != self._policy_version:
            self._finished = {}
        self._policy_version = version.policy_version
        calls = [worker.activate.remote(version.policy_version) for worker in self.workers.values()]
        self._memory_peak_gib = max(self._wait(calls, f"activate policy version {version.policy_version}"))

    def score_logprobs(self, pairs: Sequence[TokenPair]) -> dict[int, list[FloatArray]]:
        """{worker: [pair] -> [R]}; see `rl.controller.RolloutPool`."""
        calls = [worker.score_logprobs.remote(pairs) for worker in self.workers.values()]
        return dict(zip(self.workers, self._wait(calls, "score the probe"), strict=True))

    def metrics(self) -> dict[str, float]:
        """How many workers serve, how many were replaced so far in this run, and the most memory that one has held."""
        return {
            "rollout/workers_serving": float(len(self.workers)),
            "rollout/worker_restarts": float(self.roster.restarts),
            "rollout/memory_peak_gib": self._memory_peak_gib,
        }

    # Failures

    def replace_lost_workers(self, cause: str) -> int:
        """Find the workers that are lost, and begin to start others in their place; let those serve that have started
        since the last call. Returns how many were lost.

        Sync before generating: a new worker serves the initial weights. `cause` is told to the user.

        Raises:
            EnginesLostError: more than rollout.max_restarts losses in a row, or no worker is left and none could be
                started.
        """
        lost = self.roster.find_lost()
        if lost:
            self.roster.replace(lost, cause)
        try:
            self.roster.admit()
        except EnginesLostError as error:
            if not lost:
                raise
            raise EnginesLostError(f"{error}; they were lost because: {cause}") from error
        return len(lost)

    def surviving_losses(self, call: Callable[[], T]) -> T:
        """What `call` returns, repeating it after workers were lost. For engines that no learner sends weights to; see
        `rl.controller.Controller.surviving_losses` for others."""
        while True:
            try:
                return call()
            except EnginesLostError:
                raise
            except RolloutError as error:
                if not self.replace_lost_workers(str(error)):
                    raise

    def _wait(self, calls: Sequence[Any], what: str, *, waves: int = 1) -> list[Any]:
        setting = "rollout.timeout_s" if waves == 1 else f"{waves} x rollout.timeout_s"
        timeout_s = self._config.timeout_s * waves
        return CREW.wait(
            calls,
            what,
            timeout_s=timeout_s,
            setting=setting,
            members=list(self.workers),
            meanwhile=self.roster.raise_if_hung,
        )


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

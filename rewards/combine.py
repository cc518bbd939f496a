"""Several rewards as one: weights, gates, clipping and a breakdown, with every failure kept apart from a wrong answer.

Scoring is a stream of steps, so that whoever runs it can put a deadline on each. Left out: deadlines and processes
(`rewards.scoring_process`) and Ray (`rewards.workers`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.api import GroundTruthError, InfrastructureError, RewardInput, RewardOutput
from rewards.loading import describe_error, load_reward
from rewards.signatures import Reward, iterate_results
from rl.batch import Prompt, RewardStatus, Score
from rl.config import RewardFunctionConfig
from rl.errors import ConfigError, FledgeError, RewardError

SHARED_DONE = "shared done"  # yielded once by `stream`: what follows is work on one sample at a time
_END = object()
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class PartResults:
    """What the parts said about one sample, or why one of them could not."""

    outputs: Mapping[str, RewardOutput] = field(default_factory=dict)  # part label -> result; abstentions are absent
    status: RewardStatus = RewardStatus.OK
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Part:
    label: str
    reward: Reward
    weight: float = 1.0
    gate: bool = False


def _passed(judged: Sequence[tuple[_Part, float]]) -> bool:
    """Whether a response has all that the parts ask for: 1 from each reward, 0 from each penalty, and every gate open.
    A part without weight that is no gate is only observed."""
    return any(part.weight != 0.0 or part.gate for part, _ in judged) and all(
        (value >= 1.0 - _ROUNDING or part.weight <= 0.0)
        and (value <= _ROUNDING or part.weight >= 0.0)
        and (value > 0.0 or not part.gate)
        for part, value in judged
    )


class CombinedReward:
    """The weighted sum of reward functions.

    `reward = clip(sum of weight x value)`. If a gate's own value is not positive, min(sum, 0) takes the sum's place, so
    that a closed gate never cancels a penalty. `unshaped_reward` is the same over the task parts alone (those without
    `shaping`). A row that names its own reward gets it in place of the task parts: the entry of `functions` with that
    name if there is one, else the named reward with weight 1 and no options.

    Raises ConfigError and RewardError as `load_reward` does.
    """

    def __init__(self, functions: Sequence[RewardFunctionConfig], clip: tuple[float, float] | None = None) -> None:
        self._clip = clip
        self._parts = tuple(_load_parts(functions))
        self._names = [(function.name, part) for function, part in zip(functions, self._parts, strict=True)]
        self._row_parts: dict[str, _Part] = {}
        self._runner: asyncio.Runner | None = None

    def validate_ground_truth(
        self, ground_truth: Any, reward: str | None = None, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Raise GroundTruthError unless every part that checks ground truths can use this one.

        `reward` is the row's own reward, `extra` its other fields. Raises RewardError or ConfigError when the row's
        reward cannot be loaded.
        """
        parts = self._parts_for(reward)
        if not parts:
            raise ConfigError(
                "reward.functions is empty and the row names no reward of its own, so nothing would score its "
                "responses; list at least one reward"
            )
        for part in parts:
            if part.reward.validate_ground_truth is None:
                continue
            try:
                part.reward.validate_ground_truth(ground_truth, extra or {})
            except FledgeError:
                raise
            except Exception as error:
                raise RewardError(
                    f"validate_ground_truth(ground_truth, extra) of the reward {part.label} failed: "
                    f"{describe_error(error)}; for a ground truth that it rejects, it should raise GroundTruthError"
                ) from error

    def validate_prompt(self, prompt: Prompt) -> None:
        """`validate_ground_truth` for a loaded row; the parts see its data_source among its other fields."""
        fields = {**prompt.extra, "data_source": prompt.data_source}
        self.validate_ground_truth(prompt.ground_truth, prompt.reward, fields)

    def close(self) -> None:
        """End what the parts hold: processes, connections."""
        for part in (*self._parts, *self._row_parts.values()):
            if part.reward.close is not None:
                part.reward.close()
        if self._runner is not None:
            self._runner.close()

    def score(self, samples: Sequence[RewardInput], timeout_s: float = math.inf) -> tuple[Score, ...]:
        """Score in this process; only coroutines are held to the deadline."""
        results: dict[int, PartResults] = {}
        for item in self.stream(samples, timeout_s):
            if isinstance(item, tuple):
                results[item[0]] = item[1]
        return self.finish(samples, [results[i] for i in range(len(samples))])

    def stream(
        self, samples: Sequence[RewardInput], timeout_s: float
    ) -> Iterator[str | tuple[int, PartResults] | None]:
        """Score in steps, each of which should end within `timeout_s`.

        Yields None after a step of work that samples share (batch functions, then coroutines, as many at once as their
        rewards allow), SHARED_DONE after the last of them, then (index, results) after each sample in order.
        """
        parts_of = [self._try_parts_for(sample.reward) for sample in samples]
        outcomes: list[dict[str, Any]] = [{} for _ in samples]
        # By identity, because rewards that rows name from two files may share a label.
        for part in {id(p): p for parts in parts_of for p in parts.parts if p.reward.mode == "batch"}.values():
            indices = [i for i, parts in enumerate(parts_of) if any(part is p for p in parts.parts)]
            yield from self._batch_steps(part, [samples[i] for i in indices], [outcomes[i] for i in indices])
        waiting = [
            (part, sample, outcome)
            for sample, parts, outcome in zip(samples, parts_of, outcomes)
            for part in parts.parts
            if part.reward.mode == "sample" and part.reward.is_async
        ]
        at_once = min((p.reward.max_concurrent for p, _, _ in waiting if p.reward.max_concurrent), default=len(waiting))
        while waiting:  # a coroutine must not spend its deadline on waiting for its turn
            wave, waiting = waiting[:at_once], waiting[at_once:]
            self._run(_gather([self._sample_async(*one, timeout_s) for one in wave]))
            yield None
        yield SHARED_DONE
        for index, (sample, parts, outcome) in enumerate(zip(samples, parts_of, outcomes)):
            for part in parts.parts:
                if part.reward.mode == "sample" and not part.reward.is_async:
                    value, error = _attempt(part.reward.call, sample)
                    outcome[part.label] = value if error is None else error
            yield index, parts.failure or _results_of(parts.parts, outcome)

    def finish(
        self,
        samples: Sequence[RewardInput],
        results: Sequence[PartResults],
        *,
        compared: Callable[[], None] = lambda: None,
    ) -> tuple[Score, ...]:
        """Run the parts that compare a group's responses with each other, and combine. `compared` is called after each
        group."""
        results = list(results)
        groups: dict[int, dict[Any, list[int]]] = {}  # identity of a part -> group -> its samples that use the part
        comparing: dict[int, _Part] = {}
        for index, sample in enumerate(samples):
            if results[index].status is RewardStatus.OK:
                for part in self._parts_for(sample.reward):
                    if part.reward.mode == "group":
                        comparing[id(part)] = part
                        group = ("alone", index) if sample.group_id is None else sample.group_id
                        groups.setdefault(id(part), {}).setdefault(group, []).append(index)
        for part in sorted(comparing.values(), key=lambda p: p.reward.shaping):  # shaping may look at the task rewards
            for indices in groups[id(part)].values():
                scored = [index for index in indices if results[index].status is RewardStatus.OK]
                if scored:
                    self._score_group(part, scored, samples, results)
                    compared()
        return tuple(self._combine(sample, result) for sample, result in zip(samples, results, strict=True))

    def _score_group(
        self, part: _Part, indices: Sequence[int], samples: Sequence[RewardInput], results: list[PartResults]
    ) -> None:
        members = [samples[i] for i in indices]
        tasks = [self._weighted_sum(self._task_parts(samples[i].reward), results[i].outputs) for i in indices]
        values, error = _attempt(lambda: list(part.reward.call(members, tasks)))
        if error is None and len(values) != len(members):
            error = TypeError(f"score_group returned {len(values)} results for {len(members)} samples")
        for position, index in enumerate(indices):
            merged = _results_of((part,), {part.label: values[position] if error is None else error})
            results[index] = PartResults({**results[index].outputs, **merged.outputs}, merged.status, merged.error)

    def _combine(self, sample: RewardInput, results: PartResults) -> Score:
        if results.status is not RewardStatus.OK:
            return Score(math.nan, status=results.status, error=results.error)
        parts = self._parts_for(sample.reward)
        tasks = [part for part in parts if not part.reward.shaping]
        judges = tasks or parts  # shaping does not say whether the task was done
        if not any(part.label in results.outputs for part in judges):
            error = f"none of {', '.join(p.label for p in judges)} applies to this sample (each returned None)"
            return Score(math.nan, status=RewardStatus.PLUGIN_ERROR, error=error)
        breakdown: dict[str, float] = {}
        for part in parts:
            if (output := results.outputs.get(part.label)) is not None:
                breakdown[part.label] = output.reward
                breakdown |= {f"{part.label}/{key}": value for key, value in output.breakdown.items()}
        unshaped = self._clipped(self._weighted_sum(tasks, results.outputs)) if tasks else None
        judged = [(part, results.outputs[part.label]) for part in judges if part.label in results.outputs]
        return Score(
            self._clipped(self._weighted_sum(parts, results.outputs)),
            breakdown,
            unshaped_reward=unshaped,
            passed=_passed([(part, output.reward) for part, output in judged]),
            extracted=next((output.extracted for _, output in judged if output.extracted is not None), None),
        )

    def _weighted_sum(self, parts: Iterable[_Part], outputs: Mapping[str, RewardOutput]) -> float:
        present = [(part, outputs[part.label].reward) for part in parts if part.label in outputs]
        total = sum(part.weight * value for part, value in present)
        closed = any(part.gate and value <= 0 for part, value in present)
        return min(total, 0.0) if closed else total

    def _clipped(self, reward: float) -> float:
        return reward if self._clip is None else min(max(reward, self._clip[0]), self._clip[1])

    def _parts_for(self, row_reward: str | None) -> tuple[_Part, ...]:
        if row_reward is None:
            return self._parts
        tasks = self._task_parts(row_reward)
        return (*tasks, *(part for part in self._parts if part.reward.shaping and part not in tasks))

    def _task_parts(self, row_reward: str | None) -> tuple[_Part, ...]:
        if row_reward is None:
            return tuple(part for part in self._parts if not part.reward.shaping)
        if named := [part for name, part in self._names if name == row_reward]:
            if len(named) > 1:
                raise RewardError(
                    f"a row names the reward {row_reward!r}, and {len(named)} entries of reward.functions have that "
                    "name; keep one of them"
                )
            return (named[0],)
        if row_reward not in self._row_parts:
            label = _unique(row_reward.rpartition(":")[2], {part.label for part in self._parts})
            self._row_parts[row_reward] = _Part(label, load_reward(row_reward))
        return (self._row_parts[row_reward],)

    def _try_parts_for(self, row_reward: str | None) -> _RowParts:
        try:
            return _RowParts(self._parts_for(row_reward))
        except (RewardError, ValueError) as error:
            return _RowParts((), PartResults(status=RewardStatus.PLUGIN_ERROR, error=str(error)))

    def _batch_steps(
        self, part: _Part, samples: Sequence[RewardInput], outcomes: Sequence[dict[str, Any]]
    ) -> Iterator[None]:
        """One call for all; when it raises, one call for each that has no result, so that a bad sample fails alone."""
        results, error = _attempt(self._call_batch, part.reward, samples)
        count = 0
        while error is None and count <= len(samples):
            value, error = _attempt(next, results, _END)
            if error is not None or value is _END:
                break
            if count < len(samples):
                outcomes[count][part.label] = value
            count += 1
            yield
        if error is None and count != len(samples):
            error = TypeError(f"the function returned {count} results for {len(samples)} samples")
            for outcome in outcomes:
                outcome[part.label] = error
        elif error is not None and len(samples) == 1:
            outcomes[0][part.label] = error
        elif error is not None:
            for sample, outcome in zip(samples[count:], outcomes[count:]):
                yield from self._batch_steps(part, [sample], [outcome])

    def _call_batch(self, reward: Reward, samples: Sequence[RewardInput]) -> Iterator[Any]:
        results = reward.call(samples)
        return iterate_results(self._run(results) if reward.is_async else results)

    async def _sample_async(self, part: _Part, sample: RewardInput, outcome: dict[str, Any], timeout_s: float) -> None:
        limit = None if math.isinf(timeout_s) else timeout_s
        try:
            outcome[part.label] = await asyncio.wait_for(part.reward.call(sample), limit)
        except TimeoutError:
            outcome[part.label] = TimeoutError(f"no result within the deadline of {timeout_s:g} s")
        except Exception as error:  # noqa: BLE001  a plugin may raise anything; it becomes the sample's status
            outcome[part.label] = error

    def _run(self, coroutine: Any) -> Any:
        """In one event loop for the life of this object, since HTTP clients are bound to their loop."""
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(coroutine)


@dataclass(frozen=True, slots=True)
class _RowParts:
    parts: tuple[_Part, ...]
    failure: PartResults | None = None


async def _gather(coroutines: Sequence[Any]) -> None:
    await asyncio.gather(*coroutines)


def _load_parts(functions: Sequence[RewardFunctionConfig]) -> Iterator[_Part]:
    labels: set[str] = set()
    for function in functions:
        label = _unique(function.name.rpartition(":")[2], labels)
        labels.add(label)
        yield _Part(label, load_reward(function.name, function.options), function.weight, function.gate)


def _unique(label: str, taken: set[str]) -> str:
    candidates = (label if i == 1 else f"{label}#{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def _attempt(call: Any, *arguments: Any) -> tuple[Any, BaseException | None]:
    """(result, None), or (None, what it raised)."""
    try:
        return call(*arguments), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  plugins may raise anything: SystemExit, time-outs that are not Exceptions
        return None, error


def _results_of(parts: Iterable[_Part], outcomes: Mapping[str, Any]) -> PartResults:
    outputs: dict[str, RewardOutput] = {}
    for part in parts:
        if part.reward.mode == "group" and part.label not in outcomes:
            continue
        value = outcomes[part.label]
        try:
            if isinstance(value, BaseException):
                raise value
            if value is None and part.reward.may_abstain:
                continue
            outputs[part.label] = to_output(value)
        except BaseException as error:  # noqa: BLE001  any failure becomes a status
            return PartResults(status=status_of(error), error=f"{part.label}: {describe_error(error)}")
    return PartResults(outputs)


def status_of(error: BaseException) -> RewardStatus:
    """Which of the four kinds of failure an exception is."""
    if isinstance(error, GroundTruthError):
        return RewardStatus.GROUND_TRUTH_ERROR
    if isinstance(error, InfrastructureError):
        return RewardStatus.INFRASTRUCTURE_ERROR
    if isinstance(error, TimeoutError):
        return RewardStatus.TIMEOUT
    return RewardStatus.PLUGIN_ERROR


def to_output(value: Any) -> RewardOutput:
    """A result as a RewardOutput of finite floats.

    Accepted: a RewardOutput; any real number (True is 1.0; numpy and torch scalars); verl's dict with "score", whose
    other numbers become the breakdown, and whose "pred" is the extracted answer. Raises TypeError for anything else,
    None and strings included, and ValueError for NaN and infinities.
    """
    if isinstance(value, RewardOutput):
        parts = {key: _finite(part, key) for key, part in value.breakdown.items()}
        return RewardOutput(_finite(value.reward), parts, _as_text(value.extracted))
    if isinstance(value, Mapping):
        if "score" not in value:
            raise TypeError(f'the reward returned a dict without "score"; its keys are {", ".join(map(str, value))}')
        parts = {str(k): _finite(v, str(k)) for k, v in value.items() if k not in ("score", "pred") and _is_number(v)}
        return RewardOutput(_finite(value["score"]), parts, _as_text(value.get("pred")))
    return RewardOutput(_finite(value))


def _as_text(answer: Any) -> str | None:
    return None if answer is None else str(answer)


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(type(value), "__float__")


def _finite(value: Any, part: str = "") -> float:
    what = f"part {part!r} of the reward" if part else "the reward"
    if not _is_number(value):
        raise TypeError(f"{what} is {repr(value)[:80]} of type {type(value).__name__}; it must be a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}; it must be finite")
    return number

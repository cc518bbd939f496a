"""The reward `code`: does the response's program pass the row's tests.

Left out: running programs (`rewards.sandbox`) and judging one result (`rewards.sandbox.suite`). What it rewards, how it
can be hacked and what guards it: docs/rewards/code.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from rewards.api import GroundTruthError, RewardInput, RewardOutput, register_reward
from rewards.sandbox.api import CallTask, Language, Limits, Program, RunStatus, SandboxService
from rewards.sandbox.local import LocalSandbox
from rewards.sandbox.suite import Judgement, Test, judged_true, parse_tests
from rl.errors import ConfigError

# possessive (`*+`), since backtracking takes quadratic time on a flood of fence marks
_OPENING = re.compile(r"^ {0,3}(`{3,}+|~{3,}+)[ \t]*+([^\s`{]*+)[^`\n]*+$")
_CLOSING = re.compile(r"^ {0,3}(`{3,}+|~{3,}+)[ \t]*+$")
_TAGS: dict[Language, frozenset[str]] = {
    "python": frozenset({"python", "python3", "py"}),
    "cpp": frozenset({"cpp", "c++", "cc", "cxx"}),
}


@dataclass(frozen=True, slots=True)
class CodeOutcome:
    """What the tests said of one program."""

    passed: int
    total: int
    statuses: frozenset[RunStatus]  # of the tests that ran


def extract_program(text: str, language: Language) -> str | None:
    """The last complete fenced block tagged with the language, else the last one without a tag; None without either.

    A block without a tag often shows output, so a tagged one always goes first. A block that is not closed does not
    count: that is what a response cut off at its limit looks like.
    """
    tagged: str | None = None
    untagged: str | None = None
    lines = text.replace("\r\n", "\n").split("\n")
    index = 0
    while index < len(lines):
        opening = _OPENING.match(lines[index])
        index += 1
        if opening is None:
            continue
        end = next((i for i in range(index, len(lines)) if _closes(lines[i], opening[1])), None)
        if end is None:
            break
        tag, block = opening[2].lower(), "\n".join(lines[index:end]) + "\n"
        if tag in _TAGS[language]:
            tagged = block
        elif not tag:
            untagged = block
        index = end + 1
    return untagged if tagged is None else tagged


def _closes(line: str, mark: str) -> bool:
    closing = _CLOSING.match(line)
    return closing is not None and closing[1].startswith(mark)


@register_reward("code")
class CodeReward:
    """1 when the program passes all tests (`score: all`), or the share that it passes (`score: share`)."""

    def __init__(  # noqa: PLR0913 - the options of a config
        self,
        *,
        score: Literal["all", "share"] = "all",
        language: Language = "python",
        sandbox: str = "local",
        isolation: Literal["full", "none"] = "full",
        slots: int | None = None,
        packages: Sequence[str] = (),
        limits: Mapping[str, Any] | None = None,
        total_s: float = 15.0,
        float_tolerance: float = 1e-6,
    ) -> None:
        """
        Args:
            score: what the reward is, see the class.
            language: the programs'; a row's field `language` takes precedence.
            sandbox: "local", or the URL of a SandboxFusion server.
            isolation: "full", or "none" to run unisolated where the machine cannot isolate (local only).
            slots: how many programs run at once on this machine, over all workers; None: one per CPU.
            packages: installed packages that programs and tests may import besides the standard library (local only).
            limits: what one test may use, named as in `rewards.sandbox.api.Limits`, e.g. {cpu_s: 2}.
            total_s: seconds that one program's tests may take in all. The tests after that, and those after a test
                that ran out of its own time, count as failed. `reward.timeout_s` should exceed total_s + limits.wall_s.
            float_tolerance: how far a float may be from the expected one, relative or absolute; 0: not at all.

        Raises ConfigError for an impossible option, or if the machine cannot isolate programs.
        """
        for name, value, allowed in (
            ("score", score, ("all", "share")),
            ("language", language, get_args(Language)),
            ("isolation", isolation, ("full", "none")),
        ):
            if value not in allowed:
                raise ConfigError(f"the code reward's {name} is {value!r}; allowed are {', '.join(allowed)}")
        if total_s <= 0 or float_tolerance < 0 or (slots is not None and slots < 1):
            raise ConfigError(
                f"the code reward needs total_s > 0, float_tolerance >= 0 and slots >= 1, not {total_s}, "
                f"{float_tolerance} and {slots}"
            )
        self._score_all = score == "all"
        self._language: Language = language
        self._limits = _limits(limits or {})
        self._total_s = total_s
        self._tolerance = float_tolerance
        self._packages = (packages,) if isinstance(packages, str) else tuple(packages)
        self._service, concurrency = _service(sandbox, isolation, slots, self._packages)
        self._threads = ThreadPoolExecutor(2 * concurrency, thread_name_prefix="code-reward")
        self._known = _Outcomes()

    def score_batch(self, samples: Sequence[RewardInput]) -> Iterator[RewardOutput | Exception]:
        """One result or exception per sample, in order, each as soon as it and all before it are ready."""
        futures: list[Future[CodeOutcome | None]] = []
        for sample in samples:
            futures.append(self._threads.submit(self._outcome, sample))
        try:
            for future in futures:
                error = future.exception()
                if error is None:
                    yield self._output(future.result())
                elif isinstance(error, Exception):
                    yield error
                else:
                    raise error
        finally:
            for future in futures:
                future.cancel()

    def validate_ground_truth(self, ground_truth: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Raises GroundTruthError when the tests cannot be used."""
        parse_tests(ground_truth, self._language_of(extra or {}), self._packages)

    def close(self) -> None:
        """End the threads and every process."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._service.close()

    def _language_of(self, extra: Mapping[str, Any]) -> Language:
        language = str(extra.get("language") or self._language).lower()
        for name, tags in _TAGS.items():
            if language == name or language in tags:
                return name
        raise GroundTruthError(f"the row's language is {language!r}; known are {', '.join(_TAGS)}")

    def _outcome(self, sample: RewardInput) -> CodeOutcome | None:
        language = self._language_of(sample.extra)
        tests = parse_tests(sample.ground_truth, language, self._packages)
        source = extract_program(sample.answer, language)
        if source is None:
            return None
        program = Program(source, language)
        key = hashlib.sha256(
            json.dumps([source, language, sample.ground_truth], sort_keys=True, default=repr).encode()
        ).digest()
        return self._known.get(key, lambda: self._run(program, tests))

    def _run(self, program: Program, tests: tuple[Test, ...]) -> CodeOutcome:
        """Run the tests in order until time runs out; `score: all` also stops at the first failure."""
        passed, judgements, statuses = 0, list[Judgement](), set[RunStatus]()
        results = self._service.run(program, (test.task for test in tests), self._limits)
        started: float | None = None
        try:
            for test, result in zip(tests, results, strict=False):
                statuses.add(result.status)
                verdict = result.status is RunStatus.OK and test.judge(result, self._tolerance)
                if isinstance(verdict, tuple):
                    judgements.append(verdict)
                passed += verdict is True
                started = time.monotonic() - result.wall_s if started is None else started
                out_of_time = result.status is RunStatus.TIME_LIMIT or time.monotonic() - started > self._total_s
                if out_of_time or (verdict is False and self._score_all):
                    break
        finally:
            results.close()  # type: ignore[attr-defined]
        if not self._score_all or passed + len(judgements) == len(tests):
            passed += sum(self._judge(judgement) for judgement in judgements)
        return CodeOutcome(passed, len(tests), frozenset(statuses))

    def _judge(self, judgement: Judgement) -> bool:
        """Run a trusted expression on the program's plain values, in a box without the program."""
        source, arguments = judgement
        return judged_true(self._service.run(Program(source), [CallTask("judge", arguments)], self._limits))

    def _output(self, outcome: CodeOutcome | None) -> RewardOutput:
        if outcome is None:
            return RewardOutput(0.0, {"extracted": 0.0, "passed": 0.0})
        share = outcome.passed / outcome.total
        reward = float(outcome.passed == outcome.total) if self._score_all else share
        breakdown = {"extracted": 1.0, "passed": share}
        for status in RunStatus:
            if status is not RunStatus.OK:
                breakdown[status.value] = float(status in outcome.statuses)
        return RewardOutput(reward, breakdown)


class _Outcomes:
    """Outcomes by program and tests; each is computed once, even if several threads ask at the same time."""

    MOST = 20_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, CodeOutcome] = OrderedDict()
        self._running: dict[bytes, Future[CodeOutcome]] = {}

    def get(self, key: bytes, run: Any) -> CodeOutcome:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            running = self._running.get(key)
            if running is None:
                mine: Future[CodeOutcome] = Future()
                self._running[key] = mine
        if running is not None:
            return running.result()
        try:
            outcome = run()
            mine.set_result(outcome)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._running[key]
        if RunStatus.TIME_LIMIT not in outcome.statuses:  # a later run, on a less busy machine, may finish
            with self._lock:
                self._known[key] = outcome
                if len(self._known) > self.MOST:
                    self._known.popitem(last=False)
        return outcome


def _limits(options: Mapping[str, Any]) -> Limits:
    known = {field.name for field in fields(Limits)}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"the code reward has no limit {name!r}; known are {', '.join(sorted(known))}")
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"the code reward's limit {name} is {value!r}; expected a number above 0")
    return Limits(**{name: value if name.endswith("_s") else int(value) for name, value in options.items()})


def _service(
    sandbox: str, isolation: Literal["full", "none"], slots: int | None, packages: Sequence[str]
) -> tuple[SandboxService, int]:
    """The service, and how many programs to have in flight."""
    if sandbox == "local":
        local = LocalSandbox(isolation, slots, packages)
        return local, local.concurrency
    if not sandbox.startswith(("http://", "https://")):
        raise ConfigError(f"the code reward's sandbox is {sandbox!r}; expected local, or an http(s) URL")
    from rewards.sandbox.remote import RemoteSandbox

    return RemoteSandbox(sandbox), slots or 16

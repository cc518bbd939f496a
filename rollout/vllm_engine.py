"""`VLLMEngine`: one vLLM 0.31 `AsyncLLM` behind the `RolloutEngine` Protocol.

The front end lives in the calling process, the engine core in a child process that dies with it. Left out: Ray, and the
workers' half of weight sync (`rollout.weight_receiver`).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rl.batch import FinishReason, FloatArray
from rl.errors import RolloutError, WeightSyncError
from rollout.engine import GenerationRequest, GenerationResult, SamplingParameters
from rollout.engine_log import EngineLog
from rollout.process_tie import EngineFiles
from rollout.vllm_options import EngineSpec, engine_args, sampling_params, set_environment

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

_SHUTDOWN_GRACE_S = 10.0  # for an orderly end of the engine core, before it is killed


class VLLMEngine:
    """Implements `rollout.engine.RolloutEngine`. Call `start` once before anything else, and `shutdown` at the end."""

    def __init__(self, spec: EngineSpec, *, index: int = 0) -> None:
        """`index`: this engine's number among all, for messages."""
        self._spec = spec
        self._index = index
        self._policy_version = 0  # the checkpoint's
        self._llm: AsyncLLM | None = None
        self._log = EngineLog()
        self._files: EngineFiles | None = None
        self._request_numbers = itertools.count()
        self._admission = asyncio.Lock()  # held while the scheduler is being paused or resumed
        self._updating = False  # between start_weight_update and activate

    async def start(self) -> None:
        """Start the engine core and wait until it has loaded the model. Raises RolloutError."""
        self._files = set_environment(self._spec.model, self._spec.rollout)
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            # Constructing blocks for as long as the model takes to load.
            arguments = engine_args(self._spec)
            # LLM_CLASS selects vLLM's large batches on GPUs; with AsyncLLM's default they would have 2,048 tokens.
            self._llm = llm = await asyncio.to_thread(
                AsyncLLM.from_engine_args, arguments, usage_context=UsageContext.LLM_CLASS
            )
            meeting, *_ = await llm.collective_rpc("fledge_note_meeting")
            self._files.own_meeting(meeting)
        except Exception as error:
            self._files.cleanup()
            raise RolloutError(
                f"rollout engine {self._index} did not start on {self._spec.model.path}: {type(error).__name__}: "
                f"{error}{self._log.explain()}"
            ) from error

    # ---- generation ----

    async def generate(
        self, requests: Sequence[GenerationRequest], parameters: SamplingParameters
    ) -> list[GenerationResult]:
        """Generate all requests; results in request order. Raises RolloutError when the engine is dead."""
        sampling = [sampling_params(parameters, request.seed) for request in requests]
        async with self._submitted([r.prompt_ids for r in requests], sampling) as streams:
            return await asyncio.gather(
                *(self._collect(r, stream) for r, stream in zip(requests, streams, strict=True))
            )

    async def score_logprobs(self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[FloatArray]:
        """For each (prompt_ids, response_ids): [R] log-probabilities at temperature 1. Waits during an update.

        Prompt log-probabilities skip all sampling processors, whatever `logprobs_mode` says, so they are the log
        softmax of the raw logits.
        """
        from vllm import SamplingParams

        one_token = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        prompts = [tuple(prompt) + tuple(response) for prompt, response in sequences]
        limit = self._engine().model_config.max_model_len
        if (longest := max(map(len, prompts), default=0)) >= limit:
            raise RolloutError(
                f"cannot score {longest} tokens: the engine's limit is {limit - 1} (it must generate one more)"
            )
        async with self._submitted(prompts, [one_token.clone() for _ in prompts]) as streams:
            outputs = await asyncio.gather(*(self._last_output(stream) for stream in streams))
        return [
            _flat_logprobs(output.prompt_logprobs, len(tokens))[len(prompt) :]
            for output, tokens, (prompt, _) in zip(outputs, prompts, sequences, strict=True)
        ]

    @asynccontextmanager
    async def _submitted(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]
    ) -> AsyncIterator[list[RequestOutputCollector]]:
        """Hand requests to the scheduler; abort those that are unfinished when the block is left with an error."""
        llm = self._engine()
        streams: list[RequestOutputCollector] = []
        with self._engine_errors():
            try:
                await self._submit(prompts, sampling, streams)
                yield streams
            except BaseException:
                if not llm.errored:
                    await llm.abort([stream.request_id for stream in streams], internal=True)
                raise
            finally:
                for stream in streams:
                    stream.close()

    async def _submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        streams: list[RequestOutputCollector],
    ) -> None:
        if not self._spec.deterministic:
            await self._add_requests(prompts, sampling, streams)
            return
        # Requests that trickle in make the batches, and so the last bits of the result, depend on timing.
        async with self._admission:
            if self._updating:  # paused already, and resumed by `activate`
                await self._add_requests(prompts, sampling, streams)
                return
            await self._engine().pause_generation(mode="keep", clear_cache=False)
            try:
                await self._add_requests(prompts, sampling, streams)
            finally:
                await self._engine().resume_generation()

    async def _add_requests(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        streams: list[RequestOutputCollector],
    ) -> None:
        from vllm.inputs.engine import tokens_input

        llm = self._engine()
        for prompt, params in zip(prompts, sampling, strict=True):
            request_id = f"fledge-{next(self._request_numbers)}"
            streams.append(await llm.add_request(request_id, tokens_input(list(prompt)), params))

    async def _collect(self, request: GenerationRequest, stream: RequestOutputCollector) -> GenerationResult:
        """Wait for one request; read the policy version when its first token arrives, and again at its end."""
        output = await _next_output(stream)
        first_version = self._policy_version
        while not output.finished:
            output = await _next_output(stream)
        completion = output.outputs[0]
        token_ids = np.asarray(completion.token_ids, dtype=np.int32)
        logprobs = _flat_logprobs(completion.logprobs, len(token_ids))
        if not np.isfinite(logprobs).all():
            raise RolloutError(
                f"rollout engine {self._index} drew a token with log-probability {logprobs[~np.isfinite(logprobs)][0]} "
                f"under policy version {self._policy_version}: the model's logits are not finite. If the checkpoint is "
                "sound, resume from an earlier one with a lower learner.optimizer.lr"
            )
        return GenerationResult(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=_finish_reason(completion.finish_reason),
            policy_version=first_version,
            last_policy_version=self._policy_version,
            routed_experts=None if completion.routed_experts is None else np.asarray(completion.routed_experts),
        )

    @staticmethod
    async def _last_output(stream: RequestOutputCollector) -> RequestOutput:
        while not (output := await _next_output(stream)).finished:
            pass
        return output

    # ---- weight sync ----

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Connect to the sender."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        with self._engine_errors():
            await self._engine().init_weight_transfer_engine(WeightTransferInitRequest(dict(init_info)))

    async def start_weight_update(self) -> None:
        """Pause generation where it stands, empty the prefix cache, and get ready to receive."""
        with self._engine_errors():
            async with self._admission:
                self._updating = True
                await self._engine().pause_generation(mode="keep", clear_cache=True)
            await self._engine().collective_rpc("fledge_abandon_update")  # one that another engine's death cut short
            await self._engine().start_weight_update()

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Receive one bucket, chunk or broadcast; it is loaded when this returns."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        with self._engine_errors():
            await self._engine().update_weights(WeightTransferUpdateRequest(dict(update_info)))

    async def finish_weight_update(self, policy_version: int) -> dict[str, int]:
        """End the update; return the digest of every tensor as received. Generation stays paused until `activate`."""
        with self._engine_errors():
            await self._engine().finish_weight_update(str(policy_version))
            return merge_digests(await self._engine().collective_rpc("fledge_received_digests"))

    async def activate(self, policy_version: int) -> None:
        """Serve the weights that were just loaded under this policy version, and go on generating.

        Requests in flight continue: they keep their tokens, with the log-probabilities and the first policy version
        under which these were drawn; the keys and values of those tokens are computed again under the new weights, so
        no stale cache is ever attended to. Raises WeightSyncError if the engine holds another version.
        """
        with self._engine_errors():
            held = await self._engine().get_weight_version()
            if held != str(policy_version):  # an engine that was never sent weights holds "default"
                raise WeightSyncError(
                    f"rollout engine {self._index} was told to serve policy version {policy_version}, but the last "
                    f"update it finished is {held!r}"
                )
            async with self._admission:
                self._policy_version = policy_version
                self._updating = False
                await self._engine().resume_generation()

    # ---- life ----

    async def check_health(self, timeout_s: float) -> None:
        """Raise RolloutError unless every worker answers in time.

        The engine core answers between two steps, on the thread that runs them, so an engine whose process is stopped
        or whose step hangs makes no tokens and gives no answer.
        """
        with self._engine_errors():
            await self._engine().check_health()
            try:
                await asyncio.wait_for(self._engine().collective_rpc("check_health"), timeout_s)
            except TimeoutError as error:
                raise RolloutError(
                    f"rollout engine {self._index} has made no progress for {timeout_s:g} s: its process is "
                    "stopped, or a step hangs; if steps really take that long, raise rollout.hang_timeout_s"
                ) from error

    async def memory_peak_gib(self) -> float:
        """The peak of the worker that has held the most memory."""
        with self._engine_errors():
            return max(await self._engine().collective_rpc("fledge_memory_peak_gib"))

    async def shutdown(self) -> None:
        """End the engine and every process under it; a second call does nothing. If the engine is still starting, only
        its files are removed here; its processes end when this process does."""
        llm, self._llm = self._llm, None
        if llm is not None:
            processes = _engine_processes(llm)
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # it would log the end of the engine core as an error
            await asyncio.to_thread(llm.shutdown, _SHUTDOWN_GRACE_S)
            await asyncio.to_thread(_kill_remaining, processes)
        if self._files is not None:
            self._files.cleanup()

    def _engine(self) -> AsyncLLM:
        if self._llm is None:
            raise RolloutError(f"rollout engine {self._index} is not running")
        return self._llm

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        """Turn vLLM's errors into RolloutErrors that say how the engine's processes ended."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            yield
        except EngineDeadError as error:
            ended = self._llm.engine_core.resources.engine_manager.finished_procs() if self._llm is not None else {}
            codes = ", ".join(f"{name} with exit code {code}" for name, code in ended.items()) or "no exit code yet"
            raise RolloutError(f"rollout engine {self._index} is dead ({codes}){self._log.explain()}") from error
        except EngineGenerateError as error:
            raise RolloutError(f"rollout engine {self._index} failed to generate: {error.__cause__}") from error


async def _next_output(stream: RequestOutputCollector) -> RequestOutput:
    return stream.get_nowait() or await stream.get()


def _flat_logprobs(logprobs: Any, length: int) -> FloatArray:
    """[length] the log-probability of the token itself at each position; NaN where the engine gives none (the first
    prompt token)."""
    values = np.full(length, np.nan, dtype=np.float32)
    if logprobs is None:
        if length:
            raise RolloutError(f"the engine returned {length} tokens without log-probabilities")
        return values
    for position, (start, end) in enumerate(zip(logprobs.start_indices, logprobs.end_indices, strict=True)):
        if start < end:
            values[position] = logprobs.logprobs[start]
    return values


def _finish_reason(reason: str | None) -> FinishReason:
    """vLLM's reason in our terms; its "error" and "repetition", too, mean that the engine gave the response up."""
    return FinishReason(reason) if reason in ("stop", "length") else FinishReason.ABORT


def merge_digests(by_worker: Sequence[dict[str, int]]) -> dict[str, int]:
    """One dict for an engine of several workers; every worker gets every full tensor, so they must agree.

    A parameter on which they disagree gets the digest of the last worker that differs from worker 0, so that the
    sender's comparison names it.
    """
    merged = dict(by_worker[0])
    for digests in by_worker[1:]:
        for name in merged.keys() | digests.keys():
            if digests.get(name) != by_worker[0].get(name):
                merged[name] = digests.get(name, -1)
    return merged


def _engine_processes(llm: AsyncLLM) -> list[Any]:
    """psutil handles of the engine core and of everything under it."""
    import psutil

    found: list[Any] = []
    for process in llm.engine_core.resources.engine_manager.processes:
        try:
            core = psutil.Process(process.pid)
            found += [core, *core.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return found


def _kill_remaining(processes: Sequence[Any]) -> None:
    """SIGKILL what an orderly shutdown has left (a stopped process, say), and wait until it is gone."""
    import psutil

    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=_SHUTDOWN_GRACE_S)

"""The `RolloutEngine` Protocol, its requests and its sampling parameters. Left out: vLLM and Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rl.batch import FinishReason, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How responses are sampled. Temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # generate exactly max_tokens, for tests and benchmarks


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One response to be generated. The seed makes the sample reproducible, whichever engine draws it."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What the engine generated for one request."""

    token_ids: IntArray  # [R], the stop token included
    logprobs: FloatArray  # [R] of the processed distribution
    finish_reason: FinishReason
    policy_version: int  # when the first token was generated
    last_policy_version: int  # when the last token was generated
    routed_experts: npt.NDArray[np.integer] | None = None  # [P+R-1, layers, top_k] where the engine records it


class RolloutEngine(Protocol):
    """One inference engine with its weights. Methods are coroutines; each may run concurrently with `generate`."""

    async def start(self) -> None:
        """Load the model and get ready. Call it once, before anything else. Raises RolloutError."""
        ...

    async def generate(
        self, requests: Sequence[GenerationRequest], parameters: SamplingParameters
    ) -> list[GenerationResult]:
        """Generate all requests; results in request order. Raises RolloutError when the engine is dead."""
        ...

    async def score_logprobs(self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[FloatArray]:
        """For each (prompt_ids, response_ids): [R] log-probabilities of the response under the engine's weights, at
        temperature 1. The weight-sync probe compares them with the learner's."""
        ...

    # The receiving half of weight sync. The sender (learner rank 0) drives these four in vLLM's order.
    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None: ...
    async def start_weight_update(self) -> None: ...
    async def update_weights(self, update_info: Mapping[str, Any]) -> None: ...
    async def finish_weight_update(self, policy_version: int) -> dict[str, int]:
        """End the update; return the digest of every tensor as received (checkpoint name -> digest). Generation stays
        paused until `activate`."""
        ...

    async def activate(self, policy_version: int) -> None:
        """Serve the weights that were just loaded under this policy version, and go on generating."""
        ...

    async def check_health(self, timeout_s: float) -> None:
        """Raise RolloutError unless the engine answers within so many seconds, however busy it is."""
        ...

    async def memory_peak_gib(self) -> float:
        """The peak memory of the engine's largest worker: of GPU memory if it has a GPU, else of the process."""
        ...

    async def shutdown(self) -> None: ...

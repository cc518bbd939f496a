"""Score without Ray: the same rewards, deadlines and accounting, in child processes of this one.

For `fledge reward score` and notebooks. Left out: the cluster (`rewards.workers`).
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from rewards.api import RewardInput
from rewards.combine import CombinedReward, PartResults
from rewards.scoring_process import ScoringProcess, ScoringSpec
from rl.batch import Score
from rl.config import RewardConfig


class LocalScorer:
    """Up to `config.num_workers` scoring processes, started when first needed; a context manager that ends them.

    Raises ConfigError and RewardError from the constructor when a reward cannot be loaded.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._batch_size = config.batch_size
        self._num_workers = config.num_workers
        self._combined = CombinedReward(config.functions, config.clip)
        self._spec = ScoringSpec(config.functions, config.clip, config.timeout_s)
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix="local-scorer")
        self._idle: queue.SimpleQueue[ScoringProcess] = queue.SimpleQueue()

    def score(self, samples: Sequence[RewardInput]) -> tuple[Score, ...]:
        """One score per sample, in order. Samples that share a `group_id` are compared: pass them in one call."""
        size = min(self._batch_size, -(-len(samples) // self._num_workers) or 1)
        chunks = [samples[i : i + size] for i in range(0, len(samples), size)]
        results = [result for chunk in self._threads.map(self._score_chunk, chunks) for result in chunk]
        return self._combined.finish(samples, results)

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().close()
        self._combined.close()

    def __enter__(self) -> LocalScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _score_chunk(self, samples: Sequence[RewardInput]) -> list[PartResults]:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:  # there are never more processes than threads
            process = ScoringProcess(self._spec)
        try:
            return process.score(samples)
        finally:
            self._idle.put(process)

"""The shared-memory transport: buckets for engines on the same machine, at most two in memory at a time.

Left out: GPU transports (`rl.weight_sync.gpu_transports`) and the bucket format (`rl.weight_sync.buckets`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from torch import Tensor

from rl.errors import WeightSyncError
from rl.weight_sync.api import WeightSource, WeightSyncClient
from rl.weight_sync.background import finish_call, start_call
from rl.weight_sync.buckets import SharedBucket, plan_buckets
from rl.weight_sync.digest import digest

T = TypeVar("T")


@dataclass(slots=True)
class SendReport:
    """What rank 0 knows after a transfer; empty on the other ranks."""

    sent: dict[str, int] = field(default_factory=dict)  # checkpoint name -> digest
    received: dict[int, dict[str, int]] = field(default_factory=dict)  # engine -> the same
    num_bytes: int = 0


class ShmTransport:
    """Fills one bucket while the engines load the one before it."""

    def __init__(
        self, source: WeightSource, client: WeightSyncClient, rank: int, bucket_bytes: int, timeout_s: float
    ) -> None:
        self._source = source
        self._client = client
        self._rank = rank
        self._plans = plan_buckets(source.metadata(), bucket_bytes)
        self._timeout_s = timeout_s

    def connect(self) -> None:
        """Call every engine, so that a dead one is found before training starts; there is nothing to connect."""
        if self._rank == 0:
            self._call("connecting to the engines", lambda: self._client.init_weight_transfer_engine({}))

    def close(self) -> None:
        """Nothing is held between transfers."""

    def send(self, policy_version: int) -> SendReport:
        """Transfer everything. Gathering is a collective, so even when an engine fails, rank 0 walks the source to its
        end with the other ranks before it raises."""
        pairs = iter(self._source)
        try:
            return self._send(pairs, policy_version) if self._rank == 0 else SendReport()
        finally:
            for _ in pairs:
                pass

    def _send(self, pairs: Iterator[tuple[str, Tensor]], policy_version: int) -> SendReport:
        of_version = f"of policy version {policy_version}"
        report = SendReport()
        self._call(f"starting the update {of_version}", self._client.start_weight_update)
        with ExitStack() as buckets:  # closes whatever an error leaves open
            loading: tuple[SharedBucket, Future[None]] | None = None
            for plan in self._plans:
                bucket = SharedBucket(plan)
                buckets.callback(bucket.close)
                self._fill(bucket, pairs, report)
                if loading is not None:
                    self._await_loaded(*loading, of_version)
                update = partial(self._client.update_weights, bucket.update_info())
                loading = bucket, start_call(update, "weight-sync-bucket")
            if loading is not None:
                self._await_loaded(*loading, of_version)
        self._check_exhausted(pairs)
        report.received = self._call(
            f"finishing the update {of_version}", lambda: self._client.finish_weight_update(policy_version)
        )
        return report

    @staticmethod
    def _fill(bucket: SharedBucket, pairs: Iterator[tuple[str, Tensor]], report: SendReport) -> None:
        for _ in bucket.plan.parameters:
            name, tensor = next(pairs, (None, None))
            if name is None or tensor is None:
                raise WeightSyncError(f"the weight source ended before the last parameter of {bucket.plan.describe()}")
            bucket.put(name, tensor)
            report.sent[name] = digest(tensor)
            report.num_bytes += tensor.numel() * tensor.element_size()

    def _await_loaded(self, bucket: SharedBucket, loaded: Future[None], of_version: str) -> None:
        self._finish(loaded, f"loading {bucket.plan.describe()} {of_version}")
        bucket.close()

    @staticmethod
    def _check_exhausted(pairs: Iterator[tuple[str, Tensor]]) -> None:
        name, _ = next(pairs, (None, None))
        if name is not None:
            raise WeightSyncError(f"the weight source yielded {name}, which is beyond its metadata")

    def _call(self, what: str, call: Callable[[], T]) -> T:
        return self._finish(start_call(call, "weight-sync-call"), what)

    def _finish(self, call: Future[T], what: str) -> T:
        return finish_call(call, f"rank 0: {what}", self._timeout_s, self._client.late)

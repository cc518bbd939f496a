"""Buckets of tensors in shared memory, by which weights reach an engine without GPUs on the same machine.

A bucket is an anonymous memory file (`memfd_create`) that the receiver maps through `/proc/<pid>/fd/<fd>`. It has no
name in /dev/shm, so nothing is left behind however either side dies, and a container's /dev/shm limit does not apply.
Left out: which bucket is sent when (`rl.weight_sync.shm_transport`).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rl.errors import WeightSyncError
from rl.weight_sync.api import ParameterInfo

T = TypeVar("T")

_ALIGNMENT = 64  # bytes; a tensor of any dtype can be viewed at a multiple of this


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """Consecutive parameters that travel together."""

    index: int
    parameters: tuple[ParameterInfo, ...]
    offsets: tuple[int, ...]
    num_bytes: int

    def describe(self) -> str:
        """For error messages: which parameters a bucket holds."""
        first, last = self.parameters[0].name, self.parameters[-1].name
        return f"bucket {self.index} ({first}{'' if first == last else f' to {last}'})"


def consecutive(items: Iterable[T], size_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Group items in order, up to a total size of `most` per group; a larger item gets a group of its own."""
    group: list[T] = []
    total = 0
    for item in items:
        size = size_of(item)
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group


def plan_buckets(parameters: Iterable[ParameterInfo], bucket_bytes: int) -> list[BucketPlan]:
    """Split parameters, in order, into buckets of at most `bucket_bytes`; a larger parameter gets a bucket of its
    own."""

    def room(parameter: ParameterInfo) -> int:
        return -(-parameter.num_bytes // _ALIGNMENT) * _ALIGNMENT

    plans = []
    for index, members in enumerate(consecutive(parameters, room, bucket_bytes)):
        *offsets, size = accumulate(map(room, members), initial=0)
        plans.append(BucketPlan(index, tuple(members), tuple(offsets), size))
    return plans


class SharedBucket:
    """The sender's side of one bucket: fill it in plan order, announce it with `update_info`, then close it."""

    def __init__(self, plan: BucketPlan) -> None:
        self.plan = plan
        self._filled = 0
        self._fd = os.memfd_create(f"fledge-bucket-{plan.index}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, max(plan.num_bytes, 1))
            self._memory = mmap.mmap(self._fd, max(plan.num_bytes, 1))
        except OSError:
            os.close(self._fd)
            raise

    def put(self, name: str, tensor: Tensor) -> None:
        """Copy in the next tensor of the plan, from any device."""
        expected = self.plan.parameters[self._filled]
        if name != expected.name or tuple(tensor.shape) != expected.shape or tensor.dtype != expected.dtype:
            raise WeightSyncError(
                f"the weight source yielded {name} {tensor.dtype} {tuple(tensor.shape)} where its metadata says "
                f"{expected.name} {expected.dtype} {expected.shape}"
            )
        if expected.num_bytes:
            offset = self.plan.offsets[self._filled]
            target = torch.frombuffer(self._memory, dtype=torch.uint8, offset=offset, count=expected.num_bytes)
            target.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        self._filled += 1

    def update_info(self) -> dict[str, Any]:
        """What the receiver needs to map the bucket, as plain JSON-like values."""
        return {
            "pid": os.getpid(),
            "fd": self._fd,
            "index": self.plan.index,
            "num_bytes": self.plan.num_bytes,
            "names": [p.name for p in self.plan.parameters],
            "dtype_names": [dtype_name(p.dtype) for p in self.plan.parameters],
            "shapes": [list(p.shape) for p in self.plan.parameters],
            "offsets": list(self.plan.offsets),
        }

    def close(self) -> None:
        """Release the memory, which then lives only as long as a receiver maps it. A second call does nothing."""
        if not self._memory.closed:
            self._memory.close()
            os.close(self._fd)


def open_bucket(info: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The receiver's side: map the bucket that `SharedBucket.update_info` announced.

    The tensors are views of a private (copy-on-write) mapping that lives as long as they do; the sender may close its
    bucket as soon as this function has returned. Raises WeightSyncError if the sender is gone.
    """
    path = Path(f"/proc/{info['pid']}/fd/{info['fd']}")
    size = max(int(info["num_bytes"]), 1)
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise WeightSyncError(
            f"cannot map weight bucket {info['index']} ({size} bytes) of process {info['pid']}: {error}. The shm "
            "transport needs the learner's rank 0 and the engine on one machine, in one container, as one user"
        ) from error
    tensors = []
    for name, dtype, shape, offset in zip(
        info["names"], info["dtype_names"], info["shapes"], info["offsets"], strict=True
    ):
        parameter = ParameterInfo(name, getattr(torch, dtype), tuple(shape))
        if parameter.num_bytes == 0:
            tensors.append((name, torch.empty(parameter.shape, dtype=parameter.dtype)))
            continue
        data = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=parameter.num_bytes)
        tensors.append((name, data.view(parameter.dtype).view(parameter.shape)))
    return tensors


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

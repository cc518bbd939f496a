"""What the parts of weight sync share: the client Protocol, parameter descriptions, and the comparison of digests.

Left out: torch (except in annotations), vLLM and Ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rl.errors import ConfigError, WeightSyncError

if TYPE_CHECKING:
    import torch

Transport = Literal["shm", "nccl", "ipc"]

_MOST_NAMED = 8  # parameters that an error message names before it only counts the rest


def resolve_transport(transport: Literal["auto", "shm", "nccl", "ipc"], *, cuda: bool, colocate: bool) -> Transport:
    """The transport that `sync.transport` means here: shared memory without GPUs, CUDA IPC on shared GPUs, else NCCL.

    Raises:
        ConfigError: the requested transport cannot work here, which vLLM would report only after every model has
            loaded.
    """
    best: Transport = "shm" if not cuda else "ipc" if colocate else "nccl"
    if transport in ("auto", "shm", best):
        return best if transport == "auto" else transport
    needs = {
        "nccl": "separate GPUs for learners and engines (NCCL refuses two ranks on one GPU by default)",
        "ipc": "learners and engines on the same GPUs (ray.colocate)",
    }
    here = "no GPUs" if not cuda else "ray.colocate" if colocate else "GPUs that learners and engines do not share"
    raise ConfigError(f"sync.transport {transport} needs {needs[transport]}, but this run has {here}; set it to auto")


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One tensor on the wire, as a checkpoint names and shapes it. Field names are those of vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightSource(Protocol):
    """A re-iterable stream of full tensors, which vLLM's trainer engines accept as their own `WeightSource`.

    Every rank iterates it, in the same order, because gathering is a collective; a rank that does not send gets no
    items.
    """

    def metadata(self) -> list[ParameterInfo]: ...
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class WeightSyncClient(Protocol):
    """The control plane to all engines, called only by rank 0.

    Every method returns when every engine has answered, and raises WeightSyncError, naming the engine, when one fails
    or does not answer in time.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine gets its own part (`init_info_at`)."""
        ...

    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...
    def finish_weight_update(self, policy_version: int) -> dict[int, dict[str, int]]:
        """By engine: checkpoint name -> digest of the tensor as it arrived."""
        ...

    def late(self) -> str:
        """Which engines have not yet answered the running call, in words; empty if all have.

        Called from another thread, for the error of a wait that times out before the call does.
        """
        ...


def init_info_at(place: int, init_info: Mapping[str, Any]) -> dict[str, Any]:
    """What the engine at this place among those that receive needs to know to connect. `rank_offsets`, if given, holds
    each engine's first rank in the NCCL group, by place."""
    info = dict(init_info)
    if (offsets := info.pop("rank_offsets", None)) is not None:
        info["rank_offset"] = offsets[place]
    return info


def check_digests(policy_version: int, sent: Mapping[str, int], received: Mapping[int, Mapping[str, int]]) -> None:
    """Raise WeightSyncError, naming engine, version and parameters, unless every engine received exactly what was
    sent."""
    problems = []
    for index, digests in received.items():
        faults = (
            ("missing", [name for name in sent if name not in digests]),
            ("different", [name for name in sent if name in digests and digests[name] != sent[name]]),
            ("extra", [name for name in digests if name not in sent]),
        )
        text = "; ".join(f"{kind}: {name_some(names)}" for kind, names in faults if names)
        if text:
            problems.append(f"engine {index} ({text})")
    if problems:
        raise WeightSyncError(
            f"the weights of policy version {policy_version} arrived changed at {len(problems)} of {len(received)} "
            f"engines: {', '.join(problems)}. They must not be served; restart the engines and sync again"
        )


def name_some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"

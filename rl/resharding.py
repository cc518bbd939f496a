"""Learner checkpoints for another number of ranks than wrote them.

ZeRO-3 cuts every parameter into one equal part per rank, the last ones padded, and lays a rank's parts one after
another into sub-groups. Master weights and optimizer states are flat tensors of these. DeepSpeed 0.19 reads them back
only for the same ranks and sub-groups. Its universal checkpoints, the alternative, would first write all of it out
twice more (docs/decisions/0003-learner.md). Left out: what else a checkpoint holds (`rl.learner_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

# DeepSpeed's keys. A shard's optimizer state, and within it the optimizer's own, have the same one.
_OPTIMIZER, _MASTERS, _SHAPES, _RANKS = "optimizer_state_dict", "fp32_flat_groups", "param_shapes", "dp_world_size"
_FROZEN, _FROZEN_SHAPES = "frozen_param_fragments", "frozen_param_shapes"

Group = Sequence[tuple[str, int]]  # the parameters of a sub-group: name and number of elements
Groups = Sequence[Group]
FlatOf = Callable[[dict[str, Any], int], Tensor]


def load_resharded(engine: Any, directory: Path, tag: str, *, written_by: int) -> Any:
    """`engine.load_checkpoint(directory, tag)` for a checkpoint of `written_by` ranks; returns what that returns.

    Every rank reads, from the files of all, only what becomes its own.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    models = [
        _read(directory / tag, f"zero_pp_rank_{writer}_mp_rank_00_model_states.pt") for writer in range(written_by)
    ]
    model = {**models[0], _RANKS: ranks, _FROZEN: frozen_parts(models, rank=rank, ranks=ranks)}
    shards = [
        _read(directory / tag, f"*zero_pp_rank_{writer}_mp_rank_00_optim_states.pt")[_OPTIMIZER]
        for writer in range(written_by)
    ]
    optimizer, names = engine.optimizer, engine.param_names
    groups = [[(names[parameter], parameter.ds_numel) for parameter in group] for group in optimizer.fp16_groups]
    owners = [optimizer.sub_group_to_group_id[index] for index in range(len(groups))]
    shard = WrittenShards(shards, sizes(model[_SHAPES])).shard(groups, owners, rank=rank, ranks=ranks)
    with TemporaryDirectory() as own:
        path = Path(engine._get_ckpt_name(own, tag))
        path.parent.mkdir()
        torch.save(model, path)
        engine._get_all_zero_checkpoints = lambda *_: {rank: shard}
        try:
            return engine.load_checkpoint(own, tag=tag)
        finally:
            del engine._get_all_zero_checkpoints  # the class's own again


def _read(folder: Path, pattern: str) -> dict[str, Any]:
    """A file of DeepSpeed's, whose tensors are read from disk as they are used."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} files {pattern} in {folder}")
    contents: dict[str, Any] = torch.load(found[0], map_location="cpu", mmap=True, weights_only=False)
    return contents


def sizes(shapes: Sequence[dict[str, torch.Size]]) -> Groups:
    """DeepSpeed's record of the parameters in each sub-group, as sizes."""
    return [[(name, shape.numel()) for name, shape in group.items()] for group in shapes]


def frozen_parts(models: Sequence[dict[str, Any]], *, rank: int, ranks: int) -> dict[str, Tensor] | None:
    """This rank's parts of the parameters that are not trained, from the writers' model files; None if all are."""
    if not models[0].get(_FROZEN):
        return None
    return {
        name: take_part([model[_FROZEN][name] for model in models], shape.numel(), rank=rank, ranks=ranks)
        for name, shape in models[0][_FROZEN_SHAPES].items()
    }


def take_part(written: Sequence[Tensor], elements: int, *, rank: int, ranks: int) -> Tensor:
    """[part_size] This rank's part of a parameter with so many elements, from the parts ([size], padded) of all that
    wrote it."""
    held, size = written[0].numel(), part_size(elements, ranks)
    begin, end = min(rank * size, elements), min((rank + 1) * size, elements)
    pieces = [
        written[writer][max(begin - writer * held, 0) : min(end - writer * held, held)]
        for writer in range(begin // held, part_size(end, held))
    ]
    return torch.cat([*pieces, written[0].new_zeros(size - (end - begin))])


class _Place(NamedTuple):
    """Where the parts of a parameter are, in the file of every rank."""

    group: int
    offset: int
    size: int  # of a part, with its padding


def part_size(elements: int, ranks: int) -> int:
    """The elements of a parameter that each rank holds, with padding."""
    return -(-elements // ranks)


def places(groups: Groups, ranks: int) -> dict[str, _Place]:
    """Where a rank's parts are in its flat tensors, by the parameter's name."""
    found: dict[str, _Place] = {}
    for index, group in enumerate(groups):
        offset = 0
        for name, elements in group:
            size = part_size(elements, ranks)
            found[name] = _Place(index, offset, size)
            offset += size
    return found


class WrittenShards:
    """What some number of ranks have written, of which any part can be read without loading the rest.

    Args:
        shards: DeepSpeed's ZeRO state of every rank, by rank.
        groups: their sub-groups, the same for all ranks.
    """

    def __init__(self, shards: Sequence[dict[str, Any]], groups: Groups) -> None:
        self._shards = shards
        self._places = places(groups, len(shards))

    def shard(self, groups: Groups, owners: Sequence[int], *, rank: int, ranks: int) -> dict[str, Any]:
        """The state that this rank of `ranks` would have written.

        Args:
            groups: the sub-groups of the ranks that read.
            owners: [sub-group] -> the number of the optimizer's parameter group that it belongs to.
        """
        first = self._shards[0]
        optimizer = first[_OPTIMIZER]
        masters: list[Tensor] = []
        states: dict[int, dict[str, Any]] = {}
        for index, group in enumerate(groups):
            masters.append(self._flat(group, _masters_of, rank, ranks))
            old = self._places[group[0][0]].group
            if old in optimizer["state"]:  # else the checkpoint is older than the first step, or there is none to keep
                states[index] = self._optimizer_state(group, optimizer["state"][old], rank, ranks)
        numbered = [
            {**settings, "params": [index for index, owner in enumerate(owners) if owner == number]}
            for number, settings in enumerate(optimizer["param_groups"])
        ]
        divided = {_MASTERS: masters, _OPTIMIZER: {"state": states, "param_groups": numbered}}
        return {**first, "partition_count": ranks, **divided}

    def _optimizer_state(self, group: Group, sample: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
        """The optimizer's state of one sub-group; `sample` is that of some parameter in it, which has the same keys.
        What is no tensor of the parts, like the number of steps, is the same for all."""
        state: dict[str, Any] = {}
        for key, value in sample.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = self._flat(group, partial(_state_of, key), rank, ranks)
            else:
                state[key] = value.clone() if isinstance(value, Tensor) else value
        return state

    def _flat(self, group: Group, flat_of: FlatOf, rank: int, ranks: int) -> Tensor:
        """This rank's flat tensor of one sub-group; `flat_of` finds it in a shard, for a sub-group of the writers."""
        parts: list[Tensor] = []
        for name, elements in group:
            old, offset, size = self._places[name]
            written = [flat_of(shard, old)[offset : offset + size] for shard in self._shards]
            parts.append(take_part(written, elements, rank=rank, ranks=ranks))
        return torch.cat(parts)


def _masters_of(shard: dict[str, Any], group: int) -> Tensor:
    flat: Tensor = shard[_MASTERS][group]
    return flat


def _state_of(key: str, shard: dict[str, Any], group: int) -> Tensor:
    flat: Tensor = shard[_OPTIMIZER]["state"][group][key]
    return flat

"""Checkpoint tensors of known name, shape and dtype that are read only when a parameter takes their values.

transformers hands a checkpoint to a ZeRO-3 model as one dictionary on every rank, after conversion: experts are
stacked, MXFP4 is dequantised. Made of deferred tensors, that dictionary takes no memory: operations on them are
recorded, and computed parameter by parameter on the one rank that reads. Left out: the model (`rl.models`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

_BLOCKS, _SCALES = "_blocks", "_scales"  # the two tensors in which MXFP4 stores one


class Deferred:
    """Stands for a tensor in torch functions. Combined with a real tensor (`parameter.copy_(deferred)`), its values are
    computed; otherwise the result is another deferred tensor. Values are not cached."""

    def __init__(self, meta: Tensor, compute: Callable[[], Tensor]) -> None:
        """`meta` has the shape and dtype of what `compute` returns."""
        self._meta = meta
        self.compute = compute

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        attribute = getattr(self._meta, name)
        if not callable(attribute):
            return attribute
        method = getattr(Tensor, name)
        return lambda *args, **kwargs: _apply(method, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Any:
        return _apply(Tensor.__getitem__, (self, index), {})

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _apply(function, args, kwargs or {})


def _apply(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    def compute() -> Any:
        real_args, real_kwargs = tree_map_only(Deferred, lambda deferred: deferred.compute(), (args, kwargs))
        return function(*real_args, **real_kwargs)

    if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
        return compute()
    meta_args, meta_kwargs = tree_map_only(Deferred, lambda deferred: deferred._meta, (args, kwargs))
    result = function(*meta_args, **meta_kwargs)
    if isinstance(result, Tensor):
        return Deferred(result, compute)
    if isinstance(result, tuple) and all(isinstance(item, Tensor) for item in result):
        return tuple(Deferred(item, partial(lambda index: compute()[index], i)) for i, item in enumerate(result))
    return result  # a size, a number of dimensions


def read_deferred(path: str, revision: str | None) -> dict[str, Deferred]:
    """The tensors of a safetensors checkpoint, in a folder or on the hub; empty if it has no safetensors file.

    Only the header of each file is read until a value is computed.
    """
    return {name: tensor for file in _files(path, revision) for name, tensor in _read_file(file)}


def _files(path: str, revision: str | None) -> list[str]:
    options: dict[str, Any] = {"revision": revision}
    optional = options | {"_raise_exceptions_for_missing_entries": False}
    if (single := cached_file(path, SAFE_WEIGHTS_NAME, **optional)) is not None:
        return [single]
    if (index := cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **optional)) is not None:
        files, _ = get_checkpoint_shard_files(path, index, **options)
        return list(files)
    return []


def _read_file(path: str) -> Iterator[tuple[str, Deferred]]:
    file = safe_open(path, framework="pt")
    for name in file.keys():  # noqa: SIM118 - not a dictionary
        header = file.get_slice(name)
        meta = torch.empty(header.get_shape(), dtype=str_to_torch_dtype[header.get_dtype()], device="meta")
        yield name, Deferred(meta, partial(file.get_tensor, name))


def dequantize_mxfp4(tensors: dict[str, Deferred]) -> dict[str, Deferred]:
    """[E, N, K/32, 16] blocks of 32 four-bit numbers and their [E, N, K/32] scales -> [E, K, N] bfloat16, which
    represents the values exactly (OCP Microscaling Formats v1.0, section 5.3)."""
    result = dict(tensors)
    for name in tensors:
        if not name.endswith(_BLOCKS):
            continue
        whole = name.removesuffix(_BLOCKS)
        blocks, scales = result.pop(name), result.pop(whole + _SCALES)
        experts, outputs, groups, half = blocks.shape
        meta = torch.empty(experts, groups * half * 2, outputs, dtype=torch.bfloat16, device="meta")
        result[whole] = Deferred(meta, partial(_dequantized, blocks, scales))
    return result


def _dequantized(blocks: Deferred, scales: Deferred) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks.compute(), scales.compute())

"""Attention for sequences that share equal prompts, so that a group's prompt is computed once.

A micro-batch is one row: each distinct prompt, followed by the responses of all its sequences side by side. Everything
but attention works token by token and is unaffected. Attention gathers each whole sequence into tables of similar
length and runs plain causal attention over them; for a shared prompt, the result of one of its sequences is used.
Log-probabilities and gradients are those of the sequences alone, because a causal prompt never sees what follows it.
The attention over a prompt itself is not shared (unlike in "Prefix Grouper", arXiv 2506.05433), which would take masks.

Left out: which sequences go together (`rl.batching`) and the row's tensors (`rl.layouts`). Attention sinks are not
supported, so GPT-OSS cannot use this layout.

Shape legend: L tokens of the row, s sequences of a table, n positions of its longest one, H heads (K of keys and
values), D head size.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from rl.errors import LearnerError

ATTENTION = "fledge_shared_prefix"  # the name under which transformers knows `attention`
_SHORTEST = 0.8  # of a table's longest sequence; padding costs attention at most 1 / 0.8^2

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefixes:
    """The places of a row's sequences within the row."""

    tables: tuple[Tensor, ...]  # [s, n] int64 places in the row; 0, never read, after a sequence's end
    results: Tensor  # [L] int64: each token's place in the concatenated, flattened tables


def shared_prefixes(sequences: Sequence[Places], tensor: Callable[[npt.NDArray[Any]], Tensor]) -> SharedPrefixes:
    """Build the tables from the places of each sequence's tokens in the row, which sequences may share in any part.

    Args:
        sequences: [n] places of each sequence, in the order of its tokens.
        tensor: puts an array on the device.
    """
    results = np.zeros(max(int(places.max()) for places in sequences) + 1, dtype=np.int64)
    tables: list[Places] = []
    start = 0
    for members in _similar([len(places) for places in sequences]):
        table = np.zeros((len(members), len(sequences[members[0]])), dtype=np.int64)
        for row, index in zip(table, members, strict=True):
            places = sequences[index]
            row[: len(places)] = places
            results[places] = start + np.arange(len(places))
            start += len(row)
        tables.append(table)
    return SharedPrefixes(tuple(tensor(table) for table in tables), tensor(results))


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Indices grouped into tables of similar length, each longest first."""
    tables: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not tables or lengths[index] < _SHORTEST * lengths[tables[-1][0]]:
            tables.append([])
        tables[-1].append(index)
    return tables


def attention(  # noqa: PLR0913 - transformers' interface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    shared_prefixes: SharedPrefixes | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it.

    Args:
        module: the attention layer.
        query: [B, H, L, D].
        key: [B, K, L, D].
        value: [B, K, L, D].
        attention_mask: must be None; transformers creates none for an attention that it does not know. A model that
            passes one means more than causality by it (for example, which tokens it chose to look at).
        scaling: scale of the scores.
        dropout: dropout rate of the attention weights.
        sliding_window: a token sees itself and the window - 1 tokens before it.
        shared_prefixes: the places in a single row (B is 1); without it, rows are plain sequences, padded on the right.
        others: what else transformers passes.

    Returns:
        ([B, L, H, D], None).

    Raises:
        LearnerError: the model needs another form of attention (a mask, sinks, a soft cap, or later tokens).
    """
    _refuse_more_than_causality(module, attention_mask, others)
    groups = query.shape[1] // key.shape[1]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = _window_mask(query.shape[2], sliding_window, query.device)
        return nn.functional.scaled_dot_product_attention(
            query,
            repeat_kv(key, groups),
            repeat_kv(value, groups),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
        ).transpose(1, 2)

    if shared_prefixes is None:
        return attend(query, key, value).contiguous(), None
    results = [
        attend(_take(query, table), _take(key, table), _take(value, table)).flatten(0, 1).flatten(1)
        for table in shared_prefixes.tables
    ]
    chosen = torch.cat(results).index_select(0, shared_prefixes.results)  # [L, H D]
    return chosen.view(1, len(chosen), query.shape[1], value.shape[3]), None


def _refuse_more_than_causality(module: nn.Module, attention_mask: Tensor | None, others: Mapping[str, Any]) -> None:
    unknown = [name for name in ("s_aux", "softcap") if others.get(name) is not None]
    if attention_mask is not None:
        unknown.append("a mask of its own")
    if not getattr(module, "is_causal", True):
        unknown.append("a view of later tokens")
    if unknown:
        raise LearnerError(f"attention with {unknown[0]} cannot share prompts; set learner.layout to bucketed")


def windows_in_masks(config: Any, model_class: type) -> bool:
    """Whether layers that see a window or a chunk learn of it only from their masks, which sharing does not use.

    Args:
        config: the model's transformers configuration.
        model_class: the model's class; its module is searched for attention that passes sliding_window itself.
    """
    if getattr(config, "attention_chunk_size", None) is not None:
        return True
    if getattr(config, "sliding_window", None) is None:
        return False
    module = sys.modules[model_class.__module__]
    return re.search(r"\bsliding_window=(self|getattr)\b", inspect.getsource(module)) is None


def use_shared_prefixes(model: Any) -> None:
    """Let a model with sdpa attention take `shared_prefixes` among its inputs. Raises LearnerError if it cannot."""
    config = model.config
    refuse_unshareable(
        config.model_type, config._attn_implementation, windows_in_masks=windows_in_masks(config, type(model))
    )
    AttentionInterface.register(ATTENTION, attention)
    model.set_attn_implementation(ATTENTION)


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Inside the context, a model that shares prompts uses plain sdpa attention instead."""
    if model.config._attn_implementation != ATTENTION:
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION)


def refuse_unshareable(model_type: str, attention: str, *, windows_in_masks: bool = False) -> None:
    """Raise LearnerError if prompts cannot be shared; `windows_in_masks` is the result of the function of that name."""
    if windows_in_masks:
        raise LearnerError(
            f"prompts cannot be shared with the attention windows of {model_type}; set learner.layout to bucketed or "
            "packed"
        )
    if attention not in ("sdpa", ATTENTION):
        raise LearnerError(
            f"prompts can be shared only with sdpa attention, but {model_type} runs with {attention}; set "
            "learner.layout to bucketed or packed, or model.attention to sdpa where the model has it"
        )


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, length, length], True where a query may look; None if only causality limits it."""
    if window is None or length <= window:
        return None
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _take(values: Tensor, table: Tensor) -> Tensor:
    """[1, heads, L, D] at [s, n] -> [s, heads, n, D]."""
    tokens = values[0].transpose(0, 1)  # [L, heads, D]
    chosen = tokens.flatten(1).index_select(0, table.flatten())
    return chosen.view(*table.shape, *tokens.shape[1:]).transpose(1, 2)

"""Micro-batches as tensors: padded rows of similar length ("bucketed"), one row of packed sequences ("packed"), or one
row in which equal prompts are shared ("shared_prefix").

All are exact: a sequence gets the same log-probabilities as it does alone. Left out: which samples go together
(`rl.batching`) and the forward pass (`rl.learner`).

A model reads every token of a sequence except the last, from which nothing is predicted: a sequence of P prompt and R
response tokens takes n = P + R - 1 positions, and the last R of them predict the response.

Shape legend: S sequences, n positions of one of them, B x L the padded input, T response tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl.batch import TokenSequence
from rl.batching import Layout
from rl.errors import LearnerError
from rl.shared_prefix import Places, refuse_unshareable, shared_prefixes

FLASH_ATTENTIONS = ("flash_attention_2", "flash_attention_3")
# These models ignore position_ids in their attention mask, so packed sequences need explicit masks.
_NEEDS_EXPLICIT_MASKS = ("gpt_oss",)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Model inputs for S sequences, and the positions that predict their response tokens."""

    model_inputs: dict[str, Any]  # input_ids [B, L] and what else the layout needs
    positions: Tensor  # [T] int64 into flattened B x L: the hidden state that predicts each response token
    targets: Tensor  # [T] int64, the response tokens
    sequence_index: Tensor  # [T] int64, 0..S-1, non-decreasing
    lengths: tuple[int, ...]  # S x R
    real: Tensor  # [B * L] bool, False on padding
    routed_experts: Tensor | None = field(default=None)  # [B * L, layers, top_k] int64

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def split(self, values: Tensor) -> list[Tensor]:
        """[T] -> S x [R]."""
        return list(values.split(list(self.lengths)))


def resolve_layout(
    layout: Layout | Literal["auto"], *, attention: str, device: str, windows_in_masks: bool = False
) -> Layout:
    """The layout that `learner.layout` means.

    On a GPU, `auto` packs if attention has a variable-length kernel (without one, packing pays for the whole masked
    square); on a CPU it shares prompts with sdpa attention, unless `rl.shared_prefix.windows_in_masks` holds; otherwise
    it makes buckets.

    Any other value is returned as it is.
    """
    if layout == "auto":
        if device == "cuda":
            return "packed" if attention in FLASH_ATTENTIONS else "bucketed"
        return "shared_prefix" if attention == "sdpa" and not windows_in_masks else "bucketed"
    return layout


def refuse_inexact_layout(layout: str, *, config: Any, attention: str, windows_in_masks: bool = False) -> None:
    """Raise LearnerError if packed sequences would see each other (`rl.learner_checks` measures it), or if prompts
    cannot be shared (`rl.shared_prefix.refuse_unshareable`). `config` is the model's transformers configuration."""
    model_type, chunks = config.model_type, getattr(config, "attention_chunk_size", None) is not None
    if layout == "packed" and chunks:
        raise LearnerError(
            f"{model_type} attends in chunks, and in a packed row these would follow the row's positions, not each "
            "sequence's own; set learner.layout to bucketed"
        )
    if layout == "packed" and model_type in _NEEDS_EXPLICIT_MASKS and attention not in (*FLASH_ATTENTIONS, "eager"):
        raise LearnerError(
            f"{model_type} with {attention} attention cannot run packed sequences exactly; set learner.layout to "
            "bucketed, or model.attention to eager"
        )
    if layout == "shared_prefix":
        refuse_unshareable(model_type, attention, windows_in_masks=windows_in_masks)


def collate(
    sequences: Sequence[TokenSequence],
    layout: Layout,
    *,
    model_config: Any,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> MicroBatch:
    """Build the tensors of one micro-batch.

    Args:
        sequences: S >= 1, each with at least one prompt and one response token.
        layout: bucketed gives [S, max n], packed [1, sum n], and shared_prefix the same with equal prompts only once.
        model_config: the transformers configuration of the model.
        device: where the tensors go.
        dtype: the dtype of the model's activations, for additive attention masks where the model needs them.

    Raises:
        LearnerError: a sequence lacks a prompt or a response, or the packed layout would not be exact.
    """
    for index, sequence in enumerate(sequences):
        if not len(sequence.prompt_ids) or not len(sequence.response_ids):
            raise LearnerError(
                f"sequence {index} has {len(sequence.prompt_ids)} prompt and {len(sequence.response_ids)} response "
                "tokens; the learner needs at least one of each"
            )
    places, rows, width = _places(sequences, layout)
    input_ids = np.zeros(rows * width, dtype=np.int64)
    real = np.zeros(rows * width, dtype=bool)
    for place, sequence in zip(places, sequences, strict=True):
        input_ids[place] = np.concatenate([sequence.prompt_ids, sequence.response_ids])[:-1]
        real[place] = True
    responses = [len(s.response_ids) for s in sequences]

    def tensor(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    inputs: dict[str, Any] = {"input_ids": tensor(input_ids.reshape(rows, width)), "use_cache": False}
    if layout != "bucketed":
        inputs["position_ids"] = tensor(_position_ids(places, width))[None]
    if layout == "packed":
        inputs["attention_mask"] = _packed_mask([len(place) for place in places], model_config, device, dtype)
    elif layout == "shared_prefix":
        inputs["shared_prefixes"] = shared_prefixes(places, tensor)
    # Bucketed rows are padded on the right and need neither mask nor positions: attention is causal, so a real token
    # never sees the padding after it.
    return MicroBatch(
        model_inputs=inputs,
        positions=tensor(np.concatenate([place[-r:] for place, r in zip(places, responses, strict=True)])),
        targets=tensor(np.concatenate([s.response_ids for s in sequences]).astype(np.int64)),
        sequence_index=tensor(np.repeat(np.arange(len(sequences)), responses)),
        lengths=tuple(responses),
        real=tensor(real),
        routed_experts=_routed_experts(sequences, places, rows * width, tensor),
    )


def _places(sequences: Sequence[TokenSequence], layout: Layout) -> tuple[list[Places], int, int]:
    """(S x [n] places of each sequence's tokens in flattened B x L, B, L)."""
    lengths = [s.num_positions for s in sequences]
    if layout == "bucketed":
        width = max(lengths)
        return [row * width + np.arange(n) for row, n in enumerate(lengths)], len(lengths), width
    places: list[Places] = []
    prompts: dict[bytes, Places] = {}
    end = 0
    for sequence, length in zip(sequences, lengths, strict=True):
        key = sequence.prompt_key if layout == "shared_prefix" else b""  # read once: it copies recorded experts
        prompt = prompts.get(key) if key else None
        known = 0 if prompt is None else len(prompt)
        own = np.arange(end, end + length - known)
        end += len(own)
        places.append(own if prompt is None else np.concatenate([prompt, own]))
        prompts.setdefault(key, places[-1][: len(sequence.prompt_ids)])
    return places, 1, end


def _position_ids(places: Sequence[Places], width: int) -> Places:
    """[L]: each token's place in its sequence."""
    position_ids = np.zeros(width, dtype=np.int64)
    for place in places:
        position_ids[place] = np.arange(len(place))
    return position_ids


def _packed_mask(
    lengths: Sequence[int], model_config: Any, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor] | None:
    """None if positions that restart are enough: from them transformers builds block-diagonal attention (only without a
    mask and a cache). Explicit masks for models that ignore positions there."""
    attention = model_config._attn_implementation
    refuse_inexact_layout("packed", config=model_config, attention=attention)
    if model_config.model_type not in _NEEDS_EXPLICIT_MASKS or attention in FLASH_ATTENTIONS:
        return None
    sequence = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)
    return _explicit_masks(sequence, model_config, dtype)


def _explicit_masks(sequence: Tensor, model_config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """[L] sequence numbers -> additive masks [1, 1, L, L] by layer type: causal within a sequence and, in sliding
    layers, limited to the last `sliding_window` tokens."""
    index = torch.arange(len(sequence), device=sequence.device)
    distance = index[:, None] - index[None, :]
    full = (sequence[:, None] == sequence[None, :]) & (distance >= 0)
    allowed = {"full_attention": full, "sliding_attention": full & (distance < model_config.sliding_window)}
    blocked = torch.finfo(dtype).min
    return {
        name: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, blocked)[None, None]
        for name, mask in allowed.items()
    }


def _routed_experts(
    sequences: Sequence[TokenSequence],
    places: Sequence[Places],
    size: int,
    tensor: Callable[[npt.NDArray[Any]], Tensor],
) -> Tensor | None:
    """The recorded experts of every position, in the layout's order; padding gets the first top_k experts."""
    recorded = [s.routed_experts for s in sequences if s.routed_experts is not None]
    if not recorded:
        return None
    if len(recorded) != len(sequences):
        raise LearnerError(
            f"only {len(recorded)} of {len(sequences)} samples carry routed_experts; router replay needs all or none"
        )
    layers, top_k = recorded[0].shape[1:]
    experts = np.tile(np.arange(top_k, dtype=np.int64), (size, layers, 1))
    for place, sequence, routed in zip(places, sequences, recorded, strict=True):
        if routed.shape != (sequence.num_positions, layers, top_k):
            raise LearnerError(
                f"routed_experts has shape {routed.shape}; this sequence needs "
                f"{(sequence.num_positions, layers, top_k)} (prompt + response - 1, layers, experts per token)"
            )
        experts[place] = routed  # a prompt is shared only among equal records (`TokenSequence.prompt_key`)
    return tensor(experts)

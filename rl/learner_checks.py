"""Checks of a loaded model before training: its results do not depend on the layout, nor on training mode.

Short sequences, two of them with the same prompt, run alone through the plain model, and together through the layout
(and the policy's chunked head). That reveals attention across sequences or to padding, positions that do not restart,
and models that change the logits after their output head. The effect of rounding alone, which a deep bfloat16 model
amplifies from layer to layer, is measured alongside. Left out: the layouts themselves (`rl.layouts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.batch import IntArray, TokenSequence
from rl.batching import Layout
from rl.errors import LearnerError
from rl.layouts import MicroBatch, collate
from rl.logprobs import LogprobHead
from rl.models import has_experts
from rl.shared_prefix import own_attention

# Bounds on the mean |difference|, in nats, or between states of unit size. A leak between sequences moves
# log-probabilities by 0.1 to 4. Rounding moves those of small models by 1e-6 (float32) or 0.003 (bfloat16), and those
# of a deep bfloat16 model by up to 0.1 if another number of rows selects another kernel.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
_ROUNDINGS = 3.0  # raise the bound to this multiple of what another number of rows alone changes,
# but to at most these values, beyond which it is not rounding; with experts, rounding can also change the routing.
_MOST_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3}
_MOST_TOLERANCE_WITH_EXPERTS = {torch.float32: 1e-4, torch.bfloat16: 1.0}
_COPIES = 3  # of one sequence in a batch, in which each can see only itself or its equals

Forward = Callable[[MicroBatch], Tensor]  # -> [T] or [T, H]


def check_layout(engine: Any, head: LogprobHead, layout: Layout, *, device: torch.device, dtype: torch.dtype) -> None:
    """Raise LearnerError unless the policy's log-probabilities are exact in the layout and in training. A
    collective."""

    def chunked(micro: MicroBatch) -> Tensor:
        with head.query(micro.positions, micro.targets, temperature=1.0):
            logprobs: Tensor = engine(**micro.model_inputs).logits[0]
        return logprobs

    def plain(micro: MicroBatch) -> Tensor:
        logits = engine(**micro.model_inputs).logits.flatten(0, 1)[micro.positions].float()
        return logits.log_softmax(-1).gather(-1, micro.targets[:, None]).squeeze(-1)

    _compare(engine, layout, chunked, plain, device=device, dtype=dtype)


def check_value_layout(engine: Any, layout: Layout, *, device: torch.device, dtype: torch.dtype) -> None:
    """Raise LearnerError unless the states that the critic's head reads are exact in the layout and in training.

    A collective. Values cannot be compared instead: a fresh head makes all of them 0.
    """

    def states(micro: MicroBatch) -> Tensor:
        hidden = engine(**micro.model_inputs, output_hidden_states=True).hidden_states[-1]
        chosen = hidden.flatten(0, 1)[micro.positions].float()
        return chosen / chosen.square().mean(-1, keepdim=True).sqrt()

    _compare(engine, layout, states, states, device=device, dtype=dtype)


@torch.no_grad()
def _compare(
    engine: Any, layout: Layout, found: Forward, expected: Forward, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Compare `found` of all sequences in the layout, and `expected` in training mode, with `expected` of each alone.

    Every rank runs the same tokens. Lengths exceed a short sliding window, and differ so that buckets are padded.
    """
    model = engine.module
    generator = np.random.default_rng(0)
    vocabulary = min(model.config.vocab_size, 4096)

    def tokens(count: int) -> IntArray:
        return generator.integers(0, vocabulary, count).astype(np.int32)

    sequences = [TokenSequence(tokens(prompt), tokens(response)) for prompt, response in ((5, 19), (3, 12))]
    sequences.append(TokenSequence(sequences[0].prompt_ids, tokens(23)))

    def batch(chosen: list[TokenSequence], kind: Layout) -> MicroBatch:
        return collate(chosen, kind, model_config=model.config, device=device, dtype=dtype)

    def worst(some: list[Tensor], others: list[Tensor]) -> float:
        return float(torch.stack([(a - b).abs().mean() for a, b in zip(some, others, strict=True)]).max())

    def first(micro: MicroBatch) -> Tensor:
        return micro.split(expected(micro))[0]

    engine.eval()
    together = batch(sequences, layout)
    with own_attention(model):
        alone = [first(batch([sequence], "bucketed")) for sequence in sequences]
        rounding = worst(alone, [first(batch([sequence] * _COPIES, "bucketed")) for sequence in sequences])
    most = (_MOST_TOLERANCE_WITH_EXPERTS if has_experts(model.config) else _MOST_TOLERANCE)[dtype]
    allowed = min(max(_TOLERANCE[dtype], _ROUNDINGS * rounding), most)
    difference = worst(together.split(found(together)), alone)
    if not difference <= allowed:
        raise LearnerError(
            f"the {layout} layout is not exact for {type(model).__name__} with {model.config._attn_implementation} "
            "attention: what it computes for a token differs from what it computes for the same sequence alone by "
            f"{difference:.2e} on average (allowed {allowed:.0e}). Set learner.layout to bucketed, or change "
            "model.attention; if the layout is already bucketed, the model is not supported"
        )
    engine.train()
    noise = worst([first(batch([sequence], "bucketed")) for sequence in sequences], alone)
    engine.eval()
    if not noise <= allowed:
        raise LearnerError(
            f"{type(model).__name__} computes something else in training mode, {noise:.2e} off on average (allowed "
            f"{allowed:.0e}): it adds noise, for example to its router's choice, so an update would not see the "
            "policy that generated the rollouts. Set that noise to zero in its config.json; a model that always adds "
            "it is not supported"
        )

"""Log-probabilities and entropies from a model's output head for chosen tokens, without the full [T, V] logits.

Left out: the model's forward pass (`rl.learner`) and which positions are chosen (`rl.layouts`).

Shape legend: T chosen positions, C tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rl.cpu_linear import linear, weight_gradient
from rl.errors import LearnerError

# Rows of the head's gradient to update at a time, so that a second [V, H] tensor never exists.
_VOCABULARY_BLOCK = 16384


class _Options(NamedTuple):
    """See `token_logprobs`."""

    temperature: float
    chunk_tokens: int
    entropy_grad: bool
    float32: bool


class _ChunkedLogprobs(torch.autograd.Function):
    """log p(target) and entropy per token. It saves only the log-sum-exp and the entropy, and recomputes the logits.

    With z the logits over temperature and p = softmax(z): d log p_t / d z_j = [j = t] - p_j, and for the entropy
    S = logsumexp(z) - sum_j p_j z_j, d S / d z_j = -p_j (log p_j + S).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        logprobs = torch.empty(count, dtype=_accumulation_dtype(hidden), device=hidden.device)
        entropy = torch.empty_like(logprobs)
        lse = torch.empty_like(logprobs)
        for start in range(0, count, options.chunk_tokens):
            rows = slice(start, start + options.chunk_tokens)
            logits = _logits(hidden[rows], weight, bias, options)
            lse[rows] = torch.logsumexp(logits, dim=-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - lse[rows]
            probs = torch.sub(logits, lse[rows, None]).exp_()
            entropy[rows] = lse[rows] - torch.linalg.vecdot(probs, logits)
        # `weight` itself is saved, not a view of it: ZeRO-3 replaces its storage between forward and backward.
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.options = options
        if not options.entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        accumulate = {"dtype": _accumulation_dtype(hidden), "device": weight.device}
        grad_weight = torch.zeros(weight.shape, **accumulate) if needs_weight else None
        grad_bias = torch.zeros(weight.shape[0], **accumulate) if needs_bias else None
        for start in range(0, hidden.shape[0], options.chunk_tokens):
            rows = slice(start, start + options.chunk_tokens)
            logits = _logits(hidden[rows], weight, bias, options)
            grad_logits = logits.sub_(lse[rows, None])  # log p, turned into the gradient in place
            grad_logprobs = grads[0][rows, None]
            if options.entropy_grad:
                probs = torch.exp(grad_logits)
                factor = grad_logits.add_(entropy[rows, None]).mul_(grads[1][rows, None]).add_(grad_logprobs)
                grad_logits = probs.mul_(factor).neg_()
            else:
                grad_logits = grad_logits.exp_().mul_(-grad_logprobs)
            grad_logits.scatter_add_(1, targets[rows, None], grad_logprobs)
            grad_logits /= options.temperature
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = linear(grad_logits, weight.t())
            if grad_weight is not None:
                for row in range(0, weight.shape[0], _VOCABULARY_BLOCK):
                    block = slice(row, row + _VOCABULARY_BLOCK)
                    grad_weight[block] += weight_gradient(grad_logits[:, block], hidden[rows])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            *(None,) * 2,
        )


def _accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
    """[C, H] -> [C, V]: computed in the model's dtype or in float32, as in the sampler; returned in at least
    float32."""
    if options.float32 and hidden.is_cuda:  # a bfloat16 product with float32 output needs no float32 weight
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        logits = logits if bias is None else logits.add_(bias)
    elif options.float32:
        logits = linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    else:
        logits = linear(hidden, weight, bias).to(_accumulation_dtype(hidden))
    return logits.div_(options.temperature) if options.temperature != 1.0 else logits


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
    entropy_grad: bool = False,
    float32: bool = False,
) -> tuple[Tensor, Tensor]:
    """The log-probability of each target and the entropy of each distribution.

    Args:
        hidden: [T, H], the last hidden states at the positions that predict the targets.
        weight: [V, H], the output head's.
        bias: [V], the output head's, or None.
        targets: [T] int64.
        temperature: divides the logits, as in the sampler.
        chunk_tokens: C; peak memory is that of [C, V] for any T.
        entropy_grad: let gradients flow through the entropy.
        float32: do not round the logits to the model's dtype. The gradient's products stay in the model's dtype.

    Returns:
        (logprobs [T], entropy [T]), float32 (float64 for a float64 model).
    """
    options = _Options(temperature, chunk_tokens, entropy_grad, float32)
    logprobs, entropy = _ChunkedLogprobs.apply(hidden, weight, bias, targets, options)
    return logprobs, entropy


@dataclass(frozen=True, slots=True)
class _Query:
    positions: Tensor  # [T] into the flattened batch x length
    targets: Tensor  # [T]
    temperature: float
    entropy_grad: bool


class LogprobHead:
    """Makes a causal language model's output head return log-probabilities and entropies instead of logits.

    It replaces the head module's `forward`, so that one call of that module covers all chunks: under ZeRO-3 the head is
    then gathered only once for the forward pass and once for the backward pass. Outside `query` the head works as
    before.
    """

    def __init__(self, model: nn.Module, chunk_tokens: int, *, float32: bool = False) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            raise LearnerError(
                f"{type(model).__name__} has the output head {type(head).__name__}; chunked log-probabilities need a "
                "torch.nn.Linear"
            )
        self._head = head
        self._chunk_tokens = chunk_tokens
        self._float32 = float32
        self._query: _Query | None = None
        self._plain_forward = head.forward
        head.forward = self._forward  # type: ignore[method-assign,assignment]

    @contextmanager
    def query(
        self, positions: Tensor, targets: Tensor, *, temperature: float, entropy_grad: bool = False
    ) -> Iterator[None]:
        """Inside the context, the model's `logits` are [2, T]: the log-probabilities of `targets`, and the entropies.

        Args:
            positions: [T] int64 into flattened batch x length: the hidden states that predict the targets.
            targets: [T] int64 token ids.
            temperature: as in `token_logprobs`.
            entropy_grad: as in `token_logprobs`.
        """
        self._query = _Query(positions, targets, temperature, entropy_grad)
        try:
            yield
        finally:
            self._query = None

    def _forward(self, hidden: Tensor) -> Tensor:
        query = self._query
        if query is None:
            return self._plain_forward(hidden)
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, query.positions)
        pair = token_logprobs(
            chosen,
            self._head.weight,
            self._head.bias,
            query.targets,
            temperature=query.temperature,
            chunk_tokens=self._chunk_tokens,
            entropy_grad=query.entropy_grad,
            float32=self._float32,
        )
        return torch.stack(pair)

"""Mixture-of-experts routers in training: replay recorded experts, measure load and entropy, freeze weights.

Replay and measurement are forward hooks on the router modules, so the models stay transformers' own. Left out: expert
parallelism, and recording experts in the sampler (the rollout engine does that).

Shape legend: N tokens of a micro-batch (padding included), E experts, K experts a token, D layers with a router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rl.errors import LearnerError


def _qwen3_moe_scores(router: nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
    """Softmax over all experts, restricted to the chosen ones, and renormalised if the model does so."""
    scores = torch.softmax(logits, dim=-1, dtype=torch.float).gather(-1, experts)
    if router.norm_topk_prob:
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return scores.to(logits.dtype)


def _gpt_oss_scores(router: nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
    """Softmax over the chosen experts' logits."""
    del router
    chosen = logits.gather(-1, experts)
    return torch.softmax(chosen, dim=1, dtype=chosen.dtype)


ROUTED_MODELS = ("qwen3_moe", "gpt_oss")  # the model types with these routers

# Router class -> how it weighs chosen experts. A router returns (logits [N, E], scores [N, K], experts [N, K]).
_SCORES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "Qwen3MoeTopKRouter": _qwen3_moe_scores,
    "GptOssTopKRouter": _gpt_oss_scores,
}


@dataclass(slots=True)
class _Pass:
    """What one forward pass wants from the routers, and what it saw."""

    real: Tensor  # [N] bool, False on padding
    experts: Tensor | None  # [N, D, K] to use instead of the routers' own choice
    measure: bool
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> (logits, experts)


class Routers:
    """The routers of one model, in layer order.

    Metrics cover real tokens only and add up over micro-batches (`take_sums`), so they do not depend on the split.
    """

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        self._routers = [m for m in model.modules() if type(m).__name__ in _SCORES]
        self._device = torch.device(device)
        self._pass: _Pass | None = None
        self._load: Tensor  # [D, E] float64, tokens sent to each expert
        self._entropy: Tensor  # [D] float64, sum over tokens
        self._tokens: Tensor  # [] int64
        self._reset()
        for layer, router in enumerate(self._routers):
            router.register_forward_hook(self._hook(layer))

    def __len__(self) -> int:
        return len(self._routers)

    def freeze(self) -> None:
        """Exclude the routers' weights from training. Call before the optimizer is built."""
        for router in self._routers:
            router.requires_grad_(False)

    @contextmanager
    def forward_pass(self, real: Tensor, *, experts: Tensor | None = None, measure: bool = False) -> Iterator[None]:
        """Inside the context, routers use `experts` ([N, D, K] int64) if given, and are measured if `measure` is set.

        With activation checkpointing the backward pass must be inside too, because the recomputation must use the same
        experts; nothing is then measured twice.
        """
        if experts is not None and experts.shape[1] != len(self._routers):
            raise LearnerError(
                f"routed_experts has {experts.shape[1]} layers but the model has {len(self._routers)} known routers; "
                "set learner.moe.router_replay to false, or record all layers"
            )
        self._pass = _Pass(real, experts, measure)
        try:
            yield
        finally:
            self._pass = None

    def aux_loss(self) -> Tensor:
        """Load-balancing loss of the preceding forward pass (call it inside `forward_pass`), averaged over layers.

        E * sum_e f_e P_e, with f_e the share of tokens sent to expert e (these shares sum to K) and P_e the mean router
        probability (Switch Transformer, arXiv 2101.03961, eq. 4-6). It belongs to this micro-batch: the product of
        means does not add up over micro-batches.
        """
        if self._pass is None or not self._pass.seen:
            raise LearnerError("aux_loss must follow a forward pass through the routers, within forward_pass")
        losses = []
        for logits, experts in self._pass.seen.values():
            probs, load = _probs_and_load(logits, experts, self._pass.real)
            tokens = self._pass.real.sum()
            losses.append(logits.shape[-1] * (load / tokens * probs.sum(0) / tokens).sum())
        return torch.stack(losses).mean()

    def take_sums(self) -> tuple[Tensor, Tensor, int]:
        """(load [D, E], entropy sums [D], tokens) since the last call."""
        sums = (self._load, self._entropy, int(self._tokens))
        self._reset()
        return sums

    def _reset(self) -> None:
        experts = max((int(router.num_experts) for router in self._routers), default=0)  # type: ignore[arg-type]
        self._load = torch.zeros(len(self._routers), experts, dtype=torch.float64, device=self._device)
        self._entropy = torch.zeros(len(self._routers), dtype=torch.float64, device=self._device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=self._device)

    def _hook(self, layer: int) -> Callable[..., Any]:
        def hook(router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            current = self._pass
            if current is None:
                return None
            logits, scores, experts = output
            if current.experts is not None:
                experts = current.experts[:, layer]
                scores = _SCORES[type(router).__name__](router, logits, experts)
            # A second call is the recomputation of checkpointed activations. It must save the same tensors for the
            # backward pass as the first, so nothing here may save any.
            if layer not in current.seen:
                current.seen[layer] = (logits, experts)
                if current.measure:
                    self._measure(layer, logits.detach(), experts, current.real)
            return logits, scores, experts

        return hook

    @torch.no_grad()
    def _measure(self, layer: int, logits: Tensor, experts: Tensor, real: Tensor) -> None:
        probs, load = _probs_and_load(logits, experts, real)
        self._load[layer] += load
        self._entropy[layer] += torch.special.entr(probs).sum()
        if layer == 0:
            self._tokens += real.sum()


def _probs_and_load(logits: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """(router probabilities, 0 on padding [N, E]; real tokens sent to each expert [E]), float32.

    Neither makes the host wait for the GPU, as selecting the real tokens or `bincount` would in every layer.
    """
    weights = real.to(torch.float)
    probs = torch.softmax(logits, dim=-1, dtype=torch.float) * weights[:, None]
    load = weights.new_zeros(logits.shape[-1])
    return probs, load.index_add(0, experts.flatten(), weights.repeat_interleave(experts.shape[-1]))


def router_metrics(load: Tensor, entropy: Tensor, tokens: int) -> dict[str, float]:
    """Metrics from sums over all micro-batches and ranks.

    load [D, E] and entropy [D] are as in `Routers.take_sums`. `router_load_max_over_mean` is the busiest expert's load
    over the mean load, averaged over layers (1 is perfect balance); `router_entropy` is in nats, averaged over tokens
    and layers.
    """
    ratio = load.max(dim=1).values / load.mean(dim=1).clamp_min(1e-12)
    return {
        "learner/router_load_max_over_mean": float(ratio.mean()),
        "learner/router_entropy": float(entropy.mean()) / max(tokens, 1),
    }

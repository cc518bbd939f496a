"""Linear layers in float32 on CPUs with AVX-512, multiplied by oneDNN.

torch multiplies float32 with MKL, which on an AMD EPYC with AVX-512 is about half as fast as oneDNN; with AVX2 alone
neither is ahead (`benchmarks/cpu_linear.py`). torch has no public name for oneDNN's product of plain tensors; the
operator used here is the one that torch.compile lowers torch.nn.Linear to.

Left out: other types and devices, which torch multiplies, and weights that are not in a torch.nn.Linear (experts).

Shape legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[N, I], [O, I], [O] or None -> [N, O], as torch.nn.functional.linear; outside autograd."""
    if inputs.dtype != torch.float32 or inputs.device.type != "cpu" or not onednn_is_faster():
        return nn.functional.linear(inputs, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of a float32 model on CPUs multiply with `linear`, in both passes."""
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    rows: Tensor = _Linear.apply(inputs.flatten(0, -2), layer.weight, layer.bias)
    return rows.unflatten(0, inputs.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # `weight` itself is saved, not a view of it: ZeRO-3 replaces its storage between forward and backward.
        ctx.save_for_backward(inputs, weight)
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        (grad,) = grads
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if needs_inputs else None,
            linear(grad.t(), inputs.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


@cache
def onednn_is_faster() -> bool:
    """Than torch's own product, on this machine. Where torch has no MKL (ARM), its own is another one already."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and torch.backends.cpu.get_cpu_capability() == "AVX512"

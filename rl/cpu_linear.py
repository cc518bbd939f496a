"""Float32 linear layers computed with oneDNN on AMD processors with AVX-512.

torch multiplies float32 with MKL, which uses only AVX2 on these processors and is about half as fast as oneDNN; on
processors with AVX2 alone, neither is ahead (`benchmarks/cpu_linear.py`). torch has no public name for oneDNN's product
of plain tensors; the operator used here is the one to which torch.compile lowers torch.nn.Linear.

oneDNN compiles a kernel for each shape that it meets, and keeps it. Micro-batches differ in length, and kernels that
lie between their tensors in memory prevent its reuse: a learner of 403 MiB grew to 1,077 MiB. So oneDNN multiplies rows
in blocks of one size, and torch multiplies the rest.

Left out: other dtypes and devices, which are left to torch, and weights outside a torch.nn.Linear (experts).

Shape legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256  # rows; smaller blocks cost too many calls, larger ones leave too many rows over


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[N, I], [O, I], [O] or None -> [N, O]: like torch.nn.functional.linear, but outside autograd."""
    if not _by_onednn(inputs):
        return nn.functional.linear(inputs, weight, bias)
    result = inputs.new_empty(len(inputs), len(weight))
    rest = len(inputs) - len(inputs) % BLOCK
    for start in range(0, rest, BLOCK):
        rows = slice(start, start + BLOCK)
        result[rows] = _product(inputs[rows], weight)
    torch.mm(inputs[rest:], weight.t(), out=result[rest:])
    return result if bias is None else result.add_(bias)


def weight_gradient(grad: Tensor, inputs: Tensor) -> Tensor:
    """[N, O], [N, I] -> [O, I]: the gradient of a linear layer's weight, from its outputs' gradient and its inputs."""
    if not _by_onednn(inputs):
        return grad.t() @ inputs
    rest = len(inputs) - len(inputs) % BLOCK
    result = grad[rest:].t() @ inputs[rest:]
    for start in range(0, rest, BLOCK):
        rows = slice(start, start + BLOCK)
        result += _product(grad[rows].t(), inputs[rows].t())
    return result


def use_onednn(model: nn.Module) -> None:
    """Make the linear layers of a float32 model on CPUs use oneDNN in both passes, if it is faster."""
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    rows: Tensor = _Linear.apply(inputs.reshape(-1, inputs.shape[-1]), layer.weight, layer.bias)
    return rows.view(*inputs.shape[:-1], rows.shape[-1])


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
            weight_gradient(grad, inputs) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T"""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return result


def _by_onednn(inputs: Tensor) -> bool:
    return inputs.dtype == torch.float32 and inputs.device.type == "cpu" and onednn_is_faster()


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN beats torch's own product: if that is MKL's, on an AMD processor with AVX-512."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return both and wide and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()

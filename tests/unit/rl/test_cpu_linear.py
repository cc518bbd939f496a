"""Linear layers through oneDNN give what torch's give, in both passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rl import cpu_linear
from rl.cpu_linear import linear, use_onednn, weight_gradient

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")

# Float32 products of unit-variance rows: the rounding of at most 64 terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True, scope="module")
def onednn() -> Iterator[None]:
    """Small blocks; and a machine with AVX2 alone tests the same code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_linear, "BLOCK", 4)
        patch.setattr(cpu_linear, "onednn_is_faster", lambda: True)
        yield


def _twins(inputs: int, outputs: int, *, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    plain = nn.Linear(inputs, outputs, bias=bias)
    replaced = copy.deepcopy(plain)
    use_onednn(replaced)
    return plain, replaced


def _calls(layer: nn.Linear, inputs: torch.Tensor) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(inputs).sum().backward()
    return {event.key: event.count for event in profile.key_averages()}


@settings(deadline=None)  # the first product of a shape is compiled
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    rows=st.integers(1, 9),
    inputs=st.integers(1, 64),
    outputs=st.integers(1, 64),
    bias=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_the_layer(
    shape: list[int], rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    plain, replaced = _twins(inputs, outputs, bias=bias)
    x = torch.randn(*shape, rows, inputs)
    y = x.clone()
    x.requires_grad_()
    y.requires_grad_()
    expected, got = plain(x), replaced(y)
    torch.testing.assert_close(got, expected, **CLOSE)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, **CLOSE)
    for mine, theirs in zip(replaced.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)


def test_a_frozen_layer_and_constant_inputs_get_no_gradient() -> None:
    _, layer = _twins(8, 4, bias=True)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 5.0))


def test_the_weight_of_the_backward_pass_is_the_one_that_the_layer_has_then() -> None:
    """ZeRO-3 frees a weight after the forward pass and gathers it into new storage before the backward pass."""
    _, layer = _twins(8, 4, bias=False)
    x = torch.randn(5, 8, requires_grad=True)
    output = layer(x)
    whole = layer.weight.data
    layer.weight.data = torch.empty(0)
    layer.weight.data = whole.clone()
    output.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, whole.sum(0).expand(5, 8), **CLOSE)


def test_one_row_without_a_batch() -> None:
    plain, replaced = _twins(8, 4, bias=True)
    x = torch.randn(8)
    torch.testing.assert_close(replaced(x), plain(x), **CLOSE)
    assert replaced(torch.randn(0, 8)).shape == (0, 4)


def test_no_rows_and_strided_rows() -> None:
    weight = torch.randn(6, 5)
    assert linear(torch.empty(0, 5), weight).shape == (0, 6)
    rows = torch.randn(5, 9)[:, 2:6].t()
    torch.testing.assert_close(linear(rows, weight), rows @ weight.t(), **CLOSE)
    grads = torch.randn(4, 9)[:, 3:]
    torch.testing.assert_close(weight_gradient(grads, rows), grads.t() @ rows, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_multiplied_by_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    assert torch.equal(linear(x, weight), nn.functional.linear(x, weight))
    assert torch.equal(weight_gradient(x, x), x.t() @ x)


def test_float32_is_multiplied_by_onednn_in_both_passes() -> None:
    plain, replaced = _twins(64, 32, bias=False)
    x = torch.randn(17, 64, requires_grad=True)
    assert "mkldnn::_linear_pointwise" not in _calls(plain, x)
    assert _calls(replaced, x)["mkldnn::_linear_pointwise"] == 3 * 4


def test_onednn_meets_one_shape_a_product_whatever_the_number_of_rows() -> None:
    """It keeps a kernel for each shape that it meets."""
    _, replaced = _twins(64, 32, bias=False)
    shapes = set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        for rows in range(1, 20):
            replaced(torch.randn(rows, 64, requires_grad=True)).sum().backward()
    for event in profile.events():
        if event.name == "mkldnn::_linear_pointwise":
            shapes.add(str(event.input_shapes[:2]))
    assert len(shapes) == 3

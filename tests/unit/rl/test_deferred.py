"""Deferred checkpoint tensors give what eager ones would, and are read only when a parameter takes their values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rl.deferred import Deferred, dequantize_mxfp4, read_deferred

reads: list[Tensor] = []


def deferred(tensor: Tensor) -> Deferred:
    def read() -> Tensor:
        reads.append(tensor)
        return tensor

    return Deferred(tensor.to("meta"), read)


@pytest.fixture(autouse=True)
def forget_reads() -> None:
    reads.clear()


def values(tensor: Deferred) -> Tensor:
    parameter = torch.nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=False)
    with torch.no_grad():
        parameter.copy_(tensor)  # as torch's Module._load_from_state_dict does
    return parameter.data


def test_conversions_of_checkpoints_are_computed_when_a_parameter_takes_the_values() -> None:
    gates, ups = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    stacked = [torch.stack([deferred(part) for part in parts]) for parts in (gates, ups)]
    fused = torch.cat(stacked, dim=1)
    first, second = torch.chunk(fused.transpose(1, 2).contiguous(), 2, dim=0)
    assert isinstance(fused, Deferred) and isinstance(second, Deferred)
    assert (fused.shape, fused.dtype, fused.size(1), fused.ndim) == (torch.Size((4, 12, 8)), torch.float32, 12, 3)
    assert not reads
    expected = torch.cat([gates, ups], dim=1)
    assert torch.equal(values(fused), expected)
    assert len(reads) == 8
    assert torch.equal(values(second[1:].squeeze(0)), expected.transpose(1, 2)[3])
    assert torch.overrides.is_tensor_like(first)  # else torch's Module refuses it


def test_values_are_cast_to_what_takes_them() -> None:
    tensor, target = torch.randn(5), torch.empty(5, dtype=torch.bfloat16)
    target.copy_(deferred(tensor))
    assert torch.equal(target, tensor.bfloat16())


def test_one_file_and_an_index_of_several_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4, dtype=torch.uint8), "c": torch.randn(3).bfloat16()}
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    (tmp_path / "two").mkdir()
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / "two" / file)
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for folder in ("one", "two"):
        found = read_deferred(str(tmp_path / folder), None)
        assert {name: values(tensor).tolist() for name, tensor in found.items()} == {
            name: tensor.tolist() for name, tensor in tensors.items()
        }
    (tmp_path / "none").mkdir()
    assert read_deferred(str(tmp_path / "none"), None) == {}


def test_mxfp4_is_dequantised_as_transformers_does() -> None:
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(118, 130, (2, 6, 3), dtype=torch.uint8)
    tensors = {"w_blocks": deferred(blocks), "w_scales": deferred(scales), "b": deferred(torch.randn(2))}
    result = dequantize_mxfp4(tensors)
    assert list(result) == ["b", "w"]
    assert not reads
    expected = convert_moe_packed_tensors(blocks, scales)
    assert (result["w"].shape, result["w"].dtype) == (expected.shape, expected.dtype)
    assert torch.equal(values(result["w"]), expected)

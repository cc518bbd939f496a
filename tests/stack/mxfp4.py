"""Checkpoints in the format of the released GPT-OSS models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_mxfp4(source: Path, target: Path) -> None:
    """A copy of a GPT-OSS checkpoint whose experts are random MXFP4 blocks."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(target / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            tensors[name + "_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[name + "_scales"] = torch.randint(118, 123, shape, generator=generator, dtype=torch.uint8)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (target / "config.json").write_text(json.dumps(config))

"""The weight source over real ZeRO-3: two ranks gather the same bits that a plain module holds."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from launch.tiny_models import build_tiny_model
from rl.weight_sync.digest import digest
from rl.weight_sync.source import Zero3WeightSource

pytestmark = pytest.mark.stack


def gather(rank: int, port: int, path: str, out: str) -> None:
    """One rank: shard the model, walk the source, save the digests of what it yields."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed(dist_backend="gloo")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    alive = HfDeepSpeedConfig(config)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    source = Zero3WeightSource(engine.module, dtype=torch.float32, bucket_bytes=1 << 16, rank=rank)
    digests = {name: digest(tensor) for name, tensor in source}
    assert [info.name for info in source.metadata()][: len(digests)] == list(digests)
    assert all(parameter.ds_status.name == "NOT_AVAILABLE" for parameter in engine.module.parameters())
    torch.save(digests, f"{out}/{rank}.pt")
    del alive


def test_two_ranks_yield_the_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    path = build_tiny_model("qwen3_moe", tmp_path / "model", tie_word_embeddings=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(gather, args=(port, str(path), str(tmp_path)), nprocs=2)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = {n: digest(t) for n, t in Zero3WeightSource(plain, dtype=torch.float32, bucket_bytes=1 << 20)}
    assert torch.load(tmp_path / "0.pt") == expected
    assert torch.load(tmp_path / "1.pt") == {}

"""The sender over real ZeRO-3: two ranks send the bits that a plain module holds, and share one verdict."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ranks import end_rank, meeting
from transformers import AutoModelForCausalLM

from launch.tiny_models import build_tiny_model
from rl.errors import WeightSyncError
from rl.weight_sync.buckets import open_bucket
from rl.weight_sync.digest import digest
from rl.weight_sync.sender import WeightSender
from rl.weight_sync.source import Zero3WeightSource
from rl.zero3 import init_distributed

pytestmark = pytest.mark.stack


class Engine:
    """A client over one engine that maps and digests buckets, until it is told to fail."""

    def __init__(self) -> None:
        self.fails = False
        self.received: dict[str, int] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.fails:
            raise ConnectionError("engine 0 is gone")
        self.received |= {name: digest(tensor) for name, tensor in open_bucket(update_info)}

    def finish_weight_update(self, policy_version: int) -> dict[int, dict[str, int]]:
        return {0: self.received}

    def late(self) -> str:
        return ""


def send(rank: int, environment: dict[str, str], path: str, out: str) -> None:
    """One rank: shard the model, send it successfully and then in vain, save the outcome."""
    torch.set_num_threads(1)
    os.environ |= environment | {"RANK": str(rank), "WORLD_SIZE": "2"}
    init_distributed("cpu", 300)
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    alive = HfDeepSpeedConfig(config)  # transformers looks for it while it loads
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    del alive
    source = Zero3WeightSource(engine.module, dtype=torch.float32, bucket_bytes=1 << 16, rank=rank)
    client = Engine()
    sender = WeightSender(source, "shm", client, rank=rank, world_size=2, bucket_bytes=1 << 16, timeout_s=60)
    sender.send(3)
    first = dict(client.received)
    assert all(parameter.ds_status.name == "NOT_AVAILABLE" for parameter in engine.module.parameters())
    client.fails = True
    with pytest.raises(WeightSyncError) as failure:
        sender.send(4)
    client.fails = False
    client.received = {}
    assert sender.send(5).policy_version == 5  # the ranks are still in step
    torch.save((first, str(failure.value), client.received), f"{out}/{rank}.pt")
    end_rank()


def test_two_ranks_send_the_checkpoint_bit_for_bit_and_fail_together(tmp_path: Path) -> None:
    path = build_tiny_model("qwen3_moe", tmp_path / "model", tie_word_embeddings=True)
    with meeting() as environment:
        mp.spawn(send, args=(environment, str(path), str(tmp_path)), nprocs=2)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = {n: digest(t) for n, t in Zero3WeightSource(plain, dtype=torch.float32, bucket_bytes=1 << 20)}
    for rank, received in ((0, expected), (1, {})):  # rank 0 alone speaks to the engines
        first, failure, again = torch.load(tmp_path / f"{rank}.pt")
        assert first == again == received
        assert "rank 0: loading bucket 0" in failure and "engine 0 is gone" in failure

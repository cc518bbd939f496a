"""Host memory that two ZeRO-3 ranks need to load a mixture of experts: transformers' own way, and `rl.models`.

    python benchmarks/loading_memory.py [--layers 8] [--experts 32] [--hidden 512] [--expert-size 768]

What counts is anonymous memory (RssAnon) beyond what the process had before, less what the partitioned model keeps.
Each side runs in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PATHS = ("transformers", "fledge")


def build(options: argparse.Namespace, folder: Path) -> float:
    """A random Qwen3-MoE in bfloat16; returns its size in MiB."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        moe_intermediate_size=options.expert_size,
        intermediate_size=options.expert_size,
        num_hidden_layers=options.layers,
        num_experts=options.experts,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters()) * 2 / 2**20


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


def rank(side: str, folder: Path) -> None:
    """Load, and print the peak of this rank as JSON."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from rl.config import LearnerConfig, ModelConfig
    from rl.models import load_model
    from rl.zero3 import init_distributed, training_config

    init_distributed("cpu", 600)
    zero = training_config(LearnerConfig(), dtype="bfloat16", hidden_size=512)
    before, peak, stop = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    if side == "transformers":
        config = HfDeepSpeedConfig(zero)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        del config
    else:
        model = load_model(ModelConfig(path=str(folder), dtype="bfloat16"), zero, device="cpu")
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    shard = sum(p.ds_tensor.numel() for p in model.parameters()) * 2 / 2**20
    print(json.dumps({"peak": peak[0] - before - shard, "shard": shard, "seconds": seconds}))
    torch.distributed.destroy_process_group()


def run(side: str, folder: Path) -> list[dict[str, float]]:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun does, to hold the port
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common = {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"} | place
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", side, str(folder)],
            env=os.environ | common | {"RANK": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for index in range(2)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--expert-size", type=int, default=768)
    parser.add_argument("--rank", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rank[0], Path(options.rank[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = build(options, Path(folder))
        print(f"Qwen3-MoE of {size:.0f} MiB in {options.layers} layers; MiB beyond each rank's half of it")
        totals = {}
        for side in PATHS:
            ranks = run(side, Path(folder))
            totals[side] = sum(one["peak"] for one in ranks)
            peaks = ", ".join(f"rank {index} {one['peak']:.0f} MiB" for index, one in enumerate(ranks))
            print(f"{side:<14}{peaks}; {ranks[0]['seconds']:.1f} s")
        print(f"both ranks: {totals['transformers'] / totals['fledge']:.1f} times less")


if __name__ == "__main__":
    main()

"""Forward and backward over groups of long-tailed responses: every layout against padding a shuffled batch.

    python benchmarks/layouts.py [--prompt 64] [--group-size 8] [--sequences 128] [--max-tokens 4096] [--hidden 128]

All forms run the same model over the same sequences with the same budget of positions per micro-batch. Left out:
DeepSpeed, whose share does not depend on the layout.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from rl.batch import TokenSequence
from rl.batching import Layout, micro_batches, shared_prefix_micro_batches
from rl.layouts import collate
from rl.logprobs import LogprobHead
from rl.shared_prefix import use_shared_prefixes


def long_tailed(count: int, longest: int, prompt: int, group_size: int) -> list[TokenSequence]:
    """Log-normal response lengths (median an eighth of the longest), as reasoning models have them; `group_size` of
    them to a prompt."""
    generator = np.random.default_rng(0)
    responses = np.clip(generator.lognormal(np.log(longest / 8), 0.9, count), 4, longest).astype(int)
    prompts = generator.integers(0, 128, (-(-count // group_size), prompt)).astype(np.int32)
    return [
        TokenSequence(prompts[i // group_size], generator.integers(0, 128, n).astype(np.int32))
        for i, n in enumerate(responses)
    ]


def shuffled(lengths: list[int], budget: int) -> list[list[int]]:
    """Micro-batches of a fixed number of sequences, in the order they come: as many as fit if all were the longest."""
    size = max(budget // max(lengths), 1)
    return [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        config = Qwen3Config(
            vocab_size=128,
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=max(options.hidden // 128, 1),
            head_dim=64,
        )
        self.device, self.attention = options.device, options.attention
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation=options.attention)
        self.model.to(options.device)
        self.head = LogprobHead(self.model, 2048)

    def run(self, sequences: list[TokenSequence], groups: list[list[int]], layout: Layout) -> tuple[float, int]:
        """(seconds, positions computed) of one pass over all groups.

        On a CPU the seconds are this process's own, so that other work on the machine does not count.
        """
        clock = time.perf_counter if self.device == "cuda" else time.process_time
        self.model.set_attn_implementation(self.attention)
        if layout == "shared_prefix":
            use_shared_prefixes(self.model)
        positions = 0
        started = clock()
        for group in groups:
            micro = collate(
                [sequences[i] for i in group],
                layout,
                model_config=self.model.config,
                device=self.device,
                dtype=self.dtype,
            )
            positions += micro.real.numel()
            with self.head.query(micro.positions, micro.targets, temperature=1.0):
                logprobs = self.model(**micro.model_inputs).logits[0]
            logprobs.sum().backward()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return clock() - started, positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--longest", type=int, default=512, help="response tokens")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    sequences = long_tailed(options.sequences, options.longest, options.prompt, options.group_size)
    lengths = [s.num_positions for s in sequences]
    forms: dict[str, tuple[list[list[int]], Layout]] = {
        "padded, shuffled": (shuffled(lengths, options.max_tokens), "bucketed"),
        "bucketed": (micro_batches(lengths, options.max_tokens, "bucketed"), "bucketed"),
        "packed": (micro_batches(lengths, options.max_tokens, "packed"), "packed"),
        "shared_prefix": (
            shared_prefix_micro_batches(
                [s.prompt_key for s in sequences], [options.prompt] * len(sequences), lengths, options.max_tokens
            ),
            "shared_prefix",
        ),
    }
    print(
        f"{options.device}, {bench.dtype}, {options.attention}, {len(sequences)} sequences in groups of "
        f"{options.group_size}, prompts of {options.prompt}, {sum(lengths)} tokens, longest {max(lengths)}, "
        f"{options.max_tokens} positions a micro-batch"
    )
    best: dict[str, tuple[float, int]] = {}
    for _ in range(options.repeats):  # in turn, so that a busy machine slows all alike
        for name, (groups, layout) in forms.items():
            best[name] = min(best.get(name, (float("inf"), 0)), bench.run(sequences, groups, layout))
    base = best["padded, shuffled"][0]
    print(f"{'layout':<18} {'micro-batches':>13} {'positions':>10} {'seconds':>8} {'speed':>7}")
    for name, (seconds, positions) in best.items():
        print(f"{name:<18} {len(forms[name][0]):>13} {positions:>10} {seconds:>8.2f} {base / seconds:>6.2f}x")


if __name__ == "__main__":
    main()

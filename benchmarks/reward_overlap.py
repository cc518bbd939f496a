"""Seconds of a step whose reward is slow: scored as groups are generated, and after all of them are.

    python benchmarks/reward_overlap.py [--steps 3] [--seconds 0.04]

One tiny Qwen3 with random weights and one engine, which generates a quarter of the step's samples at a time. The reward
sleeps, like one that asks a server or a sandbox on other cores. The machine must be idle; only the ratio matters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # rewards.py here would hide the package

PROMPTS, GROUP_SIZE, MAX_TOKENS = 16, 8, 96
REWARD = """
import time


def reward(sample, *, seconds):
    time.sleep(seconds)
    return float(len(sample.response))
"""


class Quiet:
    def message(self, text: str) -> None: ...
    def now(self, text: str) -> None: ...
    def step(self, step: int, metrics: Any) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.04, help="of the reward, a sample")
    arguments = parser.parse_args()
    from launch.compose import training_run
    from launch.data import checked_training
    from launch.tiny_models import build_tiny_model
    from rl.config import TrainConfig

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_tiny_model("qwen3", folder / "model", hidden_size=256, intermediate_size=768, num_hidden_layers=6)
        (folder / "reward.py").write_text(REWARD)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"What is {i} + {i}?"}) + "\n" for i in range(PROMPTS)))
        config = TrainConfig.model_validate(
            {
                "run_dir": str(folder / "run"),
                "model": {"path": str(model), "dtype": "float32"},
                "data": {"train": {"path": str(rows), "ground_truth_field": None}, "max_prompt_tokens": 64},
                "rollout": {
                    "prompts_per_step": PROMPTS,
                    "group_size": GROUP_SIZE,
                    "max_response_tokens": MAX_TOKENS,
                    "max_concurrent_sequences": PROMPTS * GROUP_SIZE // 4,
                    "kv_cache_gib": 0.5,
                },
                "reward": {
                    "functions": [{"name": f"{folder / 'reward.py'}:reward", "options": {"seconds": arguments.seconds}}]
                },
                "learner": {"optimizer": {"lr": 1e-6}},
            }
        )
        Path(config.run_dir).mkdir()
        results = {}
        with training_run(checked_training(config, Quiet()), Quiet()) as run:
            run.controller.sync_weights()
            begin = run.controller.reward_pool.begin
            for index, side in enumerate(("as they come", "afterwards")):
                run.controller.reward_pool.begin = begin if index == 0 else lambda prompt, rollouts: None
                first = index * (arguments.steps + 1)  # this step warms up, and is not counted
                results[side] = [run.controller.step(first + step) for step in range(arguments.steps + 1)][1:]
    seconds = {}
    for side, steps in results.items():
        parts = {name: statistics.mean(step.seconds[name] for step in steps) for name in steps[0].seconds}
        seconds[side] = parts.pop("step")
        print(
            f"scored {side:13s}{seconds[side]:6.1f} s a step "
            f"({', '.join(f'{part} {value:.1f}' for part, value in parts.items())})"
        )
    print(f"ratio {seconds['afterwards'] / seconds['as they come']:.2f} x")


if __name__ == "__main__":
    from launch.environment import keep_worker_priority, quiet_frameworks, secure_ray

    quiet_frameworks()
    secure_ray(None)
    keep_worker_priority()
    main()

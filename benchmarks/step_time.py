"""Seconds of one GRPO step, here and in TRL's GRPOTrainer, on the same work, one after the other.

    python benchmarks/step_time.py [--steps 3] [--dtype float32]

Both sides have the same tiny Qwen3 with random weights, prompts, group size, token limit and reward, use every core,
and use the fastest micro-batch size of those tried. The first step of each side warms up and is not counted. The
machine must be idle; only the ratio matters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # rewards.py here would hide the package

PROMPTS, GROUP_SIZE, MAX_TOKENS = 32, 8, 128
TRL_MICRO_BATCH = 16  # samples; 64 took 31.7 s a step where 16 took 25.7
MODEL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "initializer_range": 0.02}


def reward(completions: list[Any], **_: Any) -> list[float]:
    """The share of lower-case letters; both sides call it."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ch.islower() for ch in text) / max(len(text), 1) for text in texts]


def questions() -> list[str]:
    return [f"What is {i} plus {i * 7 % 31}? Think first, then answer." for i in range(PROMPTS)]


def fledge_side(model: Path, folder: Path, steps: int, dtype: str) -> dict[str, Any]:
    from launch.compose import training_run
    from launch.data import checked_training
    from rl.config import TrainConfig

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": q, "ground_truth": ""}) + "\n" for q in questions()))
    config = TrainConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "total_steps": steps + 1,
            "model": {"path": str(model), "dtype": dtype},
            "data": {"train": {"path": str(rows)}, "max_prompt_tokens": 128},
            "rollout": {
                "prompts_per_step": PROMPTS,
                "group_size": GROUP_SIZE,
                "max_response_tokens": MAX_TOKENS,
                "kv_cache_gib": 1.0,
                "num_workers": 2,
            },
            "reward": {"functions": [{"name": f"{Path(__file__).resolve()}:reward"}], "num_workers": 1},
            "learner": {
                "num_workers": 2,
                "max_tokens_per_microbatch": 2048,
                "persistence_threshold": 1 << 20,
                "optimizer": {"lr": 1e-6},
            },
        }
    )

    class Quiet:
        def message(self, text: str) -> None: ...
        def now(self, text: str) -> None: ...
        def step(self, step: int, metrics: Any) -> None: ...

    with training_run(checked_training(config, Quiet()), Quiet()) as run:
        run.controller.sync_weights()
        results = [run.controller.step(step) for step in range(steps + 1)][1:]
    lengths = [r.length for result in results for r in result.scored.batch.rollouts]
    names = ("rollout", "reward", "update", "sync")
    parts = {name: statistics.mean(r.seconds[name] for r in results) for name in names}
    return {
        "step": statistics.mean(r.seconds["step"] for r in results),
        "parts": parts,
        "length": statistics.mean(lengths),
    }


def trl_side(model: Path, folder: Path, steps: int, dtype: str) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    lengths: list[int] = []
    tokenizer = AutoTokenizer.from_pretrained(model)

    def counted(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return reward(completions, **columns)

    class Timer(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps.append(time.perf_counter() - self._start)

    class TimedTrainer(GRPOTrainer):
        generation: list[float] = []  # noqa: RUF012 - one trainer a process

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = super()._generate_and_score_completions(*args, **kwargs)
            self.generation.append(time.perf_counter() - started)
            return result

    timer = Timer()
    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
        processing_class=tokenizer,
        reward_funcs=counted,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in questions()]),
        args=_trl_arguments(folder, steps, dtype),
        callbacks=[timer],
    )
    trainer.train()
    step, generate = statistics.mean(timer.steps[1:]), statistics.mean(trainer.generation[1:])
    return {
        "step": step,
        "parts": {"generate+reward": generate, "update": step - generate},
        "length": statistics.mean(lengths),
    }


def _trl_arguments(folder: Path, steps: int, dtype: str) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=TRL_MICRO_BATCH,
        gradient_accumulation_steps=PROMPTS * GROUP_SIZE // TRL_MICRO_BATCH,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_TOKENS,
        max_steps=steps + 1,
        learning_rate=1e-6,
        beta=0.0,
        bf16=dtype == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )


def run_side(side: str, model: Path, folder: Path, steps: int, dtype: str) -> dict[str, Any]:
    """One side in a process of its own."""
    out = folder / f"{side}.json"
    command = [sys.executable, __file__, "--side", side, "--model", str(model), "--folder", str(folder)]
    subprocess.run(
        [*command, "--steps", str(steps), "--dtype", dtype, "--out", str(out)], check=True, stdout=subprocess.DEVNULL
    )
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--side", choices=("fledge", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = fledge_side if arguments.side == "fledge" else trl_side
        result = side(arguments.model, arguments.folder, arguments.steps, arguments.dtype)
        arguments.out.write_text(json.dumps(result))
        return
    from launch.tiny_models import build_tiny_model, describe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_tiny_model("qwen3", folder / "model", **MODEL)
        print(f"{describe(model)}; {PROMPTS} prompts x {GROUP_SIZE}, at most {MAX_TOKENS} tokens, {arguments.dtype}")
        results = {s: run_side(s, model, folder, arguments.steps, arguments.dtype) for s in ("trl", "fledge")}
    for side, result in results.items():
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in result["parts"].items())
        print(f"{side:7s} {result['step']:6.1f} s a step ({parts}); mean length {result['length']:.0f}")
    print(f"ratio   {results['trl']['step'] / results['fledge']['step']:6.2f} x")


if __name__ == "__main__":
    from launch.environment import keep_worker_priority, quiet_frameworks, secure_ray

    quiet_frameworks()
    secure_ray(None)
    keep_worker_priority()
    main()

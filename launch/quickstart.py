"""What the quickstart starts from: a tiny Qwen3, and worked examples of sums written out step by step.

    python -m launch.quickstart OUT_DIR

The examples are of mixed quality, as collected ones are: not quite half work the sum out one term at a time before they
answer; the others guess at once, and one guess in seven is right. So the warm start leaves a model that can reason but
often does not, and reinforcement learning has something to discover: that reasoning pays. Left out: training.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import reasoning_gym

from launch.environment import quiet_frameworks
from launch.tiny_models import build_tiny_model, describe
from rl.config import TrainConfig
from rl.config.loading import load_config

TASK = "basic_arithmetic"
TASK_OPTIONS = {
    "min_terms": 4,
    "max_terms": 5,
    "min_digits": 1,
    "max_digits": 1,
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
}
REASONING_SHARE = 0.45
GUESSES_MISS_BY = 3  # at most, in either direction
# Problem i of a generated task is made from its seed + i: the seeds of two runs, and those of training and held-out
# problems in configs/quickstart.yaml, must be further apart than there are problems.
SEED_STRIDE = 1_000_000
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
MODEL_SIZE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}


def worked_example(expression: str) -> str:
    """A response in the Qwen3 format that reasons.

    Example: `worked_example("5 + 3 + 6 + 1")` is `<think>5+3=8;8+6=14;14+1=15</think>15`.
    """
    first, *terms = (int(term) for term in expression.split(" + "))
    total, steps = first, []
    for term in terms:
        steps.append(f"{total}+{term}={total + term}")
        total += term
    return f"<think>{';'.join(steps)}</think>{total}"


def held_out_questions() -> set[str]:
    """What configs/quickstart.yaml evaluates on. Small sums repeat, so seeds alone do not keep it out of training."""
    config = load_config(CONFIG, [], TrainConfig)
    return {
        problem["question"]
        for dataset in config.data.eval
        for problem in reasoning_gym.create_dataset(TASK, size=dataset.size, seed=dataset.seed, **dataset.options)
    }


def write_examples(path: Path, count: int, *, seed: int) -> None:
    """Write `count` worked examples, none of them a held-out problem, as JSONL rows with `prompt` and `response`."""
    rng = np.random.default_rng(seed)
    held_out = held_out_questions()
    problems = reasoning_gym.create_dataset(TASK, size=2 * count, seed=(1 + seed) * SEED_STRIDE, **TASK_OPTIONS)
    unseen = (problem for problem in problems if problem["question"] not in held_out)
    with path.open("w") as file:
        for problem in islice(unseen, count):
            if rng.random() < REASONING_SHARE:
                response = worked_example(problem["metadata"]["expression"])
            else:
                miss = rng.integers(-GUESSES_MISS_BY, GUESSES_MISS_BY, endpoint=True)
                response = f"<think></think>{int(problem['answer']) + miss}"
            file.write(json.dumps({"prompt": problem["question"], "response": response}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--examples", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quiet_frameworks()
    model = build_tiny_model("qwen3", arguments.out_dir / "base", seed=arguments.seed, **MODEL_SIZE)
    write_examples(arguments.out_dir / "examples.jsonl", arguments.examples, seed=arguments.seed)
    print(f"{model}: {describe(model)}; {arguments.examples} worked examples")  # noqa: T201 - a script


if __name__ == "__main__":
    main()

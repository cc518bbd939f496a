"""What the quickstart starts from: a tiny Qwen3, and worked examples of sums written out step by step.

    python -m launch.quickstart OUT_DIR

The examples are of two kinds: two in five work the sum out one term at a time before they answer, the others answer at
once, which is mostly hopeless for a model this small. So the warm start leaves a model that can reason but often does
not, and reinforcement learning has something to find out: that reasoning pays. Left out: training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import reasoning_gym

from launch.tiny_models import build_tiny_model, describe

TASK = "basic_arithmetic"
TASK_OPTIONS = {
    "min_terms": 3,
    "max_terms": 4,
    "min_digits": 1,
    "max_digits": 1,
    "operators": ["+", "-"],
    "allow_parentheses": False,
    "allow_negation": False,
}
REASONING_SHARE = 0.4
DATA_SEED = 1000  # far from the seeds of the training and held-out problems in configs/quickstart.yaml
MODEL_SIZE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}


def worked_example(expression: str, answer: str, *, reason: bool) -> str:
    """A response in the Qwen3 format.

    Example: `worked_example("5 - 3 - 6", "-4", reason=True)` is `<think>5-3=2;2-6=-4</think>-4`.
    """
    if not reason:
        return f"<think></think>{answer}"
    first, *rest = expression.split()
    total = int(first)
    steps = []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if operator == "+" else total - int(term)
        steps.append(f"{total}{operator}{term}={result}")
        total = result
    return f"<think>{';'.join(steps)}</think>{answer}"


def write_examples(path: Path, count: int, *, seed: int) -> None:
    """Write `count` worked examples as JSONL rows with `prompt` and `response`."""
    rng = np.random.default_rng(seed)
    problems = reasoning_gym.create_dataset(TASK, size=count, seed=DATA_SEED + seed, **TASK_OPTIONS)
    with path.open("w") as file:
        for problem in problems:
            reason = bool(rng.random() < REASONING_SHARE)
            response = worked_example(problem["metadata"]["expression"], problem["answer"], reason=reason)
            file.write(json.dumps({"prompt": problem["question"], "response": response}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--examples", type=int, default=44800)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = build_tiny_model("qwen3", arguments.out_dir / "base", seed=arguments.seed, **MODEL_SIZE)
    write_examples(arguments.out_dir / "examples.jsonl", arguments.examples, seed=arguments.seed)
    print(f"{model}: {describe(model)}; {arguments.examples} worked examples")  # noqa: T201 - a script


if __name__ == "__main__":
    main()

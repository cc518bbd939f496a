"""verl's own workers, on two real ZeRO-3 ranks, compute what our learner computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from two_ranks import run_two_ranks

from launch.tiny_models import build_tiny_model

pytestmark = pytest.mark.stack
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks ran every scenario."""
    directory = tmp_path_factory.mktemp("verl")
    build_tiny_model("qwen3", directory / "model")
    run_two_ranks("verl_ranks.py", directory, 300)
    return directory


@pytest.fixture(scope="module")
def ranks(out_dir: Path) -> list[dict[str, Any]]:
    return [torch.load(out_dir / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    assert worst <= TOLERANCE

"""Schedules have the shape they are named for; vectors are not decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from launch.tiny_models import build_tiny_model
from rl.config import OptimizerConfig
from rl.optim import build_optimizer, build_schedule, lr_factor


def _factors(total: int, **options: object) -> list[float]:
    factor = lr_factor(OptimizerConfig(**options), total)  # type: ignore[arg-type]
    return [factor(step) for step in range(total)]


def test_warm_up_is_linear_and_moves_from_the_first_step() -> None:
    assert _factors(5, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_decay_reaches_the_floor_after_the_last_step() -> None:
    assert _factors(4, schedule="linear", min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert _factors(4, schedule="linear", warmup_steps=2) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])


def test_cosine_decay_is_half_way_in_the_middle() -> None:
    assert _factors(4, schedule="cosine") == pytest.approx([1.0, 0.8535533906, 0.5, 0.1464466094])


def test_steps_beyond_the_plan_stay_at_the_floor() -> None:
    factor = lr_factor(OptimizerConfig(schedule="linear", min_lr_ratio=0.1), 4)
    assert factor(100) == pytest.approx(0.1)


def test_vectors_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-5))
    assert [(group["betas"], group["eps"]) for group in optimizer.param_groups] == [((0.8, 0.9), 1e-5)] * 2
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old * (0.95 if parameter.ndim > 1 else 1.0))


def test_the_biases_of_all_experts_are_not_decayed_though_they_are_a_matrix(tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model("gpt_oss", tmp_path))
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = build_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    names = [[named[id(parameter)] for parameter in group["params"]] for group in (decayed, others)]
    assert {name.rpartition(".")[2] for name in names[0]} == {"weight", "gate_up_proj", "down_proj"}
    assert {"gate_up_proj_bias", "down_proj_bias", "sinks", "bias"} < {name.rpartition(".")[2] for name in names[1]}


def test_frozen_parameters_get_no_optimizer_state() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(name="sgd"))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 2


def test_the_schedule_multiplies_the_configured_rate() -> None:
    config = OptimizerConfig(name="sgd", lr=0.4, schedule="linear")
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, config, 3)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.4, 0.8 / 3, 0.4 / 3])

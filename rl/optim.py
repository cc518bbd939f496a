"""Optimizers and learning-rate schedules by name.

Left out: gradient clipping and master weights, which are DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rl.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters. Vectors (norms, attention sinks) and biases are not decayed.

    adamw is torch's fused kernel, which works on GPUs and CPUs (and so on offloaded states); sgd has no momentum.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a parameter's own shape is empty, and ds_shape is its whole shape. In GPT-OSS the biases of
            # all experts form one matrix.
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and not name.endswith("bias")
            (decayed if is_matrix else others).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (others, 0.0))
        if parameters
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def lr_factor(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate relative to `config.lr`, as a function of the optimizer steps already taken.

    Warm-up is linear and reaches 1 at step `warmup_steps`; step 0 already has a positive rate, 1 / (warmup_steps + 1).
    The rate is then constant, or decays linearly or as a cosine to `min_lr_ratio`, which it would reach one step after
    the last of `total_steps`.
    """
    warmup, floor = config.warmup_steps, config.min_lr_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        decay = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return floor + (1.0 - floor) * decay

    return factor


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule as a torch scheduler, stepped by DeepSpeed after each step that was not skipped."""
    return LambdaLR(optimizer, lr_factor(config, total_steps))

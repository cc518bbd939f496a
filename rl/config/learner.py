"""The learner workers: optimizers, ZeRO-3, the critic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rl.config.types import (
    Beta,
    Fraction,
    LocalOrNamed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class OptimizerConfig(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "fused_adamw", "cpu_adam", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-6
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = Field(
        0, description="optimizer steps: epochs x mini_batches of them a training step"
    )
    min_lr_ratio: Fraction = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.schedule == "constant" and self.min_lr_ratio > 0:
            raise ValueError("min_lr_ratio has no effect with schedule constant; set schedule to linear or cosine")
        for key in ("betas", "eps"):
            if self.name == "sgd" and self.sets(key):
                raise ValueError(f"{key} has no effect with optimizer.name sgd; leave it out, or set name to adamw")
        return self


class MoEConfig(Section):
    """Training of mixture-of-experts models; other models ignore it only while it is left as it is."""

    freeze_router: bool = False
    aux_loss_coefficient: NonNegativeFloat = Field(0.0, description="load balancing loss, of each micro-batch")
    router_replay: bool = Field(
        False, description="use the experts that the sampler chose again; the rollouts must carry them"
    )


class LearnerConfig(Section):
    """The ZeRO-3 learner workers."""

    num_workers: PositiveInt = 1
    threads_per_worker: PositiveInt | None = Field(None, description="CPU threads; None: an even share of the cores")
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: PositiveInt = 1
    mini_batches: PositiveInt = Field(1, description="optimizer steps an epoch over one batch of rollouts")
    max_tokens_per_microbatch: PositiveInt = 16384
    layout: Literal["auto", "packed", "bucketed", "shared_prefix"] = "auto"
    logprob_chunk_tokens: PositiveInt = 2048
    activation_checkpointing: bool = False
    persistence_threshold: NonNegativeInt | None = Field(None, description="elements; see docs/learner.md")
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_reference: bool = Field(True, description="keep the KL reference in CPU memory between its forward passes")
    moe: MoEConfig = MoEConfig()
    max_skipped_steps: NonNegativeInt = Field(
        3, description="non-finite steps, or batches without a loss token, in a row that the run bears"
    )
    timeout_s: PositiveFloat = 3600.0
    start_timeout_s: PositiveFloat = Field(
        1800.0, description="for loading the checkpoint, or fetching it from the hub"
    )


class CriticOptimizerConfig(OptimizerConfig):
    """As the policy's, but faster by default: the critic starts from a head of zeros."""

    lr: PositiveFloat = 1e-5


class CriticConfig(Section):
    """The value model. Where it runs, its epochs, mini-batches and offloading are the learner's."""

    path: LocalOrNamed | None = Field(
        None, description="checkpoint it starts from, with or without a value head; None: model"
    )
    optimizer: CriticOptimizerConfig = CriticOptimizerConfig()
    clip_range: PositiveFloat | None = Field(0.2, description="how far a value may move in one update; None: any way")
    warmup_steps: NonNegativeInt = Field(0, description="first steps, in which the critic alone learns")

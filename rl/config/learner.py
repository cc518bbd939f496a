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

    name: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or plain SGD")
    lr: PositiveFloat = Field(1e-6, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of Adam")
    eps: PositiveFloat = Field(1e-8, description="of Adam")
    weight_decay: NonNegativeFloat = Field(0.0, description="of matrices; vectors and biases have none")
    max_grad_norm: PositiveFloat = Field(1.0, description="of the global gradient")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up")
    warmup_steps: NonNegativeInt = Field(
        0, description="optimizer steps: epochs x mini_batches of them a training step"
    )
    min_lr_ratio: Fraction = Field(0.0, description="the schedule's end, as a share of lr")

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

    freeze_router: bool = Field(False, description="learn no routing")
    aux_loss_coefficient: NonNegativeFloat = Field(0.0, description="load balancing loss, of each micro-batch")
    router_replay: bool = Field(
        False, description="route each token to the experts that the sampler chose, which vLLM records on GPUs only"
    )


class LearnerConfig(Section):
    """The ZeRO-3 learner workers."""

    num_workers: PositiveInt = Field(1, description="ZeRO-3 ranks")
    threads_per_worker: PositiveInt | None = Field(None, description="CPU threads; null: an even share of the cores")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="the policy's")
    epochs: PositiveInt = Field(1, description="passes over one batch of rollouts")
    mini_batches: PositiveInt = Field(1, description="optimizer steps an epoch over one batch of rollouts")
    max_tokens_per_microbatch: PositiveInt = Field(
        16384, description="of one forward and backward pass, prompts included"
    )
    layout: Literal["auto", "packed", "bucketed", "shared_prefix"] = Field(
        "auto", description="how sequences share a forward pass; see docs/learner.md"
    )
    logprob_chunk_tokens: PositiveInt = Field(2048, description="tokens whose logits exist at a time")
    activation_checkpointing: bool = Field(False, description="compute activations again in the backward pass")
    persistence_threshold: NonNegativeInt | None = Field(
        None, description="parameters of fewer elements stay whole on every rank; null: see docs/learner.md"
    )
    offload_optimizer: bool = Field(False, description="keep optimizer states in CPU memory")
    offload_parameters: bool = Field(False, description="keep parameters in CPU memory")
    offload_reference: bool = Field(True, description="keep the KL reference in CPU memory between its forward passes")
    moe: MoEConfig = Field(MoEConfig(), description="mixtures of experts")
    max_skipped_steps: NonNegativeInt = Field(
        3, description="non-finite steps, or batches without a loss token, in a row that the run bears"
    )
    timeout_s: PositiveFloat = Field(3600.0, description="of one update, annotation or checkpoint")
    start_timeout_s: PositiveFloat = Field(
        1800.0, description="for loading the checkpoint, or fetching it from the hub"
    )


class CriticOptimizerConfig(OptimizerConfig):
    """As the policy's, but faster by default: the critic starts from a head of zeros."""

    lr: PositiveFloat = Field(1e-5, description="peak learning rate")


class CriticConfig(Section):
    """The value model. Where it runs, its epochs, mini-batches and offloading are the learner's."""

    path: LocalOrNamed | None = Field(
        None, description="checkpoint it starts from, with or without a value head; null: model"
    )
    optimizer: CriticOptimizerConfig = Field(CriticOptimizerConfig(), description="the critic's")
    clip_range: PositiveFloat | None = Field(0.2, description="how far a value may move in one update; null: any way")
    warmup_steps: NonNegativeInt = Field(0, description="first steps, in which the critic alone learns")

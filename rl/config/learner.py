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

    name: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD without momentum")
    lr: PositiveFloat = Field(1e-6, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="beta1 and beta2 of AdamW")
    eps: PositiveFloat = Field(1e-8, description="epsilon of AdamW")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="weight decay of matrices; vectors and biases are not decayed"
    )
    max_grad_norm: NonNegativeFloat = Field(
        1.0, description="maximum norm of the global gradient; a larger one is scaled down to it; 0 never scales"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after warm-up: constant, or decaying to min_lr_ratio"
    )
    warmup_steps: NonNegativeInt = Field(
        0,
        description="linear warm-up in optimizer steps, of which a training step makes epochs x mini_batches; 0 "
        "disables warm-up",
    )
    min_lr_ratio: Fraction = Field(
        0.0, description="learning rate at the end of a linear or cosine schedule, as a fraction of lr"
    )

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.schedule == "constant" and self.min_lr_ratio > 0:
            raise ValueError("min_lr_ratio has no effect with schedule constant; set schedule to linear or cosine")
        for key in ("betas", "eps"):
            if self.name == "sgd" and self.sets(key):
                raise ValueError(f"{key} has no effect with optimizer.name sgd; leave it out, or set name to adamw")
        return self


class MoEConfig(Section):
    """Training of mixture-of-experts models. Other models accept only the defaults."""

    freeze_router: bool = Field(False, description="do not train the router weights")
    aux_loss_coefficient: NonNegativeFloat = Field(
        0.0, description="weight of the load-balancing loss, which is computed per micro-batch; 0 disables it"
    )
    router_replay: bool = Field(
        False,
        description="route each token to the experts that the sampler chose; GPUs only, because vLLM records its "
        "choice only there",
    )


class LearnerConfig(Section):
    """The ZeRO-3 learner workers."""

    num_workers: PositiveInt = Field(1, description="number of learner workers (ZeRO-3 ranks); on GPUs, one GPU each")
    threads_per_worker: PositiveInt | None = Field(
        None,
        description="CPU threads per learner worker, on CPUs or with offload_optimizer; null uses an even share of "
        "the cores that its job or container may use",
    )
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(), description="optimizer and learning-rate schedule of the policy"
    )
    epochs: PositiveInt = Field(1, description="passes over each batch of rollouts")
    mini_batches: PositiveInt = Field(
        1, description="mini-batches, and so optimizer steps, per pass over a batch of rollouts"
    )
    max_tokens_per_microbatch: PositiveInt = Field(
        16384,
        description="maximum number of tokens in one forward and backward pass, prompts and padding included; at "
        "least the longest sequence",
    )
    layout: Literal["auto", "packed", "bucketed", "shared_prefix"] = Field(
        "auto",
        description="how sequences share a forward pass; auto chooses by device and attention; see docs/learner.md",
    )
    logprob_chunk_tokens: PositiveInt = Field(
        2048, description="number of tokens whose logits are held in memory at a time"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass, which saves memory and costs time"
    )
    persistence_threshold: NonNegativeInt | None = Field(
        None,
        description="parameters with fewer elements are kept whole on every rank; null means 10 x the model's hidden "
        "size",
    )
    offload_optimizer: bool = Field(False, description="keep optimizer states in CPU memory")
    offload_parameters: bool = Field(False, description="keep parameters in CPU memory")
    offload_reference: bool = Field(
        True, description="keep the KL reference model in CPU memory between its forward passes"
    )
    moe: MoEConfig = Field(MoEConfig(), description="settings for mixture-of-experts models")
    max_skipped_steps: NonNegativeInt = Field(
        3,
        description="tolerated number of non-finite optimizer steps in a row, and of batches without a loss token in "
        "a row; one more ends the run",
    )
    timeout_s: PositiveFloat = Field(3600.0, description="seconds allowed for one update, annotation or checkpoint")
    hang_timeout_s: PositiveFloat = Field(
        600.0, description="seconds allowed for one micro-batch or optimizer step; ranks that take longer count as hung"
    )
    start_timeout_s: PositiveFloat = Field(
        1800.0, description="seconds allowed for loading the checkpoint, including its download from the hub"
    )


class CriticOptimizerConfig(OptimizerConfig):
    """Like the policy's, with a higher default rate: the critic starts from a head of zeros."""

    lr: PositiveFloat = Field(1e-5, description="peak learning rate")


class CriticConfig(Section):
    """The value model. It shares the learner's workers, epochs, mini-batches and offloading."""

    path: LocalOrNamed | None = Field(
        None,
        description="checkpoint to start from, with or without a value head, as a local folder or hub name; null uses "
        "model.path",
    )
    optimizer: CriticOptimizerConfig = Field(
        CriticOptimizerConfig(), description="optimizer and learning-rate schedule of the critic"
    )
    clip_range: PositiveFloat | None = Field(
        0.2, description="how far a value may move in one update, in units of the reward; null means no limit"
    )
    warmup_steps: NonNegativeInt = Field(
        0, description="number of training steps at the start in which only the critic learns"
    )

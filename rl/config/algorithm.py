"""Advantages, policy loss and what is around them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rl.config.types import (
    Float,
    Fraction,
    Int,
    LocalOrNamed,
    NonNegativeFloat,
    PluginName,
    PositiveFloat,
    PositiveInt,
    Section,
)


class KLConfig(Section):
    """Divergence from the frozen reference."""

    placement: Literal["none", "loss", "reward"] = Field(
        "none", description="in the loss, or taken from the token rewards"
    )
    coefficient: NonNegativeFloat = Field(0.0, description="of the divergence")
    estimator: Literal["k1", "k2", "k3", "k1_straight_through", "k3_straight_through"] = Field(
        "k3", description="see docs/algorithms.md"
    )
    adaptive_target: PositiveFloat | None = Field(None, description="adaptive coefficient: the KL to hold")
    adaptive_horizon: PositiveInt = Field(
        10000, description="samples over which the coefficient moves by about a fifth at most"
    )
    reference: LocalOrNamed | None = Field(None, description="checkpoint of the reference; null: the initial policy")

    @model_validator(mode="after")
    def _consistent(self) -> KLConfig:
        if self.placement != "none" and self.coefficient == 0.0:
            raise ValueError(f"kl.placement is {self.placement} but kl.coefficient is 0; set a coefficient or none")
        if self.placement == "none" and self.coefficient > 0.0:
            raise ValueError("kl.coefficient is set but kl.placement is none; set placement to loss or reward")
        for key in ("estimator", "adaptive_target", "adaptive_horizon", "reference"):
            if self.placement == "none" and self.sets(key):
                raise ValueError(f"kl.{key} is set but kl.placement is none; set placement to loss or reward")
        if self.adaptive_target is None and self.sets("adaptive_horizon"):
            raise ValueError("kl.adaptive_horizon is set but kl.adaptive_target is not; set it, or leave both out")
        return self


class RolloutCorrectionConfig(Section):
    """Importance correction between the sampler's distribution and the learner's (rollout_logprobs, old_logprobs)."""

    mode: Literal["none", "truncate", "mask", "reject"] = Field(
        "truncate",
        description="truncate: min(ratio, upper) weighs a token; mask: the ratio inside the bounds, else 0; reject: 1 "
        "inside, else 0; none: only measured",
    )
    level: Literal["token", "sequence", "geometric"] = Field(
        "token", description="a ratio of each token, of the whole response (their product), or that's geometric mean"
    )
    upper: Annotated[Float, Field(ge=1)] = Field(2.0, description="largest ratio")
    lower: Fraction = Field(0.0, description="for mask and reject: ratios under it are left out too")

    @model_validator(mode="after")
    def _consistent(self) -> RolloutCorrectionConfig:
        if self.mode in ("truncate", "none") and self.lower > 0:
            raise ValueError(f"lower {self.lower:g} has no effect with mode {self.mode}; set mode to mask or reject")
        if self.mode in ("mask", "reject") and self.lower >= self.upper:
            raise ValueError(f"lower {self.lower:g} is not under upper {self.upper:g}: every token would be left out")
        return self


class DynamicSamplingConfig(Section):
    """Replace groups whose task rewards are all equal by groups of further prompts (DAPO)."""

    max_rounds: Annotated[Int, Field(ge=2)] = Field(10, description="generations a step, the first included")


class AlgorithmConfig(Section):
    """Advantages, policy loss and what is around them."""

    advantage: str = Field("grpo", description="a registered estimator, or verl:NAME")
    advantage_options: dict[str, Any] = Field(default_factory=dict, description="the estimator's keyword arguments")
    loss: str = Field("ppo_clip", description="a registered policy loss, or verl:NAME")
    loss_options: dict[str, Any] = Field(default_factory=dict, description="the loss's keyword arguments")
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed_length"] | None = (
        Field(None, description="null: the loss's own default")
    )
    entropy_coefficient: Float = Field(0.0, description="weight of the entropy bonus; 0: none")
    kl: KLConfig = Field(KLConfig(), description="divergence from the reference")
    rollout_correction: RolloutCorrectionConfig = Field(
        RolloutCorrectionConfig(), description="for samplers that are not quite the learner"
    )
    mask_truncated: bool = Field(False, description="responses cut at the token limit take no part in the loss")
    whiten_advantages: bool = Field(False, description="to mean 0 and standard deviation 1 over the batch")
    dynamic_sampling: DynamicSamplingConfig | None = Field(None, description="null: learn from every group")
    plugins: tuple[PluginName, ...] = Field(
        (), description="modules or files to import, that register estimators or losses"
    )

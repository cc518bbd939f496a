"""Advantages, the policy loss, and their options."""

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
        "none",
        description="where the KL penalty is applied: loss adds it to each token's loss, reward subtracts it from "
        "each token's reward",
    )
    coefficient: NonNegativeFloat = Field(
        0.0, description="weight of the KL penalty; with adaptive_target, its initial value"
    )
    estimator: Literal["k1", "k2", "k3", "k1_straight_through", "k3_straight_through"] = Field(
        "k3", description="estimator of the KL divergence of one token; see docs/algorithms.md"
    )
    adaptive_target: PositiveFloat | None = Field(
        None,
        description="mean KL per token, in nats, that the coefficient is adapted to hold; null keeps the coefficient "
        "constant",
    )
    adaptive_horizon: PositiveInt = Field(
        10000, description="samples over which an adaptive coefficient changes by at most about a fifth"
    )
    reference: LocalOrNamed | None = Field(
        None,
        description="checkpoint of the reference model, as a local folder or hub name; null uses the initial policy",
    )

    @model_validator(mode="after")
    def _consistent(self) -> KLConfig:
        if self.placement != "none" and self.coefficient == 0.0:
            raise ValueError(
                f"kl.placement is {self.placement} but kl.coefficient is 0; set a coefficient, or placement to none"
            )
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
        description="token weight from the ratio of learner to sampler probability; truncate: min(ratio, upper); "
        "mask: the ratio within bounds, else 0; reject: 1 within bounds, else 0; none: 1",
    )
    level: Literal["token", "sequence", "geometric"] = Field(
        "token",
        description="what the ratio is computed over: each token, the whole response (product of token ratios), or "
        "the response's geometric mean",
    )
    upper: Annotated[Float, Field(ge=1)] = Field(2.0, description="upper bound of the ratio")
    lower: Fraction = Field(
        0.0, description="lower bound of the ratio, for mask and reject only; 0 means no lower bound"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RolloutCorrectionConfig:
        if self.mode in ("truncate", "none") and self.lower > 0:
            raise ValueError(f"lower {self.lower:g} has no effect with mode {self.mode}; set mode to mask or reject")
        if self.mode in ("mask", "reject") and self.lower >= self.upper:
            raise ValueError(
                f"lower {self.lower:g} is not below upper {self.upper:g}, so only ratios of exactly 1 would be kept"
            )
        return self


class DynamicSamplingConfig(Section):
    """Replace groups whose task rewards are all equal by groups of further prompts (DAPO)."""

    max_rounds: Annotated[Int, Field(ge=2)] = Field(
        10, description="maximum number of generation rounds per step, including the first"
    )


class AlgorithmConfig(Section):
    """Advantages, the policy loss, and their options."""

    advantage: str = Field(
        "grpo",
        description="advantage estimator: a registered name (docs/algorithms.md), or verl:NAME for one of verl's",
    )
    advantage_options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the advantage estimator"
    )
    loss: str = Field(
        "ppo_clip", description="policy loss: a registered name (docs/algorithms.md), or verl:NAME for one of verl's"
    )
    loss_options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the policy loss")
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed_length"] | None = (
        Field(
            None,
            description="how token losses are combined into the loss of a mini-batch (docs/algorithms.md); null uses "
            "the policy loss's default",
        )
    )
    entropy_coefficient: Float = Field(0.0, description="weight of the entropy bonus in the loss; 0 disables it")
    kl: KLConfig = Field(KLConfig(), description="KL penalty relative to a frozen reference model")
    rollout_correction: RolloutCorrectionConfig = Field(
        RolloutCorrectionConfig(),
        description="weights that correct for differences between the sampler's and the learner's probabilities",
    )
    mask_truncated: bool = Field(
        False,
        description="exclude responses that were cut off at the token limit from the loss; they still count in group "
        "statistics",
    )
    whiten_advantages: bool = Field(
        False,
        description="normalise advantages to mean 0 and standard deviation 1 over all tokens of the batch that are in "
        "the loss",
    )
    dynamic_sampling: DynamicSamplingConfig | None = Field(
        None,
        description="replace groups whose task rewards are all equal with groups of further prompts; null learns from "
        "every group",
    )
    plugins: tuple[PluginName, ...] = Field(
        (), description="modules or .py files to import because they register estimators or losses"
    )

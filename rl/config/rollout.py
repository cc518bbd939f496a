"""How responses are made and scored: sampling, engines, rewards, evaluation."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from rl.config.types import Float, Fraction, Int, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

# vLLM's arguments that other settings, placement or weight sync decide
_ENGINE_OWN = (
    *("model", "revision", "seed", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
    *("worker_extension_cls", "weight_transfer_config", "logprobs_mode"),
)


class RejectDegenerateConfig(Section):
    """What counts as endless repetition: one block of tokens, again and again up to the end of the response."""

    min_tokens: PositiveInt = Field(256, description="the repetition is at least so long")
    min_repeats: Annotated[Int, Field(ge=2)] = Field(8, description="and holds the block at least so often")
    max_period: PositiveInt = Field(64, description="tokens of the longest block that is looked for")


class RolloutConfig(Section):
    """Sampling and the vLLM engines."""

    num_workers: PositiveInt = 1
    tensor_parallel_size: PositiveInt = 1
    threads_per_worker: PositiveInt | None = Field(None, description="CPU threads; None: an even share of the cores")
    prompts_per_step: PositiveInt = 32
    group_size: PositiveInt = 8
    max_response_tokens: PositiveInt = 1024
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    min_p: Fraction = 0.0
    stop: tuple[str, ...] = ()
    reject_degenerate: RejectDegenerateConfig | None = Field(
        None, description="take responses that end in endless repetition out of the loss; None: keep them"
    )
    max_concurrent_sequences: PositiveInt = 256
    kv_cache_gib: PositiveFloat | None = Field(None, description="fixed KV cache an engine; None: measured by vLLM")
    gpu_memory_utilization: Annotated[Float, Field(gt=0, lt=1)] = 0.85
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    timeout_s: PositiveFloat = Field(1800.0, description="of generation without a group of samples finished")
    start_timeout_s: PositiveFloat = 900.0
    max_restarts: NonNegativeInt = Field(3, description="engine restarts a run before it gives up")
    engine_options: dict[str, Any] = Field(default_factory=dict, description="passed to vLLM's AsyncEngineArgs as is")

    @model_validator(mode="after")
    def _consistent(self) -> RolloutConfig:
        if taken := [key for key in _ENGINE_OWN if key in self.engine_options]:
            raise ValueError(
                f"engine_options holds {', '.join(taken)}, on which placement and weight sync depend; leave it out "
                "(rollout.tensor_parallel_size, model and seed are keys of their own)"
            )
        if self.kv_cache_gib is not None and self.sets("gpu_memory_utilization"):
            raise ValueError(
                f"kv_cache_gib {self.kv_cache_gib:g} fixes the cache, so gpu_memory_utilization "
                f"{self.gpu_memory_utilization:g} has no effect; leave one of them out"
            )
        _refuse_cuts_of_greedy(self)
        return self


class EvaluationConfig(Section):
    """Evaluation on data.eval, in training and by `fledge eval`."""

    every: NonNegativeInt = Field(0, description="steps; 0: not in training")
    at_start: bool = False
    samples_per_prompt: PositiveInt = 1
    pass_at: tuple[PositiveInt, ...] = (1,)
    temperature: NonNegativeFloat = 0.0
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    min_p: Fraction = 0.0
    max_response_tokens: PositiveInt | None = Field(None, description="None: as in rollout")

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        _refuse_cuts_of_greedy(self)
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                f"samples_per_prompt is {self.samples_per_prompt}, but at temperature 0 all of them are the same "
                "response; set a temperature, or samples_per_prompt to 1"
            )
        too_large = [k for k in self.pass_at if k > self.samples_per_prompt]
        if too_large:
            raise ValueError(
                f"pass_at holds {too_large} but samples_per_prompt is {self.samples_per_prompt}; "
                "pass@k needs at least k samples a prompt"
            )
        return self


def _refuse_cuts_of_greedy(config: RolloutConfig | EvaluationConfig) -> None:
    for key in ("top_p", "top_k", "min_p"):
        if config.temperature == 0 and config.sets(key):
            raise ValueError(
                f"{key} has no effect at temperature 0, which takes the likeliest token; set a temperature, or leave "
                f"{key} out"
            )


class RewardFunctionConfig(Section):
    """One reward of the weighted sum."""

    name: str = Field(description="registered name, package.module:function, or path/to/file.py:function")
    weight: Float = 1.0
    gate: bool = Field(False, description="the reward is at most 0 unless this part is positive")
    options: dict[str, Any] = Field(default_factory=dict)


class RewardConfig(Section):
    """How responses are scored."""

    functions: tuple[RewardFunctionConfig, ...] = (RewardFunctionConfig(name="math"),)
    clip: tuple[float, float] | None = None
    num_workers: PositiveInt = 2
    timeout_s: PositiveFloat = Field(30.0, description="deadline of one sample")
    batch_size: PositiveInt = Field(64, description="samples sent to a worker at a time")
    max_error_fraction: Fraction = Field(0.5, description="end the run when more samples of a step fail to be scored")

    @model_validator(mode="after")
    def _consistent(self) -> RewardConfig:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {list(self.clip)} leaves no room; its first number must be under its second")
        return self

"""How responses are made and scored: sampling, engines, rewards, evaluation."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from rl.config.types import Float, Fraction, Int, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

# vLLM's arguments that are keys here, and so must not be set twice, or that placement and weight sync decide ("")
_ENGINE_OWN = {
    "model": "model.path",
    "revision": "model.revision",
    "dtype": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "seed": "seed",
    "tensor_parallel_size": "rollout.tensor_parallel_size",
    "max_num_seqs": "rollout.max_concurrent_sequences",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "kv_cache_memory_bytes": "rollout.kv_cache_gib",
    "enforce_eager": "rollout.enforce_eager",
    "enable_prefix_caching": "rollout.enable_prefix_caching",
    **dict.fromkeys(("pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"), ""),
    **dict.fromkeys(("worker_extension_cls", "weight_transfer_config", "logprobs_mode"), ""),
}

_LEAST_TEMPERATURE = 0.01  # vLLM samples at this where less is asked for (`vllm.sampling_params._MAX_TEMP`)


def _sampled_as_asked(temperature: float) -> float:
    if 0.0 < temperature < _LEAST_TEMPERATURE:
        raise ValueError(
            f"vLLM would sample at {_LEAST_TEMPERATURE} in its place; set at least that, or 0 for the likeliest token"
        )
    return temperature


Temperature = Annotated[NonNegativeFloat, AfterValidator(_sampled_as_asked)]


class RejectDegenerateConfig(Section):
    """What counts as endless repetition: one block of tokens, again and again up to the end of the response."""

    min_tokens: PositiveInt = Field(256, description="the repetition is at least so long")
    min_repeats: Annotated[Int, Field(ge=2)] = Field(8, description="and holds the block at least so often")
    max_period: PositiveInt = Field(64, description="tokens of the longest block that is looked for")


class RolloutConfig(Section):
    """Sampling and the vLLM engines."""

    num_workers: PositiveInt = Field(1, description="vLLM engines")
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs of an engine (on CPUs: processes)")
    threads_per_worker: PositiveInt | None = Field(None, description="CPU threads; null: an even share of the cores")
    prompts_per_step: PositiveInt = Field(32, description="groups a training step")
    group_size: Annotated[Int, Field(ge=1, le=1 << 16)] = Field(8, description="responses a prompt")
    max_response_tokens: PositiveInt = Field(1024, description="longer responses are cut, and say so")
    temperature: Temperature = Field(1.0, description="of the samples to learn from")
    top_p: Annotated[Float, Field(gt=0, le=1)] = Field(1.0, description="1: all of the distribution")
    top_k: NonNegativeInt = Field(0, description="0: every token")
    min_p: Fraction = Field(0.0, description="0: every token")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="strings that end a response, and stay in it, beside the end of the turn"
    )
    reject_degenerate: RejectDegenerateConfig | None = Field(
        None, description="take responses that end in endless repetition out of the loss; null: keep them"
    )
    max_concurrent_sequences: PositiveInt = Field(256, description="that an engine generates at a time")
    kv_cache_gib: PositiveFloat | None = Field(
        None, description="fixed KV cache an engine; null: 1 on CPUs, measured on GPUs"
    )
    gpu_memory_utilization: Annotated[Float, Field(gt=0, lt=1)] = Field(
        0.85, description="the engine's share of its GPUs, weights included"
    )
    enforce_eager: bool = Field(False, description="no CUDA graphs and no compilation: starts faster, generates slower")
    enable_prefix_caching: bool = Field(True, description="keep the keys and values of prompts")
    timeout_s: PositiveFloat = Field(1800.0, description="seconds in which at least one group of samples must finish")
    start_timeout_s: PositiveFloat = Field(900.0, description="for an engine to load and warm up")
    max_restarts: NonNegativeInt = Field(
        3, description="losses in a row, of one engine or of many at once, without a batch in between, that are borne"
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict, description="passed to vLLM's AsyncEngineArgs; see docs/running.md"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RolloutConfig:
        for option, key in _ENGINE_OWN.items():
            if option in self.engine_options:
                decided = f"which is {key} here; set that" if key else "which placement and weight sync decide"
                raise ValueError(f"engine_options holds {option}, {decided}, and leave it out")
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
    at_start: bool = Field(False, description="before the first step, too")
    samples_per_prompt: PositiveInt = Field(1, description="responses a prompt, n of avg@n and maj@n")
    pass_at: tuple[PositiveInt, ...] = Field((1,), description="each k of pass@k")
    temperature: Temperature = Field(0.0, description="0: greedy")
    top_p: Annotated[Float, Field(gt=0, le=1)] = Field(1.0, description="1: all of the distribution")
    top_k: NonNegativeInt = Field(0, description="0: every token")
    min_p: Fraction = Field(0.0, description="0: every token")
    max_response_tokens: PositiveInt | None = Field(None, description="null: as in rollout")

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
    weight: Float = Field(1.0, description="in the sum")
    gate: bool = Field(False, description="the reward is at most 0 unless this part is positive")
    options: dict[str, Any] = Field(default_factory=dict, description="the reward's own keyword arguments")


class RewardConfig(Section):
    """How responses are scored."""

    functions: tuple[RewardFunctionConfig, ...] = Field(
        (RewardFunctionConfig(name="math"),), description="their weighted sum is the reward"
    )
    clip: tuple[float, float] | None = Field(None, description="bounds of the sum; null: none")
    num_workers: PositiveInt = Field(2, description="processes that score")
    timeout_s: PositiveFloat = Field(30.0, description="deadline of one sample")
    batch_size: PositiveInt = Field(64, description="samples sent to a worker at a time")
    max_error_fraction: Fraction = Field(0.5, description="end the run when more samples of a step fail to be scored")

    @model_validator(mode="after")
    def _consistent(self) -> RewardConfig:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {list(self.clip)} leaves no room; its first number must be under its second")
        return self

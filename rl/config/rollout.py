"""How responses are generated and scored: sampling, engines, rewards, evaluation."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from rl.config.types import Float, Fraction, Int, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

# vLLM arguments that engine_options must not set, because a key here sets them, or placement and weight sync do ("").
ENGINE_OWN = {
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
    **dict.fromkeys(("worker_cls", "worker_extension_cls", "weight_transfer_config", "logprobs_mode"), ""),
    **dict.fromkeys(("stream_interval", "enable_lora"), ""),
}

_LEAST_TEMPERATURE = 0.01  # vLLM raises anything lower to this (`vllm.sampling_params._MAX_TEMP`)


def _sampled_as_asked(temperature: float) -> float:
    if 0.0 < temperature < _LEAST_TEMPERATURE:
        raise ValueError(
            f"vLLM would sample at {_LEAST_TEMPERATURE} instead; set at least that, or 0 for greedy decoding"
        )
    return temperature


Temperature = Annotated[NonNegativeFloat, AfterValidator(_sampled_as_asked)]
TopP = Annotated[
    Float,
    Field(
        gt=0,
        le=1,
        description="sample only from the most likely tokens whose probabilities add up to this value; 1 means all "
        "tokens",
    ),
]
TopK = Annotated[NonNegativeInt, Field(description="sample only from this many most likely tokens; 0 means all tokens")]
MinP = Annotated[
    Fraction, Field(description="minimum probability of a token, relative to the most likely one; 0 means all tokens")
]


class RejectDegenerateConfig(Section):
    """What counts as endless repetition: one block of tokens, repeated up to the end of the response."""

    min_tokens: PositiveInt = Field(256, description="minimum length of the repetition in tokens")
    min_repeats: Annotated[Int, Field(ge=2)] = Field(
        8, description="minimum number of times that the block is repeated"
    )
    max_period: PositiveInt = Field(64, description="maximum length of the repeated block in tokens")


class RolloutConfig(Section):
    """Sampling and the vLLM engines."""

    num_workers: PositiveInt = Field(1, description="number of rollout workers, each with one vLLM engine")
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs per engine (on CPUs: processes per engine)")
    threads_per_worker: PositiveInt | None = Field(
        None,
        description="CPU threads per process of an engine; null uses an even share of the cores that its job or "
        "container may use; has no effect on GPUs",
    )
    prompts_per_step: PositiveInt = Field(32, description="prompts, and so groups of responses, per training step")
    group_size: Annotated[Int, Field(ge=1, le=1 << 16)] = Field(8, description="responses per prompt")
    max_response_tokens: PositiveInt = Field(
        1024, description="maximum length of a response in tokens; longer responses are cut off and marked as truncated"
    )
    temperature: Temperature = Field(
        1.0, description="sampling temperature of training rollouts; 0 means greedy decoding"
    )
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="strings that end a response, in addition to the end of the turn; they stay in the response"
    )
    reject_degenerate: RejectDegenerateConfig | None = Field(
        None,
        description="exclude responses that end in endless repetition from the loss and from group statistics; null "
        "keeps them",
    )
    max_concurrent_sequences: PositiveInt = Field(
        256, description="maximum number of sequences that an engine generates at a time"
    )
    kv_cache_gib: PositiveFloat | None = Field(
        None,
        description="size of the KV cache in GiB per GPU (on CPUs: per process); null means 1 on CPUs, and what "
        "gpu_memory_utilization leaves on GPUs",
    )
    gpu_memory_utilization: Annotated[Float, Field(gt=0, lt=1)] = Field(
        0.85,
        description="fraction of each GPU's memory that the engine may use, weights included; has no effect on CPUs "
        "or with kv_cache_gib",
    )
    enforce_eager: bool = Field(
        False, description="turn off CUDA graphs and compilation: engines start faster but generate more slowly"
    )
    enable_prefix_caching: bool = Field(
        True, description="reuse the cached keys and values of prompts; deterministic turns this off"
    )
    timeout_s: PositiveFloat = Field(
        1800.0, description="seconds within which at least one group of responses must finish"
    )
    hang_timeout_s: PositiveFloat = Field(
        600.0,
        description="seconds allowed for one step of an engine, which generates a token of every sequence; an engine "
        "that takes longer counts as lost",
    )
    start_timeout_s: PositiveFloat = Field(900.0, description="seconds allowed for an engine to load and warm up")
    max_restarts: NonNegativeInt = Field(
        3,
        description="tolerated number of engine losses in a row without a finished batch in between; several engines "
        "lost at once count as one",
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict, description="further arguments for vLLM's AsyncEngineArgs; see docs/running.md"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RolloutConfig:
        for option, key in ENGINE_OWN.items():
            if option in self.engine_options:
                decided = f"which is {key} here; set that instead" if key else "which placement and weight sync decide"
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

    every: NonNegativeInt = Field(
        0,
        description="training steps between evaluations, with one more after the last step; 0 disables them",
    )
    at_start: bool = Field(False, description="also evaluate before the first training step")
    samples_per_prompt: PositiveInt = Field(1, description="responses per prompt: the n of avg@n and maj@n")
    pass_at: tuple[PositiveInt, ...] = Field(
        (1,), description="values of k for which pass@k is reported; at most samples_per_prompt"
    )
    temperature: Temperature = Field(0.0, description="sampling temperature of evaluation; 0 means greedy decoding")
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    max_response_tokens: PositiveInt | None = Field(
        None, description="maximum length of a response in tokens; null uses rollout.max_response_tokens"
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        _refuse_cuts_of_greedy(self)
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                f"samples_per_prompt is {self.samples_per_prompt}, but at temperature 0 all responses to a prompt are "
                "the same; set a temperature, or samples_per_prompt to 1"
            )
        too_large = [k for k in self.pass_at if k > self.samples_per_prompt]
        if too_large:
            raise ValueError(
                f"pass_at holds {too_large} but samples_per_prompt is {self.samples_per_prompt}; pass@k needs at "
                "least k samples per prompt"
            )
        return self


def _refuse_cuts_of_greedy(config: RolloutConfig | EvaluationConfig) -> None:
    for key in ("top_p", "top_k", "min_p"):
        if config.temperature == 0 and config.sets(key):
            raise ValueError(
                f"{key} has no effect at temperature 0, which always takes the most likely token; set a temperature, "
                f"or leave {key} out"
            )


class RewardFunctionConfig(Section):
    """One reward of the weighted sum."""

    name: str = Field(description="registered name, package.module:function, or path/to/file.py:function")
    weight: Float = Field(1.0, description="weight of this reward in the sum")
    gate: bool = Field(False, description="limit the weighted sum to at most 0 unless this reward is positive")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the reward")


class RewardConfig(Section):
    """How responses are scored."""

    functions: tuple[RewardFunctionConfig, ...] = Field(
        (RewardFunctionConfig(name="math"),), description="rewards whose weighted sum is the reward of a response"
    )
    clip: tuple[float, float] | None = Field(
        None, description="lower and upper bound of the weighted sum; null means no bounds"
    )
    num_workers: PositiveInt = Field(2, description="number of worker processes that score responses")
    timeout_s: PositiveFloat = Field(30.0, description="seconds allowed for scoring one sample")
    batch_size: PositiveInt = Field(64, description="number of samples sent to a reward worker at a time")
    max_error_fraction: Fraction = Field(
        0.5, description="end the run if more than this fraction of a step's samples cannot be scored"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RewardConfig:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {list(self.clip)} leaves no room; its first number must be under its second")
        return self

"""The configuration schema. Frozen pydantic models; code gets its own section, never the root and never a DictConfig.

Loading and composing files is in `rl.config_loading`. Left out: torch, ray, vllm, deepspeed, and checks that need them
(`launch.preflight`).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rl.config_types import (
    Beta,
    Float,
    Fraction,
    Int,
    LocalOrNamed,
    NonNegativeFloat,
    NonNegativeInt,
    PluginName,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
)

# vLLM's arguments that other settings, placement or weight sync decide
_ENGINE_OWN = (
    *("model", "revision", "seed", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
    *("worker_extension_cls", "weight_transfer_config", "logprobs_mode"),
)


class ModelConfig(Section):
    """The policy."""

    path: LocalOrNamed = Field(description="local folder or hub name of a Hugging Face checkpoint")
    revision: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "auto", description="the learner's attention; auto takes the best exact one for the model and the device"
    )
    trust_remote_code: bool = False
    chat_template: LocalOrNamed | None = Field(
        None, description="file with a Jinja chat template, in place of the tokenizer's"
    )
    chat_template_options: dict[str, Any] = Field(
        default_factory=dict, description="passed to the template, e.g. enable_thinking or reasoning_effort"
    )


class DatasetConfig(Section):
    """Where prompts come from."""

    path: str = Field(description="JSONL or Parquet file, local dataset folder, hub name, or reasoning_gym:TASK")
    name: str | None = Field(None, description="how metrics and files call it; default: from the path")
    split: str = "train"
    subset: str | None = Field(None, description="a hub dataset's configuration name")
    prompt_field: str = "prompt"
    ground_truth_field: str | None = Field("ground_truth", description="None: the rewards need no ground truth")
    system_prompt: str | None = None
    prompt_suffix: str = Field("", description="appended to the user's message, e.g. how to give the answer")
    size: PositiveInt | None = Field(None, description="use only the first rows; for reasoning_gym, how many to make")
    seed: Seed = Field(0, description="for generated tasks")
    options: dict[str, Any] = Field(default_factory=dict, description="for reasoning_gym: the task's own settings")
    reward: str | None = Field(None, description="reward for these rows in place of the config's")


class CurriculumConfig(Section):
    """Prompts by running pass rate p: each is kept with chance 4 p (1 - p), where the order comes to it."""

    decay: Annotated[Float, Field(ge=0, lt=1)] = Field(0.5, description="weight of the old rate in the running mean")
    floor: Annotated[Float, Field(ge=0.01, le=1)] = Field(0.05, description="smallest chance, so that none is lost")
    right_above: Float = Field(0.0, description="a response is right when its task reward is above this")


class DataConfig(Section):
    """Training and evaluation prompts."""

    train: DatasetConfig
    eval: tuple[DatasetConfig, ...] = ()
    shuffle: bool = True
    curriculum: CurriculumConfig | None = Field(None, description="None: every prompt once an epoch")
    max_prompt_tokens: PositiveInt = 1024
    keep_held_out: bool = Field(False, description="train also on prompts that are in eval; they are dropped otherwise")

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        for dataset in self.eval:
            if dataset.name is not None and ("/" in dataset.name or not dataset.name.isprintable()):
                raise ValueError(
                    f"eval has the name {dataset.name!r}, which becomes part of file names; leave out slashes and "
                    "control characters"
                )
        return self


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


class KLConfig(Section):
    """Divergence from the frozen reference."""

    placement: Literal["none", "loss", "reward"] = "none"
    coefficient: NonNegativeFloat = 0.0
    estimator: Literal["k1", "k2", "k3", "k1_straight_through", "k3_straight_through"] = "k3"
    adaptive_target: PositiveFloat | None = Field(None, description="adaptive coefficient: the KL to hold")
    adaptive_horizon: PositiveInt = 10000
    reference: LocalOrNamed | None = Field(None, description="checkpoint of the reference; None: the initial policy")

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

    mode: Literal["none", "truncate", "mask", "reject"] = "truncate"
    level: Literal["token", "sequence", "geometric"] = "token"
    upper: PositiveFloat = 2.0
    lower: NonNegativeFloat = Field(0.0, description="for mask and reject: ratios under it are left out too")

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
    advantage_options: dict[str, Any] = Field(default_factory=dict)
    loss: str = Field("ppo_clip", description="a registered policy loss, or verl:NAME")
    loss_options: dict[str, Any] = Field(default_factory=dict)
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed_length"] | None = (
        Field(None, description="None: the loss's own default")
    )
    entropy_coefficient: Float = 0.0
    kl: KLConfig = KLConfig()
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
    mask_truncated: bool = Field(False, description="responses cut at the token limit take no part in the loss")
    whiten_advantages: bool = False
    dynamic_sampling: DynamicSamplingConfig | None = Field(None, description="None: learn from every group")
    plugins: tuple[PluginName, ...] = Field(
        (), description="modules or files to import, that register estimators or losses"
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


class SyncConfig(Section):
    """Weights from the learner to the rollout workers."""

    transport: Literal["auto", "shm", "nccl", "ipc"] = "auto"
    bucket_mib: PositiveInt = 256
    timeout_s: PositiveFloat = 300.0
    probe_every: NonNegativeInt = Field(
        20, description="syncs between log-probability probes after the first; 0: never"
    )
    probe_tolerance: PositiveFloat | None = Field(
        None,
        description="largest mean |difference| allowed; None: 1e-4 in float32, 0.05 in bfloat16. In float32 one token "
        "may differ by ten times as much",
    )


class CheckpointConfig(Section):
    """Run state on disk."""

    every: NonNegativeInt = Field(50, description="steps; 0: only at the end")
    keep: PositiveInt = 2


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


class LoggingConfig(Section):
    """Where metrics and samples go, beside metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"
    samples_every: NonNegativeInt = Field(1, description="steps between sample files; 0: none")
    samples_per_step: PositiveInt = 64


class RayConfig(Section):
    """The cluster. RAY_ADDRESS in the environment joins a running one."""

    address: str | None = Field(None, description="None: RAY_ADDRESS, else a local cluster that ends with the run")
    colocate: bool = Field(False, description="rollout and learner workers share the GPUs")
    rollout_resources: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="custom resources a rollout worker"
    )
    learner_resources: dict[str, NonNegativeFloat] = Field(default_factory=dict)


class RunConfig(Section):
    """What training and supervised warm start have in common."""

    name: str = "run"
    run_dir: str = Field("runs/default", description="everything the run writes")
    seed: Seed = 0
    deterministic: bool = Field(False, description="two runs of the same config write the same weights, bit for bit")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig
    learner: LearnerConfig = LearnerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    ray: RayConfig = RayConfig()


class TrainConfig(RunConfig):
    """`fledge train` and `fledge eval`."""

    total_steps: PositiveInt = 100
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig | None = Field(None, description="None: no critic; {} is one with every default")
    sync: SyncConfig = SyncConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        samples = self.rollout.prompts_per_step * self.rollout.group_size
        if samples % self.learner.mini_batches:
            raise ValueError(
                f"rollout.prompts_per_step {self.rollout.prompts_per_step} x rollout.group_size "
                f"{self.rollout.group_size} = {samples} samples do not divide into learner.mini_batches "
                f"{self.learner.mini_batches}"
            )
        if samples // self.learner.mini_batches < self.learner.num_workers:
            raise ValueError(
                f"a mini-batch of {samples // self.learner.mini_batches} samples cannot feed learner.num_workers "
                f"{self.learner.num_workers}; raise rollout.prompts_per_step or lower learner.mini_batches"
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if self.learner.max_tokens_per_microbatch < longest:
            raise ValueError(
                f"learner.max_tokens_per_microbatch {self.learner.max_tokens_per_microbatch} is under the longest "
                f"sequence, data.max_prompt_tokens {self.data.max_prompt_tokens} + rollout.max_response_tokens "
                f"{self.rollout.max_response_tokens} = {longest}; raise it to at least {longest}"
            )
        if self.critic is not None and self.critic.warmup_steps >= self.total_steps:
            raise ValueError(
                f"critic.warmup_steps {self.critic.warmup_steps} leaves no step of total_steps {self.total_steps} for "
                "the policy; lower it"
            )
        if (self.evaluation.every or self.evaluation.at_start) and not self.data.eval:
            key = "every" if self.evaluation.every else "at_start"
            raise ValueError(
                f"evaluation.{key} is set but data.eval is empty; add a dataset, or leave evaluation.{key} out"
            )
        if self.deterministic and self.rollout.temperature > 0 and self.model.dtype != "float32":
            raise ValueError("deterministic needs model.dtype float32 (bit-exact runs are a CPU float32 promise)")
        return self

    @model_validator(mode="after")
    def _devices_can_work(self) -> TrainConfig:
        rollout, learner = self.rollout, self.learner
        if self.device == "cpu" and self.sync.transport in ("nccl", "ipc"):
            raise ValueError(
                f"sync.transport {self.sync.transport} needs GPUs, but device is cpu; set it to auto or shm"
            )
        if self.device == "cpu" and learner.moe.router_replay:
            raise ValueError("learner.moe.router_replay needs vLLM's record of experts, which it keeps on GPUs only")
        if learner.moe.router_replay and (self.deterministic or not rollout.enable_prefix_caching):
            raise ValueError(
                "learner.moe.router_replay needs rollout.enable_prefix_caching (vLLM's condition), which is false or "
                "turned off by deterministic; set router_replay to false, or change these"
            )
        if not self.ray.colocate or self.device == "cpu":
            return self
        if rollout.tensor_parallel_size > 1 or rollout.num_workers > learner.num_workers:
            raise ValueError(
                "ray.colocate puts one rollout worker beside a learner on its GPU, but rollout.num_workers is "
                f"{rollout.num_workers} with tensor_parallel_size {rollout.tensor_parallel_size}, and "
                f"learner.num_workers {learner.num_workers}; use at most as many rollout workers, each of size 1"
            )
        shares = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
        said = "gpu_memory_utilization" in rollout.model_fields_set or bool(shares & rollout.engine_options.keys())
        if rollout.kv_cache_gib is None and not said:
            raise ValueError(
                "ray.colocate lets the engine take rollout.gpu_memory_utilization "
                f"{rollout.gpu_memory_utilization:g} of the GPU before the learner loads; set it to the engine's "
                "share, or set rollout.kv_cache_gib"
            )
        return self

    @model_validator(mode="after")
    def _correction_can_work(self) -> TrainConfig:
        rollout, correction = self.rollout, self.algorithm.rollout_correction
        cut = {"top_p": rollout.top_p < 1, "top_k": rollout.top_k > 0, "min_p": rollout.min_p > 0}
        if any(cut.values()) and correction.level == "sequence" and correction.mode != "none":
            raise ValueError(
                f"rollout.{next(key for key, is_cut in cut.items() if is_cut)} cuts the sampler's distribution, so "
                "each token's ratio is under 1, and their product over a response next to 0: nothing would be learned. "
                "Set algorithm.rollout_correction.level to token or geometric, or sample from the whole distribution"
            )
        return self

    @model_validator(mode="after")
    def _shaping_can_work(self) -> TrainConfig:
        rollout = self.rollout
        if self.algorithm.dynamic_sampling is not None and (rollout.group_size < 2 or rollout.temperature == 0):
            raise ValueError(
                "algorithm.dynamic_sampling keeps groups whose rewards differ, but rollout.group_size "
                f"{rollout.group_size} at rollout.temperature {rollout.temperature:g} gives none; set at least 2, and "
                "a temperature over 0"
            )
        limits = rollout.reject_degenerate
        if limits is not None and limits.min_tokens > rollout.max_response_tokens:
            raise ValueError(
                f"rollout.reject_degenerate.min_tokens {limits.min_tokens} is over rollout.max_response_tokens "
                f"{rollout.max_response_tokens}, so nothing could be rejected; lower it"
            )
        return self


class SftDataConfig(Section):
    """Worked examples: rows with a prompt and a response."""

    train: DatasetConfig
    response_field: str = "response"
    max_tokens: PositiveInt = Field(2048, description="longer examples are dropped and counted")


class SftConfig(RunConfig):
    """`fledge sft`: supervised warm start with the same learner."""

    epochs: PositiveInt = 1
    batch_size: PositiveInt = 32
    data: SftDataConfig

    @model_validator(mode="after")
    def _consistent(self) -> SftConfig:
        for key in ("epochs", "mini_batches"):
            if getattr(self.learner, key) != 1:
                raise ValueError(
                    f"learner.{key} is {getattr(self.learner, key)}, but a supervised step is one update of its batch; "
                    "leave it out, and set epochs (at the top level) and batch_size"
                )
        for section, keys in (
            ("data.train", ("reward",)),
            ("learner", ("offload_reference",)),
            ("learner.moe", ("router_replay",)),
            ("logging", ("samples_every", "samples_per_step")),
            ("ray", ("colocate", "rollout_resources")),
        ):
            for key in filter(attrgetter(section)(self).sets, keys):
                raise ValueError(f"{section}.{key} has no effect in a supervised run; leave it out, or set it to null")
        if self.learner.max_tokens_per_microbatch < self.data.max_tokens:
            raise ValueError(
                f"learner.max_tokens_per_microbatch {self.learner.max_tokens_per_microbatch} is under data.max_tokens "
                f"{self.data.max_tokens}, the longest example; raise it, or lower data.max_tokens"
            )
        return self

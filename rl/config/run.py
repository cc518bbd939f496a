"""Whole runs: `fledge train`, `fledge sft`, and the sections they share."""

from __future__ import annotations

from operator import attrgetter
from typing import Literal

from pydantic import Field, model_validator

from rl.config.algorithm import AlgorithmConfig
from rl.config.data import DataConfig, ModelConfig, SftDataConfig
from rl.config.learner import CriticConfig, LearnerConfig
from rl.config.rollout import EvaluationConfig, RewardConfig, RolloutConfig
from rl.config.types import Folder, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Seed


class SyncConfig(Section):
    """Transfer of weights from the learner to the rollout workers."""

    transport: Literal["auto", "shm", "nccl", "ipc"] = Field(
        "auto",
        description="how weights are sent; auto means shm without GPUs, ipc with ray.colocate, else nccl; see "
        "docs/weight-sync.md",
    )
    bucket_mib: PositiveInt = Field(
        256, description="maximum size of one message in MiB; a larger tensor is sent in a message of its own"
    )
    timeout_s: PositiveFloat = Field(
        300.0, description="seconds allowed for one message; over nccl and ipc, for a whole sync"
    )
    probe_every: NonNegativeInt = Field(
        20, description="steps between log-probability probes, in addition to one at the first step; 0 disables probes"
    )
    logprob_tolerance: PositiveFloat | None = Field(
        None,
        description="maximum mean |log-probability difference| between sampler and learner (in float32, ten times "
        "this for one token), else the run ends; null: float32 1e-4, bfloat16 0.1, with experts 0.3",
    )


class CheckpointConfig(Section):
    """Run state on disk."""

    every: NonNegativeInt = Field(50, description="steps between checkpoints; 0 saves only when the run ends")
    keep: PositiveInt | None = Field(
        2, description="number of checkpoints to keep on disk, the newest ones; null keeps all"
    )
    keep_best: str | None = Field(
        None,
        description="metric of the evaluation, such as eval/NAME/pass@1; of the evaluated checkpoints, the one with "
        "its highest value is kept as well. null keeps only the newest",
    )


class LoggingConfig(Section):
    """Where metrics and samples go, beside metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard event files to run_dir/tensorboard")
    wandb_project: str | None = Field(None, description="Weights & Biases project to log to; null disables W&B")
    wandb_mode: Literal["online", "offline"] | None = Field(
        None,
        description="online, or offline to write files that `wandb sync` uploads later; null: what WANDB_MODE says, or "
        "else online",
    )
    samples_every: NonNegativeInt = Field(
        1, description="training steps between sample files in run_dir/samples; 0 writes none"
    )
    samples_per_step: PositiveInt = Field(
        64, description="maximum number of samples in a sample file, the first ones of its step"
    )


_RAYS_OWN_RESOURCES = {"CPU", "GPU", "memory", "object_store_memory"}


class RayConfig(Section):
    """The Ray cluster. Setting RAY_ADDRESS in the environment joins a running one."""

    address: str | None = Field(
        None,
        description="address of the Ray cluster to join; null uses RAY_ADDRESS if set, else a local cluster that ends "
        "with the run",
    )
    colocate: bool = Field(False, description="let rollout and learner workers share GPUs")
    placement_timeout_s: PositiveFloat = Field(
        120.0, description="seconds to wait for GPUs while nodes are still joining the cluster or other runs hold them"
    )
    forward_env: tuple[str, ...] = Field(
        ("GLOO_*", "HF_*", "NCCL_*", "OPENAI_API_KEY"),
        description="environment variables (names, or patterns with *) of this process that workers on a joined "
        "cluster get too; the others come from `ray start`",
    )
    rollout_resources: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="custom Ray resources that each rollout worker requests"
    )
    learner_resources: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="custom Ray resources that each learner worker requests"
    )

    @model_validator(mode="after")
    def _custom(self) -> RayConfig:
        for key in ("rollout_resources", "learner_resources"):
            if own := sorted(_RAYS_OWN_RESOURCES & getattr(self, key).keys()):
                raise ValueError(
                    f"{key} holds {', '.join(own)}, which placement decides; it is for custom resources that nodes "
                    "were started with, as in `ray start --resources '{\"learner\": 1}'`"
                )
        return self


class RunConfig(Section):
    """What training and supervised warm start have in common."""

    name: str = Field("run", description="name of the run in displays and loggers")
    run_dir: Folder = Field("runs/default", description="folder for everything that the run writes")
    seed: Seed = Field(0, description="seed of everything random")
    deterministic: bool = Field(
        False,
        description="make runs of the same configuration end with the same weights, bit for bit; CPU and float32 only",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto uses GPUs if the cluster has them and the installed torch supports them, else CPUs"
    )
    model: ModelConfig = Field(description="the policy")
    learner: LearnerConfig = Field(LearnerConfig(), description="workers that train the model")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="saving of the run's state to disk")
    logging: LoggingConfig = Field(LoggingConfig(), description="where metrics and samples are written")
    ray: RayConfig = Field(RayConfig(), description="the Ray cluster and where workers run on it")

    @model_validator(mode="after")
    def _deterministic_can_work(self) -> RunConfig:
        if self.deterministic and self.device == "cuda":
            raise ValueError(
                "deterministic promises bit-identical weights, which GPUs cannot guarantee, but device is cuda; set "
                "deterministic to false, or device to cpu"
            )
        return self


class TrainConfig(RunConfig):
    """`fledge train` and `fledge eval`."""

    total_steps: PositiveInt = Field(100, description="number of training steps")
    total_epochs: PositiveFloat | None = Field(
        None,
        description="length of the run in passes over the training prompts, instead of total_steps; null uses "
        "total_steps",
    )
    data: DataConfig = Field(description="training and evaluation prompts")
    rollout: RolloutConfig = Field(RolloutConfig(), description="sampling and the vLLM engines")
    reward: RewardConfig = Field(RewardConfig(), description="how responses are scored")
    algorithm: AlgorithmConfig = Field(AlgorithmConfig(), description="how the policy learns from the scores")
    critic: CriticConfig | None = Field(
        None,
        description="value model, for advantage estimators that need one; null means no critic, {} one with every "
        "default",
    )
    sync: SyncConfig = Field(SyncConfig(), description="sending weights from the learner to the engines")
    evaluation: EvaluationConfig = Field(
        EvaluationConfig(), description="how data.eval is evaluated, during training and by `fledge eval`"
    )

    @property
    def optimizer_steps(self) -> int:
        """Of the whole run; the policy makes fewer while only its critic learns."""
        return self.total_steps * self.learner.epochs * self.learner.mini_batches

    @property
    def policy_optimizer_steps(self) -> int:
        frozen = self.critic.warmup_steps if self.critic is not None else 0
        return (self.total_steps - frozen) * self.learner.epochs * self.learner.mini_batches

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.total_epochs is not None and "total_steps" in self.model_fields_set:
            raise ValueError(
                f"total_steps {self.total_steps} and total_epochs {self.total_epochs:g} both set the length of the "
                "run; leave one of them out, or set it to null"
            )
        samples = self.rollout.prompts_per_step * self.rollout.group_size
        if samples % self.learner.mini_batches:
            raise ValueError(
                f"rollout.prompts_per_step {self.rollout.prompts_per_step} x rollout.group_size "
                f"{self.rollout.group_size} = {samples} samples cannot be divided evenly into learner.mini_batches "
                f"{self.learner.mini_batches}; set it to a divisor of {samples}"
            )
        if samples // self.learner.mini_batches < self.learner.num_workers:
            raise ValueError(
                f"a mini-batch of {samples // self.learner.mini_batches} samples is too small for learner.num_workers "
                f"{self.learner.num_workers}; raise rollout.prompts_per_step or lower learner.mini_batches"
            )
        kl = self.algorithm.kl
        if kl.adaptive_target is not None and kl.adaptive_horizon < samples:
            raise ValueError(
                f"algorithm.kl.adaptive_horizon {kl.adaptive_horizon} is less than the {samples} samples of a step, "
                "so one step could change the coefficient by more than a fifth, or even make it negative; set it to "
                "the samples of several steps"
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if self.learner.max_tokens_per_microbatch < longest:
            raise ValueError(
                f"learner.max_tokens_per_microbatch {self.learner.max_tokens_per_microbatch} is less than the longest "
                f"sequence, data.max_prompt_tokens {self.data.max_prompt_tokens} + rollout.max_response_tokens "
                f"{self.rollout.max_response_tokens} = {longest}; raise it to at least {longest}"
            )
        known = self.total_epochs is None
        if self.critic is not None and known and self.critic.warmup_steps >= self.total_steps:
            raise ValueError(
                f"critic.warmup_steps {self.critic.warmup_steps} leaves none of total_steps {self.total_steps} for "
                "the policy to learn in; lower it"
            )
        if (self.evaluation.every or self.evaluation.at_start) and not self.data.eval:
            key = "every" if self.evaluation.every else "at_start"
            raise ValueError(
                f"evaluation.{key} is set but data.eval is empty; add a dataset, or leave evaluation.{key} out"
            )
        if self.deterministic and self.rollout.temperature > 0 and self.model.dtype != "float32":
            raise ValueError("deterministic needs model.dtype float32 (runs are bit-exact only on CPUs in float32)")
        return self

    @model_validator(mode="after")
    def _best_can_be_found(self) -> TrainConfig:
        checkpoint, evaluation = self.checkpoint, self.evaluation
        if checkpoint.keep_best is None:
            return self
        if checkpoint.keep is None:
            raise ValueError("checkpoint.keep_best has no effect where checkpoint.keep null keeps all; leave one out")
        if not evaluation.every or not checkpoint.every or evaluation.every % checkpoint.every:
            raise ValueError(
                f"checkpoint.keep_best needs checkpoints of the steps that are evaluated, but evaluation.every is "
                f"{evaluation.every} and checkpoint.every {checkpoint.every}; make the first a multiple of the second"
            )
        return self

    @model_validator(mode="after")
    def _devices_can_work(self) -> TrainConfig:
        rollout, learner = self.rollout, self.learner
        if self.device == "cpu" and self.sync.transport in ("nccl", "ipc"):
            raise ValueError(
                f"sync.transport {self.sync.transport} needs GPUs, but device is cpu; set it to auto or shm"
            )
        if self.device == "cpu" and learner.moe.router_replay:
            raise ValueError(
                "learner.moe.router_replay needs the experts that vLLM chose, which it records on GPUs only, but "
                "device is cpu; set it to false"
            )
        if learner.moe.router_replay and (self.deterministic or not rollout.enable_prefix_caching):
            raise ValueError(
                "learner.moe.router_replay needs rollout.enable_prefix_caching (a condition of vLLM), which is false "
                "or turned off by deterministic; set router_replay to false, or change these"
            )
        if not self.ray.colocate or self.device == "cpu":
            return self
        if rollout.tensor_parallel_size > 1 or rollout.num_workers > learner.num_workers:
            raise ValueError(
                "ray.colocate puts at most one rollout worker on each learner's GPU, but rollout.num_workers is "
                f"{rollout.num_workers} with tensor_parallel_size {rollout.tensor_parallel_size}, and "
                f"learner.num_workers is {learner.num_workers}; use at most as many rollout workers as learners, each "
                "with tensor_parallel_size 1"
            )
        if rollout.kv_cache_gib is None and "gpu_memory_utilization" not in rollout.model_fields_set:
            raise ValueError(
                "with ray.colocate, the engine would take rollout.gpu_memory_utilization "
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
                f"rollout.{next(key for key, is_cut in cut.items() if is_cut)} truncates the sampler's distribution, "
                "so each token's ratio is below 1, and their product over a response is close to 0: nothing would be "
                "learned. Set algorithm.rollout_correction.level to token or geometric, or sample from the whole "
                "distribution"
            )
        return self

    @model_validator(mode="after")
    def _shaping_can_work(self) -> TrainConfig:
        rollout = self.rollout
        if self.algorithm.dynamic_sampling is not None and (rollout.group_size < 2 or rollout.temperature == 0):
            raise ValueError(
                "algorithm.dynamic_sampling keeps groups whose rewards differ, but rollout.group_size "
                f"{rollout.group_size} at rollout.temperature {rollout.temperature:g} gives none; set group_size to "
                "at least 2, and the temperature above 0"
            )
        limits = rollout.reject_degenerate
        if limits is not None and limits.min_tokens > rollout.max_response_tokens:
            raise ValueError(
                f"rollout.reject_degenerate.min_tokens {limits.min_tokens} is more than rollout.max_response_tokens "
                f"{rollout.max_response_tokens}, so nothing could be rejected; lower it"
            )
        return self


class SftEvaluationConfig(Section):
    """When a supervised run measures its loss on data.eval."""

    every: NonNegativeInt = Field(0, description="optimizer steps between evaluations; 0: only at the start and end")


class SftConfig(RunConfig):
    """`fledge sft`: supervised warm start with the same learner."""

    epochs: PositiveInt = Field(1, description="passes over the examples")
    batch_size: PositiveInt = Field(32, description="examples per optimizer step")
    data: SftDataConfig = Field(description="worked examples")
    evaluation: SftEvaluationConfig = Field(SftEvaluationConfig(), description="when data.eval is evaluated")

    @model_validator(mode="after")
    def _consistent(self) -> SftConfig:
        for key in ("epochs", "mini_batches"):
            if getattr(self.learner, key) != 1:
                raise ValueError(
                    f"learner.{key} is {getattr(self.learner, key)}, but a supervised step makes one optimizer step "
                    "on its batch; leave it out, and set epochs (at the top level) and batch_size instead"
                )
        for section, keys in (
            ("data.train", ("reward", "ground_truth_field")),
            *([("data.eval", ("reward", "ground_truth_field"))] if self.data.eval else []),
            ("learner", ("offload_reference",)),
            ("learner.moe", ("router_replay",)),
            ("logging", ("samples_every", "samples_per_step")),
            ("checkpoint", ("keep_best",)),
            ("ray", ("colocate", "rollout_resources")),
        ):
            for key in filter(attrgetter(section)(self).sets, keys):
                if attrgetter(f"{section}.{key}")(self) is not None:
                    raise ValueError(
                        f"{section}.{key} has no effect in a supervised run; leave it out, or set it to null"
                    )
        if self.evaluation.every and self.data.eval is None:
            raise ValueError(
                "evaluation.every is set but data.eval is not; add a dataset, or leave evaluation.every out"
            )
        if self.learner.max_tokens_per_microbatch < self.data.max_tokens:
            raise ValueError(
                f"learner.max_tokens_per_microbatch {self.learner.max_tokens_per_microbatch} is less than "
                f"data.max_tokens {self.data.max_tokens}, the longest example; raise it, or lower data.max_tokens"
            )
        return self

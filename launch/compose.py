"""The composition root: from a validated configuration to running parts. Nothing else builds workers.

Left out: the command line (`launch.cli`), and what the parts do.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from launch.cluster import ray_cluster, resolve_device
from launch.data import CheckedRun
from launch.placement import place_rollouts, place_train_workers
from rewards.workers import RewardPool
from rl.advantages import build_train_batch, estimate
from rl.batch import Annotations, Prompt, ScoredBatch, TrainBatch
from rl.checkpoint import CheckpointStore
from rl.config import AlgorithmConfig, RolloutConfig, RunConfig, SftConfig, TrainConfig
from rl.controller import Controller
from rl.data_shaping import PassRateCurriculum, StepGroups
from rl.evaluation import Evaluator
from rl.learner_group import LearnerGroup
from rl.metrics import JsonlSink, MetricSink, Record, TensorBoardSink, WandbSink, best_step
from rl.models import has_experts, load_config
from rl.probe import AgreementBounds, WeightProbe
from rl.prompts import ChatTemplate, CurriculumSource, PromptSource, load_tokenizer
from rl.run import Display, RunPlan, TrainingRun
from rl.weight_sync.api import Transport, resolve_transport
from rl.workers import WATCH, LearnerSpec, LearnerWorker, SyncSpec
from rollout.engine import RolloutEngine
from rollout.pool import RolloutPool, evaluation_parameters, sampling_parameters
from rollout.roster import Roster
from rollout.vllm_options import EngineSpec
from rollout.workers import DecodeResponse, RolloutWorker

# What a resumed run must share with its checkpoint. How long, how often and where it runs may change.
_LEARNER_FIXED = (
    *("seed", "model.path", "model.revision", "model.dtype"),
    *("learner.optimizer.name", "learner.moe.freeze_router"),
)
_SFT_FIXED = (*_LEARNER_FIXED, "data.train", "data.response_field", "data.max_tokens", "batch_size")
_TRAIN_FIXED = (
    *(*_LEARNER_FIXED, "learner.epochs", "learner.mini_batches", "critic.path", "critic.optimizer.name"),
    "critic.warmup_steps",
    *("data.train", "data.shuffle", "rollout.prompts_per_step", "rollout.group_size"),
)


def build_engine(index: int, spec: EngineSpec) -> tuple[RolloutEngine, DecodeResponse]:
    """The parts of one rollout worker; runs inside its process."""
    from rollout.chat import AnswerExtractor
    from rollout.vllm_engine import VLLMEngine

    return VLLMEngine(spec, index=index), AnswerExtractor(load_tokenizer(spec.model)).extract


def start_rollout_pool(
    config: TrainConfig, *, transport: str, actor_options: Sequence[dict[str, Any]], trained: bool, display: Display
) -> RolloutPool:
    """Begin to start the rollout workers. `trained`: a learner will send them weights."""
    worker_class: Any = ray.remote(RolloutWorker)
    evaluated = config.evaluation.max_response_tokens or config.rollout.max_response_tokens
    responses = max(config.rollout.max_response_tokens, evaluated) if trained else evaluated
    rollout = config.rollout
    if trained and config.learner.moe.router_replay:
        options = {"enable_return_routed_experts": True, **rollout.engine_options}
        rollout = rollout.model_copy(update={"engine_options": options})
    spec = EngineSpec(
        config.model,
        rollout,
        transport,
        max_model_len=config.data.max_prompt_tokens + responses,
        seed=config.seed,
        deterministic=config.deterministic,
        trained=trained,
    )

    def start_worker(index: int) -> ActorHandle:
        build = functools.partial(build_engine, index, spec)
        # One call per sequence at most, and others must still get through.
        calls = rollout.max_concurrent_sequences + 100
        return worker_class.options(max_restarts=0, max_concurrency=calls, **actor_options[index]).remote(build)

    evaluation = config.evaluation
    template = ChatTemplate(load_tokenizer(config.model), config.model.chat_template_options)
    training = sampling_parameters(config.rollout, template.end_of_turn_id)
    # Fixed routing needs all workers. And an engine that starts on the GPU of a learner that is updating would find
    # another amount of free memory at every moment.
    all_needed = config.deterministic or (trained and config.ray.colocate)
    pool = RolloutPool(
        Roster(start_worker, config.rollout, all_needed=all_needed, report=display.message),
        config.rollout,
        training=training,
        evaluation=evaluation_parameters(training, evaluation),
        evaluation_samples=evaluation.samples_per_prompt,
        seed=config.seed,
        deterministic=config.deterministic,
        trained=trained,
    )
    pool.tell = display.now
    return pool


def start_learners(
    spec: LearnerSpec,
    *,
    actor_options: Sequence[dict[str, Any]],
    receivers: Callable[[], Mapping[int, ActorHandle]] = dict,
    meanwhile: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda text: None,
) -> LearnerGroup:
    """Start the learner ranks and wait until the model is loaded."""
    remote: Any = ray.remote  # its type knows no concurrency groups
    worker_class = remote(concurrency_groups={WATCH: 1})(LearnerWorker)

    def start_worker(rank: int) -> ActorHandle:
        return worker_class.options(max_restarts=0, **actor_options[rank]).remote(rank, spec.learner.num_workers)

    return LearnerGroup.start(start_worker, spec, receivers=receivers, meanwhile=meanwhile, tell=tell)


def make_batch(config: AlgorithmConfig, learners: LearnerGroup) -> Callable[[ScoredBatch, Annotations], TrainBatch]:
    """The step between rewards and the update: advantages, then the batch."""

    def build(scored: ScoredBatch, annotations: Annotations) -> TrainBatch:
        return build_train_batch(
            scored,
            estimate(scored, annotations, config),
            annotations,
            policy_version=learners.policy_version,
            config=config,
        )

    return build


def shape_data(
    config: TrainConfig, prompts: Sequence[Prompt]
) -> tuple[PromptSource | CurriculumSource, Callable[[], StepGroups]]:
    """The source of prompts, and a factory of the collector for each step's groups; they share the curriculum."""
    curriculum = PassRateCurriculum(config.data.curriculum) if config.data.curriculum is not None else None
    source = PromptSource(prompts, shuffle=config.data.shuffle, seed=config.seed)
    new_groups = functools.partial(
        StepGroups,
        config.rollout.prompts_per_step,
        dynamic_sampling=config.algorithm.dynamic_sampling,
        reject_degenerate=config.rollout.reject_degenerate,
        curriculum=curriculum,
    )
    return source if curriculum is None else CurriculumSource(source, curriculum, seed=config.seed), new_groups


@contextmanager
def training_run(checked: CheckedRun, display: Display) -> Iterator[TrainingRun]:
    """Everything that `fledge train` needs, up and running; all of it ends with the block."""
    config, run_dir, eval_sets = checked.config, Path(checked.config.run_dir), checked.eval_sets
    with ExitStack() as stack:
        stack.enter_context(ray_cluster(config.ray))
        device = resolve_device(config)
        rewards = RewardPool(config.reward)
        stack.callback(rewards.close)
        display.now("starting the workers")
        transport = resolve_transport(config.sync.transport, cuda=device == "cuda", colocate=config.ray.colocate)
        placement = place_train_workers(config, device=device, report=display.message)
        stack.callback(placement.release)
        rollouts = start_rollout_pool(
            config,
            transport=transport,
            actor_options=placement.rollouts,
            trained=True,
            display=display,
        )
        stack.callback(rollouts.roster.shutdown)
        if config.ray.colocate:  # before the learner starts: an engine measures how much memory its GPU has left
            rollouts.roster.wait_until_ready()
        learners = start_learners(
            learner_spec(config, device, transport),
            actor_options=placement.learners,
            receivers=lambda: rollouts.workers,
            meanwhile=rollouts.roster.raise_if_failed,
            tell=display.now,
        )
        stack.callback(learners.shutdown)
        learners.check_run_dir(run_dir)
        rollouts.roster.wait_until_ready()
        source, new_groups = shape_data(config, checked.prompts)
        controller = Controller(
            source,
            rollouts,
            rewards,
            learners,
            make_batch(config.algorithm, learners),
            new_groups=new_groups,
            group_size=config.rollout.group_size,
        )
        evaluator = None
        if eval_sets:
            pass_at, surviving = config.evaluation.pass_at, controller.surviving_losses
            evaluator = Evaluator(eval_sets, rollouts, rewards, pass_at=pass_at, surviving=surviving)
        yield TrainingRun(
            run_plan(config, run_dir),
            controller,
            checkpoints=checkpoint_store(config, run_dir),
            probe=WeightProbe(every=config.sync.probe_every, bounds=agreement_bounds(config)),
            bounds=_step_bounds(config, display),
            open_sinks=lambda done_steps: open_sinks(config, run_dir, done_steps),
            display=display,
            evaluator=evaluator,
        )


@contextmanager
def evaluator_of(checked: CheckedRun, display: Display) -> Iterator[Evaluator]:
    """What `fledge eval` needs: rollout workers on the config's model, and rewards; no learner."""
    config = checked.config
    with ExitStack() as stack:
        stack.enter_context(ray_cluster(config.ray))
        device = resolve_device(config)
        rewards = RewardPool(config.reward)
        stack.callback(rewards.close)
        placement = place_rollouts(config, device=device, report=display.message)
        stack.callback(placement.release)
        rollouts = start_rollout_pool(
            config,
            transport=resolve_transport("auto", cuda=device == "cuda", colocate=False),  # no learner sends anything
            actor_options=placement.rollouts,
            trained=False,
            display=display,
        )
        stack.callback(rollouts.roster.shutdown)
        rollouts.roster.wait_until_ready()
        pass_at, surviving = config.evaluation.pass_at, rollouts.surviving_losses
        yield Evaluator(checked.eval_sets, rollouts, rewards, pass_at=pass_at, surviving=surviving)


def learner_spec(config: TrainConfig, device: str, transport: Transport) -> LearnerSpec:
    return LearnerSpec(
        config.learner,
        config.model,
        config.algorithm,
        seed=config.seed,
        deterministic=config.deterministic,
        device=device,
        total_optimizer_steps=config.optimizer_steps,
        temperature=config.rollout.temperature,
        fixed_length=config.rollout.max_response_tokens,
        critic=config.critic,
        sync=SyncSpec(config.sync, transport, config.rollout.tensor_parallel_size),
    )


def agreement_bounds(config: TrainConfig) -> AgreementBounds:
    experts = has_experts(load_config(config.model))
    return AgreementBounds.for_dtype(config.model.dtype, config.sync.logprob_tolerance, experts=experts)


def _step_bounds(config: TrainConfig, display: Display) -> AgreementBounds:
    """Bounds for the comparison at every step; infinite, with a message, if sampler and learner cannot be compared."""
    if _comparable(config.rollout):
        return agreement_bounds(config)
    display.message(
        "note: rollout.top_p, top_k, min_p or temperature 0 truncates the sampler's distribution, so its "
        "log-probabilities are not compared with the learner's at each step; the probe (sync.probe_every) is not "
        "affected"
    )
    return AgreementBounds(float("inf"), float("inf"))


@contextmanager
def open_sinks(config: RunConfig, run_dir: Path, done_steps: int) -> Iterator[Record]:
    """A function that records a step in metrics.jsonl and in every other sink that the configuration asks for."""
    with ExitStack() as stack:
        sinks: list[MetricSink] = [stack.enter_context(closing(JsonlSink(run_dir, done_steps=done_steps)))]
        if config.logging.tensorboard:
            sinks.append(stack.enter_context(closing(TensorBoardSink(run_dir, done_steps=done_steps))))
        if config.logging.wandb_project:
            wandb = WandbSink(
                run_dir,
                project=config.logging.wandb_project,
                mode=config.logging.wandb_mode,
                name=config.name,
                config=config.model_dump(mode="json"),
            )
            sinks.append(stack.enter_context(closing(wandb)))

        def record(step: int, metrics: Mapping[str, float]) -> None:
            for sink in sinks:
                sink.write(step, metrics)

        yield record


def checkpoint_store(config: RunConfig, run_dir: Path) -> CheckpointStore:
    """The store of the run's checkpoints, which knows what a resumed run must share with them."""
    metric = config.checkpoint.keep_best
    return CheckpointStore(
        run_dir / "checkpoints",
        keep=config.checkpoint.keep,
        best_of=lambda steps: None if metric is None else best_step(run_dir, metric, steps),
        settings=config.model_dump(mode="json"),
        fixed=_TRAIN_FIXED if isinstance(config, TrainConfig) else _SFT_FIXED,
        contents=_contents(config),
    )


def _contents(config: RunConfig) -> dict[str, str]:
    """What tells whether the files of a run have only moved, as those in a job's own folder do, by the keys of their
    paths. Of training data the names are enough: the prompts or examples are compared when they have been read."""
    found = {"model.path": _of_checkpoint(config.model.path)}
    if isinstance(config, TrainConfig) and config.critic is not None and config.critic.path is not None:
        found["critic.path"] = _of_checkpoint(config.critic.path)
    if isinstance(config, TrainConfig | SftConfig) and config.data.train is not None:
        train = config.data.train.path
        paths = (train,) if isinstance(train, str) else train
        found["data.train.path"] = " ".join(Path(path).name if Path(path).exists() else path for path in paths)
    return found


def _of_checkpoint(path: str) -> str:
    """A digest of a checkpoint's configuration, its tokenizer, and the names and sizes of its weights; of a checkpoint
    on the hub, its name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin"):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
        elif file.is_file() and file.name.startswith(("config.json", "tokenizer", "chat_template")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _comparable(rollout: RolloutConfig) -> bool:
    """With truncated sampling the rollout's distribution is not the learner's, so their difference proves nothing."""
    return rollout.top_p == 1.0 and rollout.top_k == 0 and rollout.min_p == 0.0 and rollout.temperature > 0.0


def run_plan(config: TrainConfig, run_dir: Path) -> RunPlan:
    return RunPlan(
        run_dir=run_dir,
        total_steps=config.total_steps,
        checkpoint_every=config.checkpoint.every,
        evaluate_every=config.evaluation.every,
        evaluate_at_start=config.evaluation.at_start,
        samples_every=config.logging.samples_every,
        samples_per_step=config.logging.samples_per_step,
    )

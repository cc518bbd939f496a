"""`--dry-run`: shows what a run would do, after every check that is possible without starting anything.

Left out: whether it fits into memory, what the cluster has, and run_dir and its contents.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from launch.data import checked_evaluation, checked_sft, checked_training
from launch.display import ProgressDisplay
from rl.batch import Prompt
from rl.config import ModelConfig, OptimizerConfig, RunConfig, SftConfig, TrainConfig
from rl.losses import policy_loss_spec
from rl.models import load_config
from rl.prompts import load_tokenizer


def describe_training(config: TrainConfig) -> None:
    """Check what `fledge train` would run, and show it."""
    display = _display(config)
    checked = checked_training(config, display)
    for line in (*_training(checked.config), *_prompt(config.model, checked.prompts[0])):
        display.message(line)


def describe_evaluation(config: TrainConfig) -> None:
    """Check what `fledge eval` would run, and show it."""
    display = _display(config)
    checked = checked_evaluation(config, display)
    for line in (
        f"evaluation: {_eval_samples(config)}",
        _rewards(config),
        *_prompt(config.model, checked.eval_sets[0].prompts[0]),
    ):
        display.message(line)


def describe_sft(config: SftConfig) -> None:
    """Check what `fledge sft` would run, and show it."""
    display = _display(config)
    checked = checked_sft(config, display)
    example = checked.examples[0]
    tokenizer = load_tokenizer(config.model)
    lines = (
        _model(config.model),
        f"{checked.total_steps:,} steps of {config.batch_size} examples: {config.epochs} epochs",
        _optimizer(config.learner.optimizer, checked.total_steps),
        f"learners {config.learner.num_workers}",
        f"first prompt, {len(example.prompt_ids)} tokens:\n{tokenizer.decode(example.prompt_ids.tolist())}",
        f"its response, {len(example.response_ids)} tokens, all of them learned:\n"
        f"{tokenizer.decode(example.response_ids.tolist())}",
    )
    for line in lines:
        display.message(line)


def _display(config: RunConfig) -> ProgressDisplay:
    return ProgressDisplay(config.name, Console(soft_wrap=True))  # on stdout: it is the result


def _training(config: TrainConfig) -> Iterator[str]:
    rollout, learner, algorithm = config.rollout, config.learner, config.algorithm
    samples = rollout.prompts_per_step * rollout.group_size
    updates = learner.epochs * learner.mini_batches
    steps = "optimizer steps" if updates > 1 else "optimizer step"
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    yield _model(config.model)
    yield (
        f"each step: {rollout.prompts_per_step} prompts x {rollout.group_size} responses = {samples:,} samples of at "
        f"most {longest:,} tokens, used in {updates} {steps} of {samples // learner.mini_batches:,} samples"
    )
    yield _optimizer(learner.optimizer, config.policy_optimizer_steps)
    aggregation = algorithm.aggregation or policy_loss_spec(algorithm.loss).default_aggregation
    kl = algorithm.kl
    yield (
        f"advantage {algorithm.advantage}, loss {algorithm.loss}, {aggregation}; rollout correction "
        f"{algorithm.rollout_correction.mode}; KL "
        + ("none" if kl.placement == "none" else f"{kl.coefficient:g} x {kl.estimator} in the {kl.placement}")
    )
    if config.critic is not None:
        start = config.critic.path or config.model.path
        yield f"critic {start}: {_optimizer(config.critic.optimizer, config.optimizer_steps)}"
    if algorithm.dynamic_sampling is not None or config.data.curriculum is not None:
        yield "a step may draw more prompts than that (algorithm.dynamic_sampling, data.curriculum)"
    yield _rewards(config)
    yield _evaluation(config)
    yield (
        f"learners {learner.num_workers}, engines {rollout.num_workers} x {rollout.tensor_parallel_size}, reward "
        f"workers {config.reward.num_workers}"
    )


def _model(model: ModelConfig) -> str:
    return f"model {model.path}: {load_config(model).model_type}, {model.dtype}"


def _optimizer(optimizer: OptimizerConfig, steps: int) -> str:
    warmup = f" after {optimizer.warmup_steps} warm-up steps" if optimizer.warmup_steps else ""
    return f"{steps:,} optimizer steps: {optimizer.name}, learning rate {optimizer.lr:g}, {optimizer.schedule}{warmup}"


def _rewards(config: TrainConfig) -> str:
    parts = [f"{f.weight:g} x {f.name}" + (" (gate)" if f.gate else "") for f in config.reward.functions]
    return f"reward {' + '.join(parts)}"


def _evaluation(config: TrainConfig) -> str:
    evaluation = config.evaluation
    times = {"before the first step": evaluation.at_start, f"every {evaluation.every} steps": evaluation.every}
    if any(times.values()):
        return f"evaluation {' and '.join(time for time, asked in times.items() if asked)}: {_eval_samples(config)}"
    return "no evaluation" + (" (evaluation.every is 0, so data.eval is not used)" if config.data.eval else "")


def _eval_samples(config: TrainConfig) -> str:
    evaluation = config.evaluation
    most = evaluation.max_response_tokens or config.rollout.max_response_tokens
    return (
        f"{evaluation.samples_per_prompt} responses per prompt of at most {most:,} tokens, at temperature "
        f"{evaluation.temperature:g}"
    )


def _prompt(model: ModelConfig, prompt: Prompt) -> Iterator[str]:
    tokenizer = load_tokenizer(model)
    yield f"first prompt, {len(prompt.token_ids)} tokens:\n{tokenizer.decode(list(prompt.token_ids))}"
    yield f"its ground truth: {str(prompt.ground_truth)[:1000]}"

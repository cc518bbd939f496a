"""The prompts of a run, loaded and accepted by their rewards, and the run as it is once every check has passed.

Left out: reading files and templates (`rl.prompts`), and everything that takes a process.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from launch.preflight import (
    check_checkpoint,
    check_engine_options,
    check_engines,
    check_learner,
    check_logging,
    check_training,
    refuse_long_example,
    refuse_moving_positions,
    refuse_unknown_tokens,
)
from rewards.combine import CombinedReward
from rl.batch import Prompt
from rl.config import OptimizerConfig, SftConfig, SftDataConfig, TrainConfig
from rl.config.loading import validate
from rl.errors import ConfigError, DataError
from rl.evaluation import EvalSet
from rl.prompts import PromptSet, SftExample, drop_held_out, load_prompts, load_sft_examples, load_tokenizer
from rl.run import Display
from rl.supervised import steps_per_epoch


@dataclass(frozen=True, slots=True)
class CheckedRun:
    """A configuration that was checked as far as it can be before anything starts, and its data.

    Its `total_epochs` is None: `total_steps` accounts for them.
    """

    config: TrainConfig
    prompts: tuple[Prompt, ...]
    eval_sets: tuple[EvalSet, ...]


@dataclass(frozen=True, slots=True)
class CheckedSft:
    """The same for a supervised run."""

    examples: tuple[SftExample, ...]
    held_out: tuple[SftExample, ...]
    total_steps: int


def checked_training(config: TrainConfig, display: Display) -> CheckedRun:
    """What `fledge train` would run. Raises ConfigError and DataError for all that can be known without a process."""
    check_training(config)
    prompts, eval_sets = load_data(config, display)
    config = _with_steps(config, len(prompts))
    drawn = config.total_steps * config.rollout.prompts_per_step
    display.message(
        f"{config.total_steps:,} steps of {config.rollout.prompts_per_step} prompts: {drawn / len(prompts):.3g} "
        "passes over the training data"
    )
    _refuse_unknown_metric(config, eval_sets)
    if not any(function.weight for function in config.reward.functions):
        display.message(
            "note: every reward in reward.functions has weight 0, so only rows that name their own reward get one"
        )
    _tell_of_long_warmup(config.learner.optimizer, config.policy_optimizer_steps, "learner", display)
    if config.critic is not None:
        _tell_of_long_warmup(config.critic.optimizer, config.optimizer_steps, "critic", display)
    return CheckedRun(config, prompts, tuple(eval_sets))


def checked_sft(config: SftConfig, display: Display) -> CheckedSft:
    """What `fledge sft` would run; errors as in `checked_training`."""
    check_checkpoint(config.model.path, "model.path")
    check_learner(config)
    refuse_moving_positions(config.model, config.data.max_tokens, "data.max_tokens")
    check_logging(config)
    examples = _worked_examples(config, config.data, "worked examples", display)
    held_out: tuple[SftExample, ...] = ()
    if config.data.eval is not None:
        held = config.data.model_copy(update={"train": config.data.eval})
        held_out = _worked_examples(config, held, "held-out examples", display)
        examples = _without_prompts_of(held_out, examples, display)
    if config.batch_size > len(examples):
        display.message(
            f"note: batch_size {config.batch_size} is more than the {len(examples)} examples, so a step uses all"
        )
    steps = config.epochs * steps_per_epoch(len(examples), config.batch_size)
    _tell_of_long_warmup(config.learner.optimizer, steps, "learner", display)
    return CheckedSft(examples, held_out, steps)


def _worked_examples(config: SftConfig, data: SftDataConfig, what: str, display: Display) -> tuple[SftExample, ...]:
    tokenizer = load_tokenizer(config.model)
    loaded = load_sft_examples(data, tokenizer, chat_template_options=config.model.chat_template_options)
    dropped = f", {loaded.num_dropped_too_long} too long and dropped" if loaded.num_dropped_too_long else ""
    verbatim = f", {loaded.num_verbatim} encoded unchanged (docs/data.md)" if loaded.num_verbatim else ""
    display.message(f"{what} {loaded.name}: {len(loaded.examples)}{dropped}{verbatim}")
    refuse_unknown_tokens(config.model, (ids for e in loaded.examples for ids in (e.prompt_ids, e.response_ids)))
    refuse_long_example(config.model, max(len(e.prompt_ids) + len(e.response_ids) for e in loaded.examples))
    return loaded.examples


def _without_prompts_of(
    held_out: Sequence[SftExample], examples: Sequence[SftExample], display: Display
) -> tuple[SftExample, ...]:
    asked = {example.prompt_ids.tobytes() for example in held_out}
    kept = tuple(example for example in examples if example.prompt_ids.tobytes() not in asked)
    if not kept:
        raise DataError("data.eval has every prompt of data.train, so nothing is left to learn from; split the data")
    if len(kept) < len(examples):
        display.message(f"{len(examples) - len(kept)} worked examples dropped because data.eval has their prompts")
    return kept


def checked_evaluation(config: TrainConfig, display: Display) -> CheckedRun:
    """What `fledge eval` would run; errors as in `checked_training`."""
    check_checkpoint(config.model.path, "model.path")
    check_engines(config, trained=False)
    check_engine_options(config, trained=False)
    _, eval_sets = load_data(config, display, train=False)
    if not eval_sets:
        raise DataError("data.eval is empty; add at least one dataset to evaluate on")
    return CheckedRun(config, (), tuple(eval_sets))


def _refuse_unknown_metric(config: TrainConfig, eval_sets: Sequence[EvalSet]) -> None:
    evaluation, metric = config.evaluation, config.checkpoint.keep_best
    quantities = [f"avg@{evaluation.samples_per_prompt}", *(f"pass@{k}" for k in evaluation.pass_at)]
    known = [f"eval/{held_out.name}/{quantity}" for held_out in eval_sets for quantity in quantities]
    if metric is not None and metric not in known:
        raise ConfigError(f"checkpoint.keep_best is {metric!r}, but can only be one of {', '.join(known)}")


def _tell_of_long_warmup(optimizer: OptimizerConfig, steps: int, section: str, display: Display) -> None:
    """Not an error: short trials of a recipe are like that."""
    if steps < optimizer.warmup_steps:
        display.message(
            f"note: {section}.optimizer.warmup_steps {optimizer.warmup_steps} is more than the run's {steps} "
            f"optimizer steps, so the learning rate only reaches {steps / optimizer.warmup_steps:.0%} of "
            f"{optimizer.lr:g}"
        )


def _with_steps(config: TrainConfig, num_prompts: int) -> TrainConfig:
    """The configuration with its epochs turned into the number of steps that draw every prompt that often."""
    if config.total_epochs is None:
        return config
    exact = config.total_epochs * num_prompts / config.rollout.prompts_per_step
    steps = max(math.ceil(round(exact, 6)), 1)  # 0.7 x 10 is a little over 7
    plain = config.model_dump() | {"total_steps": steps, "total_epochs": None}
    return validate(plain, TrainConfig, source=f"total_epochs {config.total_epochs:g} (= {steps} steps)")


def load_data(config: TrainConfig, display: Display, *, train: bool = True) -> tuple[tuple[Prompt, ...], list[EvalSet]]:
    """Training prompts and evaluation sets, every ground truth accepted by its reward. Starts no worker."""
    with closing(CombinedReward(config.reward.functions, config.reward.clip)) as rewards:
        return _load_data(config, rewards, display, train=train)


def _load_data(
    config: TrainConfig, rewards: CombinedReward, display: Display, *, train: bool
) -> tuple[tuple[Prompt, ...], list[EvalSet]]:
    tokenizer = load_tokenizer(config.model)
    load = functools.partial(
        load_prompts,
        tokenizer=tokenizer,
        max_prompt_tokens=config.data.max_prompt_tokens,
        chat_template_options=config.model.chat_template_options,
        validate=rewards.validate_prompt,
    )
    prompts: tuple[Prompt, ...] = ()
    if train:
        if config.data.train is None:
            raise ConfigError("data.train is required but not set; set it to the prompts to learn from")
        loaded = load(config.data.train, drop_repeated=True)
        prompts = loaded.prompts
        display.message(_describe("training data", loaded))
    eval_sets: list[EvalSet] = []
    for dataset in config.data.eval:
        loaded = load(dataset)
        display.message(_describe("evaluation data", loaded))
        if any(loaded.name == other.name for other in eval_sets):
            raise ConfigError(f"data.eval has two datasets named {loaded.name}; give one of them another name")
        eval_sets.append(EvalSet(loaded.name, loaded.prompts))
    everything = itertools.chain(prompts, *(held_out.prompts for held_out in eval_sets))
    refuse_unknown_tokens(config.model, (prompt.token_ids for prompt in everything))
    if not config.data.train_on_eval_prompts:
        prompts = _held_out_dropped(prompts, eval_sets, display)
    return prompts, eval_sets


def _held_out_dropped(prompts: tuple[Prompt, ...], eval_sets: list[EvalSet], display: Display) -> tuple[Prompt, ...]:
    """The prompts without those that the evaluation measures on, and a message if there are any."""
    kept = drop_held_out(prompts, (prompt for held_out in eval_sets for prompt in held_out.prompts))
    if prompts and not kept:
        raise ConfigError(
            f"all {len(prompts)} prompts of data.train are also in data.eval, so none are left to train on; use other "
            "prompts for one of them, or set data.train_on_eval_prompts=true to train on them anyway"
        )
    if dropped := len(prompts) - len(kept):
        display.message(
            f"training data: {dropped} prompts dropped because they are also in data.eval "
            "(data.train_on_eval_prompts=true keeps them)"
        )
    return kept


def _describe(what: str, loaded: PromptSet) -> str:
    dropped = f", {loaded.num_dropped_too_long} too long and dropped" if loaded.num_dropped_too_long else ""
    repeated = f", {loaded.num_repeated} repeated and dropped" if loaded.num_repeated else ""
    return f"{what} {loaded.name}: {len(loaded.prompts)} prompts{dropped}{repeated}"

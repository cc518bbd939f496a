"""Checks that need the frameworks but no process: model files, algorithm, group sizes. Run before anything starts.

Left out: the configuration's own consistency (`rl.config`) and the machine's health (`launch.doctor`).
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from launch.environment import cluster_address
from rl.advantages import advantage_spec
from rl.advantages.contract import check_estimator
from rl.batch import IntArray
from rl.batching import Layout
from rl.config import ModelConfig, RunConfig, TrainConfig
from rl.config.rollout import ENGINE_OWN
from rl.config.types import looks_local
from rl.errors import ConfigError, LearnerError
from rl.layouts import refuse_inexact_layout, resolve_layout
from rl.losses import policy_loss_spec
from rl.losses.contract import check_policy_loss
from rl.models import attention_of, load_config, model_class, refuse_untrainable
from rl.moe import ROUTED_MODELS
from rl.plugins import load_plugins
from rl.prompts import load_tokenizer
from rl.shared_prefix import windows_in_masks
from rollout.vllm_options import checkpoint_options

_PRINT_ENGINE_OPTIONS = """
from dataclasses import fields
from vllm.engine.arg_utils import AsyncEngineArgs
print(*(field.name for field in fields(AsyncEngineArgs)))
"""


def check_training(config: TrainConfig) -> None:
    """Check all of a training run that can be known without its data and the device."""
    check_checkpoint(config.model.path, "model.path")
    check_algorithm(config)
    check_engines(config)
    layout = check_learner(config)
    if config.critic is not None and config.critic.path is not None:
        _check_companion(config, config.critic.path, "critic.path")
    if config.algorithm.kl.reference is not None:
        _check_companion(config, config.algorithm.kl.reference, "algorithm.kl.reference", layout)
    check_engine_options(config, trained=True)
    check_logging(config)


def check_algorithm(config: TrainConfig) -> None:
    """Raise ConfigError unless estimator, loss, options and sizes go together."""
    algorithm = config.algorithm
    load_plugins(algorithm.plugins)
    estimator = advantage_spec(algorithm.advantage)
    if estimator.needs_groups and config.rollout.group_size < 2:
        raise ConfigError(
            f"algorithm.advantage {algorithm.advantage} compares the samples of a group, but rollout.group_size is "
            f"{config.rollout.group_size}; set it to 2 or more"
        )
    if estimator.needs_critic and config.critic is None:
        raise ConfigError(
            f"algorithm.advantage {algorithm.advantage} needs a critic, and this configuration has none; add a critic "
            "section (`critic: {}` uses every default), or choose grpo, rloo or another estimator without a critic"
        )
    if config.critic is not None and not estimator.needs_critic:
        raise ConfigError(
            f"critic is set, but algorithm.advantage {algorithm.advantage} does not use a critic's values; set "
            "algorithm.advantage to gae, or leave the critic out"
        )
    if estimator.needs_groups and (config.rollout.temperature == 0 or config.rollout.top_k == 1):
        raise ConfigError(
            f"algorithm.advantage {algorithm.advantage} compares the samples of a group, but rollout.temperature "
            f"{config.rollout.temperature:g} with rollout.top_k {config.rollout.top_k} makes all of them identical; "
            "set the temperature above 0, and top_k to 0 or more than 1"
        )
    check_estimator(estimator, algorithm.advantage_options, group_size=config.rollout.group_size)
    check_policy_loss(
        policy_loss_spec(algorithm.loss),
        algorithm.loss_options,
        algorithm.aggregation,
        accumulates=_accumulates(config),
    )


def check_checkpoint(path: str, key: str) -> None:
    """Raise ConfigError unless `path`, the value of `key`, holds (or names) a checkpoint with configuration and
    weights."""
    folder = Path(path).expanduser()
    if not looks_local(path) and not folder.exists():
        return  # a hub name; loading the tokenizer says whether it can be reached
    if not folder.is_dir():
        raise ConfigError(
            f"{key} {path} does not exist (looked in {Path.cwd()}); give a Hugging Face checkpoint folder or a hub name"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key} {path} has no config.json, so it is not a Hugging Face checkpoint{_of_a_run(folder)}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ConfigError(f"{key} {path} holds no weights (*.safetensors or *.bin)")
    _refuse_cut_weights(folder, key)


def _refuse_cut_weights(folder: Path, key: str) -> None:
    """Raise ConfigError if a download was cut short or Git LFS left pointers, as file headers and the index show."""
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files |= {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{key}: {index} cannot be read: {error!r}; download the checkpoint again") from error
    for file in sorted(files):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{key}: {file} cannot be read: {error}; download the checkpoint again (a clone needs `git lfs pull`)"
            ) from error


def _of_a_run(folder: Path) -> str:
    """A hint at what was meant, if the folder is a run directory or lies in one."""
    for run in (folder, *folder.resolve().parents):
        if (run / "checkpoints").is_dir() and (run / "config.yaml").is_file():
            if (run / "model" / "config.json").is_file():
                return f"; the model of that run is {run / 'model'}"
            return f"; `fledge export {run} OUT_DIR` makes one from that run's newest checkpoint"
    return ""


def check_engines(config: TrainConfig, *, trained: bool = True) -> None:
    """Raise ConfigError if the engines cannot divide the model, or responses may be longer than its positions reach.
    `trained`: there will be rollouts beside evaluations.

    The engine itself judges stretched positions (YaRN and the like), and what rollout.engine_options says of positions.
    """
    text = _text_config(config.model)
    limit, kinds = _positions(text)
    heads = getattr(text, "num_attention_heads", None)
    if heads is not None and heads % config.rollout.tensor_parallel_size:
        raise ConfigError(
            f"the {heads} attention heads of model.path {config.model.path} cannot be divided evenly among "
            f"rollout.tensor_parallel_size {config.rollout.tensor_parallel_size}; set it to a divisor of their number"
        )
    evaluated = config.evaluation.max_response_tokens
    responses = {"evaluation": evaluated} if evaluated else {}
    if trained or not evaluated:
        responses["rollout"] = config.rollout.max_response_tokens
    for section, tokens in responses.items():
        key = f"data.max_prompt_tokens + {section}.max_response_tokens"
        refuse_moving_positions(config.model, config.data.max_prompt_tokens + tokens, key)
    if limit is None or _stretched(kinds) or {"max_model_len", "hf_overrides"} & config.rollout.engine_options.keys():
        return
    for section, tokens in responses.items():
        longest = config.data.max_prompt_tokens + tokens
        if longest > limit:
            raise ConfigError(
                f"data.max_prompt_tokens {config.data.max_prompt_tokens} + {section}.max_response_tokens {tokens} = "
                f"{longest} is more than the {limit} positions of model.path {config.model.path}; lower one of them"
            )


def refuse_long_example(model: ModelConfig, longest: int) -> None:
    """Raise ConfigError if a worked example of `longest` tokens is longer than the model's positions reach."""
    limit, kinds = _positions(_text_config(model))
    if limit is not None and longest > limit and not _stretched(kinds):
        raise ConfigError(
            f"an example of data.train has {longest} tokens, more than the {limit} positions of model.path "
            f"{model.path}; set data.max_tokens to {limit} at most, so that longer examples are dropped"
        )


def refuse_unknown_tokens(model: ModelConfig, sequences: Iterable[Sequence[int] | IntArray]) -> None:
    """Raise ConfigError if a text has tokens for which the model has no embedding."""
    largest = max((int(max(ids)) for ids in sequences if len(ids)), default=0)
    vocabulary = _text_config(model).vocab_size
    if largest >= vocabulary:
        raise ConfigError(
            f"the tokenizer of model.path {model.path} produces token id {largest}, but the model's vocab_size is "
            f"{vocabulary}: they do not belong together"
        )


def refuse_moving_positions(model: ModelConfig, longest: int, key: str) -> None:
    """Raise ConfigError if sequences of `longest` tokens, the value of `key`, are so long that the model's positions
    depend on the lengths of the sequences beside them."""
    limit, kinds = _positions(_text_config(model))
    for kind in (kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")):
        original = kind.get("original_max_position_embeddings") or limit
        if original is not None and longest > original:
            raise ConfigError(
                f"model.path {model.path} has {kind['rope_type']} positions: beyond {original} tokens, a sequence's "
                "positions depend on the lengths of the sequences that are computed with it, which differ between "
                f"learner and engine; {key} is {longest}, lower it to {original}"
            )


def _text_config(model: ModelConfig) -> Any:
    """transformers' configuration of the language model."""
    try:
        return load_config(model).get_text_config()
    except LearnerError as error:
        raise ConfigError(str(error)) from error


def _positions(text: Any) -> tuple[int | None, list[dict[str, Any]]]:
    """(the longest sequence, the rotary settings: some models have one per kind of layer)."""
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    return getattr(text, "max_position_embeddings", None), kinds


def _stretched(kinds: list[dict[str, Any]]) -> bool:
    return any(kind.get("rope_type", "default") != "default" for kind in kinds)


def check_learner(config: RunConfig) -> Layout | None:
    """Raise ConfigError if the learner cannot train the model, its layout cannot be exact with the model's attention,
    the device does not have that attention, or experts are to be replayed and cannot be.

    Returns the layout; None if the device depends on a joined cluster: it is known later, and the learner's own check
    then says what is wrong.
    """
    checkpoint = _check_trainable(config.model)
    moe = config.learner.moe
    if checkpoint.model_type not in ROUTED_MODELS and (setting := next((key for key, value in moe if value), None)):
        raise ConfigError(
            f"learner.moe.{setting} is set, but model.path {config.model.path} is a {checkpoint.model_type}, and only "
            f"the routers of {' and '.join(ROUTED_MODELS)} are supported; leave it out"
        )
    device = _device(config)
    if device == "cpu" and moe.router_replay:
        raise ConfigError(
            "learner.moe.router_replay is true, but this machine has no GPU, and vLLM records the experts that it "
            "chose on GPUs only; set it to false"
        )
    return None if device is None else _check_exact(config, checkpoint, device)


def _device(config: RunConfig) -> str | None:
    """The device; None: whatever the cluster has."""
    if config.device != "auto":
        return config.device
    if cluster_address(config.ray.address) is not None:
        return None
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_exact(config: RunConfig, checkpoint: Any, device: str, layout: Layout | None = None) -> Layout:
    """`layout`, or by default the checkpoint's own. Raises ConfigError unless it is exact with its attention."""
    try:
        attention = attention_of(config.model, checkpoint, device)
        windows = windows_in_masks(checkpoint, model_class(checkpoint))
        layout = layout or resolve_layout(
            config.learner.layout, attention=attention, device=device, windows_in_masks=windows
        )
        refuse_inexact_layout(layout, config=checkpoint, attention=attention, windows_in_masks=windows)
    except LearnerError as error:
        raise ConfigError(str(error)) from error
    return layout


def _check_companion(config: TrainConfig, path: str, key: str, layout: Layout | None = None) -> None:
    """Raise ConfigError unless the checkpoint at `path`, the value of `key`, can read what the policy writes, in
    `layout` or by default its own layout."""
    check_checkpoint(path, key)
    checkpoint = _check_trainable(config.model, path, key)
    if (device := _device(config)) is not None:
        try:
            _check_exact(config, checkpoint, device, layout)
        except ConfigError as error:
            raise ConfigError(f"{key} {path}: {error}") from error
    tokenizer = load_tokenizer(config.model)
    try:
        own = AutoTokenizer.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError):  # it has none
        own = tokenizer
    meanings = {index: token for token, index in own.get_vocab().items()}
    for token, index in tokenizer.get_vocab().items():
        if meanings.get(index, token) != token:
            raise ConfigError(
                f"{key} {path} has another tokenizer: token {index} is {meanings[index]!r} there, but {token!r} in "
                f"model.path {config.model.path}; use a checkpoint with the policy's tokenizer"
            )
    tokens = min(len(tokenizer), load_config(config.model).vocab_size)
    if checkpoint.vocab_size < tokens:
        raise ConfigError(
            f"{key} {path} has a vocabulary of {checkpoint.vocab_size} tokens, but model.path {config.model.path} "
            f"uses {tokens}; use a checkpoint with the policy's tokenizer"
        )


def _check_trainable(model: ModelConfig, path: str | None = None, key: str = "model.path") -> Any:
    """The transformers configuration of the policy, or of the checkpoint at `path`, the value of `key`. Raises
    ConfigError unless the learner can train it."""
    try:
        checkpoint = load_config(model, path, key)
        refuse_untrainable(checkpoint, path or model.path)
    except LearnerError as error:
        raise ConfigError(str(error)) from error
    return checkpoint


def check_engine_options(config: TrainConfig, *, trained: bool) -> None:
    """Raise ConfigError if rollout.engine_options sets what the checkpoint needs to be set otherwise (because it is
    `trained`, or for its head), or names something that vLLM does not take."""
    if not config.rollout.engine_options:
        return
    needed = checkpoint_options(config.model, load_config(config.model), trained=trained)
    if taken := sorted(needed.keys() & config.rollout.engine_options.keys()):
        raise ConfigError(
            f"rollout.engine_options sets {', '.join(taken)}, which Fledge sets itself for a quantised checkpoint and "
            f"for model.head_dtype float32; leave it out, or use neither of these (model.path {config.model.path})"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    limit = config.rollout.engine_options.get("max_model_len")
    if isinstance(limit, int) and limit < longest:
        raise ConfigError(
            f"rollout.engine_options.max_model_len {limit} is less than data.max_prompt_tokens + "
            f"rollout.max_response_tokens, {longest}; leave it out, or raise it"
        )
    known = _known_engine_options()
    for name in config.rollout.engine_options:
        if name not in known:
            near = next(iter(difflib.get_close_matches(name, known, n=1)), "")
            hint = f"did you mean {near}?" if near else "see the fields of vllm.engine.arg_utils.AsyncEngineArgs"
            if own := ENGINE_OWN.get(near):
                hint = f"what vLLM calls {near} is {own} here"
            raise ConfigError(f"rollout.engine_options.{name} is not an argument of vLLM's engines; {hint}")


@cache
def _known_engine_options() -> list[str]:
    """A process of its own asks vLLM (5 s), since importing it changes the environment, which Ray's workers inherit."""
    asked = subprocess.run([sys.executable, "-c", _PRINT_ENGINE_OPTIONS], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ConfigError(f"vLLM cannot be imported:\n{asked.stderr.strip()}")
    return asked.stdout.splitlines()[-1].split()


def check_logging(config: RunConfig) -> None:
    """Raise ConfigError if W&B is asked for without a key, which it would report only once every engine has started."""
    project = config.logging.wandb_project
    if project is not None and (wrong := set(project) & set("/\\#?%:")):
        raise ConfigError(
            f"logging.wandb_project is {project!r}, but names of W&B projects cannot contain {' '.join(sorted(wrong))}"
        )
    mode = config.logging.wandb_mode or os.environ.get("WANDB_MODE", "online")
    if project is None or mode in ("offline", "dryrun", "disabled"):
        return
    import wandb

    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise ConfigError(f"logging.wandb_project is set, but W&B refuses its API key: {error}") from error
    if not known:
        raise ConfigError(
            f"logging.wandb_project is {config.logging.wandb_project}, but there is no W&B API key here; run `wandb "
            "login`, set WANDB_API_KEY, or set logging.wandb_mode to offline"
        )


def _accumulates(config: TrainConfig) -> bool:
    """Whether a mini-batch may be split: over ranks, or because it may not fit one micro-batch."""
    learner = config.learner
    samples = config.rollout.prompts_per_step * config.rollout.group_size // learner.mini_batches
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    return learner.num_workers > 1 or samples * longest > learner.max_tokens_per_microbatch

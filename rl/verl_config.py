"""Translate verl's configuration to Fledge's for `rl.verl_engine`, and refuse what it cannot follow.

It reads verl's objects by their fields and imports nothing from verl. Left out: batches (`rl.verl_engine`). Written
against verl 0.9.1.
"""

from __future__ import annotations

from typing import Any

from rl.config import LearnerConfig, ModelConfig, OptimizerConfig
from rl.errors import ConfigError

_DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}
# (optim.optimizer_impl, optim.optimizer) -> learner.optimizer.name
_OPTIMIZERS = {
    ("torch.optim", "AdamW"): "adamw",
    ("torch.optim", "SGD"): "sgd",
    ("deepspeed.ops.adam", "DeepSpeedCPUAdam"): "adamw",
}


def translate_model(model: Any, engine: Any) -> ModelConfig:
    """Translate verl's HFModelConfig and EngineConfig. Raises ConfigError for an unsupported dtype."""
    dtype = _DTYPES.get(engine.dtype)
    if dtype is None:
        raise ConfigError(f"the deepspeed engine does not support dtype {engine.dtype!r}; use bfloat16 or float32")
    return ModelConfig(
        path=model.local_path,
        dtype=dtype,
        attention=_overrides(model).get("attn_implementation", "auto"),
        trust_remote_code=model.trust_remote_code,
    )


def learner_config(model: Any, engine: Any, optimizer: Any) -> LearnerConfig:
    """Translate verl's HFModelConfig, EngineConfig and OptimizerConfig. Raises ConfigError for unsupported settings."""
    return LearnerConfig(
        optimizer=OptimizerConfig() if engine.forward_only else _optimizer_config(optimizer),
        # If verl keeps padding, it asks for padded rows; if it removes padding, the best layout is chosen.
        layout="auto" if engine.use_remove_padding else "bucketed",
        activation_checkpointing=model.enable_gradient_checkpointing,
        offload_parameters=engine.param_offload,
        offload_optimizer=engine.optimizer_offload,
        offload_reference=engine.param_offload,
    )


def total_steps(optimizer: Any) -> int:
    """The length of the learning-rate schedule, which verl's trainers set before the engine starts."""
    return max(optimizer.total_training_steps, 1)


def _optimizer_config(optimizer: Any) -> OptimizerConfig:
    """Translate verl's optimizer section; `override_optimizer_config` may hold eps and fused, which is always on
    here."""
    chosen = (optimizer.get("optimizer_impl", "torch.optim"), optimizer.get("optimizer", "AdamW"))
    name = _OPTIMIZERS.get(chosen)
    if name is None:
        known = ", ".join(".".join(known) for known in _OPTIMIZERS)
        raise ConfigError(f"the deepspeed engine does not support optimizer {'.'.join(chosen)}; use one of {known}")
    override = dict(optimizer.get("override_optimizer_config") or {})
    eps = override.pop("eps", OptimizerConfig().eps)
    override.pop("fused", None)
    if override:
        raise ConfigError(
            f"optim.override_optimizer_config holds {sorted(override)}; the deepspeed engine supports only eps and "
            "fused"
        )
    if optimizer.get("num_cycles", 0.5) != 0.5:
        raise ConfigError(f"optim.num_cycles is {optimizer.num_cycles}; the deepspeed engine decays over half a cycle")
    warmup = optimizer.lr_warmup_steps
    if warmup is None or warmup <= 0:
        warmup = int(optimizer.lr_warmup_steps_ratio * total_steps(optimizer))
    schedule = optimizer.get("lr_scheduler_type", "constant")
    # verl's section has every key, even those that its optimizer or schedule does not read.
    adam = {} if name == "sgd" else {"betas": tuple(optimizer.betas), "eps": eps}
    decay = {} if schedule == "constant" else {"min_lr_ratio": optimizer.get("min_lr_ratio") or 0.0}
    return OptimizerConfig(
        name=name,
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_grad,
        schedule=schedule,
        warmup_steps=warmup,
        **adam,
        **decay,
    )


def _overrides(model: Any) -> dict[str, Any]:
    override = model.override_config
    return dict(override.get("model_config", override))


def refuse_settings(model: Any, engine: Any, checkpoint: Any, world_size: int) -> None:
    """Raise ConfigError for settings that would change the result but are not supported here."""
    router_replay, qat = engine.get("router_replay"), engine.get("qat")
    asked = {
        "model.hf_config_path": model.hf_config_path not in (None, model.path),
        "model.override_config": bool(_overrides(model).keys() - {"attn_implementation"}),
        "model.lora_rank": model.lora_rank > 0 or bool(model.lora.get("rank", 0)),
        "model.lora_adapter_path": model.lora_adapter_path is not None,
        "model.use_liger": model.use_liger,
        "model.tiled_mlp": bool(model.tiled_mlp.get("enabled")),
        "model.mtp": model.mtp.enable,
        "model.enable_activation_offload": model.enable_activation_offload,
        "engine.ulysses_sequence_parallel_size": engine.get("ulysses_sequence_parallel_size", 1) > 1,
        "engine.fsdp_size": engine.get("fsdp_size", -1) not in (-1, world_size),
        "engine.offload_policy": bool(engine.get("offload_policy")),
        "engine.mixed_precision": engine.get("mixed_precision") is not None,
        "engine.qat": qat is not None and qat.enable,
        "engine.router_replay": router_replay is not None and router_replay.mode != "disabled",
        "checkpoint.async_save": checkpoint.async_save,
        "checkpoint.load_contents": not {"model", "optimizer", "extra"} <= set(checkpoint.load_contents),
    }
    refused = [name for name, used in asked.items() if used]
    if refused:
        raise ConfigError(
            f"the deepspeed engine does not support {', '.join(refused)}; keep verl's defaults for them, or choose "
            "another strategy"
        )

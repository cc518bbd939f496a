"""verl's configuration, made of its own classes, as ours; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from verl.trainer.config import CheckpointConfig
from verl.workers.config import EngineConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.config import OptimizerConfig as VerlOptimizerConfig

from launch.tiny_models import build_tiny_model
from rl.config import LearnerConfig, ModelConfig, OptimizerConfig
from rl.errors import ConfigError
from rl.verl_config import learner_config, refuse_settings, translate_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("qwen3", tmp_path_factory.mktemp("verl") / "model")


def model(checkpoint: Path, **settings: Any) -> HFModelConfig:
    return HFModelConfig(path=str(checkpoint), load_tokenizer=False, **settings)


def test_defaults_of_verl_are_followed(checkpoint: Path) -> None:
    verl_model, engine = model(checkpoint), EngineConfig(strategy="deepspeed")
    refuse_settings(verl_model, engine, CheckpointConfig(), world_size=2)
    assert translate_model(verl_model, engine) == ModelConfig(path=str(checkpoint), dtype="bfloat16")
    assert learner_config(verl_model, engine, VerlOptimizerConfig(lr=1e-5)) == LearnerConfig(
        optimizer=OptimizerConfig(lr=1e-5, weight_decay=0.01), activation_checkpointing=True, offload_reference=False
    )


def test_settings_that_are_not_default_are_followed(checkpoint: Path) -> None:
    verl_model = model(checkpoint, override_config={"attn_implementation": "sdpa"}, enable_gradient_checkpointing=False)
    engine = FSDPEngineConfig(dtype="fp32", param_offload=True, optimizer_offload=True, use_remove_padding=False)
    optimizer = FSDPOptimizerConfig(
        optimizer_impl="torch.optim",
        lr=1e-4,
        betas=(0.8, 0.9),
        clip_grad=0.5,
        lr_scheduler_type="cosine",
        min_lr_ratio=0.1,
        lr_warmup_steps_ratio=0.25,
        total_training_steps=40,
        override_optimizer_config={"eps": 1e-6, "fused": True},
    )
    refuse_settings(verl_model, engine, CheckpointConfig(), world_size=2)
    assert translate_model(verl_model, engine) == ModelConfig(path=str(checkpoint), dtype="float32", attention="sdpa")
    assert learner_config(verl_model, engine, optimizer) == LearnerConfig(
        optimizer=OptimizerConfig(
            lr=1e-4,
            betas=(0.8, 0.9),
            eps=1e-6,
            weight_decay=0.01,
            max_grad_norm=0.5,
            schedule="cosine",
            warmup_steps=10,
            min_lr_ratio=0.1,
        ),
        layout="bucketed",
        offload_parameters=True,
        offload_optimizer=True,
    )


def test_keys_that_verls_choice_does_not_read_are_let_be(checkpoint: Path) -> None:
    settings = {"optimizer_impl": "torch.optim", "optimizer": "SGD", "betas": (0.8, 0.9)}
    optimizer = FSDPOptimizerConfig(lr=0.1, lr_scheduler_type="constant", min_lr_ratio=0.1, **settings)
    made = learner_config(model(checkpoint), FSDPEngineConfig(), optimizer).optimizer
    assert (made.name, made.lr, made.schedule, made.min_lr_ratio) == ("sgd", 0.1, "constant", 0.0)


def test_a_reference_needs_no_optimizer(checkpoint: Path) -> None:
    engine = EngineConfig(strategy="deepspeed", forward_only=True, param_offload=True)
    assert learner_config(model(checkpoint), engine, None).offload_reference


@pytest.mark.parametrize(
    ("model_settings", "engine_settings", "checkpoint_settings", "names"),
    [
        ({"lora_rank": 8, "use_liger": True}, {}, {}, ["model.lora_rank", "model.use_liger"]),
        ({"lora": {"rank": 4}}, {}, {}, ["model.lora_rank"]),
        ({"override_config": {"attention_dropout": 0.1}}, {}, {}, ["model.override_config"]),
        ({"override_config": {"model_config": {"rope_theta": 5.0}}}, {}, {}, ["model.override_config"]),
        ({}, {"ulysses_sequence_parallel_size": 2}, {}, ["engine.ulysses_sequence_parallel_size"]),
        ({}, {"fsdp_size": 4}, {}, ["engine.fsdp_size"]),
        ({}, {"mixed_precision": {"param_dtype": "bf16"}}, {}, ["engine.mixed_precision"]),
        (
            {},
            {},
            {"load_contents": ["model"], "async_save": True},
            ["checkpoint.async_save", "checkpoint.load_contents"],
        ),
    ],
)
def test_what_would_change_results_is_refused_by_name(
    checkpoint: Path,
    model_settings: dict[str, Any],
    engine_settings: dict[str, Any],
    checkpoint_settings: dict[str, Any],
    names: list[str],
) -> None:
    with pytest.raises(ConfigError, match=f"does not support {', '.join(names)};"):
        refuse_settings(
            model(checkpoint, **model_settings),
            FSDPEngineConfig(**engine_settings),
            CheckpointConfig(**checkpoint_settings),
            world_size=2,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": "AdamW8bit", "optimizer_impl": "torchao.optim"},
            "not support optimizer torchao.optim.AdamW8bit",
        ),
        ({"override_optimizer_config": {"amsgrad": True}}, r"holds \['amsgrad'\]"),
        ({"num_cycles": 1.5}, "num_cycles is 1.5"),
    ],
)
def test_unknown_optimizers_are_refused(checkpoint: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learner_config(model(checkpoint), FSDPEngineConfig(), FSDPOptimizerConfig(**settings))


def test_half_precision_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="does not support dtype 'float16'; use bfloat16 or float32"):
        translate_model(model(checkpoint), EngineConfig(dtype="float16"))

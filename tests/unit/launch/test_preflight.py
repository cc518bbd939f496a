"""A layout or an attention that the learner could not run is refused before any process starts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    DeepseekV2Config,
    Gemma3Config,
    GptOssConfig,
    MistralConfig,
    PhimoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from launch.commands import sft
from launch.preflight import (
    _accumulates,
    check_checkpoint,
    check_engine_options,
    check_engines,
    check_learner,
    check_logging,
    check_training,
    refuse_unknown_tokens,
)
from launch.tiny_models import build_tiny_model
from rl.config import (
    LearnerConfig,
    LoggingConfig,
    ModelConfig,
    RayConfig,
    RolloutConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
)
from rl.errors import ConfigError
from rl.models import has_experts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {family: str(build_tiny_model(family, directory / family)) for family in ("qwen3", "gpt_oss")}


def run_config(path, *, attention="auto", layout="auto", device="cpu", address=None):
    return RunConfig(
        device=device,
        model=ModelConfig(path=path, attention=attention),
        learner=LearnerConfig(layout=layout),
        ray=RayConfig(address=address),
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {}),
        ("qwen3", {"layout": "packed"}),
        ("qwen3", {"layout": "packed", "attention": "eager"}),
        ("gpt_oss", {}),
        ("gpt_oss", {"layout": "packed"}),
        ("gpt_oss", {"layout": "bucketed", "attention": "sdpa"}),
    ],
)
def test_layouts_that_are_exact_pass(models, family, settings):
    check_learner(run_config(models[family], **settings))


def test_packing_that_would_leak_is_refused(models):
    with pytest.raises(ConfigError, match="gpt_oss with sdpa attention cannot run packed .* set learner.layout"):
        check_learner(run_config(models["gpt_oss"], layout="packed", attention="sdpa"))


def test_flash_attention_on_a_cpu_is_refused(models, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device in ("cpu", "auto"):
        with pytest.raises(ConfigError, match=r"model\.attention flash_attention_2 runs on GPUs only"):
            check_learner(run_config(models["qwen3"], attention="flash_attention_2", device=device))
    with pytest.raises(ConfigError, match="flex_attention has no backward pass on CPUs"):
        check_learner(run_config(models["qwen3"], attention="flex_attention", device="cpu"))


def test_the_device_of_a_cluster_that_is_joined_is_not_guessed(models):
    check_learner(run_config(models["qwen3"], attention="flash_attention_2", device="auto", address="auto"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma3Config(), "is a gemma3, of which the language model is only one part"),
        (Qwen3Config(quantization_config={"quant_method": "fp8"}), "is quantised with fp8"),
    ],
)
def test_models_that_the_learner_cannot_train_are_refused(tmp_path, models, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_learner(run_config(str(tmp_path), device="auto", address="auto"))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    critic = TrainConfig(
        model={"path": models["qwen3"]},
        data={"train": {"path": "d"}},
        algorithm={"advantage": "gae"},
        critic={"path": str(tmp_path)},
    )
    with pytest.raises(ConfigError, match=message):
        check_training(critic)


@pytest.mark.parametrize(
    ("config", "expected"),
    [(Qwen3Config(), False), (Qwen3MoeConfig(), True), (GptOssConfig(), True), (DeepseekV2Config(), True)],
)
def test_experts_are_known_by_the_configuration(config, expected):
    assert has_experts(config) == expected


def test_router_replay_is_refused_where_nothing_records_the_experts(models):
    config = run_config(models["gpt_oss"])
    replaying = config.model_copy(update={"learner": LearnerConfig(moe={"router_replay": True})})
    with pytest.raises(ConfigError, match="router_replay is true, but this machine has no GPU"):
        check_learner(replaying)
    check_learner(replaying.model_copy(update={"device": "cuda"}))


@pytest.mark.parametrize("setting", [{"router_replay": True}, {"freeze_router": True}, {"aux_loss_coefficient": 0.01}])
def test_settings_of_experts_are_refused_where_there_are_none(models, setting):
    config = run_config(models["qwen3"]).model_copy(update={"learner": LearnerConfig(moe=setting)})
    with pytest.raises(ConfigError, match=rf"learner.moe.{next(iter(setting))} is set, but .* is a qwen3, and only"):
        check_learner(config)


def test_weights_that_were_cut_short_are_refused(models, tmp_path):
    """An interrupted download, and a clone without Git LFS."""
    folder = Path(shutil.copytree(models["qwen3"], tmp_path / "model"))
    check_checkpoint(str(folder), "model.path")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], b"version https://git-lfs.github.com/spec/v1\n", b""):
        weights.write_bytes(content)
        with pytest.raises(ConfigError, match=r"model\.path: .*model\.safetensors cannot be read: .*`git lfs pull`"):
            check_checkpoint(str(folder), "model.path")
    weights.write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ConfigError, match=r"model-2\.safetensors cannot be read"):
        check_checkpoint(str(folder), "model.path")
    index.write_text("{}")
    with pytest.raises(ConfigError, match=r"index\.json cannot be read"):
        check_checkpoint(str(folder), "model.path")


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (
            {"tensor_parallel_size": 3},
            "the 4 attention heads of .* cannot be divided evenly .*_parallel_size 3",
        ),
        ({"temperature": 0}, "compares the samples of a group, but rollout.temperature 0"),
        ({"top_k": 1}, "with rollout.top_k 1 makes all of them identical"),
        ({"engine_options": {"max_model_len": 10}}, "engine_options.max_model_len 10 is less than .*, 2048"),
    ],
)
def test_what_no_engine_or_no_group_can_work_with_is_refused(models, rollout, message):
    config = TrainConfig(model={"path": models["qwen3"]}, data={"train": {"path": "d"}}, rollout=rollout, device="cpu")
    with pytest.raises(ConfigError, match=message):
        check_training(config)


@pytest.mark.parametrize(
    ("num_workers", "mini_batches", "max_tokens", "accumulates"),
    [
        (1, 1, 8 * 10, False),
        (1, 1, 8 * 10 - 1, True),
        (1, 2, 4 * 10, False),
        (1, 2, 4 * 10 - 1, True),
        (2, 1, 1000, True),
    ],
)
def test_a_mini_batch_is_split_over_ranks_or_where_its_longest_may_not_fit(
    num_workers, mini_batches, max_tokens, accumulates
):
    config = TrainConfig(
        model={"path": "m"},
        data={"train": {"path": "d"}, "max_prompt_tokens": 4},
        rollout={"prompts_per_step": 2, "group_size": 4, "max_response_tokens": 6},
    )
    learner = LearnerConfig(num_workers=num_workers, mini_batches=mini_batches, max_tokens_per_microbatch=max_tokens)
    assert _accumulates(config.model_copy(update={"learner": learner})) is accumulates


def test_a_tokenizer_that_the_model_does_not_know_is_refused(models):
    refuse_unknown_tokens(ModelConfig(path=models["qwen3"]), [(1, 2), (), np.array([3], dtype=np.int32)])
    with pytest.raises(ConfigError, match="produces token id 999999, but the model's vocab_size is "):
        refuse_unknown_tokens(ModelConfig(path=models["qwen3"]), [(1, 2), (999999,)])


def test_what_the_checkpoint_needs_of_its_engine_cannot_be_set(models, tmp_path):
    def asks_for(options, path, trained=True, **model):
        data = {"train": {"path": "d"}}
        config = TrainConfig(model={"path": str(path), **model}, data=data, rollout={"engine_options": options})
        check_engine_options(config, trained=trained)

    shutil.copytree(models["gpt_oss"], tmp_path / "mxfp4")
    settings = json.loads((tmp_path / "mxfp4" / "config.json").read_text())
    quantized = settings | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "mxfp4" / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ConfigError, match="engine_options sets load_format, which Fledge sets itself for a quantised"):
        asks_for({"load_format": "auto"}, tmp_path / "mxfp4")
    with pytest.raises(ConfigError, match=r"engine_options sets hf_overrides, which .* model.head_dtype float32"):
        asks_for({"hf_overrides": {"rope_theta": 1e6}}, models["qwen3"], trained=False, head_dtype="float32")


def test_an_unknown_engine_option_is_refused_with_the_nearest_name(models):
    config = TrainConfig(model={"path": str(models["qwen3"])}, data={"train": {"path": "d"}})
    known = config.model_copy(update={"rollout": RolloutConfig(engine_options={"attention_backend": "TRITON_ATTN"})})
    check_engine_options(known, trained=True)
    for misspelt, hint in (
        ("block_siz", r"did you mean block_size\?"),
        ("max_num_seq", "what vLLM calls max_num_seqs is rollout.max_concurrent_sequences here"),
    ):
        asked = config.model_copy(update={"rollout": RolloutConfig(engine_options={misspelt: 4})})
        with pytest.raises(ConfigError, match=rf"rollout.engine_options.{misspelt} is not .*; {hint}$"):
            check_engine_options(asked, trained=True)


@pytest.mark.parametrize("key", ["critic.path", "algorithm.kl.reference"])
def test_a_checkpoint_that_cannot_be_reached_is_named_by_its_own_key(models, monkeypatch, key):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sections = {
        "critic.path": {"critic": {"path": "org/missing"}, "algorithm": {"advantage": "gae"}},
        "algorithm.kl.reference": {
            "algorithm": {"kl": {"placement": "loss", "coefficient": 0.1, "reference": "org/missing"}}
        },
    }
    config = TrainConfig(model={"path": models["qwen3"]}, data={"train": {"path": "d"}}, **sections[key])
    with pytest.raises(ConfigError, match=f"(?s)'org/missing': .* as {key}$"):
        check_training(config)


def companion(models, tmp_path, key, family, **settings):
    """A configuration whose critic or reference is a tiny model of another family, with other settings."""
    path = build_tiny_model(family, tmp_path / family)
    AutoConfig.from_pretrained(path, **settings).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(models["qwen3"]) / name, path / name)
    sections = {
        "critic": {"critic": {"path": str(path)}, "algorithm": {"advantage": "gae"}},
        "reference": {"algorithm": {"kl": {"placement": "loss", "coefficient": 0.1, "reference": str(path)}}},
    }
    return TrainConfig(model={"path": models["qwen3"]}, data={"train": {"path": "d"}}, device="cpu", **sections[key])


@pytest.mark.parametrize("key", ["critic", "reference"])
def test_a_companion_that_does_not_know_the_policys_tokens_is_refused(models, tmp_path, key):
    check_training(companion(models, tmp_path / "fits", key, "qwen3"))
    with pytest.raises(ConfigError, match=rf"{key}.* has a vocabulary of 100 tokens, but model\.path .* uses \d+"):
        check_training(companion(models, tmp_path / "small", key, "qwen3", vocab_size=100))


def test_a_reference_reads_the_policys_layout_and_a_critic_its_own(models, tmp_path):
    with pytest.raises(
        ConfigError, match="prompts can be shared only with sdpa attention, but gpt_oss runs with eager"
    ):
        check_training(companion(models, tmp_path, "reference", "gpt_oss"))
    check_training(companion(models, tmp_path, "critic", "gpt_oss"))


@pytest.mark.parametrize("key", ["critic", "reference"])
def test_a_companion_with_another_tokenizer_is_refused(models, tmp_path, key):
    config = companion(models, tmp_path, key, "qwen3")
    file = tmp_path / "qwen3" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=rf"{key}.* has another tokenizer: token \d+ is '[ab]' there, but '[ab]'"):
        check_training(config)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_company_are_refused_where_they_do(models, tmp_path, kind):
    path = build_tiny_model("qwen3", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    factors = {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 1024, **factors}
    (path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    run = TrainConfig(model={"path": str(path)}, data={"train": {"path": "d"}, "max_prompt_tokens": 500})
    check_engines(run.model_copy(update={"rollout": RolloutConfig(max_response_tokens=524)}))
    with pytest.raises(ConfigError, match=f"has {kind} positions: beyond 1024 tokens, .* is 1025, lower it to 1024"):
        check_engines(run.model_copy(update={"rollout": RolloutConfig(max_response_tokens=525)}))
    examples = SftConfig(
        run_dir=str(tmp_path / "run"), model={"path": str(path)}, data={"train": {"path": "d"}}, device="cpu"
    )
    with pytest.raises(ConfigError, match=r"data\.max_tokens is 2048, lower it to 1024"):
        sft(examples, resume=False)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (MistralConfig(sliding_window=8), "shared_prefix"),
        (PhimoeConfig(sliding_window=8), "bucketed"),
        (PhimoeConfig(sliding_window=None), "shared_prefix"),
    ],
)
def test_prompts_are_shared_where_attention_is_told_of_its_window(tmp_path, config, layout):
    config.save_pretrained(tmp_path)
    run = run_config(str(tmp_path))
    assert check_learner(run) == layout
    sharing = run.model_copy(update={"learner": LearnerConfig(layout="shared_prefix")})
    if layout == "shared_prefix":
        assert check_learner(sharing) == layout
    else:
        with pytest.raises(ConfigError, match="cannot be shared with the attention windows of phimoe"):
            check_learner(sharing)


def test_names_that_wandb_does_not_take_are_refused(models):
    logging = LoggingConfig(wandb_project="x/y", wandb_mode="offline")
    with pytest.raises(ConfigError, match="wandb_project is 'x/y', but names of W&B projects cannot contain /"):
        check_logging(run_config(models["qwen3"]).model_copy(update={"logging": logging}))


def test_wandb_without_a_key_is_refused_early(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = run_config("unused")
    check_logging(config)

    def check(mode):
        check_logging(config.model_copy(update={"logging": LoggingConfig(wandb_project="p", wandb_mode=mode)}))

    check("offline")
    with pytest.raises(ConfigError, match="there is no W&B API key here; run `wandb login`"):
        check(None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check(None)
    with pytest.raises(ConfigError, match="there is no W&B API key here"):
        check("online")

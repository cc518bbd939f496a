"""Load a Hugging Face model as a ZeRO-3 module, with attention chosen by model and device, and MXFP4 dequantised.

Left out: the DeepSpeed engine around the model (`rl.zero3`), and tokenisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from rl.config import ModelConfig
from rl.cpu_linear import use_onednn
from rl.deferred import dequantize_mxfp4, read_deferred
from rl.errors import LearnerError
from rl.quantization import MXFP4, quantization_method

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_attention(requested: str, model_class: type, device: str, dtype: str) -> str:
    """The attention that `model.attention` means: `auto` is flash attention for bfloat16 on a GPU if the package
    `flash_attn` or `flash_attn_interface` is installed, else sdpa or eager.

    GPT-OSS uses eager unless set otherwise: its attention sinks have no sdpa form, and flash attention with sinks needs
    the `kernels` package.
    """
    if requested != "auto":
        return requested
    flash = getattr(model_class, "_supports_flash_attn", False) and not getattr(
        model_class, "_compatible_flash_implementations", None
    )
    if device == "cuda" and dtype == "bfloat16" and flash:
        if is_flash_attn_3_available():
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def attention_of(model: ModelConfig, config: Any, device: str) -> str:
    """The attention of a model with this transformers configuration. Raises LearnerError if it cannot run so."""
    attention = choose_attention(model.attention, model_class(config), device, model.dtype)
    if attention.startswith("flash") and device == "cpu":
        raise LearnerError(f"model.attention {attention} runs on GPUs only; set it to auto, sdpa or eager on a CPU")
    if attention == "flex_attention" and device == "cpu":
        raise LearnerError("model.attention flex_attention has no backward pass on CPUs; set it to auto, sdpa or eager")
    if attention.startswith("flash") and model.dtype == "float32":
        raise LearnerError(
            f"model.attention {attention} does not support float32; set model.dtype to bfloat16, or model.attention "
            "to auto"
        )
    return attention


def load_config(model: ModelConfig, path: str | None = None, key: str = "model.path") -> Any:
    """The transformers configuration of the policy, or of another checkpoint at `path`, which comes from `key`. Raises
    LearnerError if there is none."""
    try:
        return AutoConfig.from_pretrained(
            path or model.path, revision=None if path else model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # transformers' classes raise errors of many types
        raise LearnerError(
            f"cannot load a model configuration from {path or model.path!r}: {error}; "
            f"give a folder or hub name of a Hugging Face checkpoint as {key}"
        ) from error


def has_experts(config: Any) -> bool:
    """Whether a transformers configuration describes a mixture of experts."""
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def refuse_untrainable(config: Any, path: str) -> None:
    """Raise LearnerError if the learner cannot train the checkpoint at `path` with this transformers configuration."""
    if config.get_text_config() is not config:
        raise LearnerError(
            f"{path!r} is a {config.model_type}, of which the language model is only one part; the learner trains "
            "only causal language models, so give a checkpoint of a text model"
        )
    method = quantization_method(config)
    if method not in (None, MXFP4):
        raise LearnerError(
            f"{path!r} is quantised with {method}; only MXFP4 checkpoints can be dequantised for training, so give an "
            "unquantised checkpoint"
        )


def load_model(model: ModelConfig, zero_config: dict[str, Any], *, device: str, path: str | None = None) -> nn.Module:
    """Load the weights, partitioning them over the ranks while reading.

    Args:
        model: the policy's section; its dtype and attention also apply to `path`.
        zero_config: the DeepSpeed configuration that the engine will use.
        device: "cpu" or "cuda".
        path: another checkpoint (the KL reference) to load instead of `model.path`.

    Returns:
        The transformers model. Quantised (MXFP4) checkpoints are dequantised to `model.dtype`.

    Raises:
        LearnerError: there is no such checkpoint, or it does not fit its configuration.
    """
    loaded, missing = _load(AutoModelForCausalLM, model, zero_config, device=device, path=path)
    _refuse_missing(loaded, missing, path or model.path)
    return loaded


def load_value_model(
    model: ModelConfig, zero_config: dict[str, Any], *, device: str, path: str | None = None
) -> nn.Module:
    """A critic: a checkpoint's backbone with a head that gives one number per token (`score`, a torch.nn.Linear).

    The arguments are those of `load_model`. A causal language model gets a head of zeros, so that its first values are
    0; a reward model or an exported critic keeps its head.

    Raises:
        LearnerError: the checkpoint lacks more than the head, or the architecture has no token classification form.
    """
    import deepspeed

    one_number = {"num_labels": 1, "classifier_dropout": 0.0}
    loaded, missing = _load(
        AutoModelForTokenClassification, model, zero_config, device=device, path=path, settings=one_number
    )
    head = getattr(loaded, "score", None)
    if not isinstance(head, nn.Linear):
        raise LearnerError(f"{type(loaded).__name__} has no linear head named score, so it cannot be a critic")
    fresh = {"score.weight": head.weight, "score.bias": head.bias}
    _refuse_missing(loaded, missing - fresh.keys(), path or model.path)
    for name in sorted(missing):
        with deepspeed.zero.GatheredParameters([fresh[name]], modifier_rank=0):
            nn.init.zeros_(fresh[name])
    return loaded


def _refuse_missing(loaded: nn.Module, missing: set[str], path: str) -> None:
    """Raise LearnerError for missing weights, to which transformers would give random values."""
    if missing:
        raise LearnerError(
            f"{path!r} lacks weights of {type(loaded).__name__}: {', '.join(sorted(missing)[:5])}; "
            "give a complete checkpoint of the model that its config.json describes"
        )


def _load(
    auto_class: Any,
    model: ModelConfig,
    zero_config: dict[str, Any],
    *,
    device: str,
    path: str | None,
    settings: dict[str, Any] | None = None,
) -> tuple[nn.Module, set[str]]:
    """(the model, the names of the weights that its checkpoint lacks). `settings` override the checkpoint's
    configuration."""
    config = load_config(model, path)
    refuse_untrainable(config, path or model.path)
    attention = attention_of(model, config, device)
    options: dict[str, Any] = {
        "dtype": DTYPES[model.dtype],
        "attn_implementation": attention,
        "trust_remote_code": model.trust_remote_code,
        "output_loading_info": True,
    }
    for name, value in (settings or {}).items():
        setattr(config, name, value)
    # transformers partitions what it loads while this object is alive (it keeps a weak reference).
    zero3 = HfDeepSpeedConfig(zero_config)
    try:
        model_class, where = _source(auto_class, path or model.path, None if path else model.revision, config)
        loaded, report = model_class.from_pretrained(**where, **options)
    except LearnerError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: shapes that do not fit
        raise LearnerError(
            f"cannot load {path or model.path!r} as {model.dtype} with {attention} attention: {error}"
        ) from error
    finally:
        del zero3
    _refuse_kept_in_float32(loaded, model, path or model.path)
    _turn_off_dropout(loaded)
    if device == "cpu" and model.dtype == "float32":
        use_onednn(loaded)
    return loaded, set(report["missing_keys"])


def _refuse_kept_in_float32(loaded: nn.Module, model: ModelConfig, path: str) -> None:
    """Raise LearnerError if a model needs float32 parameters beside bfloat16 ones: partitions have one dtype."""
    patterns = getattr(loaded, "_keep_in_fp32_modules_strict", None) or ()
    if model.dtype == "float32" or not patterns:
        return
    kept, *_ = build_glob_alternation(sorted(patterns))  # matched as transformers does
    if names := [name for name, _ in loaded.named_parameters() if kept.search(name)]:
        raise LearnerError(
            f"{path!r} keeps {names[0]} (of {len(names)} parameters) in float32, which would be rounded to "
            f"{model.dtype}; set model.dtype to float32"
        )


def _turn_off_dropout(model: nn.Module) -> None:
    """The update must see the policy that generated the rollouts: with dropout, ratios would be noise.

    The configuration keeps its values, because it is exported.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # transformers' attention stores the rate as a number
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _source(auto_class: Any, path: str, revision: str | None, config: Any) -> tuple[Any, dict[str, Any]]:
    """The class whose from_pretrained to call, and the arguments that give it the weights: as deferred tensors, which a
    rank reads one parameter at a time.

    transformers reads the path itself if the model's code is remote, because it finds that code by the path, or if
    there is no safetensors file.
    """
    chosen = model_class(config, auto_class)
    method = quantization_method(config)
    tensors = read_deferred(path, revision) if chosen is not nn.Module else None
    if method == MXFP4 and not tensors:
        raise LearnerError(f"{path!r} is quantised with {MXFP4}, which can be dequantised only from safetensors files")
    if not tensors:
        return auto_class, {"pretrained_model_name_or_path": path, "revision": revision, "config": config}
    if method == MXFP4:
        tensors = dequantize_mxfp4(tensors)
        del config.quantization_config
    return chosen, {"pretrained_model_name_or_path": None, "state_dict": tensors, "config": config}


def model_class(config: Any, auto_class: Any = AutoModelForCausalLM) -> Any:
    """The transformers class for this configuration; torch.nn.Module if the code is remote: nothing is known about it
    then, so its attention is eager."""
    known: Any = auto_class._model_mapping  # a lazy dict, which imports what is looked up
    return known.get(type(config), nn.Module)

"""Load a Hugging Face model as a ZeRO-3 module: attention by model and device, MXFP4 checkpoints as bfloat16.

Left out: the DeepSpeed engine around it (`rl.zero3`), and tokenisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from rl.config import ModelConfig
from rl.errors import LearnerError
from rl.quantization import MXFP4, quantization_method

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_attention(requested: str, model_class: type, device: str) -> str:
    """The attention that `model.attention` means: `auto` is flash attention on a GPU that has it, else sdpa or eager.

    GPT-OSS runs with eager unless asked otherwise: its attention sinks have no sdpa form, and flash attention with
    sinks needs the `kernels` package.
    """
    if requested != "auto":
        return requested
    flash = getattr(model_class, "_supports_flash_attn", False) and not getattr(
        model_class, "_compatible_flash_implementations", None
    )
    if device == "cuda" and flash:
        if is_flash_attn_3_available():
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def attention_of(model: ModelConfig, config: Any, device: str) -> str:
    """The attention of a model with this transformers configuration. Raises LearnerError where the device has none."""
    attention = choose_attention(model.attention, _model_class(config), device)
    if attention.startswith("flash") and device == "cpu":
        raise LearnerError(f"model.attention {attention} runs on GPUs only; set it to auto, sdpa or eager for a CPU")
    return attention


def load_config(model: ModelConfig, path: str | None = None) -> Any:
    """The transformers configuration of the policy, or of `path` in its place. Raises LearnerError if there is none."""
    try:
        return AutoConfig.from_pretrained(
            path or model.path, revision=None if path else model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise LearnerError(
            f"cannot load a model configuration from {path or model.path!r}: {error}; "
            "give a folder or hub name of a Hugging Face checkpoint as model.path"
        ) from error


def load_model(model: ModelConfig, zero_config: dict[str, Any], *, device: str, path: str | None = None) -> nn.Module:
    """Load weights, partitioned over the ranks while they are read.

    Args:
        model: the policy; its dtype and attention also hold for `path`.
        zero_config: the DeepSpeed configuration that the engine will use.
        device: "cpu" or "cuda".
        path: another checkpoint (the KL reference) in place of `model.path`.

    Returns:
        The transformers model. Quantised (MXFP4) checkpoints are dequantised to `model.dtype`; they are read whole by
        every rank, because transformers does not dequantise into partitioned parameters.
    """
    loaded, _ = _load(AutoModelForCausalLM, model, zero_config, device=device, path=path)
    return loaded


def load_value_model(
    model: ModelConfig, zero_config: dict[str, Any], *, device: str, path: str | None = None
) -> nn.Module:
    """A critic: the backbone of a checkpoint with a head of one number a token (`score`, a torch.nn.Linear).

    Arguments are those of `load_model`. A causal language model gets a head of zeros, so that its first values are 0; a
    reward model or an exported critic keeps its own.

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
    if not missing <= fresh.keys():
        raise LearnerError(
            f"{path or model.path!r} lacks weights of {type(loaded).__name__}: {', '.join(sorted(missing)[:5])}"
        )
    for name in sorted(missing):
        with deepspeed.zero.GatheredParameters([fresh[name]], modifier_rank=0):
            nn.init.zeros_(fresh[name])
    return loaded


def _load(
    auto_class: Any,
    model: ModelConfig,
    zero_config: dict[str, Any],
    *,
    device: str,
    path: str | None,
    settings: dict[str, Any] | None = None,
) -> tuple[nn.Module, set[str]]:
    """(the model, the names of the weights that its checkpoint lacks). `settings` overrule the checkpoint's
    configuration."""
    config = load_config(model, path)
    attention = attention_of(model, config, device)
    options: dict[str, Any] = {
        "dtype": DTYPES[model.dtype],
        "attn_implementation": attention,
        "trust_remote_code": model.trust_remote_code,
        "revision": None if path else model.revision,
        "output_loading_info": True,
    }
    if settings:
        for name, value in settings.items():
            setattr(config, name, value)
        options["config"] = config
    quantized = quantization_method(config)
    if quantized is not None:
        options["quantization_config"] = _dequantize(quantized, path or model.path)
    # transformers partitions what it loads as long as this object lives (it keeps a weak reference).
    zero3 = HfDeepSpeedConfig(zero_config)
    try:
        loaded, report = auto_class.from_pretrained(path or model.path, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: shapes that do not fit
        raise LearnerError(
            f"cannot load {path or model.path!r} as {model.dtype} with {attention} attention: {error}"
        ) from error
    finally:
        del zero3
    loaded.config.use_cache = False
    if quantized is not None:
        # transformers 5.10 keeps the dequantisation among the conversions that it would revert for a checkpoint, and
        # cannot revert it; without them it uses those of the architecture.
        loaded._weight_conversions = None
        loaded.to(DTYPES[model.dtype])  # what was dequantised is bfloat16 whatever was asked for
    return loaded, set(report["missing_keys"])


def _model_class(config: Any) -> type:
    """transformers' class for this configuration; of remote code nothing is known, so its attention is eager."""
    known: Any = AutoModelForCausalLM._model_mapping  # lazy: it looks like a dict, and imports what is asked for
    return known.get(type(config), nn.Module)


def _dequantize(method: str, path: str) -> Any:
    from transformers.utils.quantization_config import Mxfp4Config

    if method != MXFP4:
        raise LearnerError(
            f"{path!r} is quantised with {method}; only MXFP4 checkpoints can be dequantised for training, "
            "so give an unquantised checkpoint"
        )
    return Mxfp4Config(dequantize=True)

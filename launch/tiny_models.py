"""Build tiny random checkpoints with tokenizers, for the quickstart, the tests and the benchmarks.

They are ordinary Hugging Face folders of the real architectures, so everything that loads a released model loads them.
Left out: anything trained; `fledge sft` does that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GptOssConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

Family = Literal["qwen3", "qwen3_moe", "gpt_oss"]
FAMILIES: tuple[Family, ...] = ("qwen3", "qwen3_moe", "gpt_oss")

QWEN_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
HARMONY_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|return|>",
    "<|call|>",
)

QWEN_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The shape of the released GPT-OSS template: a system message that carries the reasoning effort, an end token for every
# message, and <|return|> in place of <|end|> after the last final answer.
HARMONY_CHAT_TEMPLATE = (
    "{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{%- if message.thinking %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}"
    "{%- endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}"
    "{{- '<|return|>' if loop.last else '<|end|>' }}"
    "{%- else %}"
    "{{- '<|start|>' + ('developer' if message.role == 'system' else message.role) + '<|message|>'"
    " + message.content + '<|end|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)


def build_tiny_model(
    family: Family, out_dir: str | Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any
) -> Path:
    """Write a random checkpoint of `family` and its byte-level tokenizer to `out_dir`.

    Args:
        family: the architecture.
        out_dir: created if missing; files of the same names are replaced.
        dtype: of the stored weights, "float32" or "bfloat16".
        seed: of the random weights.
        overrides: fields of the transformers config, for example `hidden_size=128, initializer_range=0.02`.

    Returns:
        `out_dir` as a Path.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(family)
    config = _config(family, tokenizer, overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        eos_token_id=_end_token_ids(family, tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a UTF-8 byte, and the family's special tokens and template."""
    harmony = family == "gpt_oss"
    special = HARMONY_SPECIAL_TOKENS if harmony else QWEN_SPECIAL_TOKENS
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    # As in Qwen3's own tokenizer, thinking tags are not special, so they survive decoding.
    core.add_tokens([AddedToken(token, special=token not in ("<think>", "</think>")) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|return|>" if harmony else "<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = HARMONY_CHAT_TEMPLATE if harmony else QWEN_CHAT_TEMPLATE
    return tokenizer


def _end_token_ids(family: Family, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    names = ("<|return|>", "<|endoftext|>", "<|call|>") if family == "gpt_oss" else ("<|im_end|>", "<|endoftext|>")
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[name] for name in names]


def _config(family: Family, tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any]) -> PreTrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 32) * 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        # Wide enough that a change in any one parameter group moves the log-probabilities visibly.
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    if family == "qwen3":
        return Qwen3Config(**(common | overrides))
    if family == "qwen3_moe":
        moe = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        return Qwen3MoeConfig(**(common | moe | overrides))
    gpt_oss = {
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return GptOssConfig(**(common | gpt_oss | overrides))


def describe(model_dir: str | Path) -> str:
    """One line about a checkpoint folder: architecture and parameter count."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    return f"{config['architectures'][0]}, {sum(p.numel() for p in model.parameters()):,} parameters"

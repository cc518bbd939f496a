"""What is refused of a model that has been loaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

from rl.config import ModelConfig
from rl.errors import LearnerError
from rl.models import _refuse_kept_in_float32


def test_parameters_that_must_stay_in_float32_are_not_rounded():
    """Ernie's routers: partitions of bfloat16 hold no float32, and a rounded router chooses other experts."""
    config = Ernie4_5_MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_num_experts=4,
        moe_k=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _refuse_kept_in_float32(model, ModelConfig(path="m", dtype="float32"), "m")
    with pytest.raises(
        LearnerError, match=r"'m' keeps model\.layers\.1\.mlp\.gate\.weight .* set model\.dtype to float32"
    ):
        _refuse_kept_in_float32(model, ModelConfig(path="m"), "m")

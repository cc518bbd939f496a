"""What an exported folder holds beside the weights; and which failures to read a checkpoint are its own."""

import errno
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launch.tiny_models import build_tiny_model
from rl.config import ModelConfig
from rl.learner_checkpoint import _is_of_the_machine, _write_companions

CONFIGURATION = """
from transformers import Qwen3Config

class MineConfig(Qwen3Config):
    model_type = "mine"
"""
MODELING = """
from transformers import Qwen3ForCausalLM
from .configuration_mine import MineConfig

class MineForCausalLM(Qwen3ForCausalLM):
    config_class = MineConfig
"""


def test_a_models_own_code_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = build_tiny_model("qwen3", tmp_path / "source")
    (source / "configuration_mine.py").write_text(CONFIGURATION)
    (source / "modeling_mine.py").write_text(MODELING)
    config = json.loads((source / "config.json").read_text()) | {
        "model_type": "mine",
        "architectures": ["MineForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
    }
    (source / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    (tmp_path / "exported").mkdir()
    _write_companions(model, ModelConfig(path=str(source), trust_remote_code=True), tmp_path / "exported")
    exported = AutoConfig.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert type(AutoModelForCausalLM.from_config(exported, trust_remote_code=True)).__name__ == "MineForCausalLM"


@pytest.mark.parametrize(
    ("error", "of_the_machine"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (OSError(errno.EINVAL, "Invalid argument"), False),  # what torch makes of some files that were cut
        (FileNotFoundError("0 files zero_pp_rank_1_mp_rank_00_optim_states.pt"), False),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), False),
    ],
)
def test_only_the_files_own_faults_are_called_damage(error, of_the_machine):
    assert _is_of_the_machine(error) is of_the_machine

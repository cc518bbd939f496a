"""How engines are configured on a CPU, and that the workarounds for vLLM are still needed. Starts no engine."""

import inspect
import os

import pytest
import torch
from mxfp4 import write_mxfp4

from launch.tiny_models import build_tiny_model
from rl.config import ModelConfig, RolloutConfig

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ModelConfig(path=str(build_tiny_model("qwen3", tmp_path_factory.mktemp("model"))), dtype="float32")


def arguments(model, *, deterministic=False, trained=False, **rollout):
    from rollout.vllm_options import EngineSpec, engine_args

    config = RolloutConfig(**rollout)
    return engine_args(EngineSpec(model, config, "shm", max_model_len=64, deterministic=deterministic, trained=trained))


def test_prompts_are_never_prefilled_in_pieces_on_a_cpu(model):
    made = arguments(model)
    assert made.enable_chunked_prefill is False
    assert made.max_num_batched_tokens >= made.max_model_len


def test_a_seeded_request_still_cannot_take_back_a_draw_on_a_cpu():
    """The reason for whole prompts. When this fails, upstream has fixed it: drop the option in `engine_args`."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "gen.set_offset(gen.get_offset()" in inspect.getsource(GPUModelRunner._bookkeeping_sync)
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator("cpu").get_offset()


def test_deterministic_engines_cache_no_prefix(model):
    assert arguments(model).enable_prefix_caching is True
    assert arguments(model, deterministic=True).enable_prefix_caching is False


def test_prompts_of_a_few_dozen_tokens_share_their_first_blocks_on_a_cpu(model):
    assert arguments(model).block_size == 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="threads are counted on CPUs only")
@pytest.mark.parametrize(
    ("config", "threads"),
    [({}, 12), ({"num_workers": 5}, 2), ({"num_workers": 20}, 1), ({"num_workers": 2, "threads_per_worker": 3}, 3)],
)
def test_engines_share_the_cores_whatever_ray_left_the_actor(monkeypatch, config, threads):
    from rollout.vllm_options import set_environment

    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1"})
    monkeypatch.setattr("rollout.vllm_options.usable_cores", lambda: 12)
    set_environment(ModelConfig(path="unused"), RolloutConfig(**config))
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "32"  # else engines grow (`make soak`)


def test_engine_options_have_the_last_word(model):
    assert arguments(model, engine_options={"block_size": 32}).block_size == 32


def test_an_engine_that_is_trained_loads_no_quantised_tensor(tmp_path):
    build_tiny_model("gpt_oss", tmp_path / "model")
    write_mxfp4(tmp_path / "model", tmp_path / "mxfp4")
    quantized = ModelConfig(path=str(tmp_path / "mxfp4"), dtype="float32")
    assert arguments(quantized, trained=True).load_format == "dummy"
    assert arguments(quantized).load_format == "auto"


def test_engines_make_logits_in_float32_where_the_learner_does(model):
    wide = model.model_copy(update={"dtype": "bfloat16", "head_dtype": "float32"})
    assert arguments(wide).create_engine_config().model_config.head_dtype == torch.float32
    assert arguments(model.model_copy(update={"dtype": "bfloat16"})).create_engine_config().model_config.head_dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("stop", ["<|im_start|>", "</think>"])  # a special token, and an added one that is none
def test_a_token_may_be_a_stop_string(model, stop):
    from transformers import AutoTokenizer
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    from rollout.engine import SamplingParameters
    from rollout.vllm_options import sampling_params

    tokenizer = AutoTokenizer.from_pretrained(model.path)
    parameters = sampling_params(SamplingParameters(max_tokens=8, stop=(stop,)), seed=0)
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=tokenizer.encode("a"),
        mm_features=None,
        sampling_params=parameters,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    assert detokenizer.update(tokenizer.encode(f"b{stop}"), stop_terminated=False) == stop

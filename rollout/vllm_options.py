"""How an engine is configured: vLLM's arguments, its environment, and the sampling parameters of a request.

Left out: running the engine (`rollout.vllm_engine`). Only the functions import vLLM.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rl.config import ModelConfig, RolloutConfig
from rl.machine import usable_cores
from rl.quantization import MXFP4, quantization_method
from rollout import process_tie
from rollout.engine import SamplingParameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams

_CPU_KV_CACHE_GIB = 1.0  # where rollout.kv_cache_gib is not set; vLLM would take a share of the whole machine's memory
# The worker shares the engine core's process. vLLM's CPU platform turns the name "uni" into "mp", which costs another
# process with its 15 s import, and keeps one core from the worker.
_ONE_WORKER_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_UNUSED_SHARE = 0.01  # of the GPU: vLLM requires its share to be free, even if a fixed cache makes no other use of it
_CPU_BLOCK_TOKENS = 32  # vLLM's 128 exceed a short prompt, and prompts share whole blocks only
_CPU_BATCHED_TOKENS = 8192  # tokens per step, or the model's length if that is more, because prompts are not split
_NO_STREAMING = 1 << 30  # tokens between two outputs of a request: only its first token and its end are reported


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What every engine of a pool is built from."""

    model: ModelConfig
    rollout: RolloutConfig
    transport: str  # "shm", "nccl" or "ipc", the same as the learner's `WeightSender` uses
    max_model_len: int | None = None  # prompt plus response tokens; None: the model's own limit
    seed: int = 0  # vLLM's own; samples are drawn with their requests' seeds
    deterministic: bool = False  # requests of one `generate` call enter the scheduler together; no prefix is cached
    trained: bool = False  # a learner sends every weight before anything is generated


def engine_args(spec: EngineSpec) -> AsyncEngineArgs:
    """vLLM's arguments. `rollout.engine_options` has the last word; it cannot hold what another key decides.

    Weights that come from a learner are dequantised, so with a learner the engine of a quantised checkpoint (MXFP4) is
    built without quantisation and loads none of the checkpoint's tensors.

    In deterministic mode no prefix is cached: whether one is found depends on what ran before and on whether its blocks
    were free when the cache was emptied, and a prompt computed only in part differs in its last bits.
    """
    from transformers import AutoConfig
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    model, rollout = spec.model, spec.rollout
    checkpoint: PreTrainedConfig = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    model_length = int(checkpoint.get_text_config().max_position_embeddings)
    # Scoring a sequence makes vLLM generate a token, so leave room for one if the model's own limit allows it.
    length = None if spec.max_model_len is None else spec.max_model_len + int(spec.max_model_len < model_length)
    kv_cache_gib = rollout.kv_cache_gib or (_CPU_KV_CACHE_GIB if current_platform.is_cpu() else None)
    options: dict[str, Any] = {
        "model": model.path,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype,
        "seed": spec.seed,
        "max_model_len": length,
        "max_num_seqs": rollout.max_concurrent_sequences,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "distributed_executor_backend": "mp" if rollout.tensor_parallel_size > 1 else _ONE_WORKER_EXECUTOR,
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        "gpu_memory_utilization": rollout.gpu_memory_utilization if kv_cache_gib is None else _UNUSED_SHARE,
        "enforce_eager": rollout.enforce_eager,
        "enable_prefix_caching": rollout.enable_prefix_caching and not spec.deterministic,
        "logprobs_mode": "processed_logprobs",
        "stream_interval": _NO_STREAMING,
        "disable_log_stats": True,
        "generation_config": "auto",
        "weight_transfer_config": WeightTransferConfig(backend=f"fledge_{spec.transport}"),
        "worker_extension_cls": "rollout.weight_receiver.WorkerExtension",
    }
    if current_platform.is_cpu():
        # Upstream fault: a seeded request whose prompt is prefilled in pieces kills the engine, because vLLM undoes the
        # draw for an unfinished prompt through the generator's offset, which CPU generators do not have (vLLM 0.31,
        # `GPUModelRunner._bookkeeping_sync`). After a whole prompt there is nothing to undo.
        options |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(
                _CPU_BATCHED_TOKENS, length or model_length, rollout.max_concurrent_sequences
            ),
            "block_size": _CPU_BLOCK_TOKENS,
        }
    options |= checkpoint_options(model, checkpoint, trained=spec.trained)
    return AsyncEngineArgs(**(options | rollout.engine_options))


def checkpoint_options(model: ModelConfig, checkpoint: PreTrainedConfig, *, trained: bool) -> dict[str, Any]:
    """What makes an engine treat the checkpoint as a different one: as dequantised if it is trained, and as one that
    wants its logits in float32 if model.head_dtype says so."""
    unquantized = trained and quantization_method(checkpoint) == MXFP4
    float32_head = model.head_dtype == "float32"
    options: dict[str, Any] = {}
    if unquantized or float32_head:
        # No lambda: vLLM pickles its arguments.
        options["hf_overrides"] = partial(overridden, unquantized=unquantized, float32_head=float32_head)
    if unquantized:
        options["load_format"] = "dummy"
    return options


def overridden(config: PreTrainedConfig, *, unquantized: bool, float32_head: bool) -> PreTrainedConfig:
    """The checkpoint's configuration, changed in place: without quantisation, and with logits in float32, as asked."""
    if unquantized and hasattr(config, "quantization_config"):
        del config.quantization_config
    if float32_head:
        config.head_dtype = "float32"
    return config


def set_environment(model: ModelConfig, rollout: RolloutConfig) -> process_tie.EngineFiles:
    """Set what vLLM reads from the environment, in this process and in those that it starts.

    Returns the engine's files, to be cleaned up when the engine has ended.
    """
    import torch

    if not torch.cuda.is_available():
        # Ray limits an actor to one thread, and the engine core would inherit that limit.
        engines = rollout.num_workers * rollout.tensor_parallel_size
        os.environ["OMP_NUM_THREADS"] = str(rollout.threads_per_worker or max(1, usable_cores() // engines))
        # Else vLLM pins each tensor-parallel worker to a NUMA node of its own, and fails if there are fewer nodes.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # oneDNN keeps a kernel for each batch size: with its default of 1024 an engine grew by half in 1,000 steps.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a forked child would not load the plugins again
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(rollout.start_timeout_s))
    os.environ["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = str(math.ceil(rollout.hang_timeout_s))  # of several workers
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if model.dtype == "float32":
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # else Triton multiplies in TF32, with 10 bits of mantissa
    if rollout.enforce_eager:
        # Even then vLLM compiles small helpers of its sampler, which needs a C++ compiler and takes a minute on a CPU.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "VLLM_PLUGINS" in os.environ and "fledge" not in os.environ["VLLM_PLUGINS"].split(","):
        os.environ["VLLM_PLUGINS"] += ",fledge"
    return process_tie.own(os.environ)


def sampling_params(parameters: SamplingParameters, seed: int) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=parameters.max_tokens,
        temperature=parameters.temperature,
        top_p=parameters.top_p,
        top_k=parameters.top_k,
        min_p=parameters.min_p,
        stop=list(parameters.stop),
        stop_token_ids=list(parameters.stop_token_ids),
        ignore_eos=parameters.ignore_eos,
        seed=seed,
        logprobs=0,  # only the sampled token's
        flat_logprobs=True,
        detokenize=bool(parameters.stop),
        skip_special_tokens=not parameters.stop,  # a stop string may be a special token
    )

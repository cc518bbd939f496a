"""DeepSpeed ZeRO-3 as the learner uses it: process group, configuration and engines.

Left out: models (`rl.models`), and what is computed (`rl.learner`).
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rl.config import LearnerConfig

# Elements per rank that the optimizer updates at a time (or a single parameter with more). DeepSpeed copies their
# gradients at 4 bytes each, which would be 4 GB with its own default of 1e9; on a CPU, a step takes no longer with
# fewer (`benchmarks/update_memory.py`).
SUB_GROUP_ELEMENTS = 50_000_000


def init_distributed(device: str, timeout_s: float) -> None:
    """Join the process group described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and let DeepSpeed use it.

    torch's own initialisation comes first, because DeepSpeed's binds a device to the default group, which can hang a
    second NCCL group (the one for weight sync; allenai/open-instruct pull request 1311).
    """
    # DeepSpeed calls collectives that torch 2.13 renamed; each call would warn.
    warnings.filterwarnings("ignore", message=".*_into_tensor` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor` is deprecated", category=FutureWarning)
    os.environ.setdefault("LOCAL_RANK", "0")
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, which would take a GPU if there is one
    if not torch.distributed.is_initialized():
        backend = "gloo" if device == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    import deepspeed
    import deepspeed.comm

    # DeepSpeed's shared-memory all-reduce serves only inference, but is compiled when a group starts. That takes a
    # minute and a compiler, and if the process dies meanwhile, its lock file hangs later starts. Declaring the operator
    # incompatible prevents the compilation.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def set_up_process(*, seed: int, deterministic: bool, device: str) -> torch.device:
    """Seed torch, set its deterministic mode, and return this rank's device (for "cuda", that of LOCAL_RANK)."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def training_config(config: LearnerConfig, *, dtype: str, hidden_size: int) -> dict[str, Any]:
    """DeepSpeed configuration of an engine that trains (the policy's or the critic's).

    gradient_accumulation_steps is 1 and the learner sets the boundary itself, so DeepSpeed never divides a loss.
    Gradients are summed and kept in float32 for every model dtype.
    """
    result = _zero3_config(
        hidden_size=hidden_size, dtype=dtype, offload_parameters=config.offload_parameters, overlap=True
    )
    if config.persistence_threshold is not None:
        result["zero_optimization"]["stage3_param_persistence_threshold"] = config.persistence_threshold
    if config.offload_optimizer:
        result["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return result | {
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def inference_config(*, dtype: str, hidden_size: int, offload: bool) -> dict[str, Any]:
    """DeepSpeed configuration of a frozen engine (the KL reference): parameters are sharded, nothing is updated."""
    return _zero3_config(hidden_size=hidden_size, dtype=dtype, offload_parameters=offload, overlap=False)


def _zero3_config(*, hidden_size: int, dtype: str, offload_parameters: bool, overlap: bool) -> dict[str, Any]:
    # In elements. Few large collectives are fastest on GPUs: 1.69 s per step with 4e6, 1.50 s with 50e6 (Qwen3-0.6B,
    # H100).
    least = 50_000_000 if torch.cuda.is_available() else 1_000_000
    bucket = min(max(4 * hidden_size * hidden_size, least), 200_000_000)
    zero: dict[str, Any] = {
        "stage": 3,
        "contiguous_gradients": True,
        "sub_group_size": SUB_GROUP_ELEMENTS,
        "overlap_comm": overlap and torch.cuda.is_available(),
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
    }


def start_engine(
    model: nn.Module,
    config: dict[str, Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Any:
    """A DeepSpeedEngine for the model; without an optimizer it can only run forward.

    Each decoder layer is gathered and released as a whole, so that DeepSpeed's hooks run once per layer, not once per
    module.
    """
    import deepspeed

    layers = sorted(getattr(model, "_no_split_modules", None) or ())
    if layers:
        zero = config["zero_optimization"] | {"leaf_module": {"classes": layers}}
        config = config | {"zero_optimization": zero}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=config, dist_init_required=False
    )
    return engine


def backward(engine: Any, loss: Tensor) -> None:
    """Backward pass of one micro-batch; the gradients of all ranks are averaged.

    A loss that is not finite may still have finite gradients. DeepSpeed looks only at gradients, so they are made NaN,
    and every rank skips the step.
    """
    engine.backward(loss * torch.where(torch.isfinite(loss), 1.0, torch.nan))

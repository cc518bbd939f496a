"""The ZeRO-3 learner as a training engine of verl: importing this module registers the strategy `deepspeed`.

verl imports it if a configuration says `model.external_lib: rl.verl_engine`; its `TrainingWorker` then drives the parts
that `rl.learner` is made of. verl decides what a batch is, how it is split and which loss is minimised; Fledge does
loading, layouts, log-probabilities, the update, checkpoints and weight export. Left out, and refused if a configuration
or a batch asks for it: adapters (LoRA), value models, images, distillation from logits, sequence parallelism. No other
module of Fledge imports this one. Written against verl 0.9.1.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.device import get_device_name
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.engine.base import BaseEngine, BaseEngineCtx, EngineRegistry
from verl.workers.engine.utils import detach_tree, postprocess_batch_func, prepare_micro_batches

from rl.batch import TokenSequence
from rl.errors import LearnerError
from rl.layouts import collate
from rl.learner_checkpoint import export_hf, load_checkpoint, save_checkpoint
from rl.learner_checks import check_layout
from rl.lockstep import prepare_model
from rl.logprobs import LogprobHead
from rl.models import DTYPES, load_config, load_model
from rl.optim import build_optimizer, build_schedule
from rl.verl_config import learner_config, refuse_settings, total_steps, translate_model
from rl.weight_sync.source import Zero3WeightSource
from rl.zero3 import backward, inference_config, init_distributed, set_up_process, start_engine, training_config

_logger = logging.getLogger(__name__)


@EngineRegistry.register(model_type="language_model", backend="deepspeed", device=["cpu", "cuda"])
class DeepSpeedEngine(BaseEngine):
    """One rank of the engine. Methods are collectives; verl calls them on all ranks in the same order.

    Args:
        model_config: verl's HFModelConfig.
        engine_config: verl's EngineConfig, or the FSDPEngineConfig that its trainers make.
        optimizer_config: verl's OptimizerConfig; not read where engine_config.forward_only is set.
        checkpoint_config: verl's CheckpointConfig.

    Raises:
        ConfigError: a setting asks for something that this engine does not support.
    """

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any, **kwargs: Any
    ) -> None:
        super().__init__()
        del kwargs  # of other strategies
        refuse_settings(model_config, engine_config, checkpoint_config, self.get_data_parallel_size())
        self.mode: str | None = None
        self.model_config, self.engine_config = model_config, engine_config
        self.optimizer_config, self.checkpoint_config = optimizer_config, checkpoint_config
        self.engine: Any = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.lr_scheduler: Any = None
        self._device_name = get_device_name()
        self._model = translate_model(model_config, engine_config)
        self._saved: list[Path] = []

    def initialize(self) -> None:
        """Load the model into a new DeepSpeed engine, freeing an earlier one.

        Raises:
            LearnerError: the model cannot be loaded, or the layout would not be exact with its attention.
        """
        if self.engine is not None:
            self.engine.destroy()
        verl, model = self.engine_config, self._model
        # Not in __init__, because verl's trainers complete the optimizer's configuration after it.
        config = learner_config(self.model_config, verl, self.optimizer_config)
        init_distributed(self._device_name, config.timeout_s)
        self._device = set_up_process(seed=verl.seed, deterministic=verl.full_determinism, device=self._device_name)
        hidden_size = load_config(model).hidden_size
        if verl.forward_only:
            zero = inference_config(dtype=model.dtype, hidden_size=hidden_size, offload=config.offload_reference)
        else:
            zero = training_config(config, dtype=model.dtype, hidden_size=hidden_size)
        policy = load_model(model, zero, device=self._device.type)
        self._head = LogprobHead(policy, config.logprob_chunk_tokens)
        self._layout = prepare_model(policy, config, self._device)
        if verl.forward_only:
            policy.requires_grad_(False)
            self.engine = start_engine(policy, zero)
        else:
            self.optimizer = build_optimizer(policy, config.optimizer)
            self.engine = start_engine(policy, zero, optimizer=self.optimizer)
            # Not given to DeepSpeed: verl steps it once per batch of rollouts, however many optimizer steps that takes.
            self.lr_scheduler = build_schedule(self.optimizer, config.optimizer, total_steps(self.optimizer_config))
        check_layout(self.engine, self._head, self._layout, device=self._device, dtype=DTYPES[model.dtype])

    @property
    def module(self) -> Any:
        """The transformers model; its parameters are ZeRO-3 partitions."""
        return self.engine.module

    @property
    def is_param_offload_enabled(self) -> bool:
        return bool(self.engine_config.param_offload)

    @property
    def is_optimizer_offload_enabled(self) -> bool:
        return bool(self.engine_config.optimizer_offload)

    def train_mode(self, **kwargs: Any) -> BaseEngineCtx:
        return _Mode(self, mode="train", **kwargs)

    def eval_mode(self, **kwargs: Any) -> BaseEngineCtx:
        return _Mode(self, mode="eval", **kwargs)

    def get_data_parallel_rank(self) -> int:
        return torch.distributed.get_rank()

    def get_data_parallel_size(self) -> int:
        return torch.distributed.get_world_size()

    def get_data_parallel_group(self) -> Any:
        return torch.distributed.group.WORLD

    def is_mp_src_rank_with_outputs(self) -> bool:
        """Always True: every rank is data parallel and has the outputs of its own samples."""
        return True

    def forward_backward_batch(
        self, data: Any, loss_function: Callable[..., Any] | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """Run this rank's batch in verl's micro-batches.

        Args:
            data: a TensorDict of S rows without padding: jagged `input_ids`, `loss_mask`, and whatever the loss reads.
            loss_function: verl's, called as (model_output, data, dp_group); its losses include the factor dp_size,
                which averaging over ranks cancels. None: no loss, forward only.
            forward_only: no backward pass.

        Returns:
            {"model_output": jagged rows as long as input_ids (in training only if the batch sets return_model_output),
            "loss": one per micro-batch, "metrics": lists}. In `log_probs` and `entropy`, position i belongs to the
            token after position i, and the last position is 0.

        Raises:
            LearnerError: the batch asks for something that this engine does not support.
        """
        _refuse_batch(data)
        temperature = _temperature(data)
        group = self.get_data_parallel_group()
        num_tokens = data["loss_mask"].sum().to(self._device)
        torch.distributed.all_reduce(num_tokens, group=group)
        tu.assign_non_tensor(data, batch_num_tokens=num_tokens.item(), dp_size=self.get_data_parallel_size(), sp_size=1)
        micro_batches, indices = prepare_micro_batches(data=data, dp_group=group, same_micro_num_in_dp=True)
        keep = forward_only or tu.get_non_tensor_data(data=data, key="return_model_output", default=False)
        outputs = []
        for index, micro_batch in enumerate(micro_batches):
            if not forward_only:
                self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            output = self._micro_step(micro_batch.to(self._device), temperature, loss_function, forward_only)
            if not keep:
                del output["model_output"]
            outputs.append(output)
        result: dict[str, Any] = postprocess_batch_func(output_lst=outputs, indices=indices, data=data)
        return result

    def optimizer_zero_grad(self) -> None:
        self.engine.optimizer.zero_grad()

    def optimizer_step(self) -> float:
        """Step, and return the gradient's norm before clipping; it is infinite if the step was skipped."""
        self.engine.step()
        if self.engine.optimizer.overflow:
            _logger.warning("the loss or the gradient is not finite; all ranks skip this optimizer step")
        return float(self.engine.get_global_grad_norm())

    def lr_scheduler_step(self) -> float:
        self.lr_scheduler.step()
        return float(self.lr_scheduler.get_last_lr()[0])

    def get_per_tensor_param(self, **kwargs: Any) -> tuple[Iterator[tuple[str, Tensor]], None]:
        """(checkpoint name, whole tensor in the engine's dtype) on every rank, gathered 256 MiB at a time.

        Iteration is a collective. The second value would be verl's adapter configuration; there is none.
        """
        del kwargs  # how to gather an adapter
        source = Zero3WeightSource(self.module, dtype=DTYPES[self._model.dtype], keep="all")
        return iter(source), None

    def get_per_tensor_param_shard(self, **kwargs: Any) -> tuple[Iterator[Any], None]:
        raise LearnerError(
            "the deepspeed engine exports whole parameters, not shards; set rollout.checkpoint_engine.backend to one "
            "that is not delta_sharded"
        )

    def get_per_tensor_param_delta_shard(self, **kwargs: Any) -> tuple[Iterator[Any], None]:
        return self.get_per_tensor_param_shard(**kwargs)

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        """Move nothing: offloaded states are in CPU memory already, and DeepSpeed fetches them layer by layer.

        Raises:
            LearnerError: on a request to move states to the CPU that were not offloaded from the start, which DeepSpeed
                cannot.
        """
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        missing = [
            name
            for name, asked, offloaded in (
                ("param_offload", model, self.is_param_offload_enabled),
                ("optimizer_offload", optimizer, self.is_optimizer_offload_enabled),
            )
            if asked and not offloaded
        ]
        if device == "cpu" and self._device_name != "cpu" and missing and not self.engine_config.forward_only:
            raise LearnerError(
                "the deepspeed engine cannot move states to the CPU that were created on the GPU; set "
                f"{' and '.join(missing)} to true to keep them on the CPU"
            )

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a sharded checkpoint, and `huggingface/` if checkpoint.save_contents includes hf_model.

        Of the checkpoints that this process has written, only the newest `max_ckpt_to_keep` are kept (None: all).
        """
        del global_step, kwargs  # already in the path; for other strategies
        _refuse_hdfs(hdfs_path)
        directory = Path(local_path)
        save_checkpoint(self.engine, directory, {"schedule": self.lr_scheduler.state_dict()})
        rank = self.get_data_parallel_rank()
        if "hf_model" in self.checkpoint_config.save_contents:
            export_hf(self.module, self._model, directory / "huggingface")
            if rank == 0 and self.model_config.tokenizer is not None:  # with verl's custom_chat_template
                self.model_config.tokenizer.save_pretrained(directory / "huggingface")
        self._saved = [path for path in self._saved if path != directory] + [directory]
        while max_ckpt_to_keep and len(self._saved) > max_ckpt_to_keep:
            oldest = self._saved.pop(0)
            if rank == 0:
                shutil.rmtree(oldest, ignore_errors=True)

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = True, **kwargs: Any
    ) -> None:
        """Continue from a saved checkpoint. Raises CheckpointError if it is missing or damaged."""
        del del_local_after_load, kwargs  # only copies from HDFS are deleted
        _refuse_hdfs(hdfs_path)
        state = load_checkpoint(self.engine, Path(local_path))
        self.lr_scheduler.load_state_dict(state["schedule"])
        for group, rate in zip(self.lr_scheduler.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _micro_step(
        self, data: Any, temperature: float, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> dict[str, Any]:
        """Forward pass of one micro-batch and, unless `forward_only`, its backward pass."""
        with torch.set_grad_enabled(not forward_only):
            output = self._forward(data, temperature, entropy_grad=not forward_only)
            loss, metrics = torch.zeros((), device=self._device), {}
            if loss_function is not None:
                loss, metrics = loss_function(model_output=output, data=data, dp_group=self.get_data_parallel_group())
            if not forward_only:
                backward(self.engine, loss)
        return {"model_output": detach_tree(output), "loss": loss.detach().item(), "metrics": metrics}

    def _forward(self, data: Any, temperature: float, *, entropy_grad: bool) -> dict[str, Tensor]:
        """Log-probabilities (and with `calculate_entropy` entropies) of every token except a row's first."""
        input_ids = data["input_ids"]
        offsets = input_ids.offsets()
        rows = [row.cpu().numpy().astype(np.int32) for row in input_ids.unbind()]
        micro = collate(
            [TokenSequence(row[:1], row[1:]) for row in rows],
            self._layout,
            model_config=self.module.config,
            device=self._device,
            dtype=DTYPES[self._model.dtype],
        )
        wanted = tu.get_non_tensor_data(data=data, key="calculate_entropy", default=False)
        with self._head.query(
            micro.positions, micro.targets, temperature=temperature, entropy_grad=wanted and entropy_grad
        ):
            logprobs, entropy = self.engine(**micro.model_inputs).logits
        predicts = torch.ones(int(offsets[-1]), dtype=torch.bool, device=self._device)
        predicts[offsets[1:] - 1] = False
        places = predicts.nonzero().squeeze(-1)

        def jagged(values: Tensor) -> Tensor:
            whole = values.new_zeros(len(predicts)).index_copy(0, places, values)
            return torch.nested.nested_tensor_from_jagged(whole, offsets)

        output = {"log_probs": jagged(logprobs)}
        if wanted:
            output["entropy"] = jagged(entropy)
        return output


class _Mode(BaseEngineCtx):
    """verl's context for training or evaluation, which also puts the module into that mode."""

    def __enter__(self) -> None:
        super().__enter__()
        self.engine.engine.train(self.mode == "train")

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if self.mode == "train" and (self.zero_grad_on_exit or exc_type is not None):
            self.engine.optimizer_zero_grad()
        super().__exit__(exc_type, exc_val, exc_tb)


def _temperature(data: Any) -> float:
    """The rollouts' temperature, which divides the logits; greedy rollouts are scored at temperature 1."""
    value = tu.get(data, key="temperature", default=1.0)
    if isinstance(value, Tensor):
        values = value.unique().tolist()
        if len(values) != 1:
            raise LearnerError(f"the deepspeed engine needs one temperature per batch, but this one has {values}")
        value = values[0]
    return float(value) or 1.0


def _refuse_batch(data: Any) -> None:
    asked = {
        key: bool(tu.get_non_tensor_data(data=data, key=key, default=False))
        for key in ("calculate_sum_pi_squared", "distillation_use_topk", "enable_routing_replay")
    }
    asked["multi_modal_inputs"] = bool(extract_multi_modal_inputs(data.get("multi_modal_inputs", [])))
    pad_mode = tu.get_non_tensor_data(data=data, key="pad_mode", default=DatasetPadMode.NO_PADDING)
    asked["pad_mode"] = pad_mode != DatasetPadMode.NO_PADDING
    refused = [name for name, used in asked.items() if used]
    if refused:
        raise LearnerError(
            f"the deepspeed engine does not support {', '.join(refused)} in a batch; it takes text without padding "
            "and returns log-probabilities and entropies"
        )


def _refuse_hdfs(path: str | None) -> None:
    if path is not None:
        raise LearnerError(f"the deepspeed engine does not copy checkpoints to or from HDFS ({path}); use a local path")

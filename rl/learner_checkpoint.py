"""The learner's files: sharded checkpoints to resume from, and Hugging Face checkpoints to use elsewhere.

Left out: atomicity (`rl.checkpoint` writes into a temporary folder and renames it) and the run's own state.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl.config import ModelConfig
from rl.errors import CheckpointError
from rl.models import DTYPES, load_config
from rl.prompts import ChatTemplate
from rl.resharding import load_resharded
from rl.shared_files import not_seen
from rl.weight_sync.source import Zero3WeightSource

_TAG = "zero3"
_META = "learner.json"
_OF_ONE_RANK = re.compile(r"(?:random|(?:bf16_)?zero_pp_rank)_(\d+)")  # rank 0 writes all other files
LAST_WRITTEN = "generation_config.json"  # last file of an exported model
_SHARD_BYTES = 4 * 2**30


def save_checkpoint(engine: Any, directory: Path, state: dict[str, Any]) -> None:
    """Write this rank's shard, its random state, and (rank 0) `state` as JSON. A collective."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    directory.mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(directory), tag=_TAG)
    torch.save(_random_state(), directory / f"random_{rank}.pt")
    if rank == 0:
        meta = {"world_size": world_size, "sub_group_elements": engine.zero_sub_group_size(), "state": state}
        (directory / _META).write_text(json.dumps(meta, indent=1))
    _flush(directory, rank)
    torch.distributed.barrier()
    if missing := not_seen([directory / f"random_{r}.pt" for r in range(world_size)]):
        raise CheckpointError(
            f"rank {rank} does not see {', '.join(path.name for path in missing)} of other ranks in {directory}: "
            "run_dir must be on a file system that every node shares"
        )


def _flush(directory: Path, rank: int) -> None:
    """Flush this rank's files to disk, so that the checkpoint stays whole if the node loses power."""
    for path in directory.rglob("*"):
        numbered = _OF_ONE_RANK.match(path.name)
        if path.is_file() and int(numbered[1] if numbered else 0) == rank:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def load_checkpoint(engine: Any, directory: Path) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, on any number of ranks; returns its `state`. A collective."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    meta = _read_meta(directory)
    written_by = meta["world_size"]
    divided_alike = (written_by, meta.get("sub_group_elements")) == (world_size, engine.zero_sub_group_size())
    configured = _hyperparameters(engine) if engine.lr_scheduler is not None else None
    try:
        if divided_alike:
            path, _ = engine.load_checkpoint(str(directory), tag=_TAG)
        else:
            path, _ = load_resharded(engine, directory, _TAG, written_by=written_by)
        random_state = torch.load(directory / f"random_{rank % written_by}.pt", weights_only=True)
    except Exception as error:  # torch, zipfile, pickle and DeepSpeed's assertions, each in its own words
        if _is_of_the_machine(error):
            raise  # nobody should delete an intact checkpoint for it
        raise CheckpointError(_damaged(directory, f"{type(error).__name__}: {error}")) from error
    if path is None:
        raise CheckpointError(_damaged(directory, f"DeepSpeed found nothing in {_TAG}"))
    if configured is not None:
        _set_hyperparameters(engine, *configured)
    _set_random_state(random_state)
    state: dict[str, Any] = meta["state"]
    return state


def _is_of_the_machine(error: Exception) -> bool:
    """Whether the machine is at fault, and not the file: torch's reader calls a file that was cut an invalid
    argument."""
    damage = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == errno.EINVAL
    return isinstance(error, torch.OutOfMemoryError | OSError) and not damage


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((directory / _META).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} holds no learner checkpoint ({_META} is missing)") from error
    except ValueError as error:
        raise CheckpointError(_damaged(directory, f"{_META}: {error}")) from error
    return meta


def _damaged(directory: Path, what: str) -> str:
    step = next((path for path in directory.parents if path.name.startswith("step_")), directory)
    return f"the learner checkpoint {directory} cannot be read ({what}); remove {step} to resume from the one before it"


def _hyperparameters(engine: Any) -> tuple[list[dict[str, Any]], list[float]]:
    """The configured settings of each parameter group, and the base learning rates that the schedule multiplies."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    return groups, list(engine.lr_scheduler.base_lrs)


def _set_hyperparameters(engine: Any, groups: list[dict[str, Any]], rates: list[float]) -> None:
    """Restore the configured settings after loading: a checkpoint brings back the learning rate, betas and decay it was
    saved with, so changed ones would have no effect."""
    schedule = engine.lr_scheduler
    schedule.base_lrs = rates
    current = [rate * factor(schedule.last_epoch) for rate, factor in zip(rates, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = current
    for group, settings, rate in zip(engine.optimizer.param_groups, groups, current, strict=True):
        group.update(settings, lr=rate)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def export_hf(model: Any, source: ModelConfig, directory: Path) -> None:
    """Write the weights as safetensors under checkpoint names, with configuration, generation settings and tokenizer.

    A collective. Memory is bounded by one bucket on every rank and one file (4 GiB) on rank 0.
    """
    from transformers.core_model_loading import revert_weight_conversion

    rank = torch.distributed.get_rank()
    weights = Zero3WeightSource(model, dtype=DTYPES[source.dtype], rank=rank)
    writer = _ShardWriter(directory)
    for name, tensor in weights:
        writer.add({name: tensor.cpu()})
    if rank == 0:
        for name, buffer in _persistent_buffers(model).items():
            writer.add(revert_weight_conversion(model, {name: buffer.cpu()}))
        writer.finish()
        _write_companions(model, source, directory)
    torch.distributed.barrier()


def export_checkpoint(checkpoint: Path, source: ModelConfig, directory: Path) -> None:
    """Convert a `save_checkpoint` folder to a Hugging Face checkpoint, in this process alone and without an engine.

    Memory is bounded by one parameter and one file. Raises CheckpointError if there is no learner checkpoint.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    _read_meta(checkpoint)
    config = load_config(source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the trained weights are not quantised
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[source.dtype], trust_remote_code=source.trust_remote_code
        )
    # The float32 master weights round to exactly the weights that were trained with.
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            masters = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=_TAG, lazy_mode=True)
    except Exception as error:  # of many types, as in `load_checkpoint`
        raise CheckpointError(_damaged(checkpoint, f"{type(error).__name__}: {error}")) from error
    writer = _ShardWriter(directory)
    for name, _ in skeleton.named_parameters():
        whole = masters[name].contiguous().to(DTYPES[source.dtype])
        writer.add(revert_weight_conversion(skeleton, {name: whole}))
    for name in _persistent_buffers(skeleton):  # in float32, as are the routing biases, for which it matters
        writer.add(revert_weight_conversion(skeleton, {name: masters[name].contiguous()}))
    writer.finish()
    _write_companions(skeleton, source, directory)


def _persistent_buffers(model: Any) -> dict[str, Tensor]:
    """What a checkpoint holds besides parameters: for example, the routing biases of some mixtures of experts."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _write_companions(model: Any, source: ModelConfig, directory: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.dynamic_module_utils import custom_object_save

    config = model.config.to_dict()
    config.pop("quantization_config", None)  # the weights are written dequantised
    config["dtype"] = source.dtype
    config["architectures"] = [type(model).__name__]
    written = type(model.config).from_dict(config)
    if model._auto_class is not None:  # copy the model's own code too, as save_pretrained does
        custom_object_save(model, directory, config=written)
    written.save_pretrained(directory)
    try:
        generation = GenerationConfig.from_pretrained(source.path, revision=source.revision or "main")
    except OSError:  # the checkpoint has none
        generation = GenerationConfig.from_model_config(model.config)
    tokenizer = AutoTokenizer.from_pretrained(
        source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    if source.chat_template is not None:
        tokenizer.chat_template = Path(source.chat_template).read_text()
    tokenizer.save_pretrained(directory)
    if tokenizer.chat_template:
        end_of_turn = ChatTemplate(tokenizer, source.chat_template_options).end_of_turn_id
        generation.eos_token_id = with_end_of_turn(generation.eos_token_id, end_of_turn)
    # Not with save_pretrained, which refuses a temperature without do_sample, as many published configurations have.
    (directory / LAST_WRITTEN).write_text(generation.to_json_string())


def with_end_of_turn(ends: int | list[int] | None, end_of_turn: int) -> int | list[int]:
    """A generation configuration's `eos_token_id`, extended by the token that ends an assistant's turn.

    The model was trained to stop with that token; a base model's own configuration knows only the end of a text.
    """
    known = [] if ends is None else [ends] if isinstance(ends, int) else ends
    if ends is not None and end_of_turn in known:
        return ends
    return [*known, end_of_turn]


class _ShardWriter:
    """Writes tensors into files of bounded size, and the index if there are several."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > _SHARD_BYTES:
                self._flush()
            self._pending[name] = tensor.contiguous()
            self._pending_bytes += size

    def finish(self) -> None:
        self._flush()
        for stale in self._directory.glob("model*.safetensors*"):
            if not re.fullmatch(r"model-part-\d+\.safetensors", stale.name):
                stale.unlink()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, start=1):
            file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).chmod(0o644)  # safetensors makes files readable for the owner only
            self._part(number).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        from safetensors.torch import save_file

        self._files.append(list(self._pending))
        self._directory.mkdir(parents=True, exist_ok=True)
        save_file(self._pending, self._part(len(self._files)), metadata={"format": "pt"})
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._directory / f"model-part-{number:05d}.safetensors"

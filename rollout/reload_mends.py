"""Mends for four silent faults in vLLM 0.31's layerwise reload: after an update, the engine serves stale weights.

Each mend has a name in `ALL_MENDS`. tests/stack/test_weight_sync.py switches each off in turn and expects the engine to
go wrong; when that test fails, upstream has fixed the fault: delete the mend. Left out: the reload itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

CPU_TIED_HEAD = "cpu_tied_head"
CPU_EXPERTS = "cpu_experts"
GPT_OSS_EXPERTS = "gpt_oss_experts"
GPT_OSS_SINKS = "gpt_oss_sinks"
ALL_MENDS = frozenset((CPU_TIED_HEAD, CPU_EXPERTS, GPT_OSS_EXPERTS, GPT_OSS_SINKS))

_EXPERT_TENSORS = frozenset(("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"))
_EXPERT_NAME = re.compile(r"\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|gate_up_proj_bias|down_proj|down_proj_bias)$")
_SINKS_NAME = re.compile(r"\.layers\.(\d+)\.self_attn\.(sinks)$")


class ReloadMends:
    """The mends of one update, called at fixed points of its life."""

    def __init__(self, model: nn.Module, device: torch.device, enabled: frozenset[str]) -> None:
        self._model = model
        self._on_cpu = device.type == "cpu"
        self._enabled = enabled
        self._direct: dict[tuple[str, int], _DirectLayer] = {}

    def after_start(self) -> None:
        if self._on_cpu and CPU_EXPERTS in self._enabled:
            forget_packed_experts(self._model)
        self._direct = find_direct_layers(self._model, self._enabled)

    def before_load(self, names: Sequence[str]) -> None:
        for name in names:
            if (found := self._direct_layer(name)) is not None:
                found[0].materialize()

    def after_load(self, names: Sequence[str]) -> None:
        for name in names:
            if (found := self._direct_layer(name)) is not None:
                found[0].mark_loaded(found[1])

    def before_finish(self) -> None:
        incomplete = {name: sorted(layer.missing) for name, layer in self._direct.items() if layer.half_loaded}
        if incomplete:
            raise RuntimeError(f"the update ended with half-loaded layers; they lack {incomplete}")

    def after_finish(self) -> None:
        if self._on_cpu and CPU_TIED_HEAD in self._enabled:
            repack_tied_heads(self._model)

    def _direct_layer(self, name: str) -> tuple[_DirectLayer, str] | None:
        """The layer whose loader writes checkpoint tensor `name` directly, and the tensor's name within it."""
        for kind, pattern in ((GPT_OSS_EXPERTS, _EXPERT_NAME), (GPT_OSS_SINKS, _SINKS_NAME)):
            if (match := pattern.search(name)) and (layer := self._direct.get((kind, int(match[1])))) is not None:
                return layer, match[2]
        return None


def repack_tied_heads(model: nn.Module) -> None:
    """Fault 1, CPU, every model with tied embeddings: the packed copy of the output head is not rebuilt after a reload.

    `UnquantizedEmbeddingMethod` keeps a packed copy of the weight in `cpu_linear`. A checkpoint has no tensor for a
    tied head, so the reload finds that nothing was loaded and leaves the module as it was, while the embedding's new
    values come into the weight that both share.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def forget_packed_experts(model: nn.Module) -> None:
    """Fault 2, CPU, mixture of experts: a reload copies the experts but skips packing them for the kernel.

    `UnquantizedFusedMoEMethod._setup_kernel` packs only while it has no kernel, so take the kernel away.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for module in model.modules():
        quant_method: Any = getattr(module, "quant_method", None)
        if isinstance(quant_method, UnquantizedFusedMoEMethod):
            quant_method.moe_kernel = None


def find_direct_layers(model: nn.Module, enabled: frozenset[str]) -> dict[tuple[str, int], _DirectLayer]:
    """Faults 3 and 4, GPT-OSS, every device: experts and attention sinks never change.

    `GptOssModel._load_weights_other` copies these tensors straight into the parameters instead of calling their
    `weight_loader`, so under a reload the copy goes to the meta device, and the reload, which counts what the loaders
    load, puts the old tensors back. A layer found here gets real memory before its tensors arrive and, once all have
    arrived, is processed as the reload would have done.
    """
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts, OAIAttention

    found: dict[tuple[str, int], _DirectLayer] = {}
    for name, module in model.named_modules():
        index = re.search(r"\.layers\.(\d+)\.", f"{name}.")
        if index is None:
            continue
        if isinstance(module, GptOssRoutedExperts) and GPT_OSS_EXPERTS in enabled:
            found[GPT_OSS_EXPERTS, int(index[1])] = _DirectLayer(module, _EXPERT_TENSORS)
        elif isinstance(module, OAIAttention) and GPT_OSS_SINKS in enabled:
            found[GPT_OSS_SINKS, int(index[1])] = _DirectLayer(module, frozenset(("sinks",)))
    return found


def restore_unfinished_layers(model: nn.Module) -> None:
    """Leave the layerwise reload without finishing it, for which vLLM itself has no way."""
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            _place_kernel_tensors(layer, info)
        info.reset()


class _DirectLayer:
    """A layer under reload whose loader copies into its parameters directly."""

    def __init__(self, module: nn.Module, tensors: frozenset[str]) -> None:
        self._module = module
        self._tensors = tensors
        self.missing = set(tensors)

    @property
    def half_loaded(self) -> bool:
        return 0 < len(self.missing) < len(self._tensors)

    def materialize(self) -> None:
        """Replace meta parameters by real ones; a second call changes nothing."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import materialize_layer

        materialize_layer(self._module, get_layerwise_info(self._module))

    def mark_loaded(self, tensor: str) -> None:
        """After the last tensor: process the layer and copy it into the tensors that the kernels use."""
        from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info

        self.missing.discard(tensor)
        info = get_layerwise_info(self._module)
        if not self.missing and info.can_load():
            _layerwise_process(self._module, info)

"""One real engine, one transformers model with the same weights, and a shared-memory sender between them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from transformers import AutoModelForCausalLM

from launch.tiny_models import Family, build_tiny_model
from rl.config import ModelConfig, RolloutConfig
from rl.errors import WeightSyncError
from rl.weight_sync.api import Transport, init_info_at
from rl.weight_sync.sender import WeightSender
from rl.weight_sync.source import Zero3WeightSource
from rollout.reload_mends import ALL_MENDS
from rollout.vllm_engine import VLLMEngine
from rollout.vllm_options import EngineSpec

T = TypeVar("T")
PROMPT, TOKENS = 8, 48

ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")
ENDS = ("embed_tokens", "lm_head")  # the same matrix in the tied model
GROUPS = {  # family -> parts of parameter names, which together name every parameter
    "qwen3": ("embed_tokens", *NORMS, *ATTENTION, "q_norm", "k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen3_moe": (*ENDS, *NORMS, *ATTENTION, "q_norm", "k_norm", "mlp.gate.weight", "gate_up_proj", "down_proj"),
    "gpt_oss": (
        *(*ENDS, *NORMS, *ATTENTION, "q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias", "sinks"),
        *("router.weight", "router.bias", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ),
}


class EngineRig:
    """Blocking access to an engine whose event loop runs on a thread of its own."""

    def __init__(
        self,
        family: Family,
        directory: Path,
        *,
        transport: Transport = "shm",
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        tensor_parallel_size: int = 1,
        engine_checkpoint: Callable[[Path], Path] | None = None,
    ) -> None:
        """`engine_checkpoint` makes another checkpoint from the model's, for the engine to start from."""
        self.family = family
        self.transport = transport
        # Qwen3's small models share one matrix between embedding and head, the others do not.
        self.path = build_tiny_model(family, directory, tie_word_embeddings=family == "qwen3")
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        spec = EngineSpec(
            ModelConfig(path=str(engine_checkpoint(self.path) if engine_checkpoint else self.path), dtype=dtype),
            RolloutConfig(kv_cache_gib=0.25, enforce_eager=True, tensor_parallel_size=tensor_parallel_size),
            transport=transport,
            max_model_len=512,
            trained=engine_checkpoint is not None,
        )
        self.engine = VLLMEngine(spec)
        self.run(self.engine.start(), timeout_s=500)
        self.dtype_name = dtype
        self.dtype = getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype, attn_implementation="eager")
        self.model = model.to(device).eval()
        unnamed = [name for name, _ in model.named_parameters() if not any(part in name for part in GROUPS[family])]
        assert unnamed == []
        self.version = 0
        self.sender = WeightSender(
            self.source(),
            transport,
            LoopClient(self),
            tensor_parallel_size=tensor_parallel_size,
            bucket_bytes=1 << 16,
            timeout_s=60,
        )
        generator = torch.Generator().manual_seed(0)
        self.token_ids = torch.randint(5, 250, (3, TOKENS), generator=generator)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 120) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def source(self) -> Zero3WeightSource:
        return Zero3WeightSource(self.model, dtype=self.dtype, bucket_bytes=1 << 16)

    def sync(self) -> None:
        self.version += 1
        self.sender.send(self.version)
        self.run(self.engine.activate(self.version))

    def difference(self) -> float:
        """|difference| between the engine's and the model's log-probabilities of fixed responses: the largest in
        float32, the mean in bfloat16, where rounding can flip an expert of one token."""
        pairs = [(tuple(row[:PROMPT]), tuple(row[PROMPT:])) for row in self.token_ids.tolist()]
        scored = self.run(self.engine.score_logprobs(pairs))
        differences = torch.cat(
            [
                (torch.from_numpy(values) - self.reference_logprobs(row)[PROMPT - 1 :]).abs()
                for values, row in zip(scored, self.token_ids, strict=True)
            ]
        )
        return float(differences.max() if self.dtype == torch.float32 else differences.mean())

    @torch.no_grad()
    def reference_logits(self, row: torch.Tensor) -> torch.Tensor:
        return self.model(row[None].to(self.model.device)).logits[0].float().cpu()

    def reference_logprobs(self, row: torch.Tensor) -> torch.Tensor:
        """[T] -> [T-1], of each token after the first."""
        logprobs = torch.log_softmax(self.reference_logits(row)[:-1], -1)
        return logprobs.gather(-1, row[1:, None])[:, 0]

    @torch.no_grad()
    def perturb(self, part: str) -> None:
        """Add noise, of the size of the values themselves, to every parameter whose name contains `part`."""
        generator = torch.Generator().manual_seed(self.version + 1)
        found = [parameter for name, parameter in self.model.named_parameters() if part in name]
        assert found, f"no parameter of {self.family} is named like {part}"
        for parameter in found:
            noise = torch.randn(parameter.shape, generator=generator) * max(float(parameter.std()), 0.3)
            parameter.add_(0.3 * noise.to(parameter))

    def check_following(self, close: float, visible: float, parts: Sequence[str] = ()) -> float:
        """Perturb and sync one part after another, by default all of the family's: the engine must differ by more than
        `visible` before each sync and by less than `close` after it. Returns the largest difference after a sync."""
        assert self.difference() < close
        worst = 0.0
        for part in parts or GROUPS[self.family]:
            self.perturb(part)
            assert self.difference() > visible, f"{part}: the perturbation does not show"
            self.sync()
            worst = max(worst, self.difference())
            assert worst < close, f"{part}: the engine serves something else than was sent"
        return worst

    def use_mends(self, names: frozenset[str] = ALL_MENDS) -> None:
        self.run(self.engine._engine().collective_rpc("fledge_set_mends", args=(sorted(names),)))

    def difference_without(self, mends: set[str] | frozenset[str], part: str) -> float:
        """The difference after an update of `part` without these mends; then all is sent again with every mend."""
        self.use_mends(ALL_MENDS - mends)
        self.perturb(part)
        self.sync()
        wrong = self.difference()
        self.use_mends()
        self.sync()
        return wrong

    def core(self) -> psutil.Process:
        (process,) = self.engine._engine().engine_core.resources.engine_manager.processes
        return psutil.Process(process.pid)

    def close(self) -> None:
        self.run(self.engine.shutdown())
        self.loop.call_soon_threadsafe(self.loop.stop)


class LoopClient:
    """`WeightSyncClient` over rigs in this process; `intercept` sees every bucket on its way."""

    def __init__(self, *rigs: EngineRig, timeout_s: float = 60) -> None:
        self.rigs = rigs
        self.timeout_s = timeout_s
        self.intercept: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda info: info

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._each(method, [arguments] * len(self.rigs))

    def _each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        results = []
        for index, (rig, own) in enumerate(zip(self.rigs, arguments, strict=True)):
            call: Awaitable[Any] = getattr(rig.engine, method)(*own)
            try:
                results.append(rig.run(call, self.timeout_s))  # type: ignore[arg-type]
            except TimeoutError as error:
                raise WeightSyncError(f"engine {index} did not answer {method} in {self.timeout_s} s") from error
        return results

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._each("init_weight_transfer", [(init_info_at(place, init_info),) for place in range(len(self.rigs))])

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if (info := self.intercept(update_info)) is not None:
            self._all("update_weights", info)

    def finish_weight_update(self, policy_version: int) -> dict[int, dict[str, int]]:
        return dict(enumerate(self._all("finish_weight_update", policy_version)))

    def late(self) -> str:
        return ""

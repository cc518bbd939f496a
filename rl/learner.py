"""The learner: a plain class around a ZeRO-3 engine that annotates, updates, scores, saves and exports one policy.

One object is one rank. Methods are collectives: every rank calls them in the same order, each with its own share.
Left out: Ray (`rl.workers`), the transfer of weights (`rl.weight_sync`), advantages, and the critic (`rl.critic`), made
from the same parts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl.batch import Annotations, FloatArray, IntArray, TokenSequence, TrainSample, UpdateResult
from rl.batching import Layout, MiniBatchShare
from rl.config import AlgorithmConfig, LearnerConfig, ModelConfig
from rl.errors import LearnerError
from rl.layouts import MicroBatch
from rl.learner_checkpoint import export_hf, load_checkpoint, save_checkpoint
from rl.learner_checks import check_layout
from rl.learner_metrics import MetricSums
from rl.lockstep import LockstepEngine
from rl.logprobs import LogprobHead
from rl.memory import memory_peak_gib
from rl.models import DTYPES, load_config, load_model
from rl.moe import Routers, router_metrics
from rl.objectives import Objective, PolicyObjective, SupervisedObjective, correction_metrics
from rl.shared_prefix import use_shared_prefixes
from rl.zero3 import inference_config, init_distributed, set_up_process, start_engine, training_config


class Learner:
    """One rank of the ZeRO-3 learner.

    Args:
        config: the learner's section of the configuration.
        model: the policy to load.
        algorithm: the loss and its options; None for supervised training.
        seed: seeds everything random in this process.
        deterministic: refuse operations whose results are not repeatable.
        device: "cpu" (gloo) or "cuda" (NCCL, this rank's LOCAL_RANK).
        total_optimizer_steps: the length of the learning-rate schedule.
        fixed_length: the longest possible response, for the aggregation `fixed_length`.
        temperature: the rollouts' temperature, so that log-probabilities are those of the sampled distribution.

    Raises:
        LearnerError: the model cannot be loaded, or the layout would not be exact with its attention.
    """

    def __init__(  # noqa: PLR0913 - one call site, all passed by name
        self,
        config: LearnerConfig,
        model: ModelConfig,
        algorithm: AlgorithmConfig | None,
        *,
        seed: int,
        deterministic: bool,
        device: str,
        total_optimizer_steps: int,
        fixed_length: int,
        temperature: float = 1.0,
    ) -> None:
        init_distributed(device, config.timeout_s)
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.device = set_up_process(seed=seed, deterministic=deterministic, device=device)
        self.policy_version = 0
        self._config, self._model_config, self._algorithm = config, model, algorithm
        self._temperature = temperature or 1.0  # greedy rollouts are scored at temperature 1
        self._objective: Objective = PolicyObjective(algorithm, fixed_length) if algorithm else SupervisedObjective()
        self._policy = self._start_policy(total_optimizer_steps)
        check_layout(
            self._policy.engine, self._head, self._policy.layout, device=self.device, dtype=DTYPES[model.dtype]
        )
        self._reference: tuple[Any, LogprobHead] | None = None
        if algorithm is not None and algorithm.kl.placement != "none":
            self._reference = self._start_reference(algorithm.kl.reference)

    @property
    def module(self) -> Any:
        """The transformers model; its parameters are ZeRO-3 partitions."""
        return self._policy.module

    @property
    def layout(self) -> Layout:
        """The layout of its micro-batches."""
        return self._policy.layout

    def annotate(self, sequences: Sequence[TokenSequence], *, old_logprobs: bool) -> Annotations:
        """Log-probabilities of this rank's sequences before the update, in their order, at the rollouts' temperature.

        The policy's if `old_logprobs` is set, the reference's if there is a KL term. `kl_coefficient` is the
        coefficient for this step, which may be adaptive, if the KL is in the reward.
        """
        if self._algorithm is None or not isinstance(self._objective, PolicyObjective):
            raise LearnerError("annotate needs an algorithm; this learner was made for supervised training")
        old = ref = None
        if old_logprobs:
            old = tuple(self._score(self._policy.engine, self._head, sequences, replay=self._config.moe.router_replay))
        if self._reference is not None:
            ref = tuple(self._score(*self._reference, sequences))
        coefficient = self._objective.kl.coefficient if self._algorithm.kl.placement == "reward" else None
        return Annotations(old_logprobs=old, ref_logprobs=ref, kl_coefficient=coefficient)

    def score_logprobs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[FloatArray]:
        """For each (prompt_ids, response_ids): [R] log-probabilities of the response at temperature 1."""
        sequences = [TokenSequence(_int32(prompt), _int32(response)) for prompt, response in pairs]
        return self._score(self._policy.engine, self._head, sequences, temperature=1.0)

    def update(self, mini_batches: Sequence[MiniBatchShare]) -> UpdateResult:
        """One optimizer step per mini-batch, from this rank's shares (see `rl.batching.plan_update`).

        Raises:
            LearnerError: too many non-finite steps in a row, or samples lack what the algorithm needs.
        """
        if len(mini_batches) > 1 and any(s.old_logprobs is None for share in mini_batches for s in share.samples):
            raise LearnerError(
                f"an update of {len(mini_batches)} optimizer steps needs old_logprobs; annotate the batch first"
            )
        result, objective = self._run(mini_batches), self._objective
        if not isinstance(objective, PolicyObjective) or "learner/kl_ref" not in result.metrics:
            return result
        used = {"learner/kl_coefficient": objective.kl.coefficient}
        samples = sum(share.num_sequences for share in mini_batches) // self._config.epochs
        objective.kl.update(result.metrics["learner/kl_ref"], samples)
        return UpdateResult(result.policy_version, {**result.metrics, **used}, result.seconds)

    def save_checkpoint(self, directory: str | Path) -> None:
        """Write weights, optimizer, schedule and random state to `directory`; each rank writes its own shard."""
        state = {
            "policy_version": self.policy_version,
            "skipped_in_a_row": self._policy.skipped_in_a_row,
            "kl": self._objective.kl.state_dict() if isinstance(self._objective, PolicyObjective) else {},
        }
        save_checkpoint(self._policy.engine, Path(directory), state)

    def load_checkpoint(self, directory: str | Path) -> None:
        """Continue from a saved checkpoint. Raises CheckpointError if it is missing or damaged."""
        state = load_checkpoint(self._policy.engine, Path(directory))
        self.policy_version = state["policy_version"]
        self._policy.skipped_in_a_row = state["skipped_in_a_row"]
        if isinstance(self._objective, PolicyObjective):
            self._objective.kl.load_state_dict(state.get("kl", {}))

    def export_hf(self, directory: str | Path) -> None:
        """Write a Hugging Face checkpoint: safetensors under checkpoint names, configuration, tokenizer."""
        export_hf(self.module, self._model_config, Path(directory))

    def close(self) -> None:
        """Free the engines. The process group stays, for its creator to end."""
        if self._reference is not None:
            self._reference[0].destroy()
            self._reference = None
        self._policy.engine.destroy()

    def _start_policy(self, total_optimizer_steps: int) -> LockstepEngine:
        config, model = self._config, self._model_config
        zero = training_config(config, dtype=model.dtype, hidden_size=load_config(model).hidden_size)
        policy = load_model(model, zero, device=self.device.type)
        self._head = self._logprob_head(policy)
        self._routers = _routers(policy, config, self.device)
        return LockstepEngine(
            policy,
            config=config,
            zero=zero,
            total_optimizer_steps=total_optimizer_steps,
            device=self.device,
            name="learner",
        )

    def _start_reference(self, path: str | None) -> tuple[Any, LogprobHead]:
        """The frozen model at `path`; None: the initial policy."""
        model = self._model_config
        hidden_size = load_config(model, path).hidden_size
        zero = inference_config(dtype=model.dtype, hidden_size=hidden_size, offload=self._config.offload_reference)
        reference = load_model(model, zero, device=self.device.type, path=path)
        reference.requires_grad_(False).eval()
        if self.layout == "shared_prefix":
            use_shared_prefixes(reference)
        head = self._logprob_head(reference)
        engine = start_engine(reference, zero)
        if path is not None:
            check_layout(engine, head, self.layout, device=self.device, dtype=DTYPES[model.dtype])
        return engine, head

    def _logprob_head(self, model: nn.Module) -> LogprobHead:
        return LogprobHead(model, self._config.logprob_chunk_tokens, float32=self._model_config.head_dtype == "float32")

    def _score(
        self,
        engine: Any,
        head: LogprobHead,
        sequences: Sequence[TokenSequence],
        *,
        temperature: float | None = None,
        replay: bool = False,
    ) -> list[FloatArray]:
        engine.eval()

        def forward(micro: MicroBatch) -> Tensor:
            routing = self._routers.forward_pass(micro.real, experts=micro.routed_experts) if replay else nullcontext()
            with routing, head.query(micro.positions, micro.targets, temperature=temperature or self._temperature):
                logprobs: Tensor = engine(**micro.model_inputs).logits[0]
            return logprobs

        return self._policy.map_tokens(sequences, forward, engine.module.config)

    def _run(self, shares: Sequence[MiniBatchShare]) -> UpdateResult:
        start = time.perf_counter()
        self._policy.engine.train()
        sums = MetricSums()
        for share in shares:
            self._optimizer_step(share, sums)
        self.policy_version += 1
        seconds = time.perf_counter() - start
        sums.add_sum("learner/tokens", sum(s.tokens.num_tokens for share in shares for s in share.samples))
        sums.add_max("seconds", seconds)
        sums.add_max("learner/memory_peak_gib", memory_peak_gib())
        metrics, totals = sums.reduce()
        seconds = metrics.pop("seconds")
        metrics |= correction_metrics(totals) | self._router_metrics()
        metrics["learner/tokens_per_s"] = totals["learner/tokens"] / seconds
        metrics |= self._policy.skipped_steps(totals)
        return UpdateResult(policy_version=self.policy_version, metrics=metrics, seconds=seconds)

    def _optimizer_step(self, share: MiniBatchShare, sums: MetricSums) -> None:
        def micro_step(samples: Sequence[TrainSample], micro: MicroBatch) -> Tensor:
            return self._micro_step(samples, micro, share, sums)

        self._policy.optimizer_step(share, micro_step, sums, split_invariant=self._objective.split_invariant)

    def _micro_step(
        self, samples: Sequence[TrainSample], micro: MicroBatch, share: MiniBatchShare, sums: MetricSums
    ) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the loss."""
        moe, objective = self._config.moe, self._objective
        if moe.router_replay and samples and micro.routed_experts is None:
            raise LearnerError(
                "learner.moe.router_replay is set, but the engines returned no routed_experts with the rollouts; set "
                "it to false"
            )
        # The backward pass is inside, because it recomputes checkpointed activations with the same experts.
        with self._routers.forward_pass(
            micro.real,
            experts=micro.routed_experts if moe.router_replay else None,
            measure=bool(samples),
        ):
            with self._head.query(
                micro.positions, micro.targets, temperature=self._temperature, entropy_grad=objective.entropy_grad
            ):
                logprobs, entropy = self._policy.engine(**micro.model_inputs).logits
            if samples:
                loss = objective(logprobs, entropy, samples, micro, share, sums)
                if moe.aux_loss_coefficient:
                    loss = loss + self._aux_loss(samples, share, sums)
            else:
                loss = 0.0 * logprobs.sum()
            self._policy.backward(loss)
        return loss

    def _aux_loss(self, samples: Sequence[TrainSample], share: MiniBatchShare, sums: MetricSums) -> Tensor:
        """This micro-batch's load-balancing loss, weighted by its share of the loss tokens."""
        balance = self._routers.aux_loss()
        tokens = sum(s.num_loss_tokens for s in samples)
        sums.add_mean("learner/router_aux_loss", balance.detach() * tokens, tokens)
        return self._config.moe.aux_loss_coefficient * balance * (tokens / share.num_loss_tokens)

    def _router_metrics(self) -> dict[str, float]:
        if not len(self._routers):
            return {}
        load, entropy, tokens = self._routers.take_sums()
        count = torch.tensor(tokens, dtype=torch.float64, device=self.device)
        for tensor in (load, entropy, count):
            torch.distributed.all_reduce(tensor)
        return router_metrics(load, entropy, int(count))


def _routers(policy: nn.Module, config: LearnerConfig, device: torch.device) -> Routers:
    routers = Routers(policy, device)
    moe = config.moe
    if not len(routers) and (moe.freeze_router or moe.router_replay or moe.aux_loss_coefficient):
        raise LearnerError(
            f"learner.moe is set, but {type(policy).__name__} has no router that Fledge supports; leave learner.moe out"
        )
    if moe.freeze_router:
        routers.freeze()
    return routers


def _int32(ids: Sequence[int]) -> IntArray:
    return np.asarray(ids, dtype=np.int32)

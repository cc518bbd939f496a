"""A ZeRO-3 engine in training: micro-batches of all ranks in lockstep, and optimizer steps that leave out what is not
finite. The policy and the critic each have one.

Methods are collectives. Left out: what a forward pass computes and what the loss is (`rl.learner`, `rl.critic`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl.batch import FloatArray, TokenSequence, TrainSample
from rl.batching import MiniBatchShare, micro_batches, shared_prefix_micro_batches
from rl.config import LearnerConfig
from rl.errors import LearnerError
from rl.layouts import Layout, MicroBatch, collate, resolve_layout
from rl.learner_metrics import MetricSums
from rl.optim import build_optimizer, build_schedule
from rl.shared_prefix import use_shared_prefixes, windows_in_masks
from rl.zero3 import backward, start_engine

# What a rank runs when the others still have work: two tokens whose loss weighs nothing.
_EMPTY = TokenSequence(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32))

MicroStep = Callable[[Sequence[TrainSample], MicroBatch], Tensor]  # forward and backward; returns its share of the loss


def prepare_model(model: nn.Module, config: LearnerConfig, device: torch.device) -> Layout:
    """Give a loaded model what the configuration asks for, before its engine is made; returns its layout."""
    model_config: Any = model.config
    layout = resolve_layout(
        config.layout,
        attention=model_config._attn_implementation,
        device=device.type,
        windows_in_masks=windows_in_masks(model_config, type(model)),
    )
    if layout == "shared_prefix":
        use_shared_prefixes(model)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return layout


class LockstepEngine:
    """One rank of a model in training.

    Args:
        model: loaded with `zero`; frozen parameters stay out of the optimizer.
        config: the learner's section, with this model's optimizer.
        zero: from `rl.zero3.training_config`.
        total_optimizer_steps: the length of the learning-rate schedule.
        device: of this rank.
        name: of its metrics ("learner", "critic").
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        config: LearnerConfig,
        zero: dict[str, Any],
        total_optimizer_steps: int,
        device: torch.device,
        name: str,
    ) -> None:
        self.config, self.name, self.device = config, name, device
        self.skipped_in_a_row = 0
        self.world_size = torch.distributed.get_world_size()
        self.dtype = next(model.parameters()).dtype
        self.layout = prepare_model(model, config, device)
        self.engine = start_engine(
            model,
            zero,
            optimizer=build_optimizer(model, config.optimizer),
            schedule=lambda optimizer: build_schedule(optimizer, config.optimizer, total_optimizer_steps),
        )

    @property
    def module(self) -> Any:
        """The transformers model; its parameters are ZeRO-3 partitions."""
        return self.engine.module

    def collate(self, sequences: Sequence[TokenSequence], model_config: Any = None) -> MicroBatch:
        """Tensors of one micro-batch; of `_EMPTY` when there are no sequences. `model_config`: see `map_tokens`."""
        return collate(
            sequences or [_EMPTY],
            self.layout,
            model_config=model_config or self.module.config,
            device=self.device,
            dtype=self.dtype,
        )

    @torch.no_grad()
    def map_tokens(
        self, sequences: Sequence[TokenSequence], forward: Callable[[MicroBatch], Tensor], model_config: Any = None
    ) -> list[FloatArray]:
        """`forward` gives a number per response token ([T]); the results are [R] of each sequence, in their order.
        `model_config`: the transformers configuration of what `forward` runs, where it is not this engine's model.

        A sequence without a response has an empty result and costs nothing.
        """
        results: list[FloatArray] = [np.empty(0, dtype=np.float32)] * len(sequences)
        places = [i for i, sequence in enumerate(sequences) if len(sequence.response_ids)]
        for group in self._groups([sequences[i] for i in places]):
            micro = self.collate([sequences[places[i]] for i in group], model_config)
            values = micro.split(forward(micro))
            for index, value in zip(group, values, strict=False):  # `_EMPTY` belongs to no sample
                results[places[index]] = value.float().cpu().numpy()
        return results

    def optimizer_step(
        self, share: MiniBatchShare, micro_step: MicroStep, sums: MetricSums, *, split_invariant: bool = True
    ) -> None:
        """One optimizer step over this rank's share. `micro_step` runs `backward` and gets no samples where this rank
        only keeps in step.

        Raises:
            LearnerError: a loss that cannot be split would have to be, or too many non-finite steps in a row.
        """
        sums.add_sum(f"{self.name}/skipped_steps", 0.0)
        if share.num_loss_tokens == 0:
            return  # nothing to learn on any rank; a step would still move the weights by momentum and decay
        groups = self._groups([s.tokens for s in share.samples], together=not split_invariant)
        if not split_invariant and (len(groups) > 1 or self.world_size > 1):
            raise LearnerError(
                "this policy loss looks across sequences, so a mini-batch cannot be split, but this one takes "
                f"{len(groups)} micro-batches on {self.world_size} ranks; use one rank and a larger "
                "learner.max_tokens_per_microbatch, or another algorithm.loss"
            )
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, group in enumerate(groups):
            self.engine.set_gradient_accumulation_boundary(index == len(groups) - 1)
            samples = [share.samples[i] for i in group]
            loss = micro_step(samples, self.collate([s.tokens for s in samples]))
            total += loss.detach().double()
        sums.add_mean(f"{self.name}/lr", self.engine.get_lr()[0], 1.0)
        self.engine.step()
        if self._step_was_applied(sums):
            # The ranks' parts add up to the loss, so all of them together weigh one.
            sums.add_mean(f"{self.name}/loss", total, 1.0 / self.world_size)
            sums.add_mean(f"{self.name}/grad_norm", self.engine.get_global_grad_norm(), 1.0)

    def backward(self, loss: Tensor) -> None:
        """Backward of a micro-batch's share of the loss, which is divided by the mini-batch's counts already."""
        # The ranks' gradients are averaged; the loss is already divided by global counts.
        backward(self.engine, loss * self.world_size)

    def skipped_steps(self, totals: dict[str, float]) -> dict[str, float]:
        """The metric of steps that were left out, from the plain sums of a `MetricSums`."""
        name = f"{self.name}/skipped_steps"
        return {name: totals[name] / self.world_size}

    def _groups(self, sequences: Sequence[TokenSequence], *, together: bool = False) -> list[list[int]]:
        """Micro-batches of this rank, as many as the rank with the most has: ZeRO-3 runs in lockstep. Groups that are
        empty run `_EMPTY`. `together`: as of `micro_batches`."""
        lengths, max_tokens = [s.num_positions for s in sequences], self.config.max_tokens_per_microbatch
        if self.layout == "shared_prefix":
            groups = shared_prefix_micro_batches(
                [s.prompt_key for s in sequences], [len(s.prompt_ids) for s in sequences], lengths, max_tokens
            )
        else:
            groups = micro_batches(lengths, max_tokens, self.layout, together=together)
        count = torch.tensor(len(groups), device=self.device)
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
        return groups + [[] for _ in range(int(count) - len(groups))]

    def _step_was_applied(self, sums: MetricSums) -> bool:
        """DeepSpeed leaves a step out, on all ranks, when the gradient's norm is not finite."""
        if not self.engine.optimizer.overflow:
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        sums.add_sum(f"{self.name}/skipped_steps", 1.0)
        if self.skipped_in_a_row > self.config.max_skipped_steps:
            raise LearnerError(
                f"{self.skipped_in_a_row} optimizer steps in a row had a loss or gradient that is not finite "
                f"(learner.max_skipped_steps {self.config.max_skipped_steps}); lower {self.name}.optimizer.lr, or "
                "resume from an earlier checkpoint"
            )
        return False

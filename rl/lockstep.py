"""A ZeRO-3 engine in training: all ranks run micro-batches in lockstep, and skip optimizer steps that are not finite.

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
from rl.progress import WORK
from rl.shared_prefix import use_shared_prefixes, windows_in_masks
from rl.zero3 import backward, start_engine

# What a rank without work runs while others still have some: two tokens whose loss has weight 0.
_EMPTY = TokenSequence(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32))

MicroStep = Callable[[Sequence[TrainSample], MicroBatch], Tensor]  # forward and backward; returns its share of the loss


def prepare_model(model: nn.Module, config: LearnerConfig, device: torch.device) -> Layout:
    """Apply the configuration to a loaded model, before its engine is created; returns its layout."""
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
    """One rank of a model in training. The policy and the critic each have one.

    Args:
        model: loaded with `zero`; frozen parameters stay out of the optimizer.
        config: the learner's section, with this model's optimizer settings.
        zero: from `rl.zero3.training_config`.
        total_optimizer_steps: the length of the learning-rate schedule.
        device: this rank's device.
        name: the prefix of its metrics ("learner", "critic").
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
        """Tensors of one micro-batch; those of `_EMPTY` if there are no sequences. `model_config`: see `map_tokens`."""
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
        """Run `forward` over all sequences; the results are [R] for each, in their order.

        `forward` returns a number per response token ([T]). `model_config` is the transformers configuration of the
        model that it runs, if that is not this engine's.

        A sequence without a response gets an empty result and costs nothing.
        """
        results: list[FloatArray] = [np.empty(0, dtype=np.float32)] * len(sequences)
        places = [i for i, sequence in enumerate(sequences) if len(sequence.response_ids)]
        groups = self._groups([sequences[i] for i in places])
        for number, group in enumerate(groups, start=1):
            WORK.begin(f"the forward pass of micro-batch {number} of {len(groups)}")
            micro = self.collate([sequences[places[i]] for i in group], model_config)
            values = micro.split(forward(micro))
            for index, value in zip(group, values, strict=False):  # `_EMPTY` belongs to no sample
                results[places[index]] = value.float().cpu().numpy()
        return results

    def optimizer_step(
        self, share: MiniBatchShare, micro_step: MicroStep, sums: MetricSums, *, split_invariant: bool = True
    ) -> None:
        """One optimizer step over this rank's share. `micro_step` must run `backward`; it gets no samples when this
        rank only keeps in step with the others.

        Raises:
            LearnerError: a loss that must not be split would be, or too many non-finite steps in a row.
        """
        sums.add_sum(f"{self.name}/skipped_steps", 0.0)
        if share.num_loss_tokens == 0:
            return  # nothing to learn on any rank, but a step would move the weights by momentum and decay
        groups = self._groups([s.tokens for s in share.samples], together=not split_invariant)
        if not split_invariant and (len(groups) > 1 or self.world_size > 1):
            raise LearnerError(
                "this policy loss looks across sequences, so a mini-batch cannot be split, but this one takes "
                f"{len(groups)} micro-batches on {self.world_size} ranks; use one rank and a larger "
                "learner.max_tokens_per_microbatch, or another algorithm.loss"
            )
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, group in enumerate(groups, start=1):
            WORK.begin(f"micro-batch {number} of {len(groups)} of a {self.name} step")
            self.engine.set_gradient_accumulation_boundary(number == len(groups))
            samples = [share.samples[i] for i in group]
            loss = micro_step(samples, self.collate([s.tokens for s in samples]))
            total += loss.detach().double()
        sums.add_mean(f"{self.name}/lr", self.engine.get_lr()[0], 1.0)
        WORK.begin(f"the optimizer's part of a {self.name} step")
        self.engine.step()
        WORK.begin(f"the end of a {self.name} step")
        if self._step_was_applied(sums):
            # The ranks' parts add up to the loss, so their weights must add up to 1.
            sums.add_mean(f"{self.name}/loss", total, 1.0 / self.world_size)
            sums.add_mean(f"{self.name}/grad_norm", self.engine.get_global_grad_norm(), 1.0)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch's share of the loss."""
        # DeepSpeed averages the ranks' gradients, but the loss is already divided by global counts.
        backward(self.engine, loss * self.world_size)

    def skipped_steps(self, totals: dict[str, float]) -> dict[str, float]:
        """The metric of skipped steps, from the plain sums of a `MetricSums`."""
        name = f"{self.name}/skipped_steps"
        return {name: totals[name] / self.world_size}

    def _groups(self, sequences: Sequence[TokenSequence], *, together: bool = False) -> list[list[int]]:
        """This rank's micro-batches, as many as the rank with the most has, because ZeRO-3 runs in lockstep; empty ones
        run `_EMPTY`. `together`: as in `micro_batches`."""
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
        """Whether the step was applied: DeepSpeed skips it on all ranks if the gradient's norm is not finite."""
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

"""PPO's critic: a value model on its own ZeRO-3 engine, and a learner that trains one beside its policy.

V(s_t), the value of response token t, is read where the policy predicts that token: from the last hidden state of the
preceding position. So it is known before the token is drawn, and it is aligned like the log-probabilities.

As in `rl.learner`, one object is one rank, and methods are collectives. Left out: advantages and returns
(`rl.advantages.gae`) and the loss per token (`rl.losses.value`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rl.batch import Annotations, FloatArray, TokenSequence, TrainSample, UpdateResult
from rl.batching import MiniBatchShare
from rl.config import AlgorithmConfig, CriticConfig, LearnerConfig, ModelConfig
from rl.errors import LearnerError
from rl.layouts import MicroBatch
from rl.learner import Learner
from rl.learner_checkpoint import export_hf, load_checkpoint, save_checkpoint
from rl.learner_checks import check_value_layout
from rl.learner_metrics import MetricSums
from rl.lockstep import LockstepEngine
from rl.losses.value import ValueInputs, value_loss
from rl.models import load_config, load_value_model
from rl.objectives import flat, loss_mask
from rl.zero3 import training_config

_FOLDER = "critic"  # within the learner's checkpoint


class Critic:
    """One rank of the critic.

    Args:
        config: the critic's section of the configuration.
        learner: the learner's section; micro-batches, layout, offloading and activation checkpointing are the policy's.
        model: the policy's section; the critic uses the same dtype, attention and tokenizer.
        device: this rank's device; the process group must exist already.
        total_optimizer_steps: the length of the learning-rate schedule.

    Raises:
        LearnerError: the checkpoint cannot be a critic, or the layout would not be exact with its attention.
    """

    def __init__(
        self,
        config: CriticConfig,
        learner: LearnerConfig,
        model: ModelConfig,
        *,
        device: torch.device,
        total_optimizer_steps: int,
    ) -> None:
        self.config, self._model_config = config, model
        settings = learner.model_copy(update={"optimizer": config.optimizer})
        zero = training_config(settings, dtype=model.dtype, hidden_size=load_config(model, config.path).hidden_size)
        value_model = load_value_model(model, zero, device=device.type, path=config.path)
        _in_float32(value_model.score)  # type: ignore[arg-type]
        self._engine = LockstepEngine(
            value_model,
            config=settings,
            zero=zero,
            total_optimizer_steps=total_optimizer_steps,
            device=device,
            name="critic",
        )
        check_value_layout(self._engine.engine, self._engine.layout, device=device, dtype=self._engine.dtype)

    @property
    def module(self) -> Any:
        """The transformers model; its parameters are ZeRO-3 partitions."""
        return self._engine.module

    def values(self, sequences: Sequence[TokenSequence]) -> tuple[FloatArray, ...]:
        """N x [R]: V(s_t) of this rank's sequences, in their order."""
        self._engine.engine.eval()
        return tuple(self._engine.map_tokens(sequences, self._forward))

    def update(self, mini_batches: Sequence[MiniBatchShare]) -> dict[str, float]:
        """One optimizer step per mini-batch on the clipped squared error, averaged over all loss tokens.

        Returns:
            Metrics under `critic/`. `explained_variance` is 1 - Var(R - V) / Var(R) with the values before the update,
            and is omitted if all returns are equal.

        Raises:
            LearnerError: samples without values or returns, or too many non-finite steps in a row.
        """
        self._engine.engine.train()
        sums = MetricSums()
        for share in mini_batches:

            def micro_step(samples: Sequence[TrainSample], micro: MicroBatch, share: MiniBatchShare = share) -> Tensor:
                values = self._forward(micro)
                loss = self._loss(values, samples, micro, share, sums) if samples else 0.0 * values.sum()
                self._engine.backward(loss)
                return loss

            self._engine.optimizer_step(share, micro_step, sums)
        metrics, totals = sums.reduce()
        return metrics | self._engine.skipped_steps(totals) | _explained_variance(totals)

    def save_checkpoint(self, directory: Path) -> None:
        save_checkpoint(self._engine.engine, directory, {"skipped_in_a_row": self._engine.skipped_in_a_row})

    def load_checkpoint(self, directory: Path) -> None:
        """Raises CheckpointError if the checkpoint is missing or damaged."""
        self._engine.skipped_in_a_row = load_checkpoint(self._engine.engine, directory)["skipped_in_a_row"]

    def export_hf(self, directory: Path) -> None:
        """Write a Hugging Face token classification checkpoint, which `critic.path` accepts."""
        export_hf(self.module, self._model_config, directory)

    def close(self) -> None:
        self._engine.engine.destroy()

    def _forward(self, micro: MicroBatch) -> Tensor:
        """[T] values, float32."""
        return self._engine.engine(**micro.model_inputs).logits.flatten().index_select(0, micro.positions)

    def _loss(
        self, values: Tensor, samples: Sequence[TrainSample], micro: MicroBatch, share: MiniBatchShare, sums: MetricSums
    ) -> Tensor:
        """This micro-batch's share of the mini-batch's loss."""
        old_values, returns = (flat(samples, name, values.device) for name in ("values", "returns"))
        if old_values is None or returns is None:
            raise LearnerError(
                "samples have no values and returns; annotate the batch, and use an advantage estimator such as gae"
            )
        mask = loss_mask(samples, values.device)
        # Whatever stands outside the mask is replaced: 0 * NaN is NaN in a gradient.
        old_values, returns = (torch.where(mask, x, values.detach()) for x in (old_values, returns))
        inputs = ValueInputs(
            values=values,
            old_values=old_values,
            returns=returns,
            loss_mask=mask,
            sequence_index=micro.sequence_index,
            num_sequences=micro.num_sequences,
        )
        per_token, metrics = value_loss(inputs, clip=self.config.clip_range)
        for name, quantity in {**metrics, "return_mean": returns}.items():
            sums.add_masked_mean(f"critic/{name}", quantity, mask)
        kept_returns, errors = returns[mask].double(), (returns - old_values)[mask].double()
        for name, moment in (
            ("tokens", mask.sum()),
            ("returns", kept_returns.sum()),
            ("returns_square", kept_returns.square().sum()),
            ("errors", errors.sum()),
            ("errors_square", errors.square().sum()),
        ):
            sums.add_sum(_MOMENT + name, moment)
        return inputs.masked(per_token).sum() / share.num_loss_tokens


class LearnerWithCritic(Learner):
    """A learner that annotates batches with values too, and whose updates also train the critic.

    In the first `critic.warmup_steps` updates only the critic learns: the policy's weights and optimizer stay as they
    are, but its version still advances, because a version says how many updates came before.

    Args:
        critic: the critic's section of the configuration.
        total_optimizer_steps: in the whole run; the policy's schedule is shorter by the warm-up.
        others: as in `Learner`.
    """

    def __init__(
        self,
        config: LearnerConfig,
        model: ModelConfig,
        algorithm: AlgorithmConfig | None,
        *,
        critic: CriticConfig,
        total_optimizer_steps: int,
        **others: Any,
    ) -> None:
        warmup = critic.warmup_steps * config.epochs * config.mini_batches
        super().__init__(config, model, algorithm, total_optimizer_steps=total_optimizer_steps - warmup, **others)
        self.critic = Critic(critic, config, model, device=self.device, total_optimizer_steps=total_optimizer_steps)

    def annotate(self, sequences: Sequence[TokenSequence], *, old_logprobs: bool) -> Annotations:
        """The policy's annotations and the critic's values."""
        return replace(super().annotate(sequences, old_logprobs=old_logprobs), values=self.critic.values(sequences))

    def update(self, mini_batches: Sequence[MiniBatchShare]) -> UpdateResult:
        """Train the critic and, after the warm-up, the policy on the same mini-batches."""
        start = time.perf_counter()
        metrics = self.critic.update(mini_batches)
        if self.policy_version < self.critic.config.warmup_steps:
            self.policy_version += 1
        else:
            metrics |= super().update(mini_batches).metrics
        return UpdateResult(self.policy_version, metrics, time.perf_counter() - start)

    def save_checkpoint(self, directory: str | Path) -> None:
        super().save_checkpoint(directory)
        self.critic.save_checkpoint(Path(directory) / _FOLDER)

    def load_checkpoint(self, directory: str | Path) -> None:
        super().load_checkpoint(directory)
        self.critic.load_checkpoint(Path(directory) / _FOLDER)

    def export_critic(self, directory: Path) -> None:
        """Write the critic as a Hugging Face checkpoint."""
        self.critic.export_hf(directory)

    def close(self) -> None:
        self.critic.close()
        super().close()


_MOMENT = "critic_moment:"  # sums that only `_explained_variance` reads


def _explained_variance(sums: dict[str, float]) -> dict[str, float]:
    """The metric from plain sums over all ranks; empty without loss tokens, or if the returns do not vary."""
    count = sums.get(_MOMENT + "tokens", 0.0)
    if not count:
        return {}

    def variance(name: str) -> float:
        return sums[f"{_MOMENT}{name}_square"] / count - (sums[_MOMENT + name] / count) ** 2

    if variance("returns") <= 1e-12:
        return {}
    return {"critic/explained_variance": 1.0 - variance("errors") / variance("returns")}


def _in_float32(head: nn.Linear) -> None:
    """Make the head compute in float32: in bfloat16 a value would be rounded by up to 1/256 of its size.

    Its `forward` is replaced and not bypassed, so that ZeRO-3 gathers its weights as it does for any module.
    """

    def forward(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(hidden.float(), head.weight.float(), bias)

    head.forward = forward  # type: ignore[method-assign,assignment]

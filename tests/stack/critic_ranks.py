"""One rank of the critic tests: runs scenarios on real two-rank ZeRO-3 critics and saves what came out.

    python critic_ranks.py OUT_DIR      (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set)

OUT_DIR/FAMILY/model holds a policy and OUT_DIR/FAMILY/value_model a critic with a random head.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learner_ranks import ADAM, PLAIN_STEP, samples
from ranks import end_rank

import rl.zero3
from rl.batch import TrainBatch, TrainSample
from rl.batching import MiniBatchShare, plan_update
from rl.config import AlgorithmConfig, CriticConfig, CriticOptimizerConfig, LearnerConfig, ModelConfig, OptimizerConfig
from rl.critic import Critic, LearnerWithCritic
from rl.errors import LearnerError
from rl.weight_sync.source import Zero3WeightSource
from rl.zero3 import init_distributed

CLIP = 0.1
SPLITS: dict[str, dict[str, Any]] = {
    "one": {"layout": "bucketed"},
    "many": {"layout": "bucketed", "max_tokens_per_microbatch": 50},
    "packed": {"layout": "packed", "max_tokens_per_microbatch": 70, "activation_checkpointing": True},
    "shared": {"layout": "shared_prefix", "max_tokens_per_microbatch": 70},
    "one_sided": {"layout": "bucketed", "max_tokens_per_microbatch": 50},  # rank 1 only keeps in step
}
FAMILIES: dict[str, tuple[str, ...]] = {"qwen3": tuple(SPLITS), "gpt_oss": ("packed",)}
PER_TOKEN = (
    "response_ids", "loss_mask", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "returns",
)  # fmt: skip


def value_samples() -> list[TrainSample]:
    """The learner's samples with made-up values and returns; some values differ from the critic's by more than CLIP."""
    generator = np.random.default_rng(11)
    result = []
    for sample in samples():
        values, returns = generator.standard_normal((2, len(sample.response_ids))).astype(np.float32)
        result.append(dataclasses.replace(sample, values=values, returns=returns))
    return result


def same(optimizer: OptimizerConfig) -> CriticOptimizerConfig:
    return CriticOptimizerConfig(**optimizer.model_dump())


class Scenarios:
    """Builds critics and records results; every method is a collective of both ranks."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        self.rank = torch.distributed.get_rank()
        self.results: dict[str, Any] = {}

    def model(self, dtype: str = "float32") -> ModelConfig:
        return ModelConfig(path=str(self.out_dir / "model"), dtype=dtype)  # type: ignore[arg-type]

    def critic(self, config: CriticConfig, *, dtype: str = "float32", **learner: Any) -> Critic:
        settings = {"max_tokens_per_microbatch": 4096} | learner
        device = torch.device("cpu")
        return Critic(config, LearnerConfig(**settings), self.model(dtype), device=device, total_optimizer_steps=8)

    @staticmethod
    def weights(module: Any) -> dict[str, torch.Tensor]:
        """All parameters, whole, in checkpoint names (rank 0 only)."""
        dtype, rank = next(module.parameters()).dtype, torch.distributed.get_rank()
        return dict(Zero3WeightSource(module, dtype=dtype, bucket_bytes=1 << 20, rank=rank))

    def shares(self, batch: list[TrainSample], steps: int = 1) -> list[MiniBatchShare]:
        return plan_update(TrainBatch.from_samples(tuple(batch)), num_ranks=2, mini_batches=steps, seed=3)[self.rank]

    def splits(self, names: tuple[str, ...]) -> None:
        """Values, then weights and metrics after one plain step over the whole batch, in different micro-batches."""
        config = CriticConfig(path=str(self.out_dir / "value_model"), optimizer=same(PLAIN_STEP), clip_range=CLIP)
        whole = TrainBatch.from_samples(tuple(value_samples()))
        for name in names:
            critic = self.critic(config, **SPLITS[name])
            if name == "one":
                self.values(critic)
            mine = whole.samples if self.rank == 0 else ()
            one_sided = [MiniBatchShare(mine, whole.num_loss_tokens, whole.num_sequences)]
            metrics = critic.update(one_sided if name == "one_sided" else self.shares(value_samples()))
            self.results[name] = {"weights": self.weights(critic.module), "metrics": metrics}
            critic.close()

    def values(self, critic: Critic) -> None:
        """Values computed on both ranks and put back together; one response is empty. And an update without values."""
        batch = value_samples()
        batch[1] = dataclasses.replace(batch[1], **{name: getattr(batch[1], name)[:0] for name in PER_TOKEN})
        parts: list[Any] = [None, None]
        torch.distributed.all_gather_object(parts, critic.values([s.tokens for s in batch[self.rank :: 2]]))
        self.results["values"] = [parts[i % 2][i // 2] for i in range(len(batch))]
        try:
            critic.update(self.shares(samples()))
        except LearnerError as error:
            self.results["no_values"] = str(error)

    def regression(self) -> None:
        """A bfloat16 critic with a fresh head and offloaded float32 master weights, towards fixed returns."""
        config = CriticConfig(optimizer=CriticOptimizerConfig(lr=3e-3), clip_range=None)
        critic = self.critic(config, dtype="bfloat16", offload_optimizer=True)
        fresh = critic.values([s.tokens for s in value_samples()])
        losses = [critic.update(self.shares(value_samples()))["critic/loss"] for _ in range(8)]
        self.results["regression"] = {"fresh": fresh, "losses": losses, "dtype": fresh[0].dtype}
        critic.close()

    def learner(self) -> LearnerWithCritic:
        return LearnerWithCritic(
            LearnerConfig(optimizer=ADAM, mini_batches=2, max_tokens_per_microbatch=4096),
            self.model(),
            AlgorithmConfig(),
            critic=CriticConfig(optimizer=same(ADAM), warmup_steps=1),
            seed=0,
            deterministic=True,
            device="cpu",
            total_optimizer_steps=6,
            fixed_length=64,
        )

    def resume(self) -> None:
        """A warm-up update, then one of critic and policy, without a break and from a checkpoint in between."""
        learner = self.learner()

        def both(learner: LearnerWithCritic) -> dict[str, Any]:
            return {"policy": self.weights(learner.module), "critic": self.weights(learner.critic.module)}

        self.results["start"] = both(learner)
        warmup = learner.update(self.shares(value_samples(), 2))
        self.results["warmup"] = both(learner) | {"metrics": warmup.metrics, "version": warmup.policy_version}
        learner.save_checkpoint(self.out_dir / "checkpoint")
        learner.export_critic(self.out_dir / "export")
        result = learner.update(self.shares(value_samples(), 2))
        self.results["straight"] = both(learner) | {"metrics": result.metrics, "version": result.policy_version}
        learner.close()
        learner = self.learner()
        learner.load_checkpoint(self.out_dir / "checkpoint")
        self.results["annotations"] = learner.annotate([s.tokens for s in samples()], old_logprobs=True)
        result = learner.update(self.shares(value_samples(), 2))
        self.results["resumed"] = both(learner) | {"metrics": result.metrics, "version": result.policy_version}
        learner.close()
        again = self.critic(CriticConfig(path=str(self.out_dir / "export")))
        self.results["exported"] = self.weights(again.module)
        again.close()

    def run(self) -> None:
        self.splits(FAMILIES[self.out_dir.name])
        if self.out_dir.name == "qwen3":
            self.regression()
            self.resume()
        torch.save(self.results, self.out_dir / f"rank{self.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    init_distributed("cpu", 300.0)
    rl.zero3.SUB_GROUP_ELEMENTS = 5_000  # several of them, as large models have
    gc.freeze()  # DeepSpeed collects garbage for every engine: a second each over all that was imported
    for family in FAMILIES:
        Scenarios(Path(sys.argv[1]) / family).run()
    end_rank()

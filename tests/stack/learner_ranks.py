"""One rank of the learner tests: runs scenarios on a real two-rank ZeRO-3 learner and saves what came out.

    python learner_ranks.py OUT_DIR      (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set)

Starting a process costs more than a scenario, so one process runs all scenarios of all model families; the tests then
look at the results one by one. OUT_DIR/FAMILY/model holds the checkpoints. Any other number of ranks only goes on from
what the two have saved.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import end_rank

import rl.zero3
from launch.tiny_models import FAMILIES
from rl.batch import TrainBatch, TrainSample, UpdateResult
from rl.batching import MiniBatchShare, plan_update
from rl.config import (
    AlgorithmConfig,
    KLConfig,
    LearnerConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RolloutCorrectionConfig,
)
from rl.errors import CheckpointError, LearnerError
from rl.learner import Learner
from rl.weight_sync.source import Zero3WeightSource

TEMPERATURE = 0.8
ALGORITHM = AlgorithmConfig(
    kl=KLConfig(placement="loss", coefficient=0.1),
    entropy_coefficient=0.02,
    loss_options={"clip_low": 0.1},
    rollout_correction=RolloutCorrectionConfig(mode="truncate", upper=1.05),
)
PLAIN_STEP = OptimizerConfig(name="sgd", lr=1.0, max_grad_norm=0)  # the step is minus the gradient
OTHER_REFERENCE = "gpt_oss"  # of Qwen3
ADAM = OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.1, schedule="cosine", warmup_steps=1)
RESUMED = {"optimizer": ADAM, "mini_batches": 2}
FROZEN = RESUMED | {"layout": "bucketed", "moe": MoEConfig(freeze_router=True)}
HALF = {"dtype": "bfloat16", "algorithm": None, "optimizer": OptimizerConfig(lr=3e-3), "offload_optimizer": True}


def samples(count: int = 7, *, layers: int | None = None) -> list[TrainSample]:
    """Ragged samples with every field that a loss reads; the old and reference log-probabilities are made up.

    From the fourth on, every second sample has the prompt of the sample three before it.
    """
    generator = np.random.default_rng(5)

    def noise(size: int, scale: float) -> Any:
        return (scale * generator.standard_normal(size)).astype(np.float32)

    result: list[TrainSample] = []
    for index in range(count):
        prompt_ids = generator.integers(0, 250, int(generator.integers(1, 9))).astype(np.int32)
        if index >= 3 and index % 2:
            prompt_ids = result[index - 3].prompt_ids
        prompt, response = len(prompt_ids), int(generator.integers(2, 40))
        old = (-5.5 + noise(response, 0.5)).astype(np.float32)
        mask = generator.random(response) < 0.9
        mask[0] = True
        routed = None
        if layers is not None:
            routed = np.argsort(generator.random((prompt + response - 1, layers, 4)), axis=-1)[..., :2].astype(np.int16)
        result.append(
            TrainSample(
                prompt_ids=prompt_ids,
                response_ids=generator.integers(0, 250, response).astype(np.int32),
                loss_mask=mask,
                advantages=noise(response, 1.0),
                rollout_logprobs=old + noise(response, 0.1),
                old_logprobs=old,
                ref_logprobs=old + noise(response, 0.3),
                routed_experts=routed,
            )
        )
    return result


class Scenarios:
    """Builds learners and records results; every method is a collective of all ranks."""

    def __init__(self, family: str, out_dir: Path) -> None:
        self.family, self.checkpoint, self.out_dir = family, out_dir / "model", out_dir
        self.results: dict[str, Any] = {}

    def learner(
        self,
        dtype: str = "float32",
        algorithm: AlgorithmConfig | None = ALGORITHM,
        path: Path | None = None,
        **config: Any,
    ) -> Learner:
        settings = {"optimizer": PLAIN_STEP, "logprob_chunk_tokens": 16, "max_tokens_per_microbatch": 4096} | config
        return Learner(
            LearnerConfig(**settings),
            ModelConfig(path=str(path or self.checkpoint), dtype=dtype),  # type: ignore[arg-type]
            algorithm,
            seed=0,
            deterministic=True,
            device="cpu",
            total_optimizer_steps=6,
            fixed_length=64,
            temperature=TEMPERATURE,
        )

    @staticmethod
    def weights(learner: Learner) -> dict[str, torch.Tensor]:
        """All parameters, whole, in checkpoint names (rank 0 only)."""
        dtype = next(learner.module.parameters()).dtype
        return dict(Zero3WeightSource(learner.module, dtype=dtype, bucket_bytes=1 << 20, rank=learner.rank))

    @staticmethod
    def update(learner: Learner, batch: list[TrainSample], *, steps: int = 1, epochs: int = 1) -> UpdateResult:
        plan = plan_update(
            TrainBatch.from_samples(tuple(batch)),
            num_ranks=learner.world_size,
            mini_batches=steps,
            epochs=epochs,
            seed=3,
            share_prefixes=learner.layout == "shared_prefix",
        )
        return learner.update(plan[learner.rank])

    def step(self, name: str, **config: Any) -> None:
        """Weights and metrics after one plain step over the whole batch."""
        learner = self.learner(**config)
        result = self.update(learner, samples(layers=2 if "moe" in config else None))
        self.results[name] = {"weights": self.weights(learner), "metrics": dict(result.metrics)}
        learner.close()

    def splits(self) -> None:
        """The same step under different splits into micro-batches."""
        self.step("one", layout="bucketed")
        self.step(
            "many", layout="bucketed", max_tokens_per_microbatch=50, offload_parameters=True, offload_optimizer=True
        )
        self.step(
            "packed",
            layout="packed",
            max_tokens_per_microbatch=70,
            activation_checkpointing=True,
            persistence_threshold=1 << 12,
        )
        if self.family != "gpt_oss":
            self.step("shared", layout="shared_prefix", max_tokens_per_microbatch=70, activation_checkpointing=True)

    def one_sided(self) -> None:
        """All work on rank 0; rank 1 only keeps in step."""
        learner = self.learner(layout="bucketed", max_tokens_per_microbatch=50)
        whole = TrainBatch.from_samples(tuple(samples()))
        mine = whole.samples if learner.rank == 0 else ()
        result = learner.update([MiniBatchShare(mine, whole.num_loss_tokens, whole.num_sequences)])
        self.results["one_sided"] = {"weights": self.weights(learner), "metrics": dict(result.metrics)}
        learner.close()

    def clipped(self) -> None:
        """A step whose gradient is longer than learner.optimizer.max_grad_norm."""
        self.step("clipped", layout="bucketed", optimizer=PLAIN_STEP.model_copy(update={"max_grad_norm": 0.01}))

    def epochs(self) -> None:
        """Two epochs over a batch in one update, and the same work as two updates."""
        for name, updates, epochs in (("epochs", 1, 2), ("updates", 2, 1)):
            learner = self.learner(optimizer=ADAM, epochs=epochs)
            for _ in range(updates):
                self.update(learner, samples(), epochs=epochs)
            self.results[name] = {"weights": self.weights(learner)}
            learner.close()

    def other_reference(self) -> None:
        """Log-probabilities of a reference that is another checkpoint, beside the policy. In the packed layout it needs
        masks, which the policy does not."""
        other = self.out_dir.parent / OTHER_REFERENCE / "model"
        kl = KLConfig(placement="loss", coefficient=0.1, reference=str(other))
        algorithm = ALGORITHM.model_copy(update={"kl": kl})
        learner = self.learner(algorithm=algorithm, layout="packed", offload_reference=False)
        part = learner.annotate([s.tokens for s in samples()[:2]], old_logprobs=False)
        self.results["other_reference"] = part.ref_logprobs
        learner.close()

    def annotate(self) -> None:
        """Old and reference log-probabilities, computed on both ranks and put back together; and the probe's."""
        learner = self.learner(mini_batches=2)
        batch = samples()
        part = learner.annotate([s.tokens for s in batch[learner.rank :: 2]], old_logprobs=True)
        assert part.old_logprobs is not None and part.ref_logprobs is not None
        parts: list[Any] = [None, None]
        torch.distributed.all_gather_object(parts, part)
        pairs = [(s.prompt_ids.tolist(), s.response_ids.tolist()) for s in batch]
        self.results["annotate"] = {
            "old": [parts[i % 2].old_logprobs[i // 2] for i in range(len(batch))],
            "ref": [parts[i % 2].ref_logprobs[i // 2] for i in range(len(batch))],
            "probe": learner.score_logprobs(pairs),
        }
        learner.close()

    def resume(self) -> None:
        """The same run twice, and once interrupted, with Adam, a schedule and two steps per update."""
        for name in ("run", "again"):
            learner = self.learner(optimizer=ADAM, mini_batches=2)
            self.update(learner, samples(), steps=2)
            if name == "run":
                learner.save_checkpoint(self.out_dir / "checkpoint")
                self.results["saved"] = {"weights": self.weights(learner), "version": learner.policy_version}
                learner.export_hf(self.out_dir / "export")
            result = self.update(learner, samples(), steps=2)
            self.results[name] = {"weights": self.weights(learner), "metrics": dict(result.metrics)}
            learner.close()
        learner = self.learner(optimizer=ADAM, mini_batches=2)
        learner.load_checkpoint(self.out_dir / "checkpoint")
        self.results["loaded"] = {"weights": self.weights(learner), "version": learner.policy_version}
        result = self.update(learner, samples(), steps=2)
        self.results["resumed"] = {"weights": self.weights(learner), "metrics": dict(result.metrics)}
        learner.close()
        learner = self.learner(optimizer=ADAM.model_copy(update={"lr": ADAM.lr / 4}), mini_batches=2)
        learner.load_checkpoint(self.out_dir / "checkpoint")
        self.results["slower"] = dict(self.update(learner, samples(), steps=2).metrics)
        damaged = self.out_dir / "damaged"
        if learner.rank == 0:
            shutil.copytree(self.out_dir / "checkpoint", damaged)
        torch.distributed.barrier()
        (damaged / f"random_{learner.rank}.pt").write_bytes(b"cut")
        try:
            learner.load_checkpoint(damaged)
        except CheckpointError as error:
            self.results["damaged"] = str(error)
        learner.close()

    def resume_divided_anew(self) -> None:
        """As if by another version, which divides the optimizer's state into other sub-groups."""
        if self.family != "qwen3":
            learner = self.learner(**FROZEN)
            self.update(learner, samples(layers=2), steps=2)
            self.results["frozen saved"] = self.weights(learner)
            learner.save_checkpoint(self.out_dir / "frozen_checkpoint")
            learner.close()
        rl.zero3.SUB_GROUP_ELEMENTS *= 3
        if self.family != "qwen3":
            learner = self.learner(**FROZEN)
            learner.load_checkpoint(self.out_dir / "frozen_checkpoint")
            self.results["frozen in other sub-groups"] = self.weights(learner)
            learner.close()
        learner = self.learner(optimizer=ADAM, mini_batches=2)
        learner.load_checkpoint(self.out_dir / "checkpoint")
        self.results["other sub-groups"] = {"loaded": self.weights(learner)}
        self.update(learner, samples(), steps=2)
        self.results["other sub-groups"]["resumed"] = self.weights(learner)
        learner.close()
        rl.zero3.SUB_GROUP_ELEMENTS //= 3

    def resume_on_other_ranks(self) -> None:
        """Three ranks go on from what two have saved, and one from what the three save."""
        ranks = int(os.environ["WORLD_SIZE"])
        for name, settings in (("checkpoint", RESUMED), ("frozen_checkpoint", FROZEN), ("half_checkpoint", HALF)):
            if not (self.out_dir / name).exists():
                continue
            learner = self.learner(**settings)
            learner.load_checkpoint(self.out_dir / (name if ranks == 3 else f"{name}_of_3"))
            self.results[name] = {"loaded": self.weights(learner)}
            learner.save_checkpoint(self.out_dir / f"{name}_of_{ranks}")
            if name == "checkpoint":
                metrics = dict(self.update(learner, samples(), steps=2).metrics)
                self.results[name] |= {"resumed": self.weights(learner), "metrics": metrics}
            learner.close()
        torch.save(self.results, self.out_dir / f"rank{torch.distributed.get_rank()}_of_{ranks}.pt")

    def non_finite(self) -> None:
        """A poisoned sample on one rank: both ranks skip the step, until too many were skipped in a row."""
        learner = self.learner(optimizer=ADAM, max_skipped_steps=1)
        good = samples()
        bad = [dataclasses.replace(good[0], advantages=np.full_like(good[0].advantages, np.inf)), *good[1:]]
        before = self.weights(learner)
        masked = [dataclasses.replace(s, loss_mask=np.zeros_like(s.loss_mask)) for s in good]
        empty = self.update(learner, masked)
        skipped = self.update(learner, bad)
        after = self.weights(learner)
        recovered = self.update(learner, good)
        self.update(learner, bad)
        try:
            self.update(learner, bad)
            error = ""
        except LearnerError as caught:
            error = str(caught)
        self.results["non_finite"] = {
            "before": before,
            "after": after,
            "empty": dict(empty.metrics),
            "skipped": dict(skipped.metrics),
            "recovered": dict(recovered.metrics),
            "error": error,
        }
        learner.close()

    def sft(self) -> None:
        """Supervised steps of a bfloat16 policy with float32 master weights: the loss must fall."""
        learner = self.learner(**HALF)
        plan = plan_update(TrainBatch.from_samples(tuple(samples())), num_ranks=2)
        losses = [learner.update(plan[learner.rank]).metrics["learner/loss"] for _ in range(6)]
        self.results["sft"] = {"losses": losses, "dtype": str(next(learner.module.parameters()).dtype)}
        self.results["sft"]["weights"] = self.weights(learner)
        learner.save_checkpoint(self.out_dir / "half_checkpoint")
        learner.close()

    def experts(self) -> None:
        """Replayed experts under checkpointed activations; frozen routers with an auxiliary loss."""
        replay = MoEConfig(router_replay=True)
        self.step("replay", layout="packed", moe=replay, activation_checkpointing=True)
        self.step("frozen", layout="bucketed", moe=MoEConfig(freeze_router=True, aux_loss_coefficient=0.1))
        self.step("balanced", layout="bucketed", moe=MoEConfig(aux_loss_coefficient=1.0), activation_checkpointing=True)

    def quantized(self) -> None:
        """An MXFP4 checkpoint, loaded for training and exported again, live and from a checkpoint."""
        learner = self.learner(path=self.out_dir / "mxfp4")
        learner.save_checkpoint(self.out_dir / "mxfp4_checkpoint")
        learner.export_hf(self.out_dir / "mxfp4_export")
        learner.close()

    def unusual(self) -> None:
        """A checkpoint with a buffer, and with dropout: the ratios of an update that moves nothing must be 1."""
        still = OptimizerConfig(name="sgd", lr=1e-30)
        learner = self.learner(path=self.out_dir / "unusual", layout="bucketed", optimizer=still, mini_batches=2)
        mine = samples()[learner.rank :: 2]
        old = learner.annotate([s.tokens for s in mine], old_logprobs=True).old_logprobs
        parts: list[Any] = [None, None]
        torch.distributed.all_gather_object(parts, old)
        batch = [dataclasses.replace(s, old_logprobs=parts[i % 2][i // 2]) for i, s in enumerate(samples())]
        self.results["unusual"] = dict(self.update(learner, batch, steps=2).metrics)
        learner.save_checkpoint(self.out_dir / "unusual_checkpoint")
        learner.export_hf(self.out_dir / "unusual_export")
        learner.close()

    def run(self) -> None:
        self.splits()
        self.annotate()
        if self.family == "qwen3":
            self.one_sided()
            self.clipped()
            self.epochs()
            self.other_reference()
            self.non_finite()
        else:
            self.experts()
        self.resume()
        self.resume_divided_anew()
        if self.family == "qwen3":
            self.sft()
        if self.family == "qwen3_moe":
            self.unusual()
        if self.family == "gpt_oss":
            self.quantized()
        torch.save(self.results, self.out_dir / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rl.zero3.SUB_GROUP_ELEMENTS = 5_000  # several of them, as large models have
    gc.freeze()  # DeepSpeed collects garbage for every engine: a second each over all that was imported
    for name in FAMILIES:
        scenarios = Scenarios(name, Path(sys.argv[1]) / name)
        if os.environ["WORLD_SIZE"] == "2":
            scenarios.run()
        else:
            scenarios.resume_on_other_ranks()
    end_rank()

"""One rank of the tests inside verl: the same data through verl's own workers and through our learner.

    python verl_ranks.py OUT_DIR      (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set)

verl's actor and reference workers are made from its own configuration files with the overrides that docs/verl.md
names. OUT_DIR/model holds the checkpoint; OUT_DIR/rank{0,1}.pt what came out.
"""

from __future__ import annotations

import gc
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from learner_ranks import samples
from ranks import end_rank
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_cuda import PlatformCUDA

from rl.batch import TrainSample, UpdateResult
from rl.batching import MiniBatchShare
from rl.config import (
    AlgorithmConfig,
    KLConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutCorrectionConfig,
)
from rl.learner import Learner
from rl.weight_sync.source import Zero3WeightSource

TEMPERATURE = 0.8
BATCH = samples(8)
MINI_BATCHES = 2
ALGORITHM = AlgorithmConfig(
    kl=KLConfig(placement="loss", coefficient=0.1, estimator="k2"),  # verl cuts k3 off at 10, we do not
    entropy_coefficient=0.02,
    loss_options={"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0},
    rollout_correction=RolloutCorrectionConfig(mode="none"),
)
OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.1, max_grad_norm=0.5)
OVERRIDES = (
    "actor_rollout_ref.model.external_lib=rl.verl_engine",
    "actor_rollout_ref.actor.strategy=deepspeed",
    "actor_rollout_ref.actor.fsdp_config.dtype=float32",
    "actor_rollout_ref.ref.fsdp_config.dtype=float32",
    "+actor_rollout_ref.model.override_config.attn_implementation=eager",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.clip_ratio_low=0.1",
    "actor_rollout_ref.actor.clip_ratio_high=0.3",
    "actor_rollout_ref.actor.clip_ratio_c=2.0",
    "actor_rollout_ref.actor.entropy_coeff=0.02",
    "actor_rollout_ref.actor.use_kl_loss=true",
    "actor_rollout_ref.actor.kl_loss_coef=0.1",
    "actor_rollout_ref.actor.kl_loss_type=k2",
    "actor_rollout_ref.actor.optim.lr=1e-4",
    "actor_rollout_ref.actor.optim.weight_decay=0.1",
    "actor_rollout_ref.actor.optim.clip_grad=0.5",
    "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
)


class PlatformCPU(PlatformCUDA):
    """verl only knows the platforms of accelerators; this is the platform of a machine without one."""

    device_name = "cpu"
    device_module = SimpleNamespace(  # what verl's worker reports of a device
        max_memory_allocated=lambda: 0,
        max_memory_reserved=lambda: 0,
        empty_cache=lambda: None,
        get_device_name=lambda: "CPU",
        is_available=lambda: False,
        manual_seed=torch.manual_seed,
    )

    def is_available(self) -> bool:
        return True


def learner(out_dir: Path, algorithm: AlgorithmConfig | None, optimizer: OptimizerConfig) -> Learner:
    return Learner(
        LearnerConfig(optimizer=optimizer, mini_batches=MINI_BATCHES, max_tokens_per_microbatch=4096),
        ModelConfig(path=str(out_dir / "model"), dtype="float32", attention="eager"),
        algorithm,
        seed=0,
        deterministic=True,
        device="cpu",
        total_optimizer_steps=1,
        fixed_length=64,
        temperature=TEMPERATURE,
    )


def weights(module: Any) -> dict[str, torch.Tensor]:
    """All parameters, whole, in checkpoint names."""
    return dict(Zero3WeightSource(module, dtype=torch.float32, bucket_bytes=1 << 20, keep="all"))


def shares(batch: list[TrainSample], count: int) -> list[MiniBatchShare]:
    """This rank's shares of `count` mini-batches, in the order in which verl cuts them."""
    result = []
    size = len(batch) // count
    for start in range(0, len(batch), size):
        whole = batch[start : start + size]
        mine = tuple(whole[torch.distributed.get_rank() :: 2])
        result.append(MiniBatchShare(mine, sum(s.num_loss_tokens for s in whole), len(whole)))
    return result


def padded(rows: list[Any], *, left: bool = False) -> torch.Tensor:
    width = max(len(row) for row in rows)
    result = np.zeros((len(rows), width), dtype=np.asarray(rows[0]).dtype)
    for line, row in zip(result, rows, strict=True):
        line[width - len(row) if left else 0 : width if left else len(row)] = row
    return torch.from_numpy(result)


def ppo_data(batch: list[TrainSample], **settings: Any) -> Any:
    """A batch as verl's trainer makes it: prompts padded on the left, responses on the right, then without padding."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    prompts, responses = padded([s.prompt_ids for s in batch], left=True), padded([s.response_ids for s in batch])
    present = torch.cat(
        [
            padded([np.ones(len(s.prompt_ids), dtype=np.int64) for s in batch], left=True),
            padded([np.ones(len(s.response_ids), dtype=np.int64) for s in batch]),
        ],
        dim=1,
    )
    data = tu.get_tensordict(
        {
            "prompts": prompts.long(),
            "responses": responses.long(),
            "input_ids": torch.cat([prompts, responses], dim=1).long(),
            "attention_mask": present,
            "position_ids": (present.cumsum(1) - 1).clamp(min=0),
            "response_mask": padded([s.loss_mask.astype(np.int64) for s in batch]),
            "advantages": padded([s.advantages for s in batch]),
            "old_log_probs": padded([s.old_logprobs for s in batch]),
            "ref_log_prob": padded([s.ref_logprobs for s in batch]),
        },
        {"temperature": TEMPERATURE},
    )
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(data, **settings)
    return data


def sft_data(batch: list[TrainSample], **settings: Any) -> Any:
    """A batch as verl's supervised trainer makes it: jagged, the loss mask as long as the tokens."""
    from verl.utils import tensordict_utils as tu

    tokens = [torch.from_numpy(np.concatenate([s.prompt_ids, s.response_ids])).long() for s in batch]
    masks = [torch.from_numpy(np.concatenate([np.zeros(len(s.prompt_ids)), s.loss_mask])).long() for s in batch]
    jagged = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    data = tu.get_tensordict(
        {
            "input_ids": jagged(tokens),
            "loss_mask": jagged(masks),
            "position_ids": jagged([torch.arange(len(t)) for t in tokens]),
        },
        {"temperature": TEMPERATURE},
    )
    tu.assign_non_tensor(data, **settings)
    return data


class Scenarios:
    """Every method is a collective of both ranks."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        self.rank = torch.distributed.get_rank()
        self.mine = BATCH[self.rank :: 2]
        self.results: dict[str, Any] = {}

    def verl_worker(self, role: str) -> Any:
        """verl's hybrid worker with one role, from verl's configuration files and the overrides of a user."""
        from hydra import compose, initialize_config_module
        from verl.workers.engine_workers import ActorRolloutRefWorker

        with initialize_config_module("verl.trainer.config", version_base=None):
            path = f"actor_rollout_ref.model.path={self.out_dir / 'model'}"
            config = compose("ppo_trainer", overrides=[path, *OVERRIDES])
        worker = ActorRolloutRefWorker(config.actor_rollout_ref, role=role)
        worker.init_model()
        return worker

    def log_probs(self, output: Any, data: Any, name: str = "log_probs") -> list[np.ndarray]:
        """Rows of verl's output, without their padding."""
        from verl.workers.utils.padding import no_padding_2_padding

        matrix = no_padding_2_padding(output[name], data)
        return [row[: len(s.response_ids)].numpy() for row, s in zip(matrix, self.mine, strict=True)]

    def run_learner(self) -> None:
        """The reference of every comparison."""
        ours = learner(self.out_dir, ALGORITHM, OPTIMIZER)
        annotated = ours.annotate([s.tokens for s in self.mine], old_logprobs=True)
        results = [ours.update(shares(BATCH, MINI_BATCHES)) for _ in range(2)]
        self.results["learner"] = {
            "old": annotated.old_logprobs,
            "metrics": [dict(result.metrics) for result in results],
            "weights": weights(ours.module),
        }
        ours.close()
        ours = learner(self.out_dir, None, OPTIMIZER)
        losses: list[UpdateResult] = [ours.update(shares(BATCH, 1)) for _ in range(2)]
        self.results["learner_sft"] = {
            "losses": [result.metrics["learner/loss"] for result in losses],
            "weights": weights(ours.module),
        }
        ours.close()

    def run_actor(self) -> None:
        """Log-probabilities, two updates of two mini-batches with a checkpoint between, and one that is skipped."""
        from verl.utils import tensordict_utils as tu

        worker = self.verl_worker("actor")
        engine = worker.actor.engine
        parameters, adapter = engine.get_per_tensor_param(layered_summon=False, base_sync_done=True)
        assert adapter is None
        self.results["start"] = dict(parameters)
        data = ppo_data(self.mine, calculate_entropy=True, compute_loss=False)
        output = worker.compute_log_prob(data)
        result: dict[str, Any] = {
            "old": self.log_probs(output, data),
            "entropy": self.log_probs(output, data, "entropy"),
            "metrics": [],
        }
        settings = {
            "calculate_entropy": True,
            "global_batch_size": 4,
            "mini_batch_size": 4,
            "epochs": 1,
            "seed": 1,
            "dataloader_kwargs": {"shuffle": False},
        }
        for step in range(2):
            output = worker.update_actor(ppo_data(self.mine, **settings))
            result["metrics"].append(tu.get(output, "metrics"))
            if step == 0:
                worker.save_checkpoint(str(self.out_dir / "checkpoint"), max_ckpt_to_keep=1)
        result["weights"] = weights(engine.module)
        infinite = ppo_data(self.mine, **settings)
        if self.rank == 0:
            infinite["advantages"][::2] = torch.inf  # one sample of either mini-batch
        result["skipped"] = tu.get(worker.update_actor(infinite), "metrics")
        result["after_skipped"] = weights(engine.module)
        worker.load_checkpoint(str(self.out_dir / "checkpoint"))
        worker.update_actor(ppo_data(self.mine, **settings))
        result["resumed"] = weights(engine.module)
        self.results["actor"] = result
        engine.engine.destroy()

    def run_reference(self) -> None:
        """A frozen engine that only runs forward passes."""
        worker = self.verl_worker("ref")
        data = ppo_data(self.mine, compute_loss=False)
        self.results["reference"] = self.log_probs(worker.compute_ref_log_prob(data), data)
        worker.ref.engine.engine.destroy()

    def run_sft(self) -> None:
        """verl's supervised loss with dynamic micro-batches, its plainest configuration, and what is refused."""
        from verl.trainer.config import CheckpointConfig
        from verl.utils import tensordict_utils as tu
        from verl.workers.config import EngineConfig as VerlEngineConfig
        from verl.workers.config import HFModelConfig, TrainingWorkerConfig
        from verl.workers.config import OptimizerConfig as VerlOptimizerConfig
        from verl.workers.engine_workers import TrainingWorker
        from verl.workers.utils.losses import sft_loss

        config = TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=str(self.out_dir / "model"),
                external_lib="rl.verl_engine",
                override_config={"attn_implementation": "eager"},
            ),
            engine_config=VerlEngineConfig(
                strategy="deepspeed", dtype="float32", max_token_len_per_gpu=60, infer_max_token_len_per_gpu=60
            ),
            optimizer_config=VerlOptimizerConfig(lr=1e-4, weight_decay=0.1, clip_grad=0.5),
            checkpoint_config=CheckpointConfig(),
        )
        worker = TrainingWorker(config)
        worker.reset()
        worker.set_loss_fn(partial(sft_loss, config=None))
        settings = {"global_batch_size": 8, "update_lr_scheduler": True}
        before = tu.get(worker.infer_batch(sft_data(self.mine, **settings)), "metrics")
        outputs = [tu.get(worker.train_batch(sft_data(self.mine, **settings)), "metrics") for _ in range(2)]
        self.results["sft"] = {
            "before": before["loss"],
            "losses": [output["loss"] for output in outputs],
            "weights": weights(worker.engine.module),
        }
        self.results["errors"] = {}
        mixed = sft_data(self.mine, **settings)
        mixed["temperature"] = torch.tensor([0.5, 1.0, 1.0, 1.0])
        for name, call in (
            ("temperature", lambda: worker.infer_batch(mixed)),
            ("batch", lambda: worker.infer_batch(sft_data(self.mine, calculate_sum_pi_squared=True))),
            ("shard", worker.engine.get_per_tensor_param_delta_shard),
            ("hdfs", lambda: worker.save_checkpoint("nowhere", "hdfs://there")),
        ):
            try:
                call()
            except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
                self.results["errors"][name] = f"{type(error).__name__}: {error}"
        worker.engine.engine.destroy()

    def run(self) -> None:
        self.run_learner()
        self.run_actor()
        self.run_reference()
        self.run_sft()
        torch.save(self.results, self.out_dir / f"rank{self.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    platform_manager.set_platform(PlatformCPU())
    from rl.zero3 import init_distributed

    init_distributed("cpu", 300)
    gc.freeze()  # DeepSpeed collects garbage for every engine: a second each over all that was imported
    Scenarios(Path(sys.argv[1])).run()
    end_rank()

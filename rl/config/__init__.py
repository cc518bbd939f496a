"""The configuration schema: frozen pydantic models. Code receives its own section, never the root or a DictConfig.

`rl.config.loading` loads and composes files. Left out: torch, ray, vllm, deepspeed, and checks that need them
(`launch.preflight`).
"""

from rl.config.algorithm import AlgorithmConfig, DynamicSamplingConfig, KLConfig, RolloutCorrectionConfig
from rl.config.data import CurriculumConfig, DataConfig, DatasetConfig, EvalDatasetConfig, ModelConfig, SftDataConfig
from rl.config.learner import CriticConfig, CriticOptimizerConfig, LearnerConfig, MoEConfig, OptimizerConfig
from rl.config.rollout import (
    EvaluationConfig,
    RejectDegenerateConfig,
    RewardConfig,
    RewardFunctionConfig,
    RolloutConfig,
)
from rl.config.run import CheckpointConfig, LoggingConfig, RayConfig, RunConfig, SftConfig, SyncConfig, TrainConfig

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "CriticConfig",
    "CriticOptimizerConfig",
    "CurriculumConfig",
    "DataConfig",
    "DatasetConfig",
    "DynamicSamplingConfig",
    "EvalDatasetConfig",
    "EvaluationConfig",
    "KLConfig",
    "LearnerConfig",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RayConfig",
    "RejectDegenerateConfig",
    "RewardConfig",
    "RewardFunctionConfig",
    "RolloutConfig",
    "RolloutCorrectionConfig",
    "RunConfig",
    "SftConfig",
    "SftDataConfig",
    "SyncConfig",
    "TrainConfig",
]

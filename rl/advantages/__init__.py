"""Advantage estimators by name, and the steps from a scored batch to the batch of one update.

Each estimator is one small file. Left out: losses (`rl.losses`) and everything that needs a model.
"""

from rl.advantages.estimate import build_train_batch, estimate
from rl.advantages.registry import advantage_spec

__all__ = ["advantage_spec", "build_train_batch", "estimate"]

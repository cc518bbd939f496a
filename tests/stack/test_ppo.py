"""PPO with a critic on the whole stack: warm-up, exact sync, and a reward that rises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training_rig import config_dict, run_here, undocumented

from rl.metrics import read_metrics

pytestmark = pytest.mark.stack
WARMUP, STEPS = 2, 16
EVEN = '''
def even(sample):
    """The share of even token ids: dense enough to learn within seconds."""
    return sum(token % 2 == 0 for token in sample.token_ids) / max(len(sample.token_ids), 1)
'''


def test_the_critic_warms_up_and_the_reward_rises(tmp_path: Path, ray_cluster: None) -> None:
    reward = tmp_path / "even.py"
    reward.write_text(EVEN)
    config = config_dict(
        tmp_path,
        total_steps=STEPS,
        algorithm={"advantage": "gae", "whiten_advantages": True},
        critic={"optimizer": {"lr": 0.003}, "warmup_steps": WARMUP},
        reward={"functions": [{"name": f"{reward}:even"}], "num_workers": 1},
        rollout={"prompts_per_step": 16, "group_size": 1},
        learner={"mini_batches": 2, "optimizer": {"lr": 0.003}},
    )
    with run_here(config) as run:
        run.execute()
    rows = read_metrics(Path(config["run_dir"]))
    assert [row["policy/version"] for row in rows] == list(range(1, STEPS + 1))
    assert ["learner/loss" in row for row in rows] == [step >= WARMUP for step in range(STEPS)]
    assert max(row["sync/probe_diff_max"] for row in rows) < 1e-3
    assert undocumented(rows[-1]) == []
    rewards = [row["reward/mean"] for row in rows]
    assert np.mean(rewards[-3:]) > np.mean(rewards[: WARMUP + 1]) + 0.15
    assert abs(rows[-1]["critic/value_mean"] - rows[-1]["critic/return_mean"]) < 0.2

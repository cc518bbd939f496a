"""Policy losses by name. Each is one small file; `policy_loss_spec` finds them, including users' own and verl's.

Left out: advantages (`rl.advantages`) and the forward pass that makes the log-probabilities (the learner).
"""

from __future__ import annotations

from rl.losses import cispo, gmpo, gspo, ppo_clip, presets, reinforce
from rl.losses.api import PolicyLossSpec, registered_policy_losses
from rl.plugins import unknown_name

BUILTIN = (cispo, gmpo, gspo, ppo_clip, presets, reinforce)  # importing them registers them

VERL_PREFIX = "verl:"


def policy_loss_spec(name: str) -> PolicyLossSpec:
    """The loss that a config calls `name`; `verl:NAME` is verl's. Raises ConfigError naming the nearest matches."""
    if name.startswith(VERL_PREFIX):
        from rl.verl_bridge import verl_policy_loss  # imports verl, which costs seconds

        return verl_policy_loss(name.removeprefix(VERL_PREFIX))
    specs = registered_policy_losses()
    if name not in specs:
        raise unknown_name("policy loss", name, specs)
    return specs[name]

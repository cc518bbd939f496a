"""Estimators by name, including users' own and verl's. Left out: the estimators themselves (one file each)."""

from __future__ import annotations

from rl.advantages import dr_grpo, gae, grpo, pass_at_k, reinforce_plus_plus, rloo
from rl.advantages.api import AdvantageSpec, registered_advantages
from rl.plugins import unknown_name

BUILTIN = (dr_grpo, gae, grpo, pass_at_k, reinforce_plus_plus, rloo)  # importing them registers them

VERL_PREFIX = "verl:"


def advantage_spec(name: str) -> AdvantageSpec:
    """The estimator that a config calls `name`; `verl:NAME` is verl's. Raises ConfigError naming the nearest
    matches."""
    if name.startswith(VERL_PREFIX):
        from rl.verl_bridge import verl_advantage  # imports verl, which costs seconds

        return verl_advantage(name.removeprefix(VERL_PREFIX))
    specs = registered_advantages()
    if name not in specs:
        raise unknown_name("advantage estimator", name, specs)
    return specs[name]

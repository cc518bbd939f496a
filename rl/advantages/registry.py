"""Estimators by name, users' own and verl's included. Left out: the registry's contents (one file an estimator)."""

from __future__ import annotations

from rl.advantages import dr_grpo, gae, grpo, pass_at_k, reinforce_plus_plus, rloo
from rl.advantages.api import AdvantageSpec, registered_advantages
from rl.plugins import unknown_name

BUILTIN = (dr_grpo, gae, grpo, pass_at_k, reinforce_plus_plus, rloo)  # imported, and so registered

VERL_PREFIX = "verl:"


def advantage_spec(name: str) -> AdvantageSpec:
    """The estimator that a config calls `name`; `verl:NAME` is verl's. Errors: ConfigError with the nearest names."""
    if name.startswith(VERL_PREFIX):
        from rl.verl_bridge import verl_advantage  # imports verl, which costs seconds

        return verl_advantage(name.removeprefix(VERL_PREFIX))
    specs = registered_advantages()
    if name not in specs:
        raise unknown_name("advantage estimator", name, specs)
    return specs[name]

"""The table of algorithms names what is registered, no more and no less."""

from __future__ import annotations

import re
from pathlib import Path

import rl.advantages  # registers the built-ins
import rl.losses  # noqa: F401  # registers the built-ins
from rl.advantages.api import registered_advantages
from rl.losses.api import registered_policy_losses

PAGE = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text(encoding="utf-8")


def names_in(section: str) -> set[str]:
    """First cells of the first table after the heading."""
    body = PAGE.split(f"\n## {section}")[1].split("\n## ")[0]
    table = body.split("\n|---", 1)[1].split("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)`", table, flags=re.M))


def test_every_built_in_is_in_the_table_and_nothing_else() -> None:
    """Only what this package's own modules registered: other tests add plug-ins to the same registries."""
    own = {n for n, s in registered_advantages().items() if s.function.__module__.startswith("rl.")}
    assert own == names_in("Advantages")
    own = {n for n, s in registered_policy_losses().items() if s.function.__module__.startswith("rl.")}
    assert own == names_in("Policy losses")


def test_default_aggregations_are_as_documented() -> None:
    section = PAGE.split("\n## Policy losses")[1].split("\n## ")[0]
    for name, spec in registered_policy_losses().items():
        if spec.function.__module__.startswith("rl."):
            row = next(line for line in section.splitlines() if line.startswith(f"| `{name}` |"))
            assert f"`{spec.default_aggregation}`" in row
            assert (" only |" in row) == (spec.allowed_aggregations is not None)

"""The table of algorithms names what is registered, no more and no less."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import rl.advantages  # registers the built-ins
import rl.losses  # noqa: F401  # registers the built-ins
from rl.advantages.api import registered_advantages
from rl.losses.api import registered_policy_losses

PAGE = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text(encoding="utf-8")


def rows_of(section: str) -> dict[str, list[str]]:
    """Name -> cells of its row, in the first table after the heading."""
    body = PAGE.split(f"\n## {section}")[1].split("\n## ")[0]
    table = body.split("\n|---", 1)[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    return {cells[0].strip("`"): cells for cells in rows}


def options_in(cell: str) -> dict[str, float | None]:
    """Option -> default: "`a`, `b` 0.2, `c` off" is a 0.2, b 0.2, c None."""
    options: dict[str, float | None] = {}
    for names, value in re.findall(r"((?:`\w+`,? )+)(= low|off|[\de.-]+)", cell):
        options |= dict.fromkeys(re.findall(r"\w+", names), None if value in ("= low", "off") else float(value))
    return options


def test_every_built_in_is_in_the_table_and_nothing_else() -> None:
    """Only what this package's own modules registered: other tests add plug-ins to the same registries."""
    own = {n for n, s in registered_advantages().items() if s.function.__module__.startswith("rl.")}
    assert own == set(rows_of("Advantages"))
    own = {n for n, s in registered_policy_losses().items() if s.function.__module__.startswith("rl.")}
    assert own == set(rows_of("Policy losses"))


def test_options_have_the_defaults_that_are_documented() -> None:
    for section, specs in (("Advantages", registered_advantages()), ("Policy losses", registered_policy_losses())):
        for name, cells in rows_of(section).items():
            parameters = inspect.signature(specs[name].function).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
            assert options_in(cells[2]) == defaults, name


def test_default_aggregations_are_as_documented() -> None:
    rows = rows_of("Policy losses")
    for name, spec in registered_policy_losses().items():
        if spec.function.__module__.startswith("rl."):
            only = "" if spec.allowed_aggregations is None else " only"
            assert rows[name][3] == f"`{spec.default_aggregation}`{only}"

"""Writes docs/configuration.md, every key of a configuration, from the schema: `make reference`.

Left out: how keys work together, which the other documents explain.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rl.config import RunConfig, SftConfig, TrainConfig
from rl.config.peers import PEERS

_HEAD = """# Every key of a configuration

Made by `make reference` from [rl/config/](../rl/config/). A key (not a section) without a
default must be given where its section is. Keys of a list's items have `[]`; `null` is a value only where the type says
so, and elsewhere unsets what an extended file has set. `fledge sft` refuses the keys of "all commands" that have no
effect in it, such as `learner.epochs` (it has its own `epochs`), `learner.offload_reference` and `ray.colocate`.
"""


def reference() -> str:
    """The page."""
    kinds = (("fledge train, fledge eval", TrainConfig), ("fledge sft", SftConfig))
    shared = RunConfig.model_fields.keys()
    parts = [_HEAD, _chapter("All commands", RunConfig, RunConfig.model_fields.keys())]
    parts += [_chapter(f"`{name}`", kind, kind.model_fields.keys() - shared) for name, kind in kinds]
    return "\n".join([*parts, _peers()])


def _peers() -> str:
    rows = []
    for keys, note, names in PEERS:
        there = ", ".join(f"`{name}`" for name in names.split())
        here = " or ".join(f"`{key}`" for key in keys.split(" or ") if key)
        rows.append(f"| {there} | {here} | {note} |")
    head = "What differs in meaning is in [migrating.md](migrating.md). A key is listed by its last part.\n"
    return "\n".join(["## Keys of verl, TRL and OpenRLHF\n", head, "| there | here | |", "|---|---|---|", *rows, ""])


def _chapter(title: str, root: type[BaseModel], names: typing.AbstractSet[str]) -> str:
    rows = [row for name, field in root.model_fields.items() if name in names for row in _rows(name, field)]
    return "\n".join([f"## {title}\n", "| key | type | default | |", "|---|---|---|---|", *rows, ""])


def _rows(key: str, field: FieldInfo) -> Iterator[str]:
    section = _section_of(field.annotation)
    value = field.get_default(call_default_factory=True)
    default = "" if field.is_required() or isinstance(value, BaseModel) else _shown(value)
    description = str(field.description).replace("|", r"\|")
    if section is None:
        yield f"| `{key}` | {_type_of(field.annotation)} | {default} | {description} |"
        return
    several = typing.get_origin(field.annotation) is tuple
    kind = ("list of sections" if several else "section") + (" or null" if value is None else "")
    yield f"| **`{key}`** | {kind} | {default} | {description} |"
    for name, inner in section.model_fields.items():
        yield from _rows(f"{key}{'[]' if several else ''}.{name}", inner)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _section_of(part))), None)


def _type_of(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_of(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_of(part) for part in arguments)
    if origin is tuple:
        return f"list of {_type_of(arguments[0])}"
    if origin is dict:
        return "mapping"
    names = {bool: "true, false", int: "integer", float: "number", str: "text", types.NoneType: "null"}
    return names[annotation]


def _shown(value: Any) -> str:
    if value in ("", (), {}):
        return "empty"
    if isinstance(value, tuple):
        return f"`[{', '.join(_plain(item) for item in value)}]`"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.model_dump(exclude_defaults=True).items()) + "}"
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


if __name__ == "__main__":
    sys.stdout.write(reference())

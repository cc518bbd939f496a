"""Building blocks of the configuration schema: its base class, and types for numbers and paths.

Left out: the sections and keys themselves (`rl.config`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)


def _no_boolean(value: Any) -> Any:
    """Refuse booleans: pydantic would take true for 1."""
    if isinstance(value, bool):
        raise ValueError("it must be a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_no_boolean)]
Float = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
PositiveInt = Annotated[Int, Field(ge=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Seed = Annotated[Int, Field(ge=0, lt=2**32)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Beta = Annotated[Float, Field(ge=0, lt=1)]


def looks_local(path: str) -> bool:
    """Whether `path` can only be a local path: a hub name has at most one slash."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _whole_path(path: str) -> str:
    """Make a local path absolute: workers run in other directories (on a cluster, that of `ray start`)."""
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


LocalOrNamed = Annotated[str, AfterValidator(_whole_path)]  # a file or folder if it exists, else a hub name
# Errors leave tags in brackets out of the key that they name (`rl.config.loading`).
OneOrSeveral = Annotated[
    Annotated[str, Tag("[one]")] | Annotated[tuple[str, ...], Field(min_length=1), Tag("[several]")],
    Discriminator(lambda value: "[several]" if isinstance(value, list | tuple) else "[one]"),
]
Folder = Annotated[str, Field(min_length=1), AfterValidator(lambda path: str(Path(path).expanduser()))]
PluginName = Annotated[str, AfterValidator(lambda name: _whole_path(name) if name.endswith(".py") else name)]


class Section(BaseModel):
    """Base of every section: frozen, and strict about unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )

    def sets(self, key: str) -> bool:
        """Whether the key's value differs from its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True))

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        """Treat null as unset, so that a file can undo what the file it extends has set. Where None is a valid value,
        it stays."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or cls._knows_none(key)}

    @classmethod
    def _knows_none(cls, key: str) -> bool:
        field = cls.model_fields.get(key)
        return field is None or type(None) in get_args(field.annotation) or field.annotation is Any

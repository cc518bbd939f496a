"""What the configuration schema is made of: its base class, and the types of numbers and paths.

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
    """Pydantic takes true for 1."""
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
    """Whether it can only be meant as a path: a name on the hub has one slash at most."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _whole_path(path: str) -> str:
    """Workers run in directories of their own (on a cluster that of `ray start`), so a local path is made whole."""
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


LocalOrNamed = Annotated[str, AfterValidator(_whole_path)]  # a file or folder, else a name on the hub
# Tags in brackets are left out of the key that an error names (`rl.config.loading`).
OneOrSeveral = Annotated[
    Annotated[str, Tag("[one]")] | Annotated[tuple[str, ...], Field(min_length=1), Tag("[several]")],
    Discriminator(lambda value: "[several]" if isinstance(value, list | tuple) else "[one]"),
]
Folder = Annotated[str, Field(min_length=1), AfterValidator(lambda path: str(Path(path).expanduser()))]
PluginName = Annotated[str, AfterValidator(lambda name: _whole_path(name) if name.endswith(".py") else name)]


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )

    def sets(self, key: str) -> bool:
        """Whether the key has another value than its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True))

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        """So that what a file that is extended has set can be unset. Where None is a value of its own, it stays one."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or cls._knows_none(key)}

    @classmethod
    def _knows_none(cls, key: str) -> bool:
        field = cls.model_fields.get(key)
        return field is None or type(None) in get_args(field.annotation) or field.annotation is Any

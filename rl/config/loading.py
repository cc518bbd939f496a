"""Compose YAML files with OmegaConf and validate them: `extends:`, dotted overrides, interpolation, environment
variables.

Every error names the key, the value and what is allowed. Left out: the schema (`rl.config`).
"""

from __future__ import annotations

import difflib
import functools
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rl.config import RunConfig, SftConfig, TrainConfig
from rl.config.peers import PEER_SECTIONS, PEER_VALUES, hints_inside, peer_hint
from rl.errors import ConfigError

Root = TypeVar("Root", bound=RunConfig)

# Schema -> (the command that a configuration may have been meant for, top-level keys that give it away, and how many of
# them it takes).
_OTHER_COMMAND: dict[type[RunConfig], tuple[str, set[str], int]] = {
    SftConfig: ("fledge train", {"rollout", "reward", "algorithm"}, 1),
    TrainConfig: ("fledge sft", {"epochs", "batch_size"}, 2),
}
_SHOWN_PLACES = 3


def load_config(path: str | Path, overrides: Sequence[str], schema: type[Root]) -> Root:
    """Load `path`, apply `key=value` overrides in order, and validate.

    Raises:
        ConfigError: file missing or unreadable, unknown key (with the nearest name), wrong type or range, or settings
            that contradict each other. All problems are in one message.
    """
    merged = _compose(Path(path))
    for item in overrides:
        merged = overridden(merged, item)
    try:
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{path}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from error
    return validate(plain, schema, source=str(path), overrides=overrides)


def overridden(config: DictConfig, override: str) -> DictConfig:
    """The configuration with one `key=value` applied: mappings are merged key by key, and {} empties one.

    Raises ConfigError naming the override.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not key=value, for example learner.optimizer.lr=1e-6")
    if not text.strip():  # for example an unset shell variable
        raise ConfigError(
            f"override {override!r} has no value; write {key}=null for the default, {key}='\"\"' for no text"
        )
    listed = re.match(r"(.*?)(\[\d+\]|\.\d+(?=\.|$))", key)  # an item of a list
    if listed and not isinstance(OmegaConf.select(config, listed[1]), ListConfig):
        raise ConfigError(
            f"override {override!r}: the file sets no list {listed[1]}; give the whole list, as in '{listed[1]}=[...]'"
        )
    if listed and int(listed[2].strip("[].")) >= (count := len(OmegaConf.select(config, listed[1]))):
        raise ConfigError(f"override {override!r}: {listed[1]} has {count} items, numbered from 0")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        value = typing.cast(dict[str, Any], parsed)["value"]
        # Unquoted text is taken as typed: YAML would strip it, and cut it at " #".
        if (isinstance(value, str) and text.lstrip()[0] not in "\"'") or (value is None and text.lstrip()[0] == "#"):
            value = text
        OmegaConf.update(config, key, value, merge=value != {})
        return config
    except (OmegaConfBaseException, yaml.YAMLError, IndexError) as error:
        if "Cannot merge" in str(error):
            raise ConfigError(
                f"override {override!r}: the file sets a mapping for {key} and this is a list, or the other way round"
            ) from error
        raise ConfigError(f"override {override!r} cannot be read: {str(error).splitlines()[0]}") from error
    except (ValueError, TypeError) as error:  # a key of a list that is no number
        raise ConfigError(
            f"override {override!r} cannot be read: items of a list are addressed by number, for example "
            "data.eval[0].path"
        ) from error


def validate(plain: Any, schema: type[Root], source: str, overrides: Sequence[str] = ()) -> Root:
    """Validate a plain dict, to which `overrides` have been applied, against the schema. Raises ConfigError with every
    problem."""
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        problems = error.errors()
        foreign = {str(p["loc"][0]) for p in problems if p["type"] == "extra_forbidden" and len(p["loc"]) == 1}
        command, marks, enough = _OTHER_COMMAND.get(schema, ("", set(), 1))
        if len(foreign & marks) >= enough:
            keys = ", ".join(sorted(foreign))
            heads = {text: text.partition("=")[0].partition(".")[0] for text in overrides}
            if foreign <= set(heads.values()):  # the file itself is right
                given = [text for text, head in heads.items() if head in foreign]
                raise ConfigError(
                    f"override {', '.join(map(repr, given))}: {source} is for another command than `{command}`, which "
                    f"has {keys}; leave it out"
                ) from None
            raise ConfigError(f"{source} is a configuration for `{command}`, which has {keys}") from None
        lines = [_explain(problem, schema) + _from_override(problem, overrides) for problem in problems]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML; loading it gives an equal configuration."""
    plain = _escaped(config.model_dump(mode="json"))
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Puts every text that is not a plain word in double quotes.

    PyYAML leaves some texts bare or in single quotes that do not survive loading: "1e5", which OmegaConf reads as a
    number, and U+0085, which YAML takes for a line end.
    """

    def represent_str(self, data: str) -> yaml.Node:
        word = data.isascii() and data[:1].isalpha() and data.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if word else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def _escaped(plain: Any) -> Any:
    """`plain` with every ${ in a text (TeX, for example) escaped, so that OmegaConf reads no interpolation into it."""
    if isinstance(plain, dict):
        return {key: _escaped(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_escaped(value) for value in plain]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", plain) if isinstance(plain, str) else plain


def _compose(path: Path, extended_by: tuple[Path, ...] = ()) -> DictConfig:
    path = path.expanduser()
    resolved = path.resolve()
    if resolved in extended_by:
        raise ConfigError(f"{path} extends itself: {' -> '.join(str(p) for p in (*extended_by, resolved))}")
    if not path.is_file():
        if extended_by:
            raise ConfigError(
                f"{extended_by[-1]} extends {resolved}, which does not exist; a path in extends is relative to the "
                "file that it is in"
            )
        raise ConfigError(f"config file {path} does not exist (looked in {Path.cwd()})")
    try:
        loaded = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping at its top level, not a {type(loaded).__name__}")
    parent = loaded.pop("extends", None)
    if parent is None:
        return loaded
    base = _compose(path.parent / Path(str(parent)).expanduser(), (*extended_by, resolved))
    if key := _list_against_mapping(base, loaded):
        raise ConfigError(
            f"{path}: {key} is a mapping in this file and a list in {parent}, which it extends, or the other way "
            "round; both must be of the same kind, because lists are replaced as a whole and mappings are merged key "
            "by key"
        )
    return typing.cast(DictConfig, OmegaConf.merge(base, loaded))


def _list_against_mapping(base: Any, own: Any, key: str = "") -> str:
    """The dotted key of the first section that is a list on one side and a mapping on the other; empty if there is
    none."""
    if not isinstance(base, DictConfig | ListConfig) or not isinstance(own, DictConfig | ListConfig):
        return ""
    if isinstance(base, ListConfig) or isinstance(own, ListConfig):
        return "" if type(base) is type(own) else key
    shared = [(f"{key}.{name!s}" if key else str(name), name) for name in own if name in base]
    found = (_list_against_mapping(base._get_node(name), own._get_node(name), inner) for inner, name in shared)
    return next(filter(None, found), "")


def _from_override(problem: Any, overrides: Sequence[str]) -> str:
    """Says which override a problem comes from, lest the file be searched for it; empty if from none."""
    location = [str(part) for part in problem["loc"]]
    for override in reversed(overrides):
        key = re.split(r"[.\[\]]+", override.partition("=")[0].rstrip("]"))
        if location[: len(key)] == key:
            return f" (from the override {override})"
    return ""


def _explain(problem: Any, schema: type[BaseModel]) -> str:
    location = [part for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
    key = ".".join(str(part) for part in location)
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        known = list(_fields_at(schema, location[:-1]))
        return f"unknown key {key}; {_hint(str(location[-1]), location[:-1], value, known, schema)}"
    if kind == "missing" and isinstance(location[-1], int):
        return f"{'.'.join(map(str, location[:-1]))} has {location[-1]} items; it needs one more"
    if kind == "missing":
        return f"{key} is required but not set"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    if kind == "tuple_type":
        return f"{key} is {value!r}: it must be a list, [..., ...]"
    if kind == "too_short":
        return f"{key} is {value!r}: give at least {problem['ctx']['min_length']}"
    if kind == "model_type":
        return f"{key} is {value!r}: it must be a mapping of {', '.join(_fields_at(schema, location))}"
    if kind == "greater_than_equal":
        *section, name = (part for part in location if not isinstance(part, int))
        field = _fields_at(schema, section).get(name)  # None for an entry of a mapping
        message += f" ({field.description})" if field else ""  # the description says how to switch it off
    peer = PEER_VALUES.get(str(value), "")
    allowed = kind == "literal_error" and f"'{peer}'" in problem["ctx"]["expected"]
    hint = f"; what other libraries call {value} is {peer} here" if allowed else ""
    return f"{key} is {value!r}: {message[0].lower()}{message[1:]}{hint}"


def _hint(name: str, location: Sequence[Any], value: Any, known: Sequence[str], schema: type[BaseModel]) -> str:
    """The best hint for an unknown key: a misspelling, a peer framework's key, a similar key, peers' keys inside its
    value, or else the known keys."""
    if slip := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
        return f"did you mean {slip[0]}?"
    places = functools.partial(_places, schema=schema)
    if hint := peer_hint([str(part) for part in location], name, places):
        return hint
    if name not in PEER_SECTIONS and (near := _did_you_mean(name, location, known, schema)):
        return f"did you mean {near}?"
    return hints_inside(name, value, places) or f"known keys here: {', '.join(sorted(known))}"


def _did_you_mean(name: str, location: Sequence[Any], known: Sequence[str], schema: type[BaseModel]) -> str:
    """A key of this name in a section further down, else a key here with a similar name, else the only key of this name
    anywhere; empty if nothing is similar."""
    everywhere = _places(name, schema)
    here = ".".join(str(part) for part in location)
    below = [place for place in everywhere if not here or place.startswith(f"{here}.")]
    if 0 < len(below) <= _SHOWN_PLACES:
        return " or ".join(below)
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return near[0]
    return everywhere[0] if len(everywhere) == 1 else ""


def _places(name: str, schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys with this name, in schema order; keys inside items of lists are left out."""
    found = [prefix + name] if name in schema.model_fields else []
    for key, field in schema.model_fields.items():
        if typing.get_origin(field.annotation) is not tuple and (section := _model_in(field.annotation)) is not None:
            found += _places(name, section, f"{prefix}{key}.")
    return found


def _fields_at(schema: type[BaseModel], location: Sequence[Any]) -> dict[str, FieldInfo]:
    """Fields of the (sub-)model that `location` points into; none if it is a free-form mapping."""
    current: Any = schema
    for part in location:
        if not isinstance(part, int):
            current = _model_in(current.model_fields[part].annotation)
    return {} if current is None else current.model_fields


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, dict):
        for argument in typing.get_args(annotation):
            if (found := _model_in(argument)) is not None:
                return found
    return None

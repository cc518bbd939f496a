"""A dataset's rows and where each came from: JSONL, Parquet, Hugging Face datasets (folder or hub), reasoning_gym.

Every error is a DataError that names the file and the row. Left out: what a row's fields mean (`rl.prompts.load`,
`rl.prompts.sft`).
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config import DatasetConfig
from rl.config.types import looks_local
from rl.errors import DataError
from rl.prompts.generated import REASONING_GYM, generated_rows, is_generated

_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_PARQUET_SUFFIXES = (".parquet",)
_MOST_NAMES = 3  # sources named in a dataset's name, which becomes part of file names
_MEDIA = ("Audio", "BioSequence", "BioStructure", "Image", "Mesh", "Nifti", "Pdf", "Video")
_SAVED_DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")  # what save_to_disk writes


Located = tuple[str, dict[str, Any]]  # (a row's location, its fields)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its source holds it."""

    index: int  # 0-based, counts rows (not lines)
    location: str  # for messages: "train.jsonl:17", "train.parquet row 17" (1-based)
    fields: Mapping[str, Any]


def read_rows(config: DatasetConfig) -> Iterator[Row]:
    """The dataset's rows in order, at most `config.size` of them.

    Raises:
        DataError: a source does not exist or cannot be read, a row is not a JSON object, a setting does not apply to
            this kind of source, or a split, subset, task or option is unknown.
    """
    if is_generated(config):
        if len(config.paths) > 1:
            raise DataError(
                f"dataset {config.shown_path}: a reasoning_gym task has its own size and options, so it cannot be "
                "part of a list; use reasoning_gym:composite to mix tasks (docs/data.md)"
            )
        _refuse_settings(config, "a reasoning_gym task", ("split", "subset"))
        rows = generated_rows(config, config.paths[0])
    else:
        sources = [_read_source(config, path) for path in config.paths]
        rows = itertools.islice(itertools.chain.from_iterable(sources), config.size)
    return (Row(index, location, fields) for index, (location, fields) in enumerate(rows))


def _read_source(config: DatasetConfig, source: str) -> Iterator[Located]:
    path = Path(source).expanduser()
    if path.is_dir():
        _refuse_settings(config, "a dataset folder", ("seed", "options"))
        return _read_folder(config, path)
    if path.is_file():
        _refuse_settings(config, "a file", ("split", "subset", "seed", "options"))
        return _read_file(path)
    if _looks_like_path(source):
        raise DataError(f"dataset {source} does not exist{_near_files(path)} (looked in {Path.cwd()})")
    _refuse_settings(config, "a hub dataset", ("seed", "options"))
    return _read_hub(config, source)


def dataset_name(config: DatasetConfig) -> str:
    """`config.name`, else the file's stem, the last part of the folder's or hub dataset's name, or the reasoning_gym
    task.

    Up to three distinct names of several sources are joined by +; beyond that it is the first and the number of the
    others.
    """
    if config.name is not None:
        return config.name
    names = list(dict.fromkeys(map(_source_name, config.paths)))
    return "+".join(names if len(names) <= _MOST_NAMES else [names[0], str(len(names) - 1)])


def _source_name(source: str) -> str:
    if source.startswith(REASONING_GYM):
        return source.removeprefix(REASONING_GYM)
    path = Path(source)
    known = path.suffix in (*_JSONL_SUFFIXES, *_PARQUET_SUFFIXES)
    return path.stem if known else path.name


def missing_field(row: Row, field: str, setting: str) -> DataError:
    """The error for a row that lacks a field, with the fields it has and the setting that names the field."""
    if field in row.fields:
        return DataError(f"{row.location}: {field} is null; fix the row, or set {setting} to another field's name")
    near = difflib.get_close_matches(field, [str(name) for name in row.fields], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = ", ".join(str(name) for name in row.fields) or "no fields"
    return DataError(
        f"{row.location}: no field {field!r}; the row has {known}. {hint}Fix the row, or set {setting} to the field's "
        "name"
    )


def _read_file(path: Path) -> Iterator[Located]:
    if path.suffix in _JSONL_SUFFIXES:
        return read_jsonl(path)
    if path.suffix in _PARQUET_SUFFIXES:
        return _read_parquet(path)
    known = ", ".join((*_JSONL_SUFFIXES, *_PARQUET_SUFFIXES))
    raise DataError(
        f"dataset {path}: unknown file type {path.suffix!r}; supported are {known}, and folders with files of other "
        "types that Hugging Face datasets reads, such as CSV"
    )


def read_jsonl(path: Path) -> Iterator[Located]:
    """The objects in a JSONL file; empty lines are skipped. Raises DataError naming the file and line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            location = f"{path}:{number}"
            try:
                fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{location}: not UTF-8 text ({error.reason} at byte {error.start})") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{location}: broken JSON: {error}") from error
            if not isinstance(fields, dict):
                raise DataError(f"{location}: a row must be a JSON object, not a {type(fields).__name__}")
            yield location, fields


def _read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            for number, fields in enumerate(rows, start=1):
                yield f"{path} row {number}", _without_filling(fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _read_folder(config: DatasetConfig, path: Path) -> Iterator[Located]:
    import datasets

    saved = any((path / name).is_file() for name in _SAVED_DATASET_FILES)
    if saved:
        _refuse_settings(config, "a folder that save_to_disk wrote", ("subset",))
    try:
        if saved:
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path), config.subset, split=config.split or None)
    except Exception as error:  # the loaders raise whatever their file formats raise
        raise DataError(f"dataset folder {path}: cannot load it: {error}") from error
    return _rows_of(*_pick_split(loaded, config, str(path), saved=saved))


def _read_hub(config: DatasetConfig, name: str) -> Iterator[Located]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config.subset, split=config.split or None)
    except ConnectionError as error:
        raise DataError(
            f"dataset {name}: no such file or folder here, and the hub cannot be reached ({error}); check the "
            "path, or download the dataset where there is a network and give its folder"
        ) from error
    except Exception as error:  # the hub client and the loaders raise many types of their own
        raise DataError(
            f"dataset {name}: no such file or folder here, and it could not be loaded from the hub: {error}"
        ) from error
    return _rows_of(*_pick_split(loaded, config, name, saved=False))


def _pick_split(loaded: Any, config: DatasetConfig, name: str, *, saved: bool) -> tuple[Any, str]:
    """The requested split, or the only one, and the name for its rows in messages.

    `saved` means that `save_to_disk` wrote the dataset, so the loader has not selected a split.
    """
    import datasets

    if not isinstance(loaded, datasets.DatasetDict):
        if saved and config.sets("split") and config.split != loaded.split:
            raise DataError(
                f"dataset {name} was saved without splits, but split is {config.split!r}; leave split out"
                + (f" (it was {loaded.split})" if loaded.split else "")
            )
        return loaded, f"{name}[{config.split or loaded.split or 'train'}]"
    if not config.split and len(loaded) > 1:
        raise DataError(f"dataset {name} has the splits {', '.join(loaded)}; set split to one of them")
    split = config.split or next(iter(loaded))
    if split not in loaded:
        raise DataError(f"dataset {name} has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split], f"{name}[{split}]"


def _rows_of(dataset: Any, name: str) -> Iterator[Located]:
    """Columns of pictures, sound and the like are left out, and stay bytes in a conversation: no model here takes them,
    they would be decoded and sent to every reward worker, and nothing would tell a decoded one from that of the same
    row in a resumed run."""
    media = [column for column, feature in dataset.features.items() if _is_media(feature)]
    talks = [column for column in media if _is_conversation(dataset.features[column])]
    dataset = dataset.remove_columns([column for column in media if column not in talks])
    for column in talks:
        dataset = dataset.cast_column(column, _undecoded(dataset.features[column]))
    for number, fields in enumerate(dataset, start=1):
        yield f"{name} row {number}", _without_filling(fields)


def _is_media(feature: Any) -> bool:
    """Whether a column of this type (of Hugging Face datasets), or a part of it, is decoded from a media file."""
    if isinstance(feature, Mapping):
        return any(map(_is_media, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_is_media, feature))
    return type(feature).__name__ in _MEDIA or _is_media(getattr(feature, "feature", ()))


def _is_conversation(feature: Any) -> bool:
    message = getattr(feature, "feature", None)
    return isinstance(message, Mapping) and "role" in message


def _undecoded(feature: Any) -> Any:
    """The same type, but its media files stay bytes."""
    if isinstance(feature, Mapping):
        return {name: _undecoded(part) for name, part in feature.items()}
    if type(feature).__name__ in _MEDIA:
        return dataclasses.replace(feature, decode=False)
    inner = getattr(feature, "feature", None)
    return feature if inner is None else dataclasses.replace(feature, feature=_undecoded(inner))


def _without_filling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the nulls that columnar formats add to conversations.

    Those formats give every object in a column all keys that any of them has, filled with nulls, which a template would
    write into the arguments of tool calls.
    """

    def cleared(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cleared(item) for key, item in value.items() if item is not None}
        return [cleared(item) for item in value] if isinstance(value, list) else value

    def is_conversation(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, Mapping) and "role" in item for item in value)

    return {name: cleared(value) if is_conversation(value) else value for name, value in fields.items()}


def _refuse_settings(config: DatasetConfig, source: str, settings: tuple[str, ...]) -> None:
    """Raise DataError for a setting that would be ignored."""
    for name in settings:
        if config.sets(name):
            raise DataError(
                f"dataset {config.shown_path}: {name} does not apply to {source}; leave it out, or set it to null if "
                "the file that this one extends sets it"
            )


def _looks_like_path(path: str) -> bool:
    suffix = Path(path).suffix.lower()
    return looks_local(path) or suffix in (".json", ".csv", *_JSONL_SUFFIXES, ".parquet")


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    if path.is_symlink():
        return f"; it is a link to {path.readlink()}, which does not exist"
    near = difflib.get_close_matches(path.name, (p.name for p in path.parent.iterdir()), n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""

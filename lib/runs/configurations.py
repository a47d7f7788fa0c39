"""What makes two runs the same: their whole configuration and the content of the data it reads."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

IDENTITY_LENGTH = 20  # hex characters: 80 bits, so a collision among a million runs has odds 1e-12


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
         type(None): "null"}  # fmt: skip


def identity(config: Any) -> str:
    """SHA-256 (first 20 hex characters) of a configuration's canonical JSON and of its data files.

    `config` is an instance of a frozen dataclass; its fields may be None, bool, int, float, str, an
    enum, tuples, lists and str-keyed dicts of these, or nested frozen dataclasses. A method
    `data_files() -> tuple[Path, ...]` names the files that it reads; their content is hashed, not
    their place. The profile that a run belongs to is no part of it. A field that was added after
    runs were published says so, `field(default=..., metadata={"later": True})`, and is left out at
    its default: what it describes is then what these runs did.

    Raises TypeError, naming field and value, for a value that has no deterministic serialisation.
    """
    content = {
        "configuration": canonical(config),
        "data": [file_hash(p) for p in data_files(config)],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:IDENTITY_LENGTH]


def canonical(config: Any) -> dict[str, Any]:
    """The fields of `config` as plain JSON values, under its class name; see `identity`."""
    return _dataclass(config, type(config).__name__)


def columns(config: Any) -> dict[str, Any]:
    """The fields of `config` as one flat row: nested fields as `outer_inner`, sequences as JSON.

    A None in a field that may hold a number becomes NaN, so that its column stays numeric. A later
    field (see `identity`) at its default has no column.
    """
    row: dict[str, Any] = {}
    _flatten(config, "", row)
    return row


def checked(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields of a dataclass, a whole float of an int field as int.

    Names that are no fields pass, and so do fields of other kinds than those of `WORDS`.
    Raises: ValueError that names field, value and what is wanted.
    """
    hints = _hints(cls)
    return {name: _of_kind(name, value, _options(hints[name])) if name in hints else value
            for name, value in values.items()}  # fmt: skip


def _of_kind(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    if type(value) in kinds or not {*kinds} <= WORDS.keys():
        return value
    if type(value) is int and float in kinds:  # `identity` knows that it is the same
        return value
    if type(value) is float and int in kinds and value.is_integer():
        return int(value)
    wanted = " or ".join(WORDS[kind] for kind in kinds)
    raise ValueError(f"{name} must be {wanted}, got {value!r}{as_number(value)}")


def as_number(value: Any) -> str:
    """A hint for text that reads as a number: YAML takes 1e-3 for text."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        return ""
    plain = np.format_float_positional(number, trim="-")
    how = f"write {plain}, not {value}" if plain != value else "leave the quotes away"
    return f" (text: in YAML {how})"


def is_default_of_later(field: dataclasses.Field, value: Any) -> bool:
    """Whether `value` is the default of a field that was added later; see `identity`."""
    return bool(field.metadata.get("later")) and value == field.default


def data_files(config: Any) -> tuple[Path, ...]:
    """The data files that a configuration says it reads (none if it has no such method)."""
    return tuple(Path(p) for p in config.data_files()) if hasattr(config, "data_files") else ()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content (hex); read again only when its time or size changed."""
    stat = Path(path).stat()
    return _file_hash(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1024)
def _file_hash(path: str, mtime_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dataclass(config: Any, where: str) -> dict[str, Any]:
    if isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise TypeError(f"{where}: expected an instance of a frozen dataclass, got {config!r}")
    if not config.__dataclass_params__.frozen:
        raise TypeError(
            f"{where}: {type(config).__name__} is not frozen, so its identity may change"
        )
    hints = _hints(type(config))
    fields = {
        field.name: _value(getattr(config, field.name), hints[field.name], f"{where}.{field.name}")
        for field in dataclasses.fields(config)
        if not is_default_of_later(field, getattr(config, field.name))
    }
    return {"class": type(config).__name__, "fields": fields}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _value(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str) and not isinstance(value, enum.Enum):
        return _text(value, _options(hint), where)
    if isinstance(value, enum.Enum):
        return {"class": type(value).__name__, "name": value.name}
    if isinstance(value, (bool, int, float)):
        return _number(value, _options(hint), where)
    if isinstance(value, (list, tuple)):
        return [_value(v, _element(hint, i), f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _value(value[key], Any, f"{where}[{key!r}]") for key in sorted(value)}
    if dataclasses.is_dataclass(value):
        return _dataclass(value, where)
    raise TypeError(
        f"{where} = {value!r} ({type(value).__name__}) has no deterministic serialisation; "
        "allowed: None, bool, int, float, str, enum, tuple, list, str-keyed dict, frozen dataclass"
    )


def _text(value: str | None, options: tuple[Any, ...], where: str) -> str | None:
    """Raises: TypeError for text where the annotation has numbers alone."""
    if value is not None and {*options} <= {bool, int, float, type(None)}:
        allowed = " or ".join(WORDS[option] for option in options)
        raise TypeError(f"{where} = {value!r} is text; allowed: {allowed}{as_number(value)}")
    return value


def _number(value: bool | float, options: tuple[Any, ...], where: str) -> bool | float:
    """A number as its field's annotation has it: 1 in a float field is 1.0, and conversely."""
    named = {option for option in options if option in (bool, int, float)}
    if isinstance(value, float) and math.isnan(value):
        raise TypeError(
            f"{where} = nan has no deterministic serialisation: nan differs from itself"
        )
    if not named or type(value) in named:
        return value + 0.0 if isinstance(value, float) else value  # -0.0 equals 0.0
    if not isinstance(value, bool) and float in named:
        return float(value)
    if isinstance(value, float) and int in named and value.is_integer():
        return int(value)
    allowed = " or ".join(sorted(option.__name__ for option in named))
    raise TypeError(f"{where} = {value!r} is a {type(value).__name__}; allowed: {allowed}")


def _element(hint: Any, index: int) -> Any:
    """The annotation of a sequence's element: tuple[float, ...], list[float], tuple[int, str]."""
    for option in _options(hint):
        args = typing.get_args(option)
        if typing.get_origin(option) is list or (len(args) == 2 and args[1] is Ellipsis):
            return args[0]
        if typing.get_origin(option) is tuple and index < len(args):
            return args[index]
    return Any


def _flatten(config: Any, prefix: str, row: dict[str, Any]) -> None:
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if is_default_of_later(field, value):
            continue
        if dataclasses.is_dataclass(value):
            _flatten(value, f"{name}_", row)
            continue
        value = _value(value, hints[field.name], name)
        if isinstance(value, dict) and set(value) == {"class", "name"}:
            value = value["name"]
        elif isinstance(value, (list, dict)):
            value = json.dumps(value, sort_keys=True)
        elif value is None and {int, float} & set(_options(hints[field.name])):
            value = math.nan
        if name in row:
            raise ValueError(
                f"two fields of {type(config).__name__} flatten to the column {name!r}"
            )
        row[name] = value

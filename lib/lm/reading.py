"""Rows of a user's file or data set, whatever its format, with the content they resolve to."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from huggingface_hub import HfApi, errors

from lib.lm.models import (
    Source,
    brief,
    file_digest,
    folder_digest,
    hub_answers,
    looks_like_path,
    unreachable,
)

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PACKED = ".gz"  # what may follow the text formats


class TextError(ValueError):
    """Text that cannot be read or used as it is; names the file, the row and what is allowed."""


def read_rows(
    source: str | Path,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> tuple[list[dict[str, Any]], Source]:
    """The rows of a JSON Lines, JSON, CSV or parquet file, or of a data set.

    Args:
        source: path of a file of one of `FORMATS`; a folder (written by `save_to_disk`, or in the
            hub's format); or a name of the hub.
        config, split, revision: of a data set; a split must be named where there are several.
        limit: read the first so many rows alone.
    Raises: TextError for what is missing, empty or unreadable; HubError.
    """
    if limit is not None and (isinstance(limit, bool) or limit != int(limit) or limit < 1):
        raise TextError(f"limit must be None or a whole number of rows, 1 or more, got {limit!r}")
    name, path = str(source), Path(source).expanduser()
    if name and path.is_file():
        _only_for_data_sets(name, config=config, split=split, revision=revision)
        rows, origin = _file_rows(path, name, limit), Source(name, None, file_digest(path))
    elif name and path.is_dir():
        _only_for_data_sets(name, revision=revision)
        rows = _folder_rows(path, name, config, split, limit)
        origin = Source(name, None, folder_digest(path, ("**/*",)))
    elif not name or looks_like_path(name) or path.suffix in (*FORMATS, PACKED):
        raise TextError(f"there is no file {name!r}: give a file ({', '.join(FORMATS)}), a folder, "
                        "or a name of the hub (owner/name)")  # fmt: skip
    else:
        rows, origin = _hub_rows(name, config, split, revision, limit)
    if not rows:
        raise TextError(f"{name!r} is empty: it has no row")
    return rows, origin


def _only_for_data_sets(name: str, **given: str | None) -> None:
    for argument, value in given.items():
        if value is not None:
            raise TextError(f"{argument}={value!r} was given for {name!r}, which has none: only "
                            "data sets have")  # fmt: skip


def _file_rows(path: Path, name: str, limit: int | None) -> list[dict[str, Any]]:
    """Rows of a file by its format, which the end of its name says. Raises: TextError."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [PACKED]
    suffix = next(iter(suffixes[-2 if packed else -1:]), "")  # fmt: skip
    if suffix not in FORMATS or (packed and suffix == ".parquet"):
        raise TextError(f"the format of {name!r} is unknown: its name must end in one of "
                        f"{FORMATS}, those of text with {PACKED} after it or not")  # fmt: skip
    try:
        if suffix == ".parquet":
            return _records(pd.read_parquet(path), limit)
        if suffix in (".csv", ".tsv"):
            return _csv_rows(path, "\t" if suffix == ".tsv" else ",", limit)
        return _json_rows(path, name, packed, limit)
    except pd.errors.EmptyDataError:
        return []
    except UnicodeDecodeError as error:
        raise TextError(f"{name!r} is not UTF-8 text: {brief(error)}") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, TextError):
            raise
        raise TextError(f"{name!r} cannot be read as {suffix}: {brief(error)}") from error


def _csv_rows(path: Path, separator: str, limit: int | None) -> list[dict[str, Any]]:
    """Every field is text as written: no "NA" or "null" becomes a missing value, no number one."""
    table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, na_filter=False,
                        nrows=limit, encoding="utf-8-sig")  # fmt: skip
    if not isinstance(table.index, pd.RangeIndex):  # else pandas shifts the columns by one
        raise ValueError(f"its rows have more fields than its header {list(table.columns)}")
    return _records(table, limit)


def _records(table: pd.DataFrame, limit: int | None) -> list[dict[str, Any]]:
    rows = table.head(limit if limit is not None else len(table)).to_dict("records")
    return [{str(key): _plain(value) for key, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    """Lists in place of the arrays that pandas makes of them; None in place of its missing."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if value is pd.NA or isinstance(value, float) and value != value else value


def _json_rows(path: Path, name: str, packed: bool, limit: int | None) -> list[dict[str, Any]]:
    """JSON Lines, or one JSON list. The standard library's reader is used since it names the line,
    and since pandas' own turns text into dates and rounds numbers."""
    with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as stream:
        first = stream.read(1)
        while first.isspace():
            first = stream.read(1)
        stream.seek(0)
        if first == "[":
            return list(islice(_objects(enumerate(json.load(stream), 1), name), limit))
        lines = ((i, line) for i, line in enumerate(stream, 1) if line.strip())
        return list(islice(_objects(_parsed(lines, name), name), limit))


def _parsed(lines: Any, name: str) -> Any:
    """Numbered lines as JSON values. Raises: TextError that names the line."""
    for number, line in lines:
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise TextError(f"{name!r}, line {number} is not JSON: {brief(error)}. A .jsonl or "
                            ".json file holds one JSON object a line, or one list of "
                            "them") from None  # fmt: skip


def _objects(values: Any, name: str) -> Any:
    """The values that numbered ones hold. Raises: TextError for one that is not an object."""
    for number, value in values:
        if not isinstance(value, dict):
            raise TextError(f"{name!r}, row {number} is {type(value).__name__} "
                            f"{str(value)[:40]!r}, not an object with named fields")  # fmt: skip
        yield value


def _folder_rows(
    path: Path, name: str, config: str | None, split: str | None, limit: int | None
) -> list[dict[str, Any]]:
    """Rows of a folder by `save_to_disk`, or of one in the hub's format. Raises: TextError."""
    saved = any((path / file).exists() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path), config, split=split)
    except Exception as error:  # the readers raise what their formats do
        raise TextError(f"the folder {name!r} cannot be read as a data set: "
                        f"{_causes(error)}") from error  # fmt: skip
    return _split(found, split if saved else None, name, limit)


def _hub_rows(
    name: str, config: str | None, split: str | None, revision: str | None, limit: int | None
) -> tuple[list[dict[str, Any]], Source]:
    """Rows of the hub's data set, at the commit that `revision` now means where that is known.

    Raises: HubError, SourceError, TextError.
    """
    with hub_answers(name, revision):
        commit = _commit(name, revision)
    try:
        found = datasets.load_dataset(name, config, split=split, revision=commit or revision)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise unreachable(name, revision, error) from error
    except Exception as error:
        raise TextError(f"the data set {name!r} cannot be read: {_causes(error)}") from error
    rows = _split(found, None, name, limit)
    content = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return rows, Source(name, revision, commit or f"sha256:{content}")


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of the hub's data set, None where the hub cannot be asked."""
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=20).sha
    except (errors.HFValidationError, errors.RepositoryNotFoundError,
            errors.RevisionNotFoundError):  # fmt: skip
        raise
    except Exception:  # offline: `datasets` says whether its cache has it
        return None


def _split(found: Any, split: str | None, name: str, limit: int | None) -> list[dict[str, Any]]:
    """The rows of a data set, of `split` if it has splits: of several, one must be named."""
    if isinstance(found, datasets.Dataset):
        if split is not None:
            raise TextError(f"split={split!r} was given for {name!r}, which was saved without "
                            "splits: leave it out")  # fmt: skip
        found, split = {"all": found}, "all"
    names = list(found)
    split = names[0] if split is None and len(names) == 1 else split
    if split not in names:
        raise TextError(f"split of {name!r} must be one of {names}, got {split!r}")
    chosen = found[split]
    chosen = chosen.select(range(min(limit, len(chosen)))) if limit is not None else chosen
    return [{key: _plain(value) for key, value in row.items()} for row in chosen.to_list()]


def _causes(error: BaseException) -> str:
    """An error with those that led to it: `datasets` hides the row's own error behind another."""
    told = [_one_line(error)]
    while (error := error.__cause__ or error.__context__) is not None and len(told) < 3:
        told.append(_one_line(error))
    return "; because: ".join(told)


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]

"""One finished run as one parquet file: its table, and its provenance in the schema's metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lib.runs.files import write_atomically

KEY = b"provenance"


class DamagedRecordError(ValueError):
    """A stored file that is truncated, altered or not what its name says."""


def checksum(table: pd.DataFrame, provenance: dict[str, Any]) -> str:
    """SHA-256 (16 hex characters) of a table's names, types and values and of its provenance."""
    digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode())
    for name in table.columns:
        column = table[name]
        if pd.api.types.is_numeric_dtype(column.dtype):
            values = np.array(column.to_numpy())
            if values.dtype.kind == "f":
                values[np.isnan(values)] = np.nan  # parquet keeps no sign of a NaN
            digest.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
        else:
            texts = [
                None if missing else str(v)
                for v, missing in zip(column, column.isna(), strict=True)
            ]
            digest.update(json.dumps([name, texts]).encode())
    return digest.hexdigest()[:16]


def write_record(path: Path, table: pd.DataFrame, provenance: dict[str, Any]) -> None:
    """Store `table` with `provenance` (JSON values; a checksum is added), atomically."""
    provenance = {**provenance, "checksum": checksum(table, provenance)}
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata(
        {**(arrow.schema.metadata or {}), KEY: json.dumps(provenance, sort_keys=True).encode()}
    )
    # float metrics barely repeat: splitting their bytes compresses them, a dictionary does not
    floats = [field.name for field in arrow.schema if pa.types.is_floating(field.type)]
    others = [field.name for field in arrow.schema if field.name not in floats]
    write_atomically(
        path,
        lambda temporary: pq.write_table(
            arrow,
            temporary,
            compression="zstd",
            compression_level=9,
            use_dictionary=others,
            use_byte_stream_split=floats,
        ),
    )


def read_record(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Table and provenance of a stored file, checked.

    Raises FileNotFoundError, another OSError for a file that cannot be read now, or
    DamagedRecordError that says what is wrong.
    """
    try:
        with pq.ParquetFile(path) as file:
            provenance = json.loads((file.schema_arrow.metadata or {})[KEY])
            table = file.read(use_threads=False).to_pandas()
    except FileNotFoundError:
        raise
    except KeyError:
        raise DamagedRecordError(f"{path.name} has no provenance") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        if getattr(error, "errno", None):  # the disk or the system, not what the file holds
            raise
        raise DamagedRecordError(f"{path.name} is unreadable ({_short(error)})") from error
    expected = provenance.pop("checksum", None)
    if checksum(table, provenance) != expected:
        raise DamagedRecordError(f"{path.name} does not match its checksum")
    return table, provenance


def unset_strings(table: pd.DataFrame) -> pd.DataFrame:
    """Columns without any value get the type of `run`, the one they have when a string is set."""
    unset = [name for name in table if table[name].dtype == object and table[name].isna().all()]
    return table.astype(dict.fromkeys(unset, table["run"].dtype))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:80] or type(error).__name__

"""Published results: one table and one provenance file per chapter and profile, committed."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lib.runs import fingerprint, provenance
from lib.runs.configurations import file_hash
from lib.runs.files import write_atomically
from lib.runs.planning import Engine, plan
from lib.runs.records import unset_strings
from lib.runs.store import Store

PROFILES = ("smoke", "cpu", "full", "gpu", "paper")  # from the smallest to the largest
SECONDS_BITS = 12  # of the mantissa that published times keep: 1 part in 8,000, far below noise


class PublishError(RuntimeError):
    """Results that may not be published, and why."""


@dataclass(frozen=True)
class Published:
    """The published results of one chapter at one profile."""

    path: Path
    table: pd.DataFrame
    meta: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Published:
        """Read and check `<profile>.parquet` and the `<profile>.json` beside it."""
        path = Path(path)
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if file_hash(path) != meta["sha256"]:
            raise PublishError(
                f"{path.name} is not the file that its .json describes: publish again"
            )
        return cls(path, _plain_strings(pq.read_table(path).to_pandas()), meta)

    @property
    def chapter(self) -> str:
        """Name of the chapter."""
        return self.path.parent.name

    @property
    def profile(self) -> str:
        """Name of the profile."""
        return self.path.stem

    @functools.cached_property
    def runs(self) -> dict[str, dict[str, Any]]:
        """Identity -> environment (machine, versions, commit) and time of finishing."""
        return {
            run: {**{k: v for k, v in entry.items() if k != "runs"}, "finished": finished}
            for entry in self.meta["environments"]
            for run, finished in entry["runs"].items()
        }

    @functools.cached_property
    def _places(self) -> dict[str, slice | np.ndarray]:
        """Where each run's rows are: a slice, which cuts a view, as long as they lie together."""
        places = self.table.groupby("run").indices
        return {
            run: slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows
            for run, rows in places.items()
        }

    @functools.cached_property
    def _metrics(self) -> pd.DataFrame:
        return self.table.drop(columns=[*self.meta["configuration"], "run"])

    def metrics(self, run: str) -> pd.DataFrame:
        """One run without its configuration's columns, as an engine returns it.

        Raises: KeyError if it is not published here.
        """
        return self._metrics.iloc[self._places[run]].reset_index(drop=True)

    def stale(self) -> list[str]:
        """The `lib` modules whose code changed since these results were computed or verified."""
        return fingerprint.changed_since(self.meta["code"])

    def notice(self) -> str:
        """What a reader must see beside stale results ("" when the code is as it was)."""
        edited = self.stale()
        commit = self.meta["commit"][:10]
        return (
            f"computed by commit {commit}, code changed since: {', '.join(edited)}"
            if edited
            else ""
        )

    def changes(self) -> str:
        """Which runs were put in later, for a reader ("" if none were)."""
        return "; ".join(
            f"{e['runs']} runs {word} at commit `{e['commit'][:10]}`, {e['date'][:10]}"
            for word, kind in (("again", "replaced"), ("more", "added"))
            for e in self.meta.get(kind, [])
        )

    def merged(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table with the rows of `table`, one of `compute`, in the place of those runs' own.

        Raises PublishError for runs or columns that are not published here.
        """
        unknown = sorted(set(table["run"]) - set(self.runs)) or sorted(
            set(table) - set(self.table.columns)
        )
        if unknown:
            raise PublishError(f"{', '.join(unknown)} are not in {self.path.name}: publish again")
        kept = self.table[~self.table["run"].isin(table["run"])]
        return pd.concat([kept, table], ignore_index=True)

    def replace(
        self, table: pd.DataFrame, records: Mapping[str, dict[str, Any]], command: str = ""
    ) -> Published:
        """Put runs that were computed again in the place of their published ones.

        For a change that moves the numbers of a few runs. Arguments and refusals are those of
        `publish`. The other runs keep rows and provenance, and the table the code that it was
        computed or verified by: if that is another one than now, it stays stale until it is
        verified.
        """
        return self._rewritten("replaced", self.merged(table), table, records, command)

    def add(
        self, table: pd.DataFrame, records: Mapping[str, dict[str, Any]], command: str = ""
    ) -> Published:
        """Publish further runs beside the others, which keep rows and provenance.

        Arguments and refusals are those of `publish`.
        Raises PublishError for a run that is published already, or if the code of the others is
        not the present one: all of a table is of one code.
        """
        if known := sorted(set(table["run"]) & set(self.runs)):
            raise PublishError(f"{', '.join(known)} are in {self.path.name} already")
        if notice := self.notice():
            raise PublishError(f"{self.path.name}: {notice}: verify it, or publish all of it")
        whole = pd.concat([self.table, table], ignore_index=True)
        return self._rewritten("added", whole, table, records, command)

    def _rewritten(
        self, kind: str, whole: pd.DataFrame, table: pd.DataFrame,
        records: Mapping[str, dict[str, Any]], command: str,
    ) -> Published:  # fmt: skip
        """The files written anew with the runs of `table` in `whole`. kind: the entry it is."""
        used = {run: _record(run, records) for run in table["run"].unique()}
        _refuse(used)
        settings = sorted({*self.meta["configuration"], *_settings(used)})
        compact = _compact(whole, settings)
        kept = {run: _split(own) for run, own in self.runs.items() if run not in used}
        totals = self._totals(len(compact), used)
        write_atomically(self.path, lambda temporary: _write_table(compact, temporary))
        entry = {"commit": provenance.commit(), "command": command, "runs": len(used),
                 "date": provenance.now()}  # fmt: skip
        meta = {
            **self.meta,
            "sha256": file_hash(self.path),
            "totals": totals,
            "configuration": settings,
            "environments": _environments({**kept, **used}),
            kind: [*self.meta.get(kind, []), entry],
        }
        _write_json(self.path.with_suffix(".json"), meta)
        return Published.load(self.path)

    def _totals(self, rows: int, records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The totals with the runs of `records`; the seconds of published runs that they replace
        are those of their rows."""
        gone = [self.metrics(run).tail(1) for run in records if run in self.runs]
        seconds = {
            name: round(total - sum(float(row[f"seconds_{name}"].iloc[0]) for row in gone)
                        + sum(record["seconds"].get(name, 0.0) for record in records.values()), 1)
            for name, total in self.meta["totals"]["seconds"].items()
        }  # fmt: skip
        return {"runs": len({*self.runs, *records}), "rows": rows, "seconds": seconds}

    def stamp(self, verification: dict[str, Any], modules: Sequence[str]) -> None:
        """Take the present code as these results' own after a sample was verified against it.

        Args: modules: those that its runs execute now, as their engine names them.
        Raises: RuntimeError for code that changed while the sample was computed.
        """
        meta = {
            **self.meta,
            "code": fingerprint.fingerprint_as_loaded(*modules),
            "verified": [*self.meta["verified"], verification],
        }
        _write_json(self.path.with_suffix(".json"), meta)


def publish(
    table: pd.DataFrame,
    records: Mapping[str, dict[str, Any]],
    path: Path,
    command: str = "",
) -> Published:
    """Write a table of `compute` and the provenance of its runs under `data/results/`.

    `records` is `store.provenance(...)` by identity; `path` is `<chapter>/<profile>.parquet`.
    Metrics become float32 (the configuration's own numbers stay as they are), seconds_* keep
    12 bits, rows are sorted by configuration. Raises PublishError, before anything is written,
    for uncommitted changes, now or when a run was computed, and for runs of other code than now.
    """
    path = Path(path)
    if path.stem not in PROFILES or path.suffix != ".parquet":
        allowed = ", ".join(f"{name}.parquet" for name in PROFILES)
        raise ValueError(f"{path.name} names no profile; allowed: {allowed}")
    used = {run: _record(run, records) for run in table["run"].unique()}
    _refuse(used)
    settings = sorted(_settings(used))
    compact = _compact(table, settings)
    write_atomically(path, lambda temporary: _write_table(compact, temporary))
    meta = {
        "chapter": path.parent.name,
        "profile": path.stem,
        "commit": provenance.commit(),
        "command": command,
        "published": provenance.now(),
        "sha256": file_hash(path),
        "totals": _totals(table, used),
        "code": _code(used),
        "verified": [],
        "configuration": settings,
        "environments": _environments(used),
    }
    _write_json(path.with_suffix(".json"), meta)
    return Published.load(path)


def refuse_dirty_tree() -> None:
    """PublishError unless all of `lib` and `data` (but for results) is committed."""
    if not provenance.commit():
        raise PublishError(
            "not a git repository: published results must name the commit they are of"
        )
    dirty = provenance.uncommitted(["lib", "data"])
    if dirty:
        raise PublishError(f"uncommitted changes; commit them first: {', '.join(dirty[:10])}")


def refuse_dirty_records(configs: Sequence[Any], store: Store, engine: Engine) -> None:
    """PublishError, naming their files, if stored runs were computed with uncommitted changes.

    Only runs that would be reused count; those that are missing or stale are computed anew.
    """
    planned = plan(configs, store, engine).runs
    records = store.provenance([run.identity for run in planned if run.status.kind == "stored"])
    _refuse_dirty_records({str(store.path(run)): record for run, record in records.items()})


def largest_published(chapter: str, results: Path | None = None) -> Published | None:
    """The published results of a chapter at its largest profile, or None."""
    files = published_files(chapter, results)
    return Published.load(files[-1]) if files else None


def published_files(chapter: str, results: Path | None = None) -> list[Path]:
    """The published tables of a chapter, unread, from its smallest profile to its largest."""
    folder = results_folder(results) / chapter
    return [path for profile in PROFILES if (path := folder / f"{profile}.parquet").exists()]


def results_folder(results: Path | None = None) -> Path:
    """Where published results lie unless told otherwise."""
    return Path(results) if results else fingerprint.ROOT / "data" / "results"


def _record(run: str, records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    if run not in records:
        raise PublishError(f"no provenance given for run {run}")
    return records[run]


def _refuse(records: Mapping[str, dict[str, Any]]) -> None:
    refuse_dirty_tree()
    _refuse_dirty_records(records)
    for run, record in records.items():
        edited = fingerprint.changed_since(record["code"])
        if edited:
            raise PublishError(
                f"run {run} was computed by other code ({record['commit'][:10]}) than now: "
                f"{', '.join(edited)}"
            )


def _refuse_dirty_records(records: Mapping[str, dict[str, Any]]) -> None:
    """PublishError that lists those of the records, by their names, which are of no commit."""
    listed = [
        f"{name}: {', '.join(record['dirty']) or 'a folder that is no git repository'}"
        for name, record in records.items()
        if record["dirty"] or not record["commit"]
    ]
    if listed:
        raise PublishError(
            f"{len(listed)} runs were computed with uncommitted changes; remove their records and "
            "compute them again from a clean tree:\n" + "\n".join(listed)
        )


def _names(configuration: dict[str, Any], prefix: str = "") -> list[str]:
    """The columns of a canonical configuration, as `columns` names them."""
    names = []
    for name, value in configuration["fields"].items():
        nested = isinstance(value, dict) and set(value) == {"class", "fields"}
        names += _names(value, f"{prefix}{name}_") if nested else [prefix + name]
    return names


def _settings(records: Mapping[str, dict[str, Any]]) -> set[str]:
    """The columns of all their configurations."""
    return {name for record in records.values() for name in _names(record["configuration"])}


def _compact(table: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """The table sorted, metrics in float32, strings as categories."""
    table = table.sort_values([*settings, "run"], kind="stable").reset_index(drop=True)
    made = {}
    for name in table.columns:
        column = table[name]
        if pd.api.types.infer_dtype(column, skipna=True) == "string":
            made[name] = column.astype("category")
        elif pd.api.types.is_float_dtype(column.dtype) and name not in settings:
            values = column.to_numpy(np.float32)
            made[name] = _rounded(values) if name.startswith("seconds_") else values
        else:
            made[name] = column
    return pd.DataFrame(made)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Float32 with only SECONDS_BITS bits of mantissa, so that noise does not cost bytes."""
    mantissa, exponent = np.frexp(values)
    scale = np.float32(2 ** (SECONDS_BITS + 1))
    return np.ldexp(np.round(mantissa * scale) / scale, exponent).astype(np.float32)


def _write_table(table: pd.DataFrame, path: Path) -> None:
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    # splitting the bytes of float metrics takes a third off; a dictionary would add to them
    floats = [field.name for field in arrow.schema if pa.types.is_float32(field.type)]
    others = [field.name for field in arrow.schema if field.name not in floats]
    pq.write_table(
        arrow,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=others,
        use_byte_stream_split=floats,
    )


def _write_json(path: Path, meta: dict[str, Any]) -> None:
    text = json.dumps(meta, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _totals(table: pd.DataFrame, records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    for record in records.values():
        for name, value in record["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + value
    totals = {name: round(value, 1) for name, value in seconds.items()}
    return {"runs": len(records), "rows": len(table), "seconds": totals}


def _code(records: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The fingerprint of all runs together; `_refuse` saw that no two differ on a module."""
    merged = {path: code for record in records.values() for path, code in record["code"].items()}
    return dict(sorted(merged.items()))


def _environments(records: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Distinct machines, versions and commits, each with its runs and when they finished."""
    entries: dict[str, dict[str, Any]] = {}
    for run, record in sorted(records.items()):
        head = {**record["environment"], "commit": record["commit"]}
        entry = entries.setdefault(json.dumps(head, sort_keys=True), {**head, "runs": {}})
        entry["runs"][run] = record["finished"]
    return list(entries.values())


def _split(own: dict[str, Any]) -> dict[str, Any]:
    """What `Published.runs` says of a run, as a record has it."""
    apart = ("commit", "finished")
    environment = {name: value for name, value in own.items() if name not in apart}
    return {"environment": environment, **{name: own[name] for name in apart}}


def _plain_strings(table: pd.DataFrame) -> pd.DataFrame:
    """Categories back to the strings that `compute` returns."""
    names = [n for n in table.columns if isinstance(table[n].dtype, pd.CategoricalDtype)]
    plain = {name: table[name].astype(table[name].cat.categories.dtype) for name in names}
    return unset_strings(table.assign(**plain))

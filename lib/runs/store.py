"""The store: one file per finished run, a checkpoint per block in progress, a lock per run."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lib.runs.files import StoreFullError, check_writable, remove, write_atomically
from lib.runs.fingerprint import changed, changed_since
from lib.runs.records import DamagedRecordError, read_record, write_record

CHECKPOINT_SHARE = 0.05  # of the time may go into checkpoints, whatever the interval
RECORD_BYTES = 20_000  # a run of 26 rows and 25 columns, before the store has any to measure


@dataclass(frozen=True)
class Status:
    """What the store has of one run: "stored", "missing", "stale" or "damaged", and why."""

    kind: str
    reason: str = ""
    table: pd.DataFrame | None = None


@dataclass
class Checkpoint:
    """The state of a block of runs in progress; engines call it between iterations.

    `header` (identities of the runs, hashes of their code) is stored beside the state, so that a
    state is only ever resumed by the same runs and the same code.
    """

    path: Path
    header: dict[str, Any]
    interval: float = 20.0  # seconds
    report: Callable[[float, dict[str, Any]], None] | None = None
    resumed: int = 0
    _saved_at: float = field(default_factory=lambda: time.monotonic())
    _save_seconds: float = 0.0

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors (on the CPU) and meta as last saved, or None when there is nothing to resume."""
        stored = read_checkpoint(self.path)
        if stored is None or stored["header"] != self.header:
            return None
        self.resumed = stored["resumed"] + 1
        return load_file(self.path), stored["meta"]

    def due(self) -> bool:
        """Whether `interval` seconds have passed since the last save, or more if saving is slow.

        An interval of 0 is always due.
        """
        wait = self.interval and max(self.interval, self._save_seconds / CHECKPOINT_SHARE)
        return time.monotonic() - self._saved_at >= wait

    def save(self, tensors: Mapping[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Replace the stored state, atomically. `meta` holds JSON values."""
        started = time.monotonic()
        copies = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
        }
        about = {"header": self.header, "resumed": self.resumed, "meta": meta}
        metadata = {"content": json.dumps(about)}
        content = to_bytes(copies, metadata)  # save_file leaves its own temporary file at a kill
        write_atomically(self.path, lambda path: path.write_bytes(content))
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - started

    def progress(self, done_updates: float, total_updates: float, **shown: Any) -> None:
        """Say how far the block is; `shown` (a loss, a reward) stands beside the progress bar."""
        if self.report is not None:
            self.report(done_updates / max(total_updates, 1), shown)

    def clear(self) -> None:
        """Remove the stored state: its runs are finished."""
        remove(self.path)


def read_checkpoint(path: Path, say: bool = True) -> dict[str, Any] | None:
    """Header, resume count and meta of a stored state; None when absent or damaged.

    Args: say: that a damaged one is, and what becomes of its runs.
    Raises: OSError for a file that cannot be read now.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["content"])
    except FileNotFoundError:
        if path.exists():  # safetensors says so of any file that it cannot open
            raise
        return None
    except (SafetensorError, KeyError, TypeError, ValueError):
        if say:
            print(f"checkpoint {path.name} is damaged: its runs start again from the beginning")
        return None


@dataclass(frozen=True)
class Store:
    """Finished runs under `root`, shared by any number of processes.

    Each run is computed once: its lock belongs to the process that computes it and is released by
    the kernel when that process ends, however it ends.
    """

    root: Path
    checkpoint_interval: float = 20.0  # seconds

    def __post_init__(self) -> None:
        if not isinstance(self.root, str | os.PathLike) or not str(self.root):
            raise ValueError(f"store must be the path of a folder, got {self.root!r}")
        object.__setattr__(self, "root", Path(self.root).expanduser().absolute())
        for place in (self.root, *self.root.parents):
            if place.is_file():
                raise NotADirectoryError(f"the store {place} is a file: name a folder")

    def path(self, run: str) -> Path:
        """The file of one finished run."""
        return self.root / "records" / run[:2] / f"{run}.parquet"

    def read(self, run: str) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Table and provenance of a run; FileNotFoundError or DamagedRecordError otherwise."""
        table, provenance = read_record(self.path(run))
        if provenance.get("identity") != run:
            raise DamagedRecordError(f"{run}.parquet holds run {provenance.get('identity')}")
        return table, provenance

    def write(self, run: str, table: pd.DataFrame, provenance: dict[str, Any]) -> None:
        """Store a finished run; the caller holds its lock."""
        write_record(self.path(run), table, {**provenance, "identity": run})

    def provenance(self, runs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Provenance of stored runs by identity."""
        return {run: self.read(run)[1] for run in runs}

    def status(self, run: str, code: Mapping[str, str]) -> Status:
        """What is stored of a run, judged against the code as it is now."""
        try:
            table, provenance = self.read(run)
        except FileNotFoundError:
            return Status("missing")
        except DamagedRecordError as error:
            return Status("damaged", str(error))
        edited = changed(provenance["code"], code)
        if edited:
            return Status("stale", f"{', '.join(edited)} changed")
        return Status("stored", f"computed {provenance['finished']}", table)

    def record_bytes(self) -> float:
        """Mean size of a stored run's file (of up to 100), or an assumed one in an empty store."""
        files = itertools.islice(self.root.glob("records/*/*"), 100)
        sizes = []
        for path in files:
            with contextlib.suppress(FileNotFoundError):  # another process just renamed or took it
                sizes.append(path.stat().st_size)
        return sum(sizes) / len(sizes) if sizes else RECORD_BYTES

    def prepare(self, needed: float) -> None:
        """Create the store; find out now, not after hours, whether it can take `needed` bytes."""
        check_writable(f"the store {self.root}", self.root)
        if shutil.disk_usage(self.root).free < needed:
            raise StoreFullError(
                f"{self.root} has less free space than the {needed:.0f} bytes needed"
            )
        if not (ignored := self.root / ".gitignore").exists():
            ignored.write_text("*\n")

    @contextlib.contextmanager
    def locked(self, runs: Sequence[str], wait: bool) -> Iterator[bool]:
        """Hold the locks of `runs`; yields False if one is held elsewhere and `wait` is False.

        Every process takes locks in the same (sorted) order, so that none waits in a circle.
        """
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        _allow_open_files(len(runs))
        with contextlib.ExitStack() as held:
            yield all(_take(folder / f"{run}.lock", wait, held) for run in sorted(runs))

    def checkpoint(
        self,
        runs: Sequence[str],
        code: Mapping[str, str],
        report: Callable[[float, dict[str, Any]], None] | None = None,
    ) -> Checkpoint:
        """The checkpoint of a block of runs computed by `code`."""
        header = {"runs": list(runs), "code": dict(code)}
        name = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:20]
        path = self.root / "checkpoints" / f"{name}.safetensors"
        return Checkpoint(path, header, self.checkpoint_interval, report)

    def checkpoints(self, code: Mapping[str, str]) -> list[tuple[str, ...]]:
        """The blocks of runs that stopped midway under `code`, or are under way elsewhere."""
        headers = [self._header(path) for path in self._checkpoint_paths()]
        return [tuple(h["runs"]) for h in headers if h is not None and h["code"] == code]

    def sweep(self) -> None:
        """Remove checkpoints that nobody can resume, unless their runs are held.

        Those are damaged ones, finished ones, and ones whose own code has changed since: other
        engines' are kept.
        """
        for path in self._checkpoint_paths():
            header = self._header(path)
            if header is not None and self._resumable(header):
                continue
            if header is None:  # its runs are not known: one that writes it anew is left alone
                path.unlink(missing_ok=True)
                continue
            with self.locked(header["runs"], wait=False) as free:
                if free:
                    remove(path)

    def _resumable(self, header: dict[str, Any]) -> bool:
        code = header["code"]
        if not isinstance(code, dict) or changed_since(code):  # once it was one hash of all files
            return False
        return any(self.status(run, code).kind != "stored" for run in header["runs"])

    def _checkpoint_paths(self) -> list[Path]:
        return sorted(self.root.glob("checkpoints/*.safetensors"))

    def _header(self, path: Path) -> dict[str, Any] | None:
        stored = read_checkpoint(path)
        return stored and stored["header"]


def _take(path: Path, wait: bool, held: contextlib.ExitStack) -> bool:
    try:
        held.enter_context(filelock.FileLock(path).acquire(timeout=-1 if wait else 0))
    except filelock.Timeout:
        return False
    return True


def _allow_open_files(more: int) -> None:
    """A block of many runs holds as many open lock files: lift the soft limit if it is too low."""
    if os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < more + 256:
        limit = more + 256 if hard == resource.RLIM_INFINITY else min(more + 256, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))

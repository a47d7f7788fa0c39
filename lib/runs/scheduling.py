"""Computing what is missing: blocks of runs over processes, each run once, resumable."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lib.runs import fingerprint, provenance
from lib.runs.configurations import canonical, columns, data_files, identity
from lib.runs.files import StoreFullError
from lib.runs.fingerprint import ROOT
from lib.runs.planning import REUSED, Engine, Plan, group, plan
from lib.runs.records import unset_strings
from lib.runs.store import Checkpoint, Store

# loky renews a worker that has grown; nothing is lost
warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given")

POLL = 0.5  # seconds between two looks at the workers' progress
NOTEBOOK = 5.0  # seconds between two drawings of a bar that is kept in a notebook's output


class RunError(RuntimeError):
    """Some runs failed; the others were computed and stored."""


@dataclass(frozen=True)
class Job:
    """What a worker needs besides its block: picklable, the same for all blocks."""

    store: Store
    engine: Engine
    code: dict[str, str]
    origin: dict[str, Any]  # commit and uncommitted files, as provenance
    folder: Path  # where workers leave their progress

    def progress_file(self, block: Sequence[Any]) -> Path:
        """Where the worker of a block writes the done share (0 to 1) and what to show."""
        return self.folder / identity(block[0])


def compute(
    configs: Sequence[Any],
    store: Store,
    engine: Engine,
    jobs: int | None = None,
    *,
    published: Any = None,
    say: Callable[[str], None] = print,
    progress: bool | None = None,
) -> pd.DataFrame:
    """The table of all `configs`, computing those that neither store nor `published` has.

    Columns: the configurations' fields (`outer_inner` for nested ones), `run` (identity), then
    the engine's metrics; rows in the order of `configs`. `jobs` processes of one thread each
    (default: one per core; 1 computes in this process). `progress` draws a bar with the time left;
    None where standard error is a terminal, which a notebook's is not.

    An interrupt or a kill loses at most the last `store.checkpoint_interval` seconds; calling
    again goes on from there. Raises RunError after all other runs when some failed.
    """
    overview = plan(configs, store, engine, jobs, published)
    say(str(overview))
    for run in overview.runs:
        if run.status.kind == "damaged":
            say(f"recomputed: {run.status.reason}")
    store.sweep()
    refuse_missing(engine, lambda: overview)
    if overview.todo:
        _compute_missing(overview, store, engine, say, progress)
    tables = [
        store.read(run.identity)[0] if run.status.table is None else run.status.table
        for run in overview.runs
    ]
    return assemble([run.config for run in overview.runs], tables)


def refuse_missing(engine: Engine, overview: Callable[[], Plan]) -> None:
    """Raises: FileNotFoundError for what the runs to be computed need and is not here, RuntimeError
    for what the device cannot do, ValueError for what a model cannot.

    Args: overview: gives the plan; called for engines alone whose runs may need something. One with
        several stages has them all, so that nothing is missed when the first has taken its hours.
    """
    if hasattr(engine, "check"):
        engine.check([run.config for run in overview().todo])


def assemble(configs: Sequence[Any], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table: each run's rows behind its configuration's columns and its identity, `run`."""
    heads = pd.DataFrame([{**columns(config), "run": identity(config)} for config in configs])
    heads = unset_strings(heads)
    metrics = pd.concat(tables, ignore_index=True)
    both = sorted(set(heads) & set(metrics))
    if both:
        raise ValueError(f"metric columns {both} are also fields of the configuration")
    repeated = heads.iloc[np.repeat(np.arange(len(tables)), [len(table) for table in tables])]
    return pd.concat([repeated.reset_index(drop=True), metrics], axis=1)


def _compute_missing(
    overview: Plan,
    store: Store,
    engine: Engine,
    say: Callable[[str], None],
    progress: bool | None,
) -> None:
    code = fingerprint.fingerprint_as_loaded(*engine.modules)
    store.prepare(overview.bytes)
    blocks = _blocks(overview, store, engine, code)
    with tempfile.TemporaryDirectory(prefix="runs-") as folder:
        job = Job(store, engine, code, origin(overview, code), Path(folder))
        bar = tqdm(
            total=overview.updates_todo,
            unit="update",
            unit_scale=True,
            disable=None if progress is None else not progress,
            mininterval=0.1 if progress is None else NOTEBOOK,
        )
        try:
            with _watched(bar, job, blocks):
                failures = _two_passes(job, blocks, overview.jobs, say)
        except KeyboardInterrupt:
            done = sum(
                run.status.kind in REUSED or store.status(run.identity, code).kind == "stored"
                for run in overview.runs
            )
            say(
                f"interrupted: {done} of {len(overview.runs)} runs are stored; start again to go on"
            )
            raise
    if failures:
        raise RunError(f"{len(failures)} of {len(blocks)} blocks failed:\n" + "\n".join(failures))


def _blocks(overview: Plan, store: Store, engine: Engine, code: dict[str, str]) -> list[list[Any]]:
    """Blocks that a kill left midway, as they were; then the rest in blocks of their own."""
    wanted = {run.identity: run.config for run in overview.runs}
    missing = {run.identity: run.config for run in overview.todo}
    resumed = []
    for runs in store.checkpoints(code):
        if set(runs) <= set(wanted) and set(runs) & set(missing):
            resumed.append([wanted[run] for run in runs])
            for run in runs:
                missing.pop(run, None)
    return resumed + group(list(missing.values()), engine)


def origin(overview: Plan, code: dict[str, str]) -> dict[str, Any]:
    """The commit, and those files that these runs execute or read which it does not hold."""
    root = fingerprint.ROOT
    data = {path.resolve() for run in overview.todo for path in data_files(run.config)}
    inside = [str(path.relative_to(root)) for path in data if path.is_relative_to(root)]
    return {"commit": provenance.commit(), "dirty": provenance.uncommitted([*code, *inside])}


def _two_passes(
    job: Job,
    blocks: list[list[Any]],
    jobs: int,
    say: Callable[[str], None],
) -> list[str]:
    """First the blocks that are free, then those that another process held; returns failures."""
    outcomes = list(_in_parallel(job, blocks, jobs, False))
    failures = [text for _, text in outcomes if text not in ("done", "busy")]
    busy = [blocks[index] for index, text in outcomes if text == "busy"]
    if busy:
        say(f"waiting for {len(busy)} blocks that another process is computing")
        outcomes = _in_parallel(job, busy, jobs, True)
        failures += [text for _, text in outcomes if text != "done"]
    return failures


def _in_parallel(
    job: Job, blocks: list[list[Any]], jobs: int, wait: bool
) -> Iterator[tuple[int, str]]:
    # a worker takes over this path, in which a notebook's checkout may be a mere "", another folder
    # there: it would import another `lib`, or none
    if sys.path[0] != str(ROOT):
        sys.path.insert(0, str(ROOT))
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
        yield from parallel(
            joblib.delayed(_work)(job, index, block, wait) for index, block in enumerate(blocks)
        )


def _work(job: Job, index: int, block: list[Any], wait: bool) -> tuple[int, str]:
    """Compute and store one block unless it is held elsewhere: "done", "busy" or the failure."""
    configs = {identity(config): config for config in block}
    with _one_thread(), job.store.locked(list(configs), wait) as held:
        if not held:
            return index, "busy"
        try:
            _compute_block(job, configs, job.progress_file(block))
        except StoreFullError:
            raise
        except Exception:  # noqa: BLE001 - one failing block must not stop the others
            return index, f"{block[0]} and {len(block) - 1} more:\n{traceback.format_exc()}"
    _tell(job.progress_file(block), 1, {})
    return index, "done"


def _compute_block(job: Job, configs: dict[str, Any], progress_file: Path) -> None:
    """Compute what is still missing of a block whose locks are held, and store it run by run."""
    store = job.store
    missing = [run for run in configs if store.status(run, job.code).kind != "stored"]
    called = {getattr(config, "called", "") for config in configs.values()}
    report = _Reporter(progress_file, called.pop() if len(called) == 1 else "")
    checkpoint = store.checkpoint(list(configs), job.code, report)
    if missing and not checkpoint.path.exists():  # others may have finished a part of the block
        configs = {run: configs[run] for run in missing}
        checkpoint = store.checkpoint(missing, job.code, report)
    if missing:
        fingerprint.refuse_other_code(job.code)
        made = job.engine.run(list(configs.values()), checkpoint)
        tables = _checked_tables(made, list(configs))
        for run in missing:
            record = _provenance(job, configs[run], tables[run], len(configs), checkpoint)
            store.write(run, tables[run], record)
    checkpoint.clear()


def _checked_tables(tables: Sequence[pd.DataFrame], runs: list[str]) -> dict[str, pd.DataFrame]:
    if len(tables) != len(runs):
        raise ValueError(f"the engine returned {len(tables)} tables for {len(runs)} runs")
    by_run = dict(zip(runs, tables, strict=True))
    empty = [run for run, table in by_run.items() if table.empty]
    if empty:
        raise ValueError(f"the engine returned no rows for the runs {empty}")
    return by_run


def _provenance(
    job: Job, config: Any, table: pd.DataFrame, block: int, checkpoint: Checkpoint
) -> dict[str, Any]:
    engine = job.engine
    last = table.iloc[-1]
    names = [name for name in table.columns if name.startswith("seconds_")]
    return {
        "configuration": canonical(config),
        "seed": getattr(config, "seed", None),
        **job.origin,
        "environment": provenance.environment(
            getattr(engine, "device", "cpu"),
            getattr(config, "dtype", getattr(engine, "dtype", "float32")),
            getattr(engine, "packages", ()),
        ),
        "seconds": {name.removeprefix("seconds_"): round(float(last[name]), 3) for name in names},
        "code": job.code,
        "block": {"runs": block, "resumed": checkpoint.resumed},
        "finished": provenance.now(),
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread: sums, and so numbers, depend on how many share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Reporter:
    """Leaves a block's progress in a small file, at most every POLL seconds.

    Args: called: what its runs go by, several of which are computed side by side.
    """

    def __init__(self, path: Path, called: str = "") -> None:
        self.path, self.called = path, called
        self.next = 0.0

    def __call__(self, share: float, shown: dict[str, Any]) -> None:
        now = time.monotonic()
        if now >= self.next:
            _tell(self.path, share, shown, self.called)
            self.next = now + POLL


def _tell(path: Path, share: float, shown: dict[str, Any], called: str = "") -> None:
    text = ", ".join(f"{key} {value}" for key, value in shown.items())
    with contextlib.suppress(OSError):  # a bar that cannot move must not stop a run
        path.write_text(f"{share} {called and f'{called}: '}{text}")


@contextlib.contextmanager
def _watched(bar: tqdm, job: Job, blocks: list[list[Any]]) -> Iterator[None]:
    """Move the bar by what the workers' files say, while the block below runs."""
    weights = {job.progress_file(b): sum(config.updates for config in b) for b in blocks}
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL):
            _move(bar, weights)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
        _move(bar, weights)
        bar.close()


def _move(bar: tqdm, weights: dict[Path, int]) -> None:
    done = 0.0
    for path, updates in weights.items():
        with contextlib.suppress(FileNotFoundError, ValueError):  # not begun, or half written
            share, _, shown = path.read_text().partition(" ")
            done += float(share) * updates
            if shown and float(share) < 1:
                bar.set_postfix_str(shown, refresh=False)
    bar.update(max(0, min(round(done), bar.total) - bar.n))

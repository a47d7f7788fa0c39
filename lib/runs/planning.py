"""What a list of configurations would cost, given what the store and the published results have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import joblib
import pandas as pd

from lib.runs.configurations import identity
from lib.runs.fingerprint import code_fingerprint
from lib.runs.store import Checkpoint, Status, Store

if TYPE_CHECKING:
    from lib.runs.published import Published

REUSED = ("stored", "published")


class Engine(Protocol):
    """How one kind of problem computes its runs.

    Attributes: `block_size`, the most runs that train together; `modules`, names of the `lib`
    modules that a run executes ("lib.finetune", ...), whose imports are followed; optionally
    `check`, which raises FileNotFoundError if something that runs need is not there, or
    RuntimeError if the device cannot do it; and, kept as provenance, `device` ("cpu"), `dtype`
    ("float32") and `packages`, those besides torch, numpy and pandas whose versions may move a
    number ("transformers", ...).
    """

    block_size: int
    modules: Sequence[str]

    def block_key(self, config: Any) -> Any:
        """Hashable; runs of equal keys may train together."""

    def cost(self, block: Sequence[Any]) -> float:
        """Estimated seconds of a block of runs, which may not be full, on one core."""

    def run(self, configs: Sequence[Any], checkpoint: Checkpoint) -> Sequence[pd.DataFrame]:
        """The tables of the runs, in their order: one row per evaluated update, metrics only.

        Resumes from `checkpoint.load()`; between iterations calls `checkpoint.progress` and, when
        `checkpoint.due()`, `checkpoint.save`. Columns called seconds_* are cumulative; their last
        row becomes the run's provenance.
        """


@dataclass(frozen=True)
class Run:
    """One configuration of a plan with what is known of it."""

    config: Any
    identity: str
    status: Status


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment in order, each stored, published, missing, stale or damaged."""

    runs: tuple[Run, ...]
    jobs: int
    seconds: float  # estimated, on `jobs` processes; NaN on a GPU
    bytes: float  # to be added to the store

    @property
    def todo(self) -> tuple[Run, ...]:
        """The runs to compute."""
        return tuple(run for run in self.runs if run.status.kind not in REUSED)

    @property
    def counts(self) -> dict[str, int]:
        """Status, with its reason where runs share one ("stale: lib/losses.py changed") -> runs."""
        counts: dict[str, int] = {}
        for run in self.runs:
            counts[_group(run.status)] = counts.get(_group(run.status), 0) + 1
        return counts

    @property
    def updates(self) -> int:
        """Run-steps of all runs, reused ones included."""
        return sum(run.config.updates for run in self.runs)

    @property
    def updates_todo(self) -> int:
        """Run-steps to compute."""
        return sum(run.config.updates for run in self.todo)

    def __str__(self) -> str:
        kinds = ", ".join(f"{number:,} {group}" for group, number in self.counts.items())
        text = f"{len(self.runs):,} runs = {self.updates:,} run-steps: {kinds}."
        if not self.todo:
            return f"{text} Nothing to compute."
        processes = f"{self.jobs} process{'es' if self.jobs > 1 else ''}"
        time = f"about {duration(self.seconds)}"
        if math.isnan(self.seconds):
            time = "how long is known for CPUs only,"
        return (
            f"{text} To compute: {len(self.todo):,} runs = {self.updates_todo:,} run-steps, "
            f"{time} on {processes}, {size(self.bytes)}."
        )


def plan(
    configs: Sequence[Any],
    store: Store,
    engine: Engine,
    jobs: int | None = None,
    published: Published | None = None,
) -> Plan:
    """What computing `configs` would take; computes nothing.

    A configuration given twice is one run. A run that the store lacks and `published` has is
    reused from there, also when the code has changed since: its reason then says so.
    """
    if not configs:
        raise ValueError("no configurations given: an experiment needs one or more")
    code = code_fingerprint(*engine.modules)
    by_identity = {identity(config): config for config in configs}
    notice = published.notice() if published else ""
    runs = tuple(
        Run(config, run, _status(run, store, code, published, notice))
        for run, config in by_identity.items()
    )
    todo = [run.config for run in runs if run.status.kind not in REUSED]
    blocks = group(todo, engine)
    jobs = max(1, min(jobs or default_jobs(engine), len(blocks) or 1))
    costs = [engine.cost(block) if _on_cpu(engine) else math.nan for block in blocks]
    seconds = max([sum(costs) / jobs, *costs])
    return Plan(runs, jobs, seconds, len(todo) * store.record_bytes())


def group(configs: Sequence[Any], engine: Engine) -> list[list[Any]]:
    """Blocks of up to `engine.block_size` runs with equal keys, the most expensive first."""
    by_key: dict[Any, list[Any]] = {}
    for config in configs:
        by_key.setdefault(engine.block_key(config), []).append(config)
    blocks = [
        members[start : start + engine.block_size]
        for members in by_key.values()
        for start in range(0, len(members), engine.block_size)
    ]
    return sorted(blocks, key=lambda block: -engine.cost(block))


def default_jobs(engine: Engine) -> int:
    """One process per available core, or one in all when the engine computes on another device."""
    return joblib.cpu_count() if _on_cpu(engine) else 1


def _on_cpu(engine: Engine) -> bool:
    return getattr(engine, "device", "cpu") == "cpu"


def duration(seconds: float) -> str:
    """12 s, 14 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as kB, MB or GB."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _status(
    run: str, store: Store, code: dict[str, str], published: Published | None, notice: str
) -> Status:
    status = store.status(run, code)
    if status.kind == "stored" or published is None or run not in published.runs:
        return status
    return Status("published", notice, published.metrics(run))


def _group(status: Status) -> str:
    named = status.kind in ("stale", "published") and status.reason
    return f"{status.kind} ({status.reason})" if named else status.kind

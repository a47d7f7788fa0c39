"""Sixteen processes on one store, against one process alone.

Every run must be computed exactly once. The runs sleep rather than compute, so that the ratio shows
what locks, checks and waiting cost, whatever the number of cores.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import pandas as pd

from benchmarks import Result
from lib import runs

PROCESSES = 16
RUNS = 64
SECONDS = 0.5  # of one run


@dataclass(frozen=True)
class Nap:
    """A run that sleeps."""

    seed: int
    updates: int = 1


@dataclass(frozen=True)
class Sleeper:
    """Sleeps once for every run and notes it in a file."""

    log: Path
    block_size: int = 1
    modules: tuple[str, ...] = ("lib.losses",)

    def block_key(self, config: Nap) -> str:
        """All runs are alike."""
        return ""

    def cost(self, block: Sequence[Nap]) -> float:
        """Seconds of a block."""
        return SECONDS * len(block)

    def run(self, configs: Sequence[Nap], checkpoint: runs.Checkpoint) -> list[pd.DataFrame]:
        """One row for each run."""
        time.sleep(SECONDS * len(configs))
        with self.log.open("a") as log:
            log.writelines(f"{runs.identity(config)}\n" for config in configs)
        return [pd.DataFrame({"update": [1]}) for _ in configs]


def work(root: Path, log: Path, together: multiprocessing.Barrier) -> None:
    """One of the processes: all of them ask for all runs."""
    together.wait()
    configs = [Nap(seed) for seed in range(RUNS)]
    runs.compute(configs, runs.Store(root), Sleeper(log), jobs=1, say=lambda text: None)


def measure(processes: int) -> tuple[float, Counter[str]]:
    """Seconds from the common start to the last end, and how often each run was computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.store"])
    with tempfile.TemporaryDirectory() as folder:
        root, log = Path(folder) / "store", Path(folder) / "log"
        together = context.Barrier(processes + 1)
        workers = [
            context.Process(target=work, args=(root, log, together)) for _ in range(processes)
        ]
        for worker in workers:
            worker.start()
        together.wait()
        started = time.perf_counter()
        for worker in workers:
            worker.join()
        return time.perf_counter() - started, Counter(log.read_text().split())


def shared(effort: Any) -> Iterator[Result]:
    """The same whatever the effort. Raises: AssertionError unless each run is computed once."""
    alone, _ = measure(1)
    together, counts = measure(PROCESSES)
    assert len(counts) == RUNS and set(counts.values()) == {1}, f"computed: {counts}"
    yield Result(
        "store", alone / together,
        f"one process ({RUNS} runs of {SECONDS} s, each computed once; {PROCESSES} is ideal)",
        together, alone, f"{PROCESSES} processes x 1",
        f"planning and reading in every process, which share {joblib.cpu_count()} cores",
    )  # fmt: skip


BENCHMARKS: dict[str, Callable[[Any], Iterator[Result]]] = {"store": shared}

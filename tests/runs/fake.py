"""A small problem for the store's tests: random walks, stepped by numpy and checkpointed."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lib import runs
from lib.allowed import LATER


@dataclass(frozen=True)
class Walk:
    """A walk of `updates` steps of scale `step`."""

    method: str = "plain"
    step: float = 0.5
    seed: int = 0
    updates: int = 40
    drift: float | None = None
    note: str | None = None
    lean: float = field(default=0.0, metadata=LATER)


@dataclass(frozen=True)
class WalkEngine:
    """Steps a block of walks together; every finished walk leaves a line in `log`.

    The method "other" has a metric of its own, `height`.
    """

    log: Path
    block_size: int = 2
    modules: tuple[str, ...] = ("lib.runs.files",)
    packages: tuple[str, ...] = ()
    pause: float = 0.0  # seconds per step
    fail: str = ""  # the method whose blocks raise
    shift: float = 0.0  # added to every reward: another machine's rounding, or a bug

    def block_key(self, config: Walk) -> tuple[str, int]:
        """Walks of one method and length go together."""
        return config.method, config.updates

    def cost(self, block: Sequence[Walk]) -> float:
        """Seconds of a block, which takes as long as a full one."""
        return 0.01 * self.block_size * block[0].updates

    def run(self, configs: Sequence[Walk], checkpoint: runs.Checkpoint) -> list[pd.DataFrame]:
        """Every walk's place after each step; randomness comes from its seed and the step."""
        if configs[0].method == self.fail:
            raise FloatingPointError(f"{self.fail} went wrong")
        updates = configs[0].updates
        places, start = np.zeros((len(configs), updates + 1)), 0
        stored = checkpoint.load()
        if stored is not None:
            places, start = stored[0]["places"].numpy(), stored[1]["step"]
        for step in range(start, updates):
            for row, config in enumerate(configs):
                noise = np.random.default_rng((config.seed, step)).normal()
                places[row, step + 1] = places[row, step] + config.step * noise
            time.sleep(self.pause)
            checkpoint.progress(step + 1, updates, place=round(places[0, step + 1], 2))
            if checkpoint.due():
                checkpoint.save({"places": torch.from_numpy(places)}, {"step": step + 1})
        with self.log.open("a") as log:
            log.writelines(f"{runs.identity(config)}\n" for config in configs)
        return [self._table(*pair) for pair in zip(configs, places, strict=True)]

    def _table(self, config: Walk, places: np.ndarray) -> pd.DataFrame:
        steps = np.arange(len(places))
        table = pd.DataFrame(
            {"update": steps, "reward": places + self.shift, "seconds_training": steps * self.pause}
        )
        return table.assign(height=np.abs(places)) if config.method == "other" else table

    def computed(self) -> list[str]:
        """The identities in the log, in order of finishing."""
        return self.log.read_text().split() if self.log.exists() else []


def grid(
    methods: Sequence[str] = ("plain", "other"), seeds: int = 3, updates: int = 40
) -> list[Walk]:
    """All methods at all seeds."""
    return [Walk(method, seed=seed, updates=updates) for method in methods for seed in range(seeds)]


def experiments(
    engine: WalkEngine, stages: Sequence[Callable], fragile: bool = False,
    assumed: Sequence[Callable] = (),
) -> types.SimpleNamespace:  # fmt: skip
    """What `lib.experiments` is to the commands: two chapters with these stages and this engine.

    Args: assumed: the stages of a plan, which has no results to choose by.
    """

    def check_chapter(name: str) -> str:
        if name not in ("walks", "other"):
            raise ValueError(f"chapter must be walks or other, got {name!r}")
        return name

    chapter = types.SimpleNamespace(jobs=1, fragile=lambda run, metric: fragile)
    return types.SimpleNamespace(
        CHAPTERS=dict.fromkeys(("walks", "other"), chapter),
        check_chapter=check_chapter,
        profile_named=lambda chapter, name: types.SimpleNamespace(device="cpu"),
        stages=lambda chapter, profile, choose=None: list(assumed if choose else stages),
        assumer="assumer",
        engine=lambda chapter, device: engine,
    )


def work(configs: Sequence[Any], root: Path, engine: runs.Engine, interval: float = 20.0) -> None:
    """Compute in this process; the target of the processes that tests start."""
    runs.compute(configs, runs.Store(root, interval), engine, jobs=1, say=lambda text: None)


def killed(
    configs: Sequence[Any], root: Path, engine: runs.Engine, saves: int, seconds: float
) -> None:
    """As `work` with a checkpoint after every step; is killed some seconds after so many of them,
    unless all is done before."""
    save, counter = runs.Checkpoint.save, itertools.count(1)

    def counted(checkpoint: runs.Checkpoint, *state) -> None:
        save(checkpoint, *state)
        if next(counter) == saves:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    runs.Checkpoint.save = counted  # of this process, which is a test's own
    work(configs, root, engine, interval=0.0)


def exit_code(process: BaseProcess, seconds: float = 120) -> int:
    """How a process ended. Raises: AssertionError if it has not within so many seconds."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"a process has not ended within {seconds} s")
    return process.exitcode

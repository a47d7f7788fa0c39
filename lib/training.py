"""One block of runs from update 0 to the end: rows of the result table, resumable. Any problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib.finetune import Diverged, Schedule, State, fine_tune
from lib.methods import Hyper, Method
from lib.timing import Clock

EARLY = (1, 2, 3, 6, 10)
COUNTERS = ("iteration", "step", "updates", "samples")


class TrainedProblem(Protocol):
    """What `Training` asks of a problem beyond `lib.finetune.Problem`."""

    method: Method
    clock: Clock
    shown: Mapping[str, str]  # what stands beside the progress bar: label -> metric

    def initial_state(self) -> State:
        """The state before the first update."""

    def evaluate(self, state: State) -> dict[str, Tensor]:
        """Metrics of the present policy, (runs,) or () each."""

    def resumable(self, state: State) -> bool:
        """Whether `save` now holds all that a resumed run needs."""

    def save(self, state: State) -> dict[str, Tensor]:
        """The tensors of policy and sampler."""

    def load(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Puts them back."""


def evaluated_updates(updates: int, evaluations: int) -> list[int]:
    """Which updates get a row: 0, `evaluations` evenly to the last, and as many in the first 100.

    Runs of different length (inner steps) can so be compared over their first 100 updates. A few
    early updates are added, where a fast method crosses from 0 to 50 nats within two rows.
    """
    spans = {min(updates, 100), updates}
    points = [np.linspace(0, span, min(evaluations, span) + 1) for span in spans]
    early = [point for point in EARLY if point <= updates]
    return sorted({int(round(point)) for point in np.concatenate([*points, early])})


class Training:
    """Runs that train together.

    Args: problem; schedule, hyper: of its method; points: the updates that get a row; runs: how
        many of the problem's runs are asked for (a stack may be filled up with copies).
    """

    def __init__(
        self, problem: TrainedProblem, schedule: Schedule, hyper: Hyper, points: list[int],
        runs: int = 1,
    ):  # fmt: skip
        self.problem, self.schedule, self.hyper = problem, schedule, hyper
        self.points, self.runs = points, runs
        self.clock = problem.clock
        self.state = problem.initial_state()
        self.rows: list[dict[str, Any]] = []
        self.sums: dict[str, Tensor] = {}

    def train(self, checkpoint) -> None:
        """Runs to the end, saving to `checkpoint` whenever one is due."""
        if not self.rows:
            self._evaluate(checkpoint)
        problem = self.problem
        updates = fine_tune(self.state, problem, problem.method, self.schedule, self.hyper)
        try:
            while (metrics := self._next(updates)) is not None:
                self._accumulate(metrics)
                if self.state.updates in self.points:
                    self._evaluate(checkpoint)
                if checkpoint.due() and problem.resumable(self.state):
                    checkpoint.save(*self.save())
        except Diverged:
            for update in self.points[len(self.rows) :]:  # the policies stay as they are now
                self.state.updates = update
                self._evaluate(checkpoint)

    def _next(self, updates: Iterator) -> dict[str, Tensor] | None:
        """The next update's metrics; its time outside sampling and scoring is training time."""
        with self.clock.measure("training"):
            return next(updates, None)

    def _accumulate(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["updates"] = self.sums.get("updates", 0.0) + 1.0

    def _evaluate(self, checkpoint) -> None:
        """Adds one row per run; training metrics are means over the updates since the last row."""
        with self.clock.measure("evaluation"):
            metrics = self.problem.evaluate(self.state)
        count = self.sums.pop("updates", 1.0)
        metrics |= {name: total / count for name, total in self.sums.items()}
        metrics["diverged"] = ~self.state.policy.alive
        self.sums = {}
        share = {f"seconds_{k}": v / self.runs for k, v in self.clock.seconds.items()}
        counters = {"update": self.state.updates, "samples": self.state.samples}
        values = {k: v.flatten()[: self.runs].tolist() for k, v in metrics.items()}
        self.rows.append({**counters, **share, **values})
        shown = {label: f"{np.mean(values[metric]):.3g}"
                 for label, metric in self.problem.shown.items()}  # fmt: skip
        checkpoint.progress(self.state.updates, self.schedule.updates, **shown)

    def tables(self) -> list[pd.DataFrame]:
        """One table per run, in the order of the runs."""
        tables = []
        for i in range(self.runs):
            rows = [{k: v[i] if isinstance(v, list) else v for k, v in row.items()}
                    for row in self.rows]  # fmt: skip
            tables.append(_typed(pd.DataFrame(rows)))
        return tables

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON from which `restore` continues with the same numbers."""
        state = self.state
        sums = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self.sums.items()}
        meta = {
            "counters": {k: getattr(state, k) for k in COUNTERS},
            "coefficient": state.controller and state.controller.coefficient,
            "moments": None if (found := state.moments.sums) is None else found.tolist(),
            "rows": self.rows, "sums": sums, "seconds": self.clock.seconds,
        }  # fmt: skip
        return self.problem.save(state), meta

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        state = self.state
        self.problem.load(state, tensors)
        for name, value in meta["counters"].items():
            setattr(state, name, value)
        if state.controller is not None:
            state.controller.coefficient = meta["coefficient"]
        self.rows = list(meta["rows"])
        device = state.policy.alive.device
        if (found := meta["moments"]) is not None:
            state.moments.sums = torch.tensor(found, dtype=torch.float64, device=device)
        self.sums = {k: torch.tensor(v, device=device) if k != "updates" else v
                     for k, v in meta["sums"].items()}  # fmt: skip
        self.clock.restore(meta["seconds"])


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """float32 for metrics, integers for counters: what the result table stores."""
    floats = table.select_dtypes("float64").columns
    return table.astype({**dict.fromkeys(floats, "float32"), "update": "int32", "samples": "int32"})


def run(training: Training, checkpoint) -> list[pd.DataFrame]:
    """Resumes where `checkpoint` left off, trains to the end, and returns the tables."""
    saved = checkpoint.load()
    if saved is not None:
        training.restore(*saved)
    training.train(checkpoint)
    return training.tables()

"""Trains stacks of bandit runs and returns their result tables: the `Engine` of `lib.runs`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib.bandit.config import BanditRun
from lib.bandit.policy import Scorer
from lib.bandit.problem import BanditProblem
from lib.finetune import Diverged, State, fine_tune

# Runs trained as one stack. A short stack keeps the activations of a layer near the cache; a fixed
# one (filled up with copies) makes a run's numbers independent of what stands beside it.
BLOCK = 10
EARLY = (1, 2, 3, 6, 10)


def evaluated_updates(updates: int, evaluations: int) -> list[int]:
    """Which updates get a row: 0, `evaluations` evenly to the last, and as many in the first 100.

    Runs of different length (inner steps) can so be compared over their first 100 updates. A few
    early updates are added, where a fast method crosses from 0 to 50 nats within two rows.
    """
    spans = {min(updates, 100), updates}
    points = [np.linspace(0, span, min(evaluations, span) + 1) for span in spans]
    early = [point for point in EARLY if point <= updates]
    return sorted({int(round(point)) for point in np.concatenate([*points, early])})


class Stack:
    """One block of runs from update 0 to the end, resumable after any update."""

    def __init__(self, runs: Sequence[BanditRun], device: str = "cpu"):
        self.runs, self.config = list(runs), runs[0]
        width = 1 if self.config.alone else BLOCK
        padded = self.runs + [runs[-1]] * (width - len(runs))
        self.problem = BanditProblem(padded, device)
        self.clock = self.problem.clock
        self.hyper = self.config.hyper
        self.state: State = self.problem.initial_state()
        self.rows: list[dict[str, Any]] = []
        self.sums: dict[str, Tensor] = {}
        self.points = evaluated_updates(self.config.updates, self.config.evaluations)

    def train(self, checkpoint) -> None:
        """Runs to the end, saving to `checkpoint` whenever one is due."""
        if not self.rows:
            self._evaluate()
        problem, schedule = self.problem, self.config.schedule
        updates = fine_tune(self.state, problem, problem.method, schedule, self.hyper)
        try:
            while (metrics := self._next(updates)) is not None:
                self._accumulate(metrics)
                if self.state.updates in self.points:
                    self._evaluate()
                    checkpoint.progress(self.state.updates, schedule.updates)
                if checkpoint.due():
                    checkpoint.save(*self.save())
        except Diverged:
            self._finish_diverged()

    def _next(self, updates: Iterator) -> dict[str, Tensor] | None:
        """The next update's metrics; its time outside sampling and scoring is training time."""
        with self.clock.measure("training"):
            return next(updates, None)

    def _finish_diverged(self) -> None:
        """Every run has diverged: the rest of the rows are those of the frozen policies."""
        for update in self.points[len(self.rows) :]:
            self.state.updates = update
            self._evaluate()

    def _accumulate(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["updates"] = self.sums.get("updates", 0.0) + 1.0

    def _evaluate(self) -> None:
        """Adds one row per run; training metrics are means over the updates since the last row."""
        with self.clock.measure("evaluation"):
            metrics = self.problem.evaluate(self.state)
        count = self.sums.pop("updates", 1.0)
        metrics |= {name: total / count for name, total in self.sums.items()}
        metrics["diverged"] = ~self.state.policy.alive
        self.sums = {}
        share = {f"seconds_{k}": v / len(self.runs) for k, v in self.clock.seconds.items()}
        counters = {"update": self.state.updates, "samples": self.state.samples}
        values = {k: v[: len(self.runs)].tolist() for k, v in metrics.items()}
        self.rows.append({**counters, **share, **values})

    def tables(self) -> list[pd.DataFrame]:
        """One table per run, in the order of the runs."""
        tables = []
        for i in range(len(self.runs)):
            rows = [{k: v[i] if isinstance(v, list) else v for k, v in row.items()}
                    for row in self.rows]  # fmt: skip
            tables.append(_typed(pd.DataFrame(rows)))
        return tables

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON from which `restore` continues with the same numbers."""
        state = self.state
        tensors = {f"policy.{k}": v for k, v in state.policy.state_dict().items()}
        tensors |= {f"behaviour.{k}": v.contiguous() for k, v in state.behaviour.parameters.items()}
        counters = {k: getattr(state, k) for k in ("iteration", "step", "updates", "samples")}
        sums = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self.sums.items()}
        meta = {"counters": counters, "rows": self.rows, "sums": sums,
                "seconds": self.clock.seconds}  # fmt: skip
        return tensors, meta

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        state = self.state
        part = {p: {k[len(p) + 1 :]: v for k, v in tensors.items() if k.startswith(p + ".")}
                for p in ("policy", "behaviour")}  # fmt: skip
        state.policy.load_state_dict(part["policy"])
        state.behaviour = Scorer(
            part["behaviour"], len(state.policy.flat), state.policy.arch, state.policy.shift
        )
        for name, value in meta["counters"].items():
            setattr(state, name, value)
        self.rows = list(meta["rows"])
        self.sums = {k: torch.tensor(v) if isinstance(v, list) else v
                     for k, v in meta["sums"].items()}  # fmt: skip
        self.clock.restore(meta["seconds"])


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """float32 for metrics, integers for counters: what the result table stores."""
    floats = table.select_dtypes("float64").columns
    return table.astype({**dict.fromkeys(floats, "float32"), "update": "int32", "samples": "int32"})


class BanditEngine:
    """How `lib.runs` computes bandit runs: which may be stacked, what they cost, how they train."""

    block_size = BLOCK
    modules = ("lib.bandit.engine",)

    def __init__(self, device: str = "cpu"):
        self.device = device

    def block_key(self, config: BanditRun) -> tuple:
        return config.stack_key

    def cost(self, config: BanditRun) -> float:
        """Seconds of one run on one core of the machine that the constants were measured on."""
        schedule = config.schedule
        hundreds = config.prompts * config.completions * config.length / 900
        drawn = schedule.iterations * config.sets * hundreds
        evaluations = min(config.evaluations, config.updates) + 1
        return 0.010 * drawn + 0.012 * schedule.updates * hundreds + 0.025 * evaluations

    def run(self, configs: Sequence[BanditRun], checkpoint) -> list[pd.DataFrame]:
        """Trains `configs` (one block) and returns one result table for each, in order.

        Raises: ValueError if they cannot be one block.
        """
        if len(configs) > BLOCK:
            raise ValueError(f"a block holds at most {BLOCK} runs, got {len(configs)}")
        stack = Stack(configs, self.device)
        saved = checkpoint.load()
        if saved is not None:
            stack.restore(*saved)
        stack.train(checkpoint)
        return stack.tables()

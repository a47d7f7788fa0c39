"""Trains stacks of bandit runs and returns their result tables: the `Engine` of `lib.runs`."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lib.bandit.config import BanditRun
from lib.bandit.problem import BanditProblem
from lib.methods import get
from lib.training import Training, evaluated_updates, run

# Runs trained as one stack. A short stack keeps the activations of a layer near the cache; a fixed
# one (filled up with copies) makes a run's numbers independent of what stands beside it.
BLOCK = 10


def width(config: BanditRun) -> int:
    """How many runs a block of such runs trains, the copies that fill it up among them."""
    return 1 if config.alone else BLOCK


def stack(runs: Sequence[BanditRun], device: str = "cpu") -> Training:
    """One block of runs, filled up with copies of the last one; a lone run is not."""
    config = runs[0]
    padded = [*runs, *[runs[-1]] * (width(config) - len(runs))]
    points = evaluated_updates(config.updates, config.evaluations)
    return Training(BanditProblem(padded, device), config.schedule, config.hyper, points, len(runs))


class BanditEngine:
    """How `lib.runs` computes bandit runs: which may be stacked, what they cost, how they train."""

    block_size = BLOCK
    modules = ("lib.bandit.engine",)

    def __init__(self, device: str = "cpu"):
        self.device = device

    def block_key(self, config: BanditRun) -> tuple:
        return config.stack_key

    def cost(self, block: Sequence[BanditRun]) -> float:
        """Seconds of a block on one core of the machine that the constants were measured on."""
        config = block[0]
        schedule = config.schedule
        hundreds = config.prompts * config.completions * config.length / 900
        drawn = schedule.iterations * config.sets * hundreds
        method = get(config.method)
        loss = method.carriers(config.hyper) or config.completions
        draw = 0.009 + 0.005 * ("reference" in method.needs)
        update = 0.0015 + 0.0165 * hundreds * loss / config.completions
        update += 0.0025 * hundreds * (config.reference_dropout > 0)
        evaluations = len(evaluated_updates(config.updates, config.evaluations))
        run = draw * drawn + update * schedule.updates + 0.034 * evaluations
        return width(config) * run

    def run(self, configs: Sequence[BanditRun], checkpoint) -> list[pd.DataFrame]:
        """Trains `configs` (one block) and returns one result table for each, in order.

        Raises: ValueError if they cannot be one block.
        """
        if len(configs) > BLOCK:
            raise ValueError(f"a block holds at most {BLOCK} runs, got {len(configs)}")
        return run(stack(configs, self.device), checkpoint)

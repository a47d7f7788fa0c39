"""Trains one language-model run and returns its result table: the `Engine` of `lib.runs`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import torch

from lib.lm.config import TINY, LengthRun, parameters
from lib.lm.policy import has_dtype
from lib.lm.problem import LengthProblem, check_length
from lib.training import Training, run


class LengthEngine:
    """How `lib.runs` computes length runs: one at a time, each in a process of its own."""

    block_size = 1
    modules: tuple[str, ...] = ("lib.lm.engine",)
    packages = ("transformers", "tokenizers", "peft")
    problem: type[LengthProblem] = LengthProblem

    def __init__(self, device: str = "cpu"):
        self.device = device

    def check(self, configs: Sequence[LengthRun]) -> None:
        """Before any run has begun. Raises: RuntimeError for bfloat16 on a GPU that has none;
        ValueError where completions may be longer than a policy has positions for."""
        for dtype in {config.dtype for config in configs}:
            _check_dtype(dtype, self.device)
        kinds = {(c.policy_folder, c.reward_folder, c.pairs_file, c.label, c.max_tokens): c
                 for c in configs}  # fmt: skip
        for config in kinds.values():
            check_length(config)

    def block_key(self, config: LengthRun) -> LengthRun:
        return config

    def cost(self, block: Sequence[LengthRun]) -> float:
        """Seconds of a block on one core."""
        return sum(map(self.seconds, block))

    def seconds(self, config: LengthRun) -> float:
        """Seconds of one run on one core: the shipped policy's, times how much larger this one is
        (of a larger one that overstates it: its products are the quicker ones)."""
        schedule = config.schedule
        drawn = schedule.iterations * schedule.batch / 64
        shipped = 0.3 * drawn + 0.3 * schedule.updates + 0.8 * config.evaluations
        return shipped * parameters(config.policy_folder) / parameters(TINY / "policy")

    def run(self, configs: Sequence[LengthRun], checkpoint) -> list[pd.DataFrame]:
        """Trains `configs` (one run) and returns its table.

        Raises: ValueError for several, or what `check` raises.
        """
        (config,) = configs
        self.check(configs)
        with _without_denormals():
            problem = self.problem(config, self.device)
            return run(Training(problem, config.schedule, config.hyper, config.points), checkpoint)


def _check_dtype(dtype: str, device: str) -> None:
    """Raises: RuntimeError for a dtype that the device would emulate, many times slower."""
    if not has_dtype(torch.device(device), dtype):
        raise RuntimeError("this GPU has no bfloat16: -y 'options: {dtype: float16}' (a chapter), "
                           "--option dtype=float16 (lib.lm.run)")  # fmt: skip


@contextmanager
def _without_denormals() -> Iterator[None]:
    """Numbers below 1e-38 are 0: with them a policy that collapses takes three times as long."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)

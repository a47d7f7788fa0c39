"""A full-scale run for `lib.training`: a length problem's loop, with a judge that looks on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from lib.lm.batches import unpadded
from lib.lm.engine import LengthEngine
from lib.lm.full_scale import SCORES, FullScaleRun, judge_source
from lib.lm.gold import kept_judge
from lib.lm.models import load_tokenizer
from lib.lm.problem import LengthProblem
from lib.lm.text import Prompt, from_text
from lib.lm.unchanged import kept_while_unchanged
from lib.randomness import uniforms
from lib.rollouts import Rollout

SUBSET = 3  # stream of random numbers: which pairs a run sees (after those of `lib.lm.problem`)


class JudgedProblem(LengthProblem):
    """One run on preferences that a gold model gave. Methods are trained on the learned reward."""

    shown = {"proxy": "proxy", "KL": "kl_ref"}

    def __init__(self, config: FullScaleRun, device: str = "cpu", scores: Path | None = None):
        """Args: scores: the file of what judges have said; None for the checkout's."""
        self.judge = None  # found first: a missing one is said before anything is loaded
        if config.judge:
            self.judge = kept_judge(str(judge_source(config)), device, scores or SCORES)
        super().__init__(config, device)
        self.tokenizer, _ = load_tokenizer(config.policy_folder)
        self.instructions = instructions(config.pairs_file)

    def _pool(self, count: int) -> Tensor:
        """The training pairs that the run's seed draws, or all of them.

        Raises: ValueError if there are fewer than it asks for.
        """
        wanted = self.config.subset
        if wanted is None:
            return super()._pool(count)
        if wanted > count:
            raise ValueError(f"subset={wanted}: {self.config.pairs_file} has only {count}")
        return uniforms([self.config.seed], SUBSET, 0, (count,))[0].argsort()[:wanted]

    def _judged(self, batch: Rollout, update: int) -> dict[str, Tensor]:
        """`gold`: the judge's mean score, NaN at the updates it does not look at."""
        if self.judge is None:
            return {}
        if update not in self.config.judged:
            return {"gold": torch.tensor(math.nan)}
        rows = unpadded(batch.prompts, batch.prompt_mask)
        prompts = [self.instructions[tuple(row)] for row in rows]
        responses = self.tokenizer.batch_decode(
            unpadded(batch.completions[:, 0], batch.mask[:, 0]), skip_special_tokens=True
        )
        return {"gold": torch.tensor(self.judge.score(prompts, responses)).mean()}


@kept_while_unchanged("file", maxsize=4)
def instructions(file: Path) -> dict[tuple[int, ...], Prompt]:
    """The prompts of a file of pairs as the judge reads them, by their token ids."""
    table = pd.read_parquet(file, columns=["prompt", "instruction"])
    return {tuple(map(int, ids)): from_text(text)
            for ids, text in zip(table["prompt"], table["instruction"], strict=True)}  # fmt: skip


class FullScaleEngine(LengthEngine):
    """How `lib.runs` computes full-scale runs: one at a time, each in a process of its own."""

    modules = ("lib.lm.judged",)

    def __init__(self, device: str = "cpu", scores: Path | None = None):
        super().__init__(device)
        self.scores = scores

    def problem(self, config: FullScaleRun, device: str) -> JudgedProblem:
        return JudgedProblem(config, device, self.scores)

    def afresh(self, folder: Path) -> FullScaleEngine:
        """One whose judges know nothing of what they have said: the last digit of a score depends
        on which responses are read with it, and those are the ones that are not known yet."""
        return FullScaleEngine(self.device, folder / "gold.sqlite")

    def check(self, configs: Sequence[FullScaleRun]) -> None:
        """Before anything is computed, not when it comes to it: FileNotFoundError for a judge that
        is not there; and what `LengthEngine.check` raises."""
        super().check(configs)
        for judged in {(c.judge, c.prepared): c for c in configs if c.judge}.values():
            judge_source(judged)

    def seconds(self, config: FullScaleRun) -> float:
        """Seconds of one run on one core."""
        return super().seconds(config) + 15.0 * len(config.judged)

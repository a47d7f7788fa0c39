"""Preference data of the length problems: pairs of the SFT policy's own responses, and labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lib.allowed import one_of
from lib.lm.batches import padded, unpadded
from lib.lm.length import GIVEN, SKEW_MEAN, check_task, truncated
from lib.lm.policy import Scorer
from lib.randomness import uniforms

SPLITS = ("train", "validation")
SEED = 0  # of the pairs, and of the Skew data's cuts
BATCH = 128  # prompts decoded at once


@dataclass(frozen=True)
class Pairs:
    """Two responses to every prompt, as token ids: (P,) lists each. `eos` ends a response.

    Of preferences that were given, the first response is the preferred one.
    """

    prompts: list[list[int]]
    first: list[list[int]]
    second: list[list[int]]
    eos: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def _lengths(self, responses: list[list[int]]) -> np.ndarray:
        return np.array([len(r) - (bool(r) and r[-1] in self.eos) for r in responses])

    @cached_property
    def lengths(self) -> np.ndarray:
        """(P, 2) tokens without EOS."""
        return np.stack([self._lengths(self.first), self._lengths(self.second)], 1)

    def skewed(self, mean: float, seed: int = SEED) -> Pairs:
        """The Skew data: both responses cut short with probability 0.95 (`length.truncated`)."""
        both, _ = truncated([*self.first, *self.second], self.eos[0], mean, seed)
        return Pairs(self.prompts, both[: len(self)], both[len(self) :], self.eos)

    def rewards(self, task: str, target: float) -> np.ndarray:
        """(P, 2) gold rewards of the responses, in tokens."""
        lengths = self.lengths.astype(float)
        return -np.abs(lengths - target) if check_task(task) == "mode" else -lengths

    def preferred(self, task: str, target: float) -> np.ndarray:
        """(P, 2) 1 for the preferred response, 0 for the other; a tie is 0 twice."""
        if task == GIVEN:
            return np.tile([1.0, 0.0], (len(self), 1))
        rewards = self.rewards(task, target)
        return (rewards > rewards[:, ::-1]).astype(float)


def sample_pairs(
    policy: Scorer, prompts: list[list[int]], max_tokens: int, seed: int = SEED
) -> Pairs:
    """Two responses of `policy` to every prompt."""
    first, second = [], []
    for number, start in enumerate(range(0, len(prompts), BATCH)):
        part = prompts[start : start + BATCH]
        ids, mask = padded([p for p in part for _ in range(2)], policy.pad, "left",
                           str(policy.network.device))  # fmt: skip
        numbers = uniforms([seed], 0, number, (2 * len(part), max_tokens))[0]
        samples = policy.sample(ids, mask, numbers.to(ids.device))
        rows = unpadded(samples.completions, samples.mask)
        first += rows[::2]
        second += rows[1::2]
    return Pairs(prompts, first, second, tuple(policy.eos.tolist()))


def save(path: Path, splits: dict[str, Pairs], more: dict[str, pd.DataFrame] | None = None) -> None:
    """One parquet file with a row per pair; `more`: other columns of each split."""
    tables = [
        pd.DataFrame({"split": name, "prompt": p.prompts, "first": p.first, "second": p.second})
        for name, p in splits.items()
    ]
    if more:
        tables = [t.assign(**more[n]) for n, t in zip(splits, tables, strict=True)]
    pd.concat(tables, ignore_index=True).to_parquet(path, compression="zstd", index=False)


def load(path: Path, split: str, eos: tuple[int, ...]) -> Pairs:
    """The pairs of one split. Raises: ValueError for another split, FileNotFoundError."""
    one_of("split", split, SPLITS)
    table = pd.read_parquet(path)
    rows = table[table["split"] == split]
    columns = (rows[name].map(lambda ids: [int(i) for i in ids]).tolist()
               for name in ("prompt", "first", "second"))  # fmt: skip
    return Pairs(*columns, eos)


def of_task(pairs: dict[str, Pairs], task: str) -> dict[str, Pairs]:
    """A task's own data, by split: as sampled, or cut short for Skew."""
    if task != "skew":
        return pairs
    mean = skew_mean(pairs["train"])
    return {split: p.skewed(mean, SEED + i) for i, (split, p) in enumerate(pairs.items())}


def skew_mean(pairs: Pairs) -> float:
    """The exponential's mean of the Skew data: a quarter of the SFT policy's mean length."""
    return SKEW_MEAN * float(pairs.lengths.mean())


def as_tensors(pairs: Pairs, index: torch.Tensor, pad: int, device: str):
    """Some pairs as padded tensors: prompts (P, *), prompt mask, completions (P, 2, L), mask."""
    chosen = index.tolist()
    prompts, prompt_mask = padded([pairs.prompts[i] for i in chosen], pad, "left", device)
    rows = [r for i in chosen for r in (pairs.first[i], pairs.second[i])]
    ids, mask = padded(rows, pad, "right", device)
    shape = (len(chosen), 2, ids.shape[1])
    return prompts, prompt_mask, ids.view(shape), mask.view(shape)

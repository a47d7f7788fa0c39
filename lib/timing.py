"""Seconds by phase, for the wall-clock comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter

import torch

PHASES = ("sampling", "scoring", "training", "evaluation")


class Clock:
    """Wall-clock seconds spent in each of PHASES; a phase inside another counts for itself only.

    Args: device: what is measured there is waited for at both ends of a phase.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._inner = [0.0]

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return perf_counter()

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to `phase`. Raises: KeyError for an unknown phase."""
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = self._now() - start
            self.seconds[phase] += spent - self._inner.pop()
            self._inner[-1] += spent

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The time of the block counts for no phase, nor for the one that is being measured."""
        start = self._now()
        try:
            yield
        finally:
            self._inner[-1] += self._now() - start

    def charge(self, phase: str, seconds: float) -> None:
        """Adds seconds that were spent elsewhere: a share of work that several runs have in common.

        They count for `phase` alone, and not for the one that is being measured.
        """
        self.seconds[phase] += seconds

    def restore(self, seconds: Mapping[str, float]) -> None:
        self.seconds.update(seconds)

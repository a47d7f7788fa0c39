"""Seconds by phase, for the wall-clock comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter

import torch

PHASES = ("sampling", "scoring", "training", "evaluation")

Mark = float | torch.cuda.Event


class Clock:
    """Seconds spent in each of PHASES; a phase inside another counts for itself only.

    On a GPU phases end when it has done the work that they gave it. Nobody waits for that: marks
    are left in its queue, and are read when `seconds` is.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._parts: list[tuple[str, Mark, Mark]] = []  # phase, start and end, still to be added
        self._phases: list[str | None] = [None]  # those that have begun; None: counts for nothing
        self._since: Mark = 0.0  # of the last turn; nothing counts before the first

    @property
    def seconds(self) -> dict[str, float]:
        """Phase -> seconds so far; of a phase that goes on, up to the last one inside it."""
        for phase, start, end in self._parts:
            self._seconds[phase] += _elapsed(start, end)
        self._parts.clear()
        return self._seconds

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to `phase`. Raises: KeyError for an unknown phase."""
        self._seconds[phase]  # now, not when it is over
        with self._within(phase):
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The time of the block counts for no phase, nor for the one that is being measured."""
        with self._within(None):
            yield

    def charge(self, phase: str, seconds: float) -> None:
        """Adds seconds that were spent elsewhere: a share of work that several runs have in common.

        They count for `phase` alone, and not for the one that is being measured.
        """
        self._seconds[phase] += seconds

    def restore(self, seconds: Mapping[str, float]) -> None:
        self.seconds.update(seconds)

    @contextmanager
    def _within(self, phase: str | None) -> Iterator[None]:
        self._turn()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._phases.pop()

    def _turn(self) -> None:
        """What has passed since the last turn belongs to the innermost phase."""
        now, phase = self._mark(), self._phases[-1]
        if phase is not None:
            self._parts.append((phase, self._since, now))
        self._since = now

    def _mark(self) -> Mark:
        if not self.device.startswith("cuda"):
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        return torch.cuda.current_stream(self.device).record_event(event)


def _elapsed(start: Mark, end: Mark) -> float:
    """Seconds between two marks."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000

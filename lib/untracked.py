"""Runs outside the store: `Engine.run(configs, Untracked())` computes them and keeps nothing."""

from __future__ import annotations


class Untracked:
    """The checkpoint of a run that is neither saved nor watched."""

    def load(self) -> None:
        return None

    def due(self) -> bool:
        return False

    def progress(self, done: int, total: int, **shown: str) -> None:
        return None

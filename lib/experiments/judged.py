"""The full-scale chapter's engine, which looks for the judges before it starts."""

from __future__ import annotations

from collections.abc import Iterable

from lib.lm.full_scale import FullScaleRun, judge_source
from lib.lm.judged import FullScaleEngine


class CheckedEngine(FullScaleEngine):
    """One that says what is missing before anything is computed, and not when it comes to it."""

    def check(self, configs: Iterable[FullScaleRun]) -> None:
        """Raises: FileNotFoundError for a judge that is not there."""
        for judged in {(c.judge, c.prepared): c for c in configs if c.judge}.values():
            judge_source(judged)

"""Speed benchmarks: `python -m benchmarks` prints each as a ratio to a named baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Result:
    """One measured ratio.

    Args:
        name: of the benchmark, parts joined by "/".
        ratio: as `baseline` puts it, above 1 where ours is more.
        baseline: what it is measured against, with its settings.
        quantity: of the baseline, what the ratio compares.
        ours, theirs: seconds of the same work, here and for the baseline.
        threads: of ours, "1" or "2 processes x 1".
        limited_by: where the time goes.
        details: anything else worth keeping, as JSON values.
    """

    name: str
    ratio: float
    baseline: str
    ours: float
    theirs: float
    threads: str
    limited_by: str
    quantity: str = "the speed of"
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.ratio:.3g} times {self.quantity} {self.baseline}; "
            f"{_seconds(self.ours)} against {_seconds(self.theirs)}; threads: {self.threads}; "
            f"limited by: {self.limited_by}"
        )


@dataclass(frozen=True)
class Unmeasured:
    """A benchmark, or a setting of one, without a number.

    Args:
        name: as of a `Result`.
        reason: why there is none.
        failed: False where it was left out, since it needs what is not here.
    """

    name: str
    reason: str
    failed: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {'FAILED' if self.failed else 'skipped'}: {self.reason}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"

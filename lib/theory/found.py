"""What a check found: how many cases broke it, by how much, and the first that did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-9  # of two ways to compute one number, relative to 1 + its size
ROUNDING = 1e-12  # of a difference whose sign is asked for


@dataclass(frozen=True)
class Found:
    """Args: cases, violations: how many were tried and how many broke. deviation: the largest
    relative difference of what should be equal (0 for inequalities). example: the first violation.
    """

    cases: int
    violations: int = 0
    deviation: float = 0.0
    example: str = ""

    @property
    def share(self) -> float:
        """The share of cases that hold."""
        return 1 - self.violations / self.cases if self.cases else float("nan")


def together(*parts: Found) -> Found:
    """Several batches of cases as one."""
    return Found(
        sum(p.cases for p in parts), sum(p.violations for p in parts),
        max((p.deviation for p in parts), default=0.0),
        next((p.example for p in parts if p.example), ""),
    )  # fmt: skip


def equal(a: Tensor, b: Tensor, **shown: Tensor) -> Found:
    """Whether a = b within TOLERANCE of 1 + |b|, case by case along the first dimension."""
    off = (a - b).abs() / (1 + b.abs())
    worst = off.flatten(1).amax(-1) if off.dim() > 1 else off
    broken = ~(worst <= TOLERANCE)
    return Found(len(worst), int(broken.sum()), float(worst.max()), _example(broken, shown))


def positive(value: Tensor, where: Tensor | None = None, **shown: Tensor) -> Found:
    """Whether value > 0, up to rounding, in the cases `where` the premises hold. (n,)."""
    where = torch.ones_like(value, dtype=torch.bool) if where is None else where
    broken = where & ~(value > -ROUNDING)
    return Found(int(where.sum()), int(broken.sum()), 0.0, _example(broken, shown))


def same_sign(value: Tensor, margin: Tensor, where: Tensor | None = None, **shown) -> Found:
    """Whether margin decides the sign of value, where neither is within rounding of 0. (n,)."""
    clear = (value.abs() > ROUNDING) & (margin.abs() > ROUNDING)
    clear = clear if where is None else clear & where
    broken = clear & (value.sign() != margin.sign())
    return Found(int(clear.sum()), int(broken.sum()), 0.0, _example(broken, shown))


def _example(broken: Tensor, shown: dict[str, Tensor]) -> str:
    """ "p = (0.5, 0.3, 0.2), gap = -0.01" of the first broken case; log-probabilities as p, q."""
    if not broken.any():
        return ""
    first = int(broken.int().argmax())
    return ", ".join(f"{name} = {text(values[first])}" for name, values in shown.items())


def text(values: Tensor | float) -> str:
    """A number, or up to four of a vector's, for a reader."""
    if not isinstance(values, Tensor) or values.dim() == 0:
        return f"{float(values):.3g}"
    numbers = [f"{x:.3g}" for x in values.tolist()[:4]]
    return f"({', '.join(numbers)}{', ...' if len(values) > 4 else ''})"

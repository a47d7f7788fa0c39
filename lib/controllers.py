"""How hard a method is held to the reference policy while it trains."""

from __future__ import annotations

from dataclasses import dataclass

MOST = 0.2  # of the target: a larger error counts as this


@dataclass
class AdaptiveKL:
    """The coefficient of the KL penalty, steered to a target: Ziegler et al. 2019, section 2.2.

    After n completions whose mean KL to the reference was kl nats,
    coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon.

    Args:
        coefficient: reward per nat; the first value, and then the present one.
        target: nats per completion. horizon: completions over which a full correction is spread.
    """

    coefficient: float
    target: float
    horizon: float

    def update(self, kl: float, completions: int) -> None:
        error = min(max(kl / self.target - 1, -MOST), MOST)
        self.coefficient *= 1 + error * completions / self.horizon

"""The adaptive KL coefficient against the published rule."""

from __future__ import annotations

import pytest

from lib.controllers import AdaptiveKL


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 0.0064), (60.0, 1 + 0.2 * 0.0064), (0.0, 1 - 0.2 * 0.0064)],
)
def test_one_update_by_hand(kl, factor):
    controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    controller.update(kl, 64)
    assert controller.coefficient == pytest.approx(0.2 * factor)


def test_it_rises_until_the_target_is_kept_and_falls_below_it():
    """Where KL is 3 / coefficient it settles at the coefficient that gives the target."""
    controller = AdaptiveKL(0.2, target=6.0, horizon=1_000)
    for _ in range(2_000):
        controller.update(3 / controller.coefficient, 64)
    assert controller.coefficient == pytest.approx(0.5, rel=1e-3)

"""Statistics of curves: rows in any order, data frames and arrays alike, NaN, missing columns."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lib import stats

CURVE = {
    "update": [0, 1, 2, 3, 4, 5], "samples": [0, 64, 128, 192, 256, 320],
    "reward": [0.0, 0.8, 0.6, 0.9, 0.9, 1.0], "kl_ref": [0.0, 4.0, 8.0, 12.0, 16.0, 24.0],
    "kl_gen": [np.nan, 0.5, 2.0, 1.0, 0.2, np.nan], "seconds": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
}  # fmt: skip


def table(seeds=(7,), **changed):
    parts = [pd.DataFrame({**CURVE, **changed}).assign(seed=seed, run=f"r{seed}", target=0.55)
             for seed in seeds]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(("statistic", "value"), [
    ("final reward", 1.0),
    ("mean reward over updates", (0.4 + 0.7 + 0.75 + 0.9 + 0.95) / 5),
    ("reward at 10 nats", 0.75),
    ("final KL to reference", 24.0),
    ("peak KL to sampler", 2.0),
    ("speed to target", 1.0),
])  # fmt: skip
def test_a_statistic_of_a_curve_whatever_the_order_of_its_rows(statistic, value):
    rows = table(seeds=(9, 7)).sample(frac=1, random_state=0)
    found = stats.per_run(rows, statistic)
    assert found.index.tolist() == [7, 9]
    assert found.tolist() == pytest.approx([value, value])
    frame = rows[rows["seed"] == 7].sort_values("update")
    assert stats.STATISTICS[statistic](frame) == pytest.approx(value)


def test_a_target_that_is_not_kept_is_not_reached():
    late = table(reward=[0.0, 0.0, 0.6, 0.6, 0.6, 0.6])
    assert stats.reaching(late, 0.55) == float("inf")
    assert stats.per_run(late, "speed to target").tolist() == [0.0]


def test_what_cannot_be_taken_is_said():
    with pytest.raises(stats.MissingColumn, match="final gold needs 'gold'"):
        stats.per_run(table(), "final gold")
    with pytest.raises(ValueError, match="statistic must be one of"):
        stats.per_run(table(), "final rewards")
    twice = pd.concat([table(), table().assign(run="other")])
    with pytest.raises(ValueError, match="two runs of seed 7"):
        stats.per_run(twice, "final reward")


def test_a_run_without_a_finite_end_counts_as_zero():
    lost = table(reward=[0.0, 0.5, 0.5, 0.5, np.nan, np.nan])
    assert stats.per_run(lost, "final reward").tolist() == [0.0]

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


def test_a_limit_between_two_rows_is_read_off_the_line_between_them():
    """A row every 4 updates: 512 samples, then 1,024; 0.3, 0.5 and 0.9 there."""
    rows = pd.DataFrame({"update": [0, 4, 8], "samples": [0, 512, 1024], "reward": [0.3, 0.5, 0.9],
                         "run": "a", "seed": 7})  # fmt: skip
    found = stats.per_run(rows, "mean reward over the first 768 samples")[7]
    assert found == pytest.approx((512 * 0.4 + 256 * 0.6) / 768)
    found = stats.per_run(rows, "mean reward over the first 384 samples")[7]
    assert found == pytest.approx((0.3 + 0.45) / 2)


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


def test_who_never_moves_10_nats_has_its_best_reward():
    near = table(kl_ref=[0.0, 4.0, 8.0, 9.0, 9.0, 9.0], reward=[0.0, 0.8, 0.6, 0.9, 0.9, 0.7])
    assert stats.per_run(near, "reward at 10 nats").tolist() == [0.9]


@pytest.mark.parametrize("first", ["100 updates", "768 samples"])
def test_a_mean_over_the_first_of_them_has_its_limit_in_it(first):
    long = table(update=[0, 50, 100, 150, 200, 250], samples=[0, 384, 768, 1152, 1536, 1920])
    found = stats.per_run(long, f"mean reward over the first {first}")
    assert found.tolist() == pytest.approx([(0.4 + 0.7) / 2])


def test_a_margin_is_chosen_minus_rejected():
    ratios = table().assign(chosen_logratio=-1.0, rejected_logratio=-4.0)
    assert stats.per_run(ratios, "final margin").tolist() == [3.0]


def test_a_target_that_is_not_kept_is_not_reached():
    late = table(reward=[0.0, 0.0, 0.6, 0.6, 0.6, 0.6])
    assert stats.reaching(late, 0.55) == float("inf")
    assert stats.per_run(late, "speed to target").tolist() == [0.0]


def test_a_run_that_starts_at_its_target_has_no_speed():
    there = table(reward=[0.6, 0.8, 0.6, 0.9, 0.9, 1.0])
    found = stats.per_run(pd.concat([there, table(seeds=(8,))]), "speed to target")
    assert found.to_dict() == {8: 1.0}


def test_what_cannot_be_taken_is_said():
    with pytest.raises(stats.MissingColumn, match="final gold needs 'gold'"):
        stats.per_run(table(), "final gold")
    with pytest.raises(ValueError, match="statistic must be one of"):
        stats.per_run(table(), "final rewards")
    twice = pd.concat([table(), table().assign(run="other")])
    with pytest.raises(ValueError, match="two runs of seed 7"):
        stats.per_run(twice, "final reward")


def test_a_reward_that_is_lost_counts_as_the_lowest_of_all_runs():
    """Zero would be the best there is where rewards are negative."""
    lost = table(reward=[-3.0, -2.0, -2.0, -2.0, np.nan, np.nan])
    fine = table(seeds=(8,), reward=[-3.0, -9.0, -1.0, -1.0, -1.0, -1.0])
    found = stats.per_run(pd.concat([lost, fine]), "final reward")
    assert found.to_dict() == {7: -9.0, 8: -1.0}
    assert stats.per_run(lost, "final reward").tolist() == [-3.0]
    assert stats.per_run(lost, "mean reward over updates").tolist() == pytest.approx(
        [(-2.5 - 2 - 2 - 2.5 - 3) / 5]
    )
    proxy = lost.assign(proxy=lost["reward"])
    assert stats.per_run(proxy, "final proxy").tolist() == [-3.0]


def test_a_distance_that_is_lost_is_no_number_and_not_zero():
    lost = table(kl_ref=[0.0, 4.0, 8.0, 12.0, np.inf, np.nan])
    found = stats.per_run(pd.concat([lost, table(seeds=(8,))]), "final KL to reference")
    assert found.to_dict() == {8: 24.0}


def test_a_run_without_any_value_makes_a_statistic_missing():
    judged = table().assign(gold=[-2.0, -1.5, -1.0, -1.0, -1.0, -1.0])
    unjudged = table(seeds=(8,)).assign(gold=np.nan)
    assert stats.per_run(judged, "gain in gold").tolist() == [1.0]
    for name in ("final gold", "gain in gold"):
        with pytest.raises(stats.MissingColumn, match=f"{name} needs 'gold', which these results"):
            stats.per_run(pd.concat([judged, unjudged]), name)
    without = table().assign(target=np.nan)
    with pytest.raises(stats.MissingColumn, match="speed to target needs 'target'"):
        stats.per_run(without, "speed to target")


def test_the_clock_starts_at_the_first_evaluation():
    """Two runs that share an index; before update 0 only what evaluations look at is drawn."""
    parts = [
        pd.DataFrame({"run": run, "update": [0, 1, 2], "seconds_sampling": [before, before + 1, 5],
                      "seconds_scoring": [0.25, 0.5, 0.5], "seconds_training": [0.0, 2.0, 4.0],
                      "seconds_evaluation": [9.0, 18.0, 27.0]})
        for run, before in (("a", 0.5), ("b", 3.0))
    ]  # fmt: skip
    rows = pd.concat(parts).sample(frac=1, random_state=0)
    found = rows.assign(**stats.phases(rows), seconds=stats.seconds(rows))
    found = found.set_index(["run", "update"]).sort_index()
    assert found["sampling"].tolist() == [0.0, 1.0, 4.5, 0.0, 1.0, 2.0]
    assert found["scoring"].tolist() == [0.0, 0.25, 0.25] * 2
    assert found["seconds"].tolist() == [0.0, 3.25, 8.75, 0.0, 3.25, 6.25]


@pytest.mark.parametrize(("name", "value"), [
    ("reward at 20 nats", 0.95), ("mean reward over samples", 416 / 768),
    ("final chosen log-ratio", -3), ("final rejected log-ratio", -4), ("final margin", 1),
    ("change of mass on tokens of the data", -0.2), ("mean proxy over updates", 1.48),
    ("final pair accuracy", 0.8),
])  # fmt: skip
def test_each_statistic_reads_its_own_column(name, value):
    found = table(samples=[0, 512, 576, 640, 704, 768])
    found = found.assign(
        chosen_logratio=[0.0] * 5 + [-3], rejected_logratio=[0.0] * 5 + [-4],
        support_share=[0.9] + [0.7] * 5, proxy=2 * found["reward"],
        held_out_accuracy=[0.5] * 5 + [0.8],
    )  # fmt: skip
    assert stats.per_run(found, name).tolist() == pytest.approx([value])

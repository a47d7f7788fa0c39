"""Tables against numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from lib import experiments, tables

SMOKE = experiments.profile_named("on_policy", "smoke")
FULL = experiments.profile_named("on_policy", "full")


def runs(values, rate=0.01, method="rwr", entropy=1.0, diverged=False, first_seed=0):
    """One run per final reward: 11 rows from 0 straight up to it."""
    parts = []
    for i, value in enumerate(values):
        seed = first_seed + i
        update = np.arange(11) * 10
        parts.append(pd.DataFrame({
            "run": f"{method}-{rate}-{seed}", "method": method, "reward_function": "R1",
            "seed": seed, "learning_rate": rate, "update": update, "samples": update * 100,
            "seconds": update / 10, "reward": value * np.minimum(1, update / 50),
            "entropy": entropy, "diverged": diverged,
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def test_numbers_are_rounded_and_text_is_left_alone():
    text = tables.shown(pd.DataFrame({"a": ["x"], "b": [0.126], "c": [3]})).data
    assert text.splitlines() == ["| a | b | c |", "| --- | ---: | ---: |", "| x | 0.13 | 3 |"]


def test_interval_text():
    assert tables.interval_text([0.5]) == "0.50"
    assert tables.interval_text([0.4, 0.6], digits=1) == "0.5 (-0.8 to 1.8)"  # t = 12.7, se = 0.1
    assert tables.interval_text([0.4, 0.6], signed=True, digits=1) == "+0.5 (-0.8 to +1.8)"


def test_paired_differences_use_only_common_seeds():
    a, b = runs([0.5, 0.7, 0.9]), runs([0.4, 0.4], first_seed=1)
    assert tables.paired(a, b, "final reward").to_dict() == pytest.approx({1: 0.3, 2: 0.5})


def test_effects_are_means_of_paired_differences():
    found = tables.effects({"x": (runs([0.5, 0.7]), runs([0.4, 0.4]))}, "final reward")
    assert found["effect"][0] == pytest.approx(0.2) and found["n"][0] == 2
    assert "+0.200 (" in tables.effects_shown({"final": found}).data


def test_cost_to_reach_counts_the_runs_that_never_do():
    found = tables.cost_to_reach({"k = 1": runs([1.0, 1.0, 0.5])}, 0.9).iloc[0]
    assert found["reached by"] == "2 of 3"
    assert (found["updates"], found["completions"], found["seconds"]) == (50, 5000, 5)


def test_cost_to_reach_of_nobody_is_unknown():
    found = tables.cost_to_reach({"k = 1": runs([0.5])}, 0.9).iloc[0]
    assert found["reached by"] == "0 of 1" and np.isnan(found["updates"])


def test_collapse_counts_each_run_once():
    table = pd.concat([
        runs([1.0, 1.0], entropy=0.0),
        runs([0.7], rate=0.1, entropy=0.0),
        runs([1.0, 0.2], rate=0.3, entropy=2.0),
        runs([0.0], rate=0.5, entropy=0.0, diverged=True),
    ], ignore_index=True)  # fmt: skip
    (row,) = tables.collapse(table).to_dict("records")
    counts = ["runs", "still varies", "one answer, the best", "one answer, not the best",
              "non-finite"]  # fmt: skip
    assert [row[name] for name in counts] == [6, 2, 2, 1, 1]


def test_by_rate_is_a_mean_over_seeds():
    parts = {1: pd.concat([runs([0.5, 0.7], 0.1), runs([0.9], 0.01)]), 10: runs([0.2], 0.1)}
    found = tables.by_rate(parts, "final reward", "k")
    assert found["learning rate"].tolist() == ["0.1", "0.01"]
    assert found["k = 1"].tolist() == pytest.approx([0.6, 0.9])
    assert found["k = 10"][0] == pytest.approx(0.2) and np.isnan(found["k = 10"][1])


def test_agreement_is_the_largest_gap_at_the_same_seed_and_rate():
    a = pd.concat([runs([0.5, 0.7], 0.1), runs([0.9], 0.01)])
    b = pd.concat([runs([0.5, 0.6], 0.1), runs([0.9], 0.01)])
    found = tables.agreement(a, b).set_index("learning rate")
    assert found["largest difference in reward"].to_dict() == pytest.approx({"0.01": 0, "0.1": 0.1})
    assert found["pairs of runs"].to_dict() == {"0.01": 1, "0.1": 2}


def test_rates_near_the_best():
    swept = pd.concat([runs([0.9], 0.1), runs([0.89], 0.01), runs([0.5], 0.001)])
    assert tables.near_best(swept) == "2 of 3"


def test_grid_names_every_value_of_a_dial_once():
    found = tables.grid(experiments.settings("on_policy", FULL), FULL)
    (row,) = found[found["methods"].eq("Best-of-N (on-policy)") & found["varied"].eq("`sets`")
                   ].to_dict("records")  # fmt: skip
    assert row["values"] == "2; 5; 10; 50" and row["reward"] == "R1, R2"
    assert row["seeds"] == len(FULL.report_seeds)
    assert found["seeds"].min() > 0 and found.duplicated().sum() == 0

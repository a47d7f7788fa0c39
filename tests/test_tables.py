"""Tables against numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from lib import experiments, tables
from lib.runs import columns

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
    assert tables.interval_text([0.001, -0.003], signed=True) == "0.00 (-0.03 to +0.02)"


def test_what_rounds_to_zero_has_no_sign():
    found = [tables.number_text(x, True) for x in (-0.004, 0.004, 0.006)]
    assert found == ["0.00", "0.00", "+0.01"]


def test_paired_differences_use_only_common_seeds():
    a, b = runs([0.5, 0.7, 0.9]), runs([0.4, 0.4], first_seed=1)
    assert tables.paired(a, b, "final reward").to_dict() == pytest.approx({1: 0.3, 2: 0.5})


def test_effects_are_means_of_paired_differences():
    found = tables.effects({"x": (runs([0.5, 0.7]), runs([0.4, 0.4]))}, "final reward")
    assert found["effect"][0] == pytest.approx(0.2) and found["n"][0] == 2
    assert "+0.20 (" in tables.effects_shown({"final": found}, digits=2).data


@pytest.mark.parametrize(("task", "titles"), [
    ("min", ["gold reward", "proxy", "gold, mean"]), ("given", ["proxy", "proxy, mean"]),
])  # fmt: skip
def test_a_task_without_a_rule_has_no_gold_reward_beside_its_proxy(task, titles):
    parts = {"a": runs([0.5]).assign(task=task, proxy=0.5)}
    columns = {"final reward": "gold reward", "final proxy": "proxy",
               "mean reward over updates": "gold, mean"}  # fmt: skip
    assert list(tables.ends(parts, columns)) == ["setting", *titles, "seeds"]


def test_settings_within_a_bound_are_so_by_every_statistic():
    first = pd.DataFrame({"low": [-0.01, -0.01, -0.3], "high": [0.02, 0.01, 0.0]})
    second = pd.DataFrame({"low": [0.0, 0.0, -np.inf], "high": [0.0, 0.05, np.inf]})
    assert [tables.within([first, second], bound) for bound in (0.02, 0.1)] == [1, 2]


def test_cost_to_reach_counts_a_run_that_never_does_as_slower_than_all():
    found = tables.cost_to_reach({"k = 1": runs([1.0, 1.0, 0.5])}, 0.9).iloc[0]
    assert found["reached by"] == "2 of 3"
    assert (found["updates"], found["completions"], found["seconds"]) == (50, 5000, 5)
    half = tables.cost_to_reach({"k = 1": runs([1.0, 0.5, 0.5])}, 0.9)
    assert half["reached by"].tolist() == ["1 of 3"] and np.isinf(half["seconds"]).all()
    assert tables.shown(half).data.splitlines()[-1].count("not reached") == 3


def test_whole_runs_spend_what_comes_after_the_first_evaluation():
    phases = {"seconds_sampling": [3.0, 4.0], "seconds_scoring": [0.0, 0.5],
              "seconds_training": [0.0, 2.0]}  # fmt: skip
    rows = pd.DataFrame({"run": "r", "seed": 5, "update": [0, 9], "samples": [0, 64],
                         "length": [50.0, 1.0], **phases})  # fmt: skip
    (found,) = tables.spent({"a": rows}).to_dict("records")
    assert [found[f"{p}, s"] for p in ("sampling", "scoring", "training")] == [1.0, 0.5, 2.0]


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
    assert tables.count_near_best(pd.Series([0.9, 0.89, 0.87])) == 2


def test_the_plateau_is_where_most_methods_end_at_the_ceiling():
    wide = pd.concat([runs([0.99], 0.1), runs([1.0], 0.01), runs([0.4], 0.001)])
    narrow = pd.concat([runs([1.0], 0.1), runs([0.9], 0.01), runs([0.4], 0.001)])
    found = tables.plateau({"a": wide, "b": wide, "c": narrow})
    assert {name: found[name] for name in ("low", "high", "factor", "n")} == {
        "low": "0.01", "high": "0.1", "factor": "10", "n": "2 of 3"}  # fmt: skip
    assert (found["from_a"], found["from_c"]) == ("0.01", "0.1")
    low = tables.plateau({"a": runs([0.4], 0.001)})
    assert set(low.values()) == {"-"} and "from_a" in low


def test_grid_names_every_value_of_a_dial_once():
    found = tables.grid(experiments.settings("on_policy", FULL), FULL)
    (row,) = found[found["methods"].eq("Best-of-N (on-policy)") & found["varied"].eq("`sets`")
                   ].to_dict("records")  # fmt: skip
    assert row["values"] == "2; 5; 10; 50" and row["reward"] == "R1, R2"
    assert row["seeds"] == len(FULL.report_seeds)
    others = found[found["methods"].str.startswith("RWR") & found["varied"].eq("`sets`")]
    assert dict(zip(others["reward"], others["values"], strict=True)) == {
        "R1": "10; 50", "R2": "50"}  # fmt: skip
    assert found["seeds"].min() > 0 and found.duplicated().sum() == 0


def test_grid_tells_a_rate_that_is_named_from_one_that_is_chosen():
    profile = experiments.profile_named("on_policy_length", "full")
    found = tables.grid(experiments.settings("on_policy_length", profile), profile)
    named = found[found["varied"].str.contains("learning_rate")]
    assert len(named) == 2 and set(named["rates tried"]) == {"the one named"}
    assert set(named["values"]) == {"0.001; 0.0003", "8, 0.001; 8, 0.0003"}


def test_quantiles_of_an_even_number():
    values = pd.Series([4.0, 1.0, 3.0, 2.0])
    assert [tables.quantile(values, q) for q in (0.25, 0.5, 0.75)] == [1, 2, 3]


def swept(rate, seed, end):
    config = experiments.Setting("rwr", "R1").run(FULL, rate, seed)
    return pd.DataFrame([columns(config)] * 2).assign(run=f"{rate}{seed}", update=[0, 100],
                                                      reward=[0.0, end])  # fmt: skip


def test_the_papers_rule_reports_the_seeds_that_chose():
    fast, slow = FULL.rates[:2]
    table = pd.concat([
        *(swept(rate, seed, end) for rate, end in ((fast, 0.9), (slow, 0.5))
          for seed in FULL.sweep_seeds),
        *(swept(fast, seed, 0.1) for seed in FULL.report_seeds),
    ])  # fmt: skip
    (row,) = tables.selection(table, [experiments.Setting("rwr", "R1")], FULL).to_dict("records")
    assert row["final reward, best of the sweep"].startswith("0.900")
    assert row["final reward, fresh seeds"].startswith("0.100")


def test_a_run_no_longer_stops_where_less_than_half_of_its_responses_end():
    table = pd.DataFrame({
        "run": ["a", "b"], "method": "dpo", "task": "min", "update": 9, "ended": [0.4, 0.6],
        "length": [96.0, 9.0], "kl_ref": [5.0, 1.0], "held_out_accuracy": [0.9, 0.5],
    })  # fmt: skip
    (row,) = tables.endless(table).to_dict("records")
    assert (row["no longer stops"], row["pair accuracy where it no longer stops"]) == (1, 0.9)

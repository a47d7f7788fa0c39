"""What runs cost, on tables whose clock is known."""

import math

import numpy as np
import pandas as pd
import pytest

from lib import costs
from lib.chapter import Chapter

TITLES = {"ipo": "IPO (on-policy)", "ipo_offline": "IPO (offline)"}


def rows(reach_at, seconds_per_update=0.1, per_update=100, seeds=(5, 6, 7), height=0.8):
    """Reward steps to `height` at an update (one per seed) and stays; 20 evaluated updates.

    Sampling for evaluations has taken 7 seconds before the first one.
    """
    return pd.DataFrame([
        {"seed": s, "run": f"r{s}-{seconds_per_update}", "update": u,
         "seconds": u * seconds_per_update, "samples": 100 if per_update == 0 else u * per_update,
         "seconds_sampling": 7 + u * seconds_per_update / 2, "seconds_scoring": 0.0,
         "seconds_training": u * seconds_per_update / 2, "target": 0.7,
         "reward": height if u >= at else 0.1}
        for s, at in zip(seeds, reach_at, strict=True) for u in range(21)
    ])  # fmt: skip


def test_papers_convention_has_the_printed_ceiling():
    assert costs.in_papers_convention(1.0) == pytest.approx(0.918, abs=5e-4)
    assert costs.in_papers_convention(0.0) == pytest.approx(0.0177, abs=5e-4)


def test_papers_rows_name_methods_of_the_book():
    from lib import methods

    names = "|".join(costs.paper()["ours"]).split("|")
    assert names and all(methods.get(name) for name in names)


def test_reaching_reads_all_three_clocks_and_censors():
    took = costs.reaching(rows([4, 10, 99]), 0.7)
    assert took["seconds"].tolist() == pytest.approx([0.4, 1.0, math.inf])
    assert took["samples"].tolist() == [400, 1000, math.inf]


def test_clock_counts_a_censored_run_as_slower_than_all():
    table = costs.clock({"a": rows([4, 10, 99]), "b": rows([4, 99, 99])}, 0.7).set_index("method")
    assert table.loc["a", "seconds"] == "1.00" and table.loc["a", "reached by"] == "2 of 3"
    assert table.loc["b", "seconds"] == "not reached"
    assert table.loc["a", "quartiles"] == "0.40 to not reached"


def test_split_adds_up():
    table = costs.split({"a": rows([4, 4, 4])}).iloc[0]
    assert table["sampling"] + table["scoring"] + table["training"] == pytest.approx(table["total"])
    assert table["total"] == pytest.approx(2.0)


def test_price_is_paid_for_every_completion():
    table = costs.priced({"a": rows([4, 4, 4])}, 0.7, [0.0, 0.01])
    assert table["cost"].tolist() == pytest.approx([0.4, 0.4 + 4])


def test_crossing_makes_both_cost_the_same():
    few, many = rows([10] * 3, 0.5, per_update=0), rows([5] * 3, 0.1)
    price = costs.crossing(few, many, 0.7)
    assert 5.0 + price * 100 == pytest.approx(0.5 + price * 500)
    never = rows([99] * 3, 0.5, per_update=0)
    assert costs.crossing(never, many, 0.7) == math.inf
    assert costs.crossing(few, rows([99] * 3), 0.7) == 0
    assert costs.crossing(rows([5] * 3, 0.1), rows([5] * 3, 0.2), 0.7) == 0
    assert costs.crossing(rows([5] * 3, 0.2), rows([5] * 3, 0.1), 0.7) == math.inf
    with pytest.raises(ValueError, match="fewer"):
        costs.crossing(many, few, 0.7)


def test_tables_name_what_does_not_get_there():
    lines = {"ipo": rows([5] * 3), "ipo_offline": rows([99] * 3, per_update=0)}
    table = costs.crossings(lines, TITLES, [0.7])
    assert table.iloc[0]["price to turn, reward 0.70"] == "offline does not get there"
    printed = costs.table_3(lines, TITLES).set_index("method")
    assert printed.loc["IPO (on-policy)", "paper: reward"] == "0.92 (0.01)"
    assert printed.loc["IPO (offline)", "paper: hours"] == "1.7"


def test_prices_are_in_milliseconds():
    lines = {"ipo": rows([5] * 3), "ipo_offline": rows([10] * 3, 0.5, per_update=0)}
    table = costs.crossings(lines, TITLES, [0.7])
    assert table.iloc[0]["price to turn, reward 0.70"] == "11 ms"  # 4.5 s for 400 completions


def test_rounds_are_those_of_on_policy_methods_that_get_there():
    lines = {"ipo": rows([5] * 3, height=0.8), "rwr": rows([3] * 3), "dpo": rows([99] * 3),
             "ipo_offline": rows([12] * 3)}  # fmt: skip
    found = costs.numbers(lines, 0.7)
    assert (found["rounds"], found["rounds_any"]) == ("3 to 5", "3 to 5")
    assert costs.numbers({"ipo": rows([99] * 3)}, 0.7)["rounds"] == "-"
    found = costs.numbers({"ipo": rows([5] * 3), "rwr": rows([9] * 3, height=0.6)}, 0.7)
    assert (found["rounds"], found["rounds_any"]) == ("5 to 5", "5 to 9")


def test_what_a_method_saves_is_the_others_seconds_less_its_own():
    found = costs.numbers({"rwr": rows([3, 3, 99]), "dpo": rows([5, 6, 5])}, 0.7)
    assert found["rwr_saves"].startswith("0.25 (")


def test_numbers_are_per_completion_and_per_update():
    found = costs.numbers({"ipo": rows([5, 5, 99])}, 0.7)
    assert (found["write_ms"], found["train_ms"], found["turn_ms"]) == ("0.5", "50", "-")
    assert found["ipo_reached"] == "2 of 3"
    assert (found["dearer"], found["dearer_best"]) == ("- to -", "-")
    lines = {"ipo": rows([5] * 3, 0.3), "dpo": rows([5] * 3, 0.4), "best_of_n": rows([5] * 3, 0.2),
             "ipo_offline": rows([5] * 3, 0.2, per_update=0)}  # fmt: skip
    found = costs.numbers(lines, 0.7)
    assert (found["dearer"], found["dearer_best"]) == ("1.5 to 2.0", "1.0")


def test_figures_of_costs_draw_who_gets_there_and_name_who_does_not():
    from lib.figures import costs as drawn

    lines = {"a": rows([4] * 3), "b": rows([99] * 3), "c": rows([8] * 3)}
    looks = {name: {"color": "red"} for name in lines}
    figure, table = drawn.prices({"0.7": costs.priced(lines, 0.7, [0.0, 1.0])}, looks)
    assert len(figure.axes[0].get_lines()) == 2
    assert "b" in figure.axes[0].texts[0].get_text()
    assert table.query("method == 'c'")["relative"].tolist() == pytest.approx([2.0, 2.0])
    bars, _ = drawn.phases(costs.split(lines))
    assert len(bars.axes[0].patches) == 9


def test_what_the_chapter_says_of_the_published_clock():
    """Its sentences that compare, which have no numbers of their own."""
    chapter, options = Chapter("wall_clock"), "[alone=True,evaluations=100,held_out=False]"
    alone = chapter.lines({name: f"{name}@R1{options}" for name in chapter.names()})
    target = float(next(iter(alone.values()))["target"].iloc[0])
    took = {name: costs.reaching(rows, target)["seconds"] for name, rows in alone.items()}
    median = {name: seconds.median() for name, seconds in took.items()}
    assert sorted(median, key=median.get)[:2] == ["best_of_n", "rwr"]
    assert not np.isfinite(took["best_of_n"]).all()
    four = ("ppo_sequence", "ipo", "dpo", "reinforce")
    assert max(median[name] for name in four) - min(median[name] for name in four) < 0.1
    assert all(np.isfinite(took[name]).all() for name in four)

    spent = costs.split(alone).set_index("method")
    training = spent["training"].drop("best_of_n")
    assert spent.loc["best_of_n", "training"] < 0.5 * training.min()
    on_policy = spent.drop(["ipo_offline", "dpo_offline", "best_of_n"])
    assert (on_policy["training"] > on_policy["sampling"]).all()
    assert (on_policy["sampling"] / on_policy["training"]).median() == pytest.approx(2 / 3, abs=0.1)
    said = costs.numbers(alone, target)
    turn, write = float(said["turn_ms"]), float(said["write_ms"])
    assert turn == pytest.approx(write, rel=0.3)  # "about as much"
    assert float(said["turn_best_ms"]) > 3 * write  # "several times"

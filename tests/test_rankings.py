"""Rankings and what moves them, from runs written by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from lib import rankings
from lib.chapter import Chapter
from lib.experiments import OFFLINE, ON_POLICY
from lib.rankings import Runs
from tests.test_audit import Handmade, rows


def runs(ends, rate=0.1, swept=None, lost=()):
    """A method's runs: `ends` of seeds from 5 on; `swept`: rate -> ends of seeds from 0 on."""

    def table(values, first, at):
        seeds = range(first, first + len(values))
        return pd.DataFrame({"seed": seeds, "learning_rate": at, "end": values,
                             "speed": np.array(values) / 2, "10 nats": values,
                             "stride": 50 * at, "lost": [s in lost for s in seeds]})  # fmt: skip

    swept = swept or {rate: ends}
    parts = [table(list(values), 0, at) for at, values in swept.items()]
    return Runs(rate, table(list(ends), 5, rate), pd.concat(parts, ignore_index=True))


@pytest.fixture
def field():
    return {
        "dpo": runs([1.0, 1.0, 0.99], swept={0.1: [1.0, 1.0], 0.01: [0.5, 0.6]}),
        "rwr": runs([0.9, 0.9, 0.88], swept={0.1: [0.9, 0.9], 0.01: [0.8, 0.82]}, lost={6}),
        "ipo_offline": runs([0.3, 0.1, 0.2]),
    }


def test_a_run_is_lost_if_it_gives_one_wrong_answer_or_diverged():
    table = rows([1.0, 0.9995, 0.8, 0.8, 0.8])
    table["entropy"] = np.repeat([0.0, 0.0, 0.0, 1.0, 1.0], 2)
    table["diverged"] = np.repeat([False, False, False, False, True], 2)
    found = rankings.scored(table)
    assert found["lost"].tolist() == [False, False, True, False, True]
    assert found["end"].tolist() == pytest.approx([1.0, 0.9995, 0.8, 0.8, 0.8])
    assert found["speed"].tolist() == pytest.approx(found["end"] / 2)
    assert set(found["learning_rate"]) == {0.1}


def test_values_ranks_and_their_look(field):
    table = rankings.values(field)
    assert table.loc["rwr"].to_dict() == pytest.approx({
        "end": 0.8933333, "best of sweep": 0.9, "speed": 0.4466667, "10 nats": 0.9,
        "worst seed": 0.88, "lost runs": 1})  # fmt: skip
    ranked = rankings.ranks(table)
    assert ranked["end"].tolist() == [1, 2, 3] and ranked["lost runs"].tolist() == [1, 3, 1]
    assert rankings.shown(table).loc["rwr", ["end", "lost runs"]].tolist() == ["0.89", "1"]
    assert rankings.shades(ranked)["end"].tolist() == [1.0, 0.5, 0.0]


def test_the_best_of_the_sweep_is_chosen_and_reported_on_one_set_of_seeds(field):
    own = runs([0.5], swept={0.1: [0.2, 0.4], 0.01: [0.9, 0.1]})
    assert rankings.CRITERIA["best of sweep"](own).tolist() == [0.9, 0.1]


def test_tau_is_scipys_and_level_means_are_ties():
    draw = np.random.default_rng(0)
    for _ in range(20):
        first, second = draw.integers(0, 4, (2, 7)) / 4
        expected = scipy_stats.kendalltau(first, second).statistic
        assert rankings.tau(pd.Series(first), pd.Series(second)) == pytest.approx(expected)
    close = pd.Series([0.9, 0.5, 0.5004, 0.1])
    assert rankings.tau(close, pd.Series([0.9, 0.5, 0.5001, 0.1])) == pytest.approx(1.0)
    assert np.isnan(rankings.tau(pd.Series([1.0, 1.0]), pd.Series([0.0, 1.0])))
    by_name = pd.Series({"b": 0.0, "a": 1.0}), pd.Series({"a": 3.0, "b": 2.0, "c": 0.0})
    assert rankings.tau(*by_name) == 1.0


def test_pairs_told_apart_by_kind(field):
    table = rankings.signs(field)
    assert table.loc[("dpo", "rwr"), "end"] == 1
    flipped = {**field, "rwr": runs([0.9, 1.0, 0.8])}  # as good on average, but not in every seed
    assert rankings.signs(flipped).loc[("dpo", "rwr"), "end"] == 0
    found = rankings.survival(table).set_index("compared")
    assert found.loc["two on-policy methods", "pairs"] == 1
    assert found.loc["on-policy with offline", ["pairs", "end"]].tolist() == [2, 2]
    assert rankings.survival(rankings.signs({})).empty


def test_surviving_needs_one_order_in_all_four_and_a_turn_is_counted():
    pairs = pd.MultiIndex.from_tuples([("dpo", "ipo"), ("dpo", "rwr"), ("ipo", "rwr")])
    signs = pd.DataFrame([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, -1]], pairs,
                         columns=[*rankings.CRITERIA])  # fmt: skip
    (row,) = rankings.survival(signs).to_dict("records")
    assert (row["pairs"], row["all four, same order"], row["two disagree"]) == (3, 1, 1)
    assert (row["best of sweep"], row["10 nats"]) == (2, 3)


def test_numbers_are_there_with_and_without_results(field):
    empty, full = rankings.numbers({}), rankings.numbers({"R1": field})
    assert set(empty) == set(full) and set(empty.values()) == {"(not run at this profile)"}
    assert full["on_pairs_R1"] == "1" and full["mixed_end_R1"] == "2"
    assert full["tau_end_R1"] == "1.00" and full["off_end_R1"] == "(not run at this profile)"


def test_who_is_first_when_seeds_are_drawn_anew():
    """One of two methods is ahead by 0.1 in two seeds and behind by 0.3 in the third."""
    field = {"dpo": runs([0.6, 0.6, 0.2]), "ipo": runs([0.5, 0.5, 0.5]),
             "rwr_offline": runs([0.1, 0.2, 0.3])}  # fmt: skip
    shares = rankings.first_share(field, draws=20_000)
    assert shares.loc["dpo", "end"] == pytest.approx((2 / 3) ** 3, abs=0.015)  # only with no third
    assert shares.loc["dpo", "end"] + shares.loc["ipo", "end"] == pytest.approx(1.0)
    assert shares.loc["rwr_offline", "end"] == 1.0
    level = {"dpo": runs([1.0, 1.0]), "ipo": runs([1.0, 1.0])}
    assert rankings.first_share(level)["end"].tolist() == [0.5, 0.5]


def test_neighbours_stop_at_the_ends_of_the_sweep(field):
    assert rankings.neighbour(field["dpo"], -1)["end"].tolist() == [0.5, 0.6]
    assert rankings.neighbour(field["dpo"], 1)["end"].tolist() == [1.0, 1.0]


def test_a_lower_rate_turns_an_order_and_tau_says_so(field):
    del field["ipo_offline"]
    table = rankings.sensitivity({}, "R1", field, draws=200).set_index(["change", "family",
                                                                        "criterion"])  # fmt: skip
    lower = table.loc[("rates one lower", "on-policy", "end")]
    assert (lower["tau"], lower["first"], lower["n"]) == (-1.0, "RWR", 2)
    assert table.loc[("rates one higher", "on-policy", "end"), "tau"] == 1.0
    seeds = table.loc[("other seeds", "on-policy", "end")]
    assert seeds[["tau", "low", "high"]].tolist() == [1.0, 1.0, 1.0] and seeds["first"] == "DPO"
    shown = rankings.leaders_table(table.reset_index()).set_index("change")
    assert shown.loc["rates one lower", "end"] == "RWR"


def test_batches_are_compared_where_every_on_policy_method_has_them(field):
    names = [f"{name}@R1" for name in ON_POLICY]
    settings = {name: rows([0.9] * 5) for name in names}
    chapter = Handmade()
    chapter.rows = settings | {f"{name}[sets=10]": rows([0.8] * 5) for name in names}
    own = {name: runs([0.9] * 5) for name in ON_POLICY}
    assert "k = 10" in rankings.moved({"a": chapter}, "R1", own)
    del chapter.rows["dpo@R1[sets=10]"]
    assert "k = 10" not in rankings.moved({"a": chapter}, "R1", own)


def test_places_under_another_beta():
    others = {f"{name}@R1": rows([value] * 5) for name, value in
              zip(OFFLINE, (0.2, 0.4, 0.3, 0.8, 0.7), strict=True)}  # fmt: skip
    chapter = Handmade()
    chapter.rows = others | {"best_of_n_negative@R1[beta=0.1]": rows([0.25] * 5)}
    (row,) = rankings.under_hyperparameters({"a": chapter}).to_dict("records")
    assert (row["place, default"], row["place, switched"]) == ("3 of 5", "4 of 5")
    assert (row["default"], row["switched"]) == pytest.approx((0.4, 0.25))
    chapter.rows = {"dpo_offline@min": rows([0.5] * 5), "pref_ft@min": rows([0.7] * 5),
                    "dpo_offline@min[beta=0.5]": rows([0.9] * 5)}  # fmt: skip
    (row,) = rankings.under_hyperparameters({"a": chapter}).to_dict("records")
    assert (row["place, default"], row["place, switched"]) == ("1 of 2", "2 of 2")  # shorter first


def test_what_a_ranking_of_ends_leaves_open(field):
    distance, rates = rankings.practical(field, "R1").split("\n")
    assert "no method is ahead of all others; the best mean is 1.00 (1.00 to 1.00)" in distance
    assert "Take on-policy DPO, RWR: at 1 of 2 rates tried on bandit R1" in rates
    assert "of any method, in the mean of 3 seeds. The others: offline IPO at none." in rates
    assert rankings.practical({}, "R1") == "not computed yet"
    apart = {"dpo": runs([1.0] * 3), "rwr": runs([0.5] * 3), "ipo_offline": runs([0.2] * 3)}
    distance, _ = rankings.practical(apart, "R1").split("\n")
    assert "Take on-policy DPO: within 10 nats it earns 1.00 (1.00 to 1.00) on bandit" in distance
    assert "the others 0.20 to 0.50, all told apart from it" in distance


def test_10_nats_are_read_at_rates_whose_first_step_stays_within_them(field):
    """The best reading of all is of a first step of 25 nats: off a line between two policies."""
    far = runs([1.0, 1.0], rate=0.5, swept={0.5: [1.0, 1.0], 0.1: [0.4, 0.4]})
    assert rankings.CRITERIA["10 nats"](far).tolist() == [0.4, 0.4]
    only = runs([1.0, 1.0], rate=0.5)
    assert rankings.CRITERIA["10 nats"](only).tolist() == [1.0, 1.0]  # no smaller step there


def test_a_stride_is_the_distance_of_the_first_row_after_the_start():
    rows = pd.DataFrame({
        "run": "a", "seed": 3, "learning_rate": 0.1, "update": [0, 1, 2], "reward": [0.1, 0.2, 0.3],
        "kl_ref": [0.0, 7.0, 12.0], "entropy": 5.0, "diverged": False,
    })  # fmt: skip
    assert rankings.scored(rows)["stride"].tolist() == [7.0]


def test_what_the_audit_says_of_ten_nats_in_the_published_runs():
    """How many on-policy methods are ahead of each offline one on R1, which the prose counts."""
    chapters = {name: Chapter(name) for name in ("on_policy", "negative_gradient", "complementary")}
    field = rankings.field(chapters, "R1")
    signs, ahead = rankings.signs(field)["10 nats"], dict.fromkeys(OFFLINE, 0)
    for (first, second), sign in signs.items():
        if rankings.kind(first, second) == "on-policy with offline" and sign:
            above, below = (first, second) if sign == 1 else (second, first)
            assert above in ON_POLICY
            ahead[below] += 1
    assert ahead == {"best_of_n_offline": 6, "rwr_offline": 6, "best_of_n_negative": 4,
                     "dpo_offline": 3, "ipo_offline": 1}  # fmt: skip
    means = rankings.values(field)["10 nats"]
    assert means[["reinforce", "ppo_sequence", "dpo"]].max() - means["best_of_n_negative"] < 0.05

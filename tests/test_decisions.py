"""The tree of questions on tables and verdicts written by hand, contradictory ones included."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib import claims, decisions, experiments
from lib.decisions import MIN_SEEDS, NOT_YET, Problem
from lib.experiments import Setting

NEAR, APART, CLOSE = decisions.PLACES
FAR = Problem("R1", "far", ("a",), "far", "apart", sizes="bandit")
ALSO = Problem("min", "also far", ("b",), "far", "apart", 2.0, " tokens")
WITH = Problem("R2", "near", ("a",), "near", sizes="bandit")
ALL = (FAR, ALSO, WITH)


def results(rewards, problem="R1", choice="fixed", chapter="a", first=5, start=-99.0):
    """Rows of a problem. Args: rewards: method -> a reward for each seed from `first` on; start:
    of the untrained model."""
    return pd.concat([
        pd.DataFrame({
            "problem": problem, "choice": choice, "chapter": chapter, "method": method,
            "serves": {"fixed": 0, "rare": 50, "fresh": 1}[choice],
            "seed": range(first, first + len(values)), "start": start, "reward": values,
            "completions": 100.0, "seconds": 2.0, "memory": 10.0,
        }) for method, values in rewards.items()
    ])  # fmt: skip


def rule(contrast, statistic="final reward", chapter="negative_gradient"):
    return claims.Rule("id", "Q2-bandit-r1", chapter, contrast, statistic, ">", 0.02, 0.02, 5, "")


def verdicts(*found, contrast="ipo_offline@R1 - rwr_offline@R1"):
    return [claims.Verdict(rule(contrast), verdict, seeds=20) for verdict in found]


CLEAR = results({"dpo_offline": [0.9] * 6, "rwr_offline": [0.3] * 6})


def test_a_leaf_that_is_as_the_paper_says():
    found = decisions.leaf("fixed", APART, CLEAR, verdicts("reproduced", "reproduced"), ALL)
    assert found.outcome == "as the paper says" and found.recommended == ("DPO (offline)",)
    assert found.verdicts == {"reproduced": 2} and found.chapters == ("negative_gradient",)
    (standing,) = found.standings
    first, last = standing.entries
    assert (first.method, first.first, first.alone, first.leads) == ("dpo_offline", 6, 6, True)
    assert (last.first, last.leads) == (0, False)
    assert first.low == pytest.approx(6 / (6 + 1.959964**2)) and first.high == 1  # Wilson, by hand
    assert (first.completions, first.seconds, first.memory) == (100, 2, 10)


@pytest.mark.parametrize(("found", "outcome"), [
    (("reproduced", "not reproduced", "reproduced"), "mixed"),  # they contradict each other
    (("not reproduced", "not reproduced"), "against the paper"),
    (("reproduced", "inconclusive"), "inconclusive"),  # half of them open
    (("reproduced", "reproduced", "inconclusive"), "as the paper says"),
    (("not reproduced", "not reproduced", "inconclusive"), "against the paper"),
    (("reproduced", "not judged", "not judged"), "as the paper says"),  # those do not count
    (("reproduced", "not reproduced", "inconclusive", "inconclusive"), "inconclusive"),
    (("inconclusive",), "inconclusive"),
    ((), "inconclusive"),  # nothing bears on it
])  # fmt: skip
def test_the_outcome_follows_the_verdicts(found, outcome):
    leaf = decisions.leaf("fixed", APART, CLEAR, verdicts(*found), ALL)
    assert leaf.outcome == outcome and leaf.recommended == ("DPO (offline)",)


def test_what_was_not_judged_is_not_shown():
    other = claims.Verdict(rule("dpo_offline@R1", chapter="on_policy"), "not judged")
    found = decisions.leaf("fixed", APART, CLEAR, [*verdicts("reproduced"), other], ALL)
    assert found.verdicts == {"reproduced": 1} and found.chapters == ("negative_gradient",)


def test_problems_that_contradict_each_other_make_it_mixed():
    other = results({"dpo_offline": [-20.0] * 6, "rwr_offline": [-2.0] * 6}, "min", chapter="b")
    found = decisions.leaf("fixed", APART, pd.concat([CLEAR, other]), verdicts("reproduced"), ALL)
    assert found.outcome == "mixed" and found.recommended == ()
    assert [s.leading for s in found.standings] == [("dpo_offline",), ("rwr_offline",)]


def test_a_problem_with_few_seeds_is_shown_but_has_no_say():
    few = MIN_SEEDS - 1
    other = results({"dpo_offline": [-20.0] * few, "rwr_offline": [-2.0] * few}, "min")
    found = decisions.leaf("fixed", APART, pd.concat([CLEAR, other]), verdicts("reproduced"), ALL)
    assert found.outcome == "as the paper says" and found.recommended == ("DPO (offline)",)
    assert [s.votes for s in found.standings] == [True, False]
    alone = decisions.leaf("fixed", APART, other, verdicts("reproduced"), ALL)
    assert alone.outcome == "inconclusive" and alone.recommended == ()


def test_a_method_that_ran_on_one_problem_is_judged_there():
    other = results({"dpo_offline": [-2.0] * 6, "pref_ft": [-2.5] * 6}, "min")
    found = decisions.leaf("fixed", APART, pd.concat([CLEAR, other]), verdicts("reproduced"), ALL)
    assert found.recommended == ("DPO (offline)", "Pref-FT (offline)")  # two problems before one


def test_one_method_alone_decides_nothing():
    found = decisions.leaf("fixed", APART, results({"dpo_offline": [0.9] * 6}),
                           verdicts("reproduced"), ALL)  # fmt: skip
    assert not found.standings[0].votes and found.outcome == "inconclusive"


def test_a_first_place_is_shared_within_the_margin():
    rows = results({"dpo_offline": [0.90, 0.90, 0.5, 0.9, 0.9],
                    "ipo_offline": [0.89, 0.85, 0.7, 0.9, 0.0]})  # fmt: skip
    (found,) = decisions.leaf("fixed", APART, rows, [], ALL).standings
    counts = {e.method: (e.first, e.alone) for e in found.entries}
    assert counts == {"dpo_offline": (4, 2), "ipo_offline": (3, 1)}


def test_a_lead_counts_beyond_the_margin_with_confidence_only():
    def leads(values, rewards=(0.9,) * 6, **place):
        rows = results({"dpo_offline": rewards, "rwr_offline": values}, **place)
        (found,) = decisions.leaf("fixed", APART, rows, [], ALL).standings
        return "rwr_offline" in found.leading

    assert leads([0.89] * 6)  # inside the margin
    assert leads([0.9, 0.9, 0.9, 0.1, 0.9, 0.9])  # far below once: not told apart
    assert not leads([0.8] * 6)
    assert leads([-1.9] * 6, [0.0] * 6, problem="min")  # tokens have a margin of their own
    assert not leads([-2.1] * 6, [0.0] * 6, problem="min")


def test_a_run_below_the_untrained_model_by_more_than_the_margin_harms():
    rows = results({"dpo_offline": [0.5] * 5 + [0.37], "rwr_offline": [0.4] * 6,
                    "ipo_offline": [0.39] * 6}, start=0.4)  # fmt: skip
    leaf = decisions.leaf("fixed", APART, rows, [], ALL)
    (found,) = leaf.standings
    assert found.start == pytest.approx(0.4)
    assert {e.method: e.harms for e in found.entries} == {
        "dpo_offline": True, "rwr_offline": False, "ipo_offline": False}  # fmt: skip
    assert [e.method for e in leaf.found("DPO (offline)")] == ["dpo_offline"]
    assert leaf.found("Pref-FT (offline)") == []


def test_a_run_is_held_against_where_it_began_itself():
    """Judged pairs begin as far apart as several margins."""
    rows = results({"dpo_offline": [0.4] * 6, "rwr_offline": [0.5] * 6},
                   start=[0.5] * 3 + [0.1] * 3)  # fmt: skip
    (found,) = decisions.leaf("fixed", APART, rows, [], ALL).standings
    assert {e.method: e.harms for e in found.entries} == {
        "dpo_offline": True, "rwr_offline": False}  # fmt: skip


def test_how_rare_sampling_was_is_read_off_the_results():
    rare = pd.concat([results({"dpo": [1.0]}, "R1", "rare"),
                      results({"dpo": [1.0]}, "min", "rare").assign(serves=4)])  # fmt: skip
    assert decisions.served(rare) == {"rare_bandit": "50", "rare_models": "4"}
    assert set(decisions.served(CLEAR).values()) == {NOT_YET}


def test_the_cost_of_a_method_is_its_median():
    rows = results({"dpo_offline": [0.9] * 5, "rwr_offline": [0.3] * 5})
    rows["seconds"] = [1.0, 2.0, 3.0, 4.0, 90.0] * 2
    (found,) = decisions.leaf("fixed", APART, rows, [], ALL).standings
    assert {e.seconds for e in found.entries} == {3.0}


def test_only_common_seeds_are_compared():
    rows = pd.concat([results({"dpo_offline": [0.9] * 10}),
                      results({"rwr_offline": [0.3] * 6}, first=9)])  # fmt: skip
    (found,) = decisions.leaf("fixed", APART, rows, [], ALL).standings
    assert found.n == 6
    apart = pd.concat([CLEAR, results({"pref_ft": [0.3]}, first=90)])
    assert decisions.leaf("fixed", APART, apart, [], ALL).standings == ()


def test_who_samples_may_also_use_fixed_data_but_not_the_other_way_round():
    fresh = results({"dpo": [0.99] * 6}, choice="fresh")
    rare = results({"rwr": [0.5] * 6}, choice="rare")
    table = pd.concat([CLEAR, fresh, rare])

    def contenders(choice):
        (found,) = decisions.leaf(choice, APART, table, [], ALL).standings
        return {e.method for e in found.entries}, found.serves

    assert contenders("fixed") == ({"dpo_offline", "rwr_offline"}, 0)
    assert contenders("fresh") == ({"dpo_offline", "rwr_offline", "dpo"}, 1)
    assert contenders("rare") == ({"dpo_offline", "rwr_offline", "rwr"}, 50)
    without = decisions.leaf("fresh", APART, CLEAR, verdicts("reproduced"), ALL)
    assert without.outcome == NOT_YET and without.standings == ()


def test_every_leaf_without_results_says_so():
    found = decisions.leaves(decisions.collect({}), [])
    assert len(found) == len(decisions.SAMPLING) * len(decisions.PLACES) == 9
    assert {leaf.outcome for leaf in found} == {NOT_YET}


def test_each_row_is_used_at_its_own_place_only():
    table = pd.concat([CLEAR, results({"dpo_offline": [0.5] * 6, "rwr_offline": [0.9] * 6}, "R2")])
    against = verdicts("not reproduced", contrast="rwr_offline@R2 - dpo_offline@R2")
    at = {(leaf.choice, leaf.place): leaf
          for leaf in decisions.leaves(table, verdicts("reproduced") + against, ALL)}  # fmt: skip
    assert at["fixed", APART].outcome == "as the paper says"
    assert at["fixed", NEAR].outcome == "against the paper"
    assert at["fixed", NEAR].recommended == ("RWR (offline)",)
    assert {leaf.outcome for key, leaf in at.items() if key[0] != "fixed"} == {NOT_YET}
    assert at["fixed", CLOSE].outcome == NOT_YET


@pytest.mark.parametrize(("contrast", "statistic", "choice"), [
    ("ipo_offline@R1 - rwr_offline@R1", "final reward", "fixed"),
    ("ipo_offline@R1 - rwr_offline@R1", "reward at 10 nats", "fixed"),
    ("ipo_offline@R1 - rwr_offline@R1", "final KL to reference", None),  # orders no methods
    ("ipo_offline@R1", "final chosen log-ratio", None),
    ("best_of_n_offline@R1[length=1] - ipo_offline@R1[length=1]", "final reward", None),
    ("ipo@R1 - ipo_offline@R1", "final reward", "fresh"),
    ("ipo@R1[alone=True,evaluations=100] - rwr@R1[alone=True,evaluations=100]",
     "speed to target", "fresh"),
    ("best_of_n@R1 - best_of_n@R1[sets=50]", "mean reward over updates", "rare"),
    ("best_of_n@R1 - best_of_n@R1[sets=50] - best_of_n@R2 + best_of_n@R2[sets=50]",
     "final reward", "rare"),
    ("rwr@R1 - rwr@R1[inner_steps=10]", "mean reward over samples", "rare"),
    ("ipo_offline@R2 - rwr_offline@R2", "final reward", None),  # another problem
    ("best_of_n_offline@R2 - best_of_n_offline@R1", "final reward", None),  # one method
])  # fmt: skip
def test_what_a_comparison_bears_on(contrast, statistic, choice):
    found = [c for c in decisions.SAMPLING if decisions.bears(rule(contrast, statistic), c, [FAR])]
    assert found == ([choice] if choice else [])


def test_a_problem_has_a_place_in_the_tree():
    with pytest.raises(ValueError, match=r"R9.*\('near', None\).*got \('near', 'close'\)"):
        Problem("R9", "", ("a",), "near", "close")
    assert {p.place for p in decisions.PROBLEMS} == set(decisions.PLACES)
    grids = experiments.CHAPTERS.values()
    known = {s.reward_function for grid in grids for s in grid.settings(grid.profiles["full"])}
    assert {p.name for p in decisions.PROBLEMS} >= known - {"given"}


class Given:
    """A chapter with given runs per setting: name -> rewards by update of each seed."""

    def __init__(self, runs, profile="full", **options):
        self.runs, self.profile_name = runs, profile
        self.profile = SimpleNamespace(options=tuple(options.items()), device="cpu")

    def settings(self):
        return list(self.runs)

    def reported(self, name):
        (curves,) = [curves for setting, curves in self.runs.items() if setting.name == name]
        return pd.concat([
            pd.DataFrame({"run": f"{name}{seed}", "seed": seed, "update": range(len(curve)),
                          "reward": curve, "samples": 640.0,
                          "seconds_sampling": [0.25, 1.25][: len(curve)],
                          "seconds_scoring": [0.0, 0.5][: len(curve)],
                          "seconds_training": [0.0, 2.0][: len(curve)]})
            for seed, curve in enumerate(curves, 5)
        ], ignore_index=True)  # fmt: skip


def setting(name, task="min", **options):
    return Setting(name, task, tuple(options.items()))


def test_collect_takes_base_settings_and_the_stalest():
    chapter = Given({
        setting("dpo_offline"): [[-9.0, -4.0]], setting("dpo"): [[-9.0, -1.0]],
        setting("dpo", sets=2): [[-9.0, -2.0]], setting("dpo", sets=4): [[-9.0, -3.0]],
        setting("dpo", inner_steps=8): [[-9.0, -5.0]], setting("dpo", label="rule"): [[-9.0, 0.0]],
    })  # fmt: skip
    table = decisions.collect({"b": chapter}, (ALSO,)).set_index("choice")
    assert table["reward"].to_dict() == {"fixed": -4.0, "fresh": -1.0, "rare": -3.0}
    assert set(table["start"]) == {-9.0}
    assert table["serves"].to_dict() == {"fixed": 0, "fresh": 1, "rare": 4}
    assert set(table["seconds"]) == {3.5} and set(table["completions"]) == {640}
    # an offline method is evaluated on samples and by the reward model as well
    assert table.at["fresh", "memory"] == table.at["fixed", "memory"] > 20
    own = decisions.collect({"b": Given({setting("dpo"): [[0.0]]}, prepared="my-policy")}, (ALSO,))
    assert np.isnan(own["memory"]).all()


def test_memory_counts_a_compiled_decoder_where_there_is_one():
    """On a GPU a language model in float32 has one: a copy of its weights. The bandit has none."""
    here = experiments.Profile((), (), (), (), ())
    there = replace(here, device="cuda")
    lm, bandit = replace(ALSO, sizes="tiny"), replace(ALSO, sizes="bandit")
    found = [decisions._memory(problem, at) for problem in (lm, bandit) for at in (there, here)]
    assert found == pytest.approx([511.04, 116.01, 13.94, 13.94], abs=0.01)


def test_memory_counts_the_bytes_of_the_dtype():
    for dtype, mib in (("float32", 116.01), ("bfloat16", 87.34)):
        given = Given({setting("dpo"): [[-9.0, -1.0]]}, dtype=dtype)
        found = decisions.collect({"b": given}, (ALSO,))["memory"].item()
        assert found == pytest.approx(mib, abs=0.01)


def test_a_problem_may_have_a_base_and_a_reward_of_its_own():
    """On judged pairs the reward is the judge's, and only the runs that it looks at count."""
    judged = Problem("similar", "", ("a",), "near", column="gold", base=(("judged", True),))
    runs = {setting("dpo", "similar", judged=True): [[0.1, 0.5]],
            setting("dpo", "similar"): [[0.1, 9.0]],
            setting("dpo", "similar", judged=True, sets=4): [[0.1, 0.3]],
            setting("dpo", "similar", policy="64"): [[0.1, 9.0]]}  # fmt: skip
    chapter = Given(runs)
    chapter.reported = lambda name: Given.reported(chapter, name).rename(columns={"reward": "gold"})
    table = decisions.collect({"a": chapter}, (judged,)).set_index("choice")
    assert table["reward"].to_dict() == {"fresh": 0.5, "rare": 0.3}
    assert table["start"].to_dict() == {"fresh": 0.1, "rare": 0.1}
    stale = rule("rwr@similar[judged=True] - rwr@similar[judged=True,sets=4]")
    assert decisions.bears(stale, "rare", [judged])
    assert not decisions.bears(rule("rwr@similar[policy=64]"), "fresh", [judged])
    assert not decisions.bears(rule("rwr@R1[judged=True]"), "fresh", [FAR])


def test_collect_counts_a_shared_run_once_and_mixes_no_profiles():
    problem = Problem("min", "", ("a", "b", "c"), "far", "apart")
    one, shared = {setting("dpo"): [[-9.0, -1.0]]}, {setting("dpo"): [[-9.0, -1.0]],
                                                     setting("rwr"): [[-9.0, -2.0]]}  # fmt: skip
    other = {setting("reinforce"): [[-9.0, -3.0]]}
    chapters = {"a": Given(one), "b": Given(shared), "c": Given(other, "cpu")}
    table = decisions.collect(chapters, (problem,))
    assert sorted(table["method"]) == ["dpo", "rwr"]
    assert table.set_index("method")["chapter"].to_dict() == {"dpo": "a", "rwr": "b"}


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_run_that_broke_is_the_worst_not_the_best(lost):
    """Zero would be the best reward that there is on Min."""
    broken = Given({setting("dpo"): [[-50.0, lost], [-40.0, -1.0]]})
    table = decisions.collect({"b": broken}, (ALSO,)).set_index("seed")
    assert table["reward"].to_dict() == {5: -50.0, 6: -1.0}


def test_a_comparison_that_two_claims_share_counts_once():
    shared = rule("ipo_offline@R1 - rwr_offline@R1")
    two = [claims.Verdict(replace(shared, claim=name), "reproduced", 0.5, 0.4, 0.6, 20)
           for name in ("a", "b")]  # fmt: skip
    assert decisions.leaf("fixed", APART, CLEAR, two, ALL).verdicts == {"reproduced": 1}

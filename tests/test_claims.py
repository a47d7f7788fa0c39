"""Verdicts by hand: every direction at both margins, few seeds, contrasts that cannot be read."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest

from lib import claims, experiments, stats
from lib.claims import _decide
from lib.runs import columns

FULL = experiments.profile_named("on_policy", "full")
INF = math.inf


def rule(direction=">", contrast="ipo@R1 - rwr@R1", margin=0.1, equivalence=0.05, **changed):
    return claims.Rule("id", "claim", "on_policy", contrast, "final reward", direction, margin,
                       equivalence, **{"min_seeds": 3, "says": "so", **changed})  # fmt: skip


def rows(finals):
    """Seed -> final reward, as a result table of runs that rise from 0."""
    return pd.concat([
        pd.DataFrame({"run": f"r{seed}", "seed": seed, "update": [0, 100], "reward": [0.0, final]})
        for seed, final in finals.items()
    ])  # fmt: skip


def reported(**methods):
    """What `judge` asks for: setting -> its rows; those of `methods` on R1 by name."""
    tables = {f"{name}@R1": rows(finals) for name, finals in methods.items()}
    return lambda setting: tables[setting.name]


# (low, high) of the 95% interval; margin 0.1, equivalence margin 0.05.
MORE = [
    (0.11, 0.3, "reproduced"),
    (0.1, 0.3, "inconclusive"),  # at the margin is not beyond it
    (0.06, 0.3, "inconclusive"),
    (-0.05, 0.05, "not reproduced"),  # no difference
    (-0.051, 0.05, "inconclusive"),
    (-0.05, 0.051, "inconclusive"),
    (-0.3, -0.1, "inconclusive"),
    (-0.3, -0.11, "not reproduced"),  # the other way round
    (-0.3, 0.3, "inconclusive"),
]
ALIKE = [
    (-0.05, 0.05, "reproduced"),
    (0.01, 0.02, "reproduced"),  # a difference, but a small one
    (-0.051, 0.0, "inconclusive"),
    (0.0, 0.051, "inconclusive"),
    (0.05, 0.3, "inconclusive"),
    (0.051, 0.3, "not reproduced"),
    (-0.3, -0.051, "not reproduced"),
]


@pytest.mark.parametrize(("low", "high", "verdict"), MORE)
def test_more_and_less_are_mirror_images(low, high, verdict):
    assert _decide(rule(">"), low, high, 5) == verdict
    assert _decide(rule("<"), -high, -low, 5) == verdict


@pytest.mark.parametrize(("low", "high", "verdict"), ALIKE)
def test_alike_needs_the_equivalence_margin_and_no_other(low, high, verdict):
    for margin in (0.0, 0.1, 1.0):
        assert _decide(rule("=", margin=margin), low, high, 5) == verdict


def test_beyond_the_margin_comes_before_no_difference():
    near = rule(">", margin=0.0, equivalence=0.05)
    assert _decide(near, 0.01, 0.03, 5) == "reproduced"
    assert _decide(near, 0.0, 0.03, 5) == "not reproduced"


@pytest.mark.parametrize("direction", claims.DIRECTIONS)
@pytest.mark.parametrize(("low", "high", "seeds"), [
    (0.0, 0.0, 2), (0.5, 0.6, 2), (-INF, INF, 5), (0.5, INF, 5), (math.nan, math.nan, 5),
])  # fmt: skip
def test_few_seeds_or_no_interval_decide_nothing(direction, low, high, seeds):
    assert _decide(rule(direction), low, high, seeds) == "inconclusive"


@pytest.mark.parametrize(("parts", "verdict"), [
    (["reproduced", "reproduced"], "reproduced"),
    (["reproduced", "not judged"], "reproduced"),
    (["not reproduced"] * 2, "not reproduced"),
    (["inconclusive"] * 2, "inconclusive"),
    (["not judged"], "not judged"),
    ([], "not judged"),
    (["reproduced", "not reproduced"], "partly"),
    (["reproduced", "inconclusive"], "partly"),
    (["partly", "inconclusive"], "partly"),
    (["partly", "not reproduced"], "partly"),
    (["not reproduced"] + ["inconclusive"] * 9, "not reproduced"),
])  # fmt: skip
def test_a_claim_whose_parts_differ_is_partly_reproduced_only_if_a_part_is(parts, verdict):
    assert claims.parent(parts) == verdict


def test_terms_of_a_contrast():
    assert claims.terms("ipo@R1") == [(1.0, "ipo@R1")]
    assert claims.terms("-ipo@R1 + 0.5*rwr@R1[sets=10,gap=0.1] - 2 * dpo@min") == [
        (-1.0, "ipo@R1"), (0.5, "rwr@R1[sets=10,gap=0.1]"), (-2.0, "dpo@min")]  # fmt: skip


@pytest.mark.parametrize("text", [
    "", " ", "ipo", "ipo@R1 rwr@R1", "ipo@R1 -", "ipo@R1 * 2", "ipo@R1 - 0.5 rwr@R1", "1 - ipo@R1",
    "ipo@R1[sets=10",
])  # fmt: skip
def test_a_contrast_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="cannot read the contrast"):
        claims.terms(text)
    with pytest.raises(ValueError, match="cannot read the contrast"):
        rule(contrast=text)


@pytest.mark.parametrize(("changed", "message"), [
    ({"direction": "~"}, "id: direction must be one of .* got '~'"),
    ({"statistic": "reward"}, "id: unknown statistic 'reward'"),
    ({"margin": -0.1}, "id: margins must not be negative"),
    ({"equivalence": math.nan}, "id: margins must not be negative"),
    ({"chapter": "nowhere"}, "chapter must be one of"),
])  # fmt: skip
def test_a_bad_rule_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(rule(), **changed)


def test_a_contrast_is_taken_within_seeds_that_all_settings_have():
    both = reported(ipo={5: 0.9, 6: 0.8, 7: 0.4}, rwr={6: 0.2, 7: 0.3, 8: 0.1})
    grid = {f"{name}@R1": both(experiments.Setting(name, "R1")) for name in ("ipo", "rwr")}
    found = claims.by_seed("ipo@R1 - 2*rwr@R1", "final reward", grid.get)
    assert found.to_dict() == pytest.approx({6: 0.4, 7: -0.2})
    assert claims.by_seed("ipo@R3 - rwr@R1", "final reward", grid.get) is None
    assert claims.by_seed("ipo@R1 - rwr@R1", "final gold", grid.get) is None


def test_a_verdict_says_what_it_rests_on():
    finals = {5: 0.5, 6: 0.6, 7: 0.7}
    both = reported(ipo=finals, rwr={seed: 0.1 for seed in finals})
    found = claims.judge(rule(), FULL, both)
    effect, low, high = stats.interval([0.4, 0.5, 0.6])
    assert (found.verdict, found.seeds) == ("reproduced", 3)
    assert (found.effect, found.low, found.high) == pytest.approx((effect, low, high))
    assert claims.judge(replace(rule(), min_seeds=4), FULL, both).verdict == "inconclusive"
    apart = reported(ipo={5: 0.5}, rwr={6: 0.1})
    assert claims.judge(rule(), FULL, apart).verdict == "not judged"


def test_runs_that_nobody_judged_decide_nothing():
    """An unjudged run's gold is NaN: as 0 it would beat every judged one, which are negative."""
    judged = {5: -2.0, 6: -2.1, 7: -2.2}
    tables = {"ipo@R1": rows(judged).assign(gold=math.nan), "rwr@R1": rows(judged)}
    tables["rwr@R1"]["gold"] = tables["rwr@R1"]["reward"]
    found = claims.judge(replace(rule(), statistic="final gold"), FULL, lambda s: tables[s.name])
    assert found.verdict == "not judged"


def test_a_setting_that_was_left_out_is_not_judged():
    other = experiments.Setting("dpo", "R1").run(FULL, 0.01, 0)
    results = rows({0: 0.5}).assign(**columns(other) | {"seed": 0})
    (verdict, *_) = claims.judge_all("complementary", results, FULL,
                                     experiments.selector(results, FULL))  # fmt: skip
    assert verdict.verdict == "not judged"


def test_results_that_are_not_sound_are_no_verdict():
    twice = pd.concat([rows({5: 0.5}), rows({5: 0.6}).assign(run="again")])
    with pytest.raises(ValueError, match="two runs of seed 5"):
        claims.judge(rule(), FULL, lambda setting: twice)


def test_seeds_that_chose_the_rate_judge_nothing():
    """Those that a reader adds do."""
    seen = pd.DataFrame({"seed": [0, 4, 5, 24, 30, 5]})
    assert sorted(claims._all_reported(seen, FULL)) == [5, 24, 30]


def test_a_summary_counts_the_comparisons_of_a_claim():
    ours = replace(rule(), claim="Q1-bandit-r1")
    found = claims.summary([claims.Verdict(ours, v) for v in ("reproduced", "inconclusive")])
    (row,) = found.to_dict("records")
    assert (row["claim"], row["verdict"]) == ("Q1-bandit-r1", "partly")
    assert (row["reproduced"], row["inconclusive"], row["not reproduced"]) == (1, 1, 0)


def test_an_open_comparison_may_exclude_what_is_claimed():
    """The margin is 0.02: between the ends lie "no difference" and "the other way round"."""
    def found(low, high, direction=">", seeds=20, verdict="inconclusive"):
        own = rule(direction, margin=0.02, min_seeds=5)
        return claims.Verdict(own, verdict, (low + high) / 2, low, high, seeds).excluded

    assert found(-0.05, 0.01) and not found(-0.05, 0.03) and not found(-0.05, 0.02)
    assert found(-0.01, 0.05, "<") and not found(-0.03, 0.05, "<")
    assert not found(-0.05, 0.01, "=") and not found(-0.05, 0.01, seeds=4)
    assert not found(-0.05, -0.03, verdict="not reproduced")


@pytest.mark.parametrize(("direction", "margin", "says"), [
    (">", 2.0, "> 2"), ("<", 0.5, "< -0.5"), ("<", 0.0, "< 0"), (">", 0.0, "> 0"),
    ("=", 2.0, "within 0.02 of 0"),
])  # fmt: skip
def test_what_a_comparison_claims_is_where_its_verdict_turns(direction, margin, says):
    own = rule(direction, margin=margin, equivalence=0.02)
    assert own.claimed == says
    if direction != "=":
        sign = 1 if direction == ">" else -1
        beyond, short = ((margin + off) * sign for off in (0.1, -0.01))
        assert claims._decide(own, *sorted((beyond, beyond + sign)), 20) == "reproduced"
        assert claims._decide(own, *sorted((short, beyond + sign)), 20) == "inconclusive"


def test_a_comparison_of_two_claims_counts_once():
    one, other = (replace(rule(), id=name, claim=name) for name in "ab")
    same = [claims.Verdict(r, "reproduced", 0.5, 0.4, 0.6, 20) for r in (one, other)]
    another = claims.Verdict(other, "reproduced", 0.5, 0.3, 0.7, 20)
    unknown = [claims.Verdict(r, "not judged") for r in (one, other)]
    assert claims.distinct([*same, another, *unknown]) == [same[0], another, *unknown]


def test_the_seeds_of_the_sweep_have_no_say_in_a_verdict(monkeypatch):
    """On them the other method is ahead."""
    def run(name, seed, end):
        config = experiments.Setting(name, "R1").run(FULL, 0.01, seed)
        return pd.DataFrame([columns(config)] * 2).assign(run=f"{name}{seed}", update=[0, 100],
                                                          reward=[0.0, end])  # fmt: skip

    seeds = (*FULL.sweep_seeds, *FULL.report_seeds)
    table = pd.concat([run(name, seed, end if seed in FULL.report_seeds else 1 - end)
                       for name, end in (("ipo", 0.9), ("rwr", 0.2))
                       for seed in seeds])  # fmt: skip
    monkeypatch.setattr(claims, "rules", lambda: [rule()])
    (found,) = claims.judge_all("on_policy", table, FULL, lambda setting: 0.01)
    assert (found.seeds, found.effect) == (len(FULL.report_seeds), pytest.approx(0.7))

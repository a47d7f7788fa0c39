"""The landing page's answers, from chapters whose results are written by hand."""

from __future__ import annotations

import re
from ast import literal_eval
from types import SimpleNamespace

import pandas as pd
import pytest

from lib import claims, experiments, overview, stats
from lib.chapter import BADGES
from lib.experiments import Setting
from lib.figures import overview as figures
from tests.test_costs import rows as timed


def rows(finals, first=5):
    """One run per seed that goes from 0 to its final reward in a straight line."""
    return pd.concat([
        pd.DataFrame({"run": f"r{seed}", "seed": seed, "update": [0, 100], "reward": [0.0, final],
                      "samples": 100, "seconds_sampling": 0.0, "seconds_scoring": 0.0,
                      "seconds_training": 1.0})
        for seed, final in enumerate(finals, first)
    ])  # fmt: skip


class Handmade:
    """A chapter with given rows per setting."""

    published, profile_name, verdicts = None, "smoke", []
    profile = SimpleNamespace(updates=100, options=(), device="cpu")

    def __init__(self, **settings):
        self.rows = {name.replace("_at_", "@"): rows(finals) for name, finals in settings.items()}

    def settings(self):
        found = []
        for name in self.rows:
            method, task, options = re.fullmatch(r"(\w+)@(\w+)(?:\[(.+)\])?", name).groups()
            pairs = (pair.split("=") for pair in options.split(",")) if options else ()
            given = tuple((option, literal_eval(value)) for option, value in pairs)
            found.append(Setting(method, task, given))
        return found

    def has(self, *names):
        return set(names) <= set(self.rows)

    def reported(self, name):
        return self.rows[name]

    def contrast(self, text, statistic):
        terms = claims.terms(text)
        if not self.has(*(name for _, name in terms)):
            return None
        return sum(w * stats.per_run(self.rows[name], statistic) for w, name in terms)


@pytest.fixture
def chapters():
    offline = Handmade(
        dpo_offline_at_R1=[0.90, 0.92, 0.94], ipo_offline_at_R1=[0.90, 0.93, 0.93],
        rwr_offline_at_R1=[0.30, 0.31, 0.32], dpo_offline_at_R2=[0.99, 0.99, 0.98],
    )  # fmt: skip
    on_policy = Handmade(ipo_at_R1=[0.99, 1.0, 1.0], rwr_at_R1=[0.95, 0.97, 0.96])
    on_policy.rows["ipo@R1[sets=50]"] = rows([0.79, 0.8, 0.8])
    return {"negative_gradient": offline, "on_policy": on_policy}


def table_row(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_speed_is_the_means_of_the_rows(chapters):
    _, far, near = table_row(overview.speed(chapters), "Best mean reward over 100 updates")
    assert far.startswith("**IPO** 0.50 (") and far.endswith("level with it: RWR")
    assert near == overview.NOT_YET


def test_whether_a_chapter_is_published_is_asked_without_reading_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.runs.published.results_folder", lambda results=None: tmp_path)
    assert not overview.published("on_policy")
    (tmp_path / "on_policy").mkdir()
    (tmp_path / "on_policy" / "cpu.parquet").write_text("no table")
    assert overview.published("on_policy") and overview.published("on_policy", "cpu")
    assert not overview.published("on_policy", "full")


def test_without_results_every_answer_says_so():
    assert overview.speed({}).count(overview.NOT_YET) == 4
    measured = (claims.claims()["question"].astype(str) != "theory").sum()  # the rest is exact
    assert overview.counts({}).startswith(f"{len(claims.claims())} claims: ")
    assert overview.counts({}).endswith(f", {measured} {overview.NOT_YET}")
    assert overview.dashboard({}).count(overview.NOT_YET) == measured
    assert overview.standing({}).empty


def test_what_is_not_judged_depends_on_what_is_there(chapters):
    assert "not judged in this version" in overview.unjudged(chapters)
    judged = overview.unjudged({**chapters, "full_scale": Handmade()})
    assert "not judged in this version" not in judged and "(full_scale.ipynb)" in judged


def test_a_clear_lead_is_told_apart():
    far = {
        "ipo": pd.Series([0.9, 0.91, 0.92], [5, 6, 7]),
        "rwr": pd.Series([0.5, 0.52, 0.51], [5, 6, 7]),
    }
    assert overview.best(far) == "ipo" and overview.not_told_apart(far) == []
    near = {**far, "dpo": pd.Series([0.89, 0.9, 0.91], [5, 6, 7])}
    assert overview.not_told_apart(near) == ["dpo"]  # a lead of 0.01 is inside the margin


def test_checks_of_a_published_result_are_counted_in_words():
    meta = {"totals": {"seconds": {}, "runs": 1}, "commit": "c", "published": "2026-11-26"}
    said = {
        n: overview._published_row(SimpleNamespace(
            meta={**meta, "verified": [{}] * n}, chapter="on_policy", profile="full",
            notice=lambda: "", changes=lambda: ""))[6]
        for n in range(4)
    }  # fmt: skip
    assert said == {0: "not yet", 1: "once", 2: "twice", 3: "3 times"}


def test_dashboard_shows_each_claim_once_with_its_verdict(chapters):
    rule = next(r for r in claims.rules() if r.claim == "Q2-bandit-r1")
    chapters["negative_gradient"].verdicts = [claims.Verdict(rule, "reproduced", 0.5, 0.4, 0.6, 20)]
    text = overview.dashboard(chapters)
    line = next(line for line in text.splitlines() if "IPO and best-of-N + negative" in line)
    assert line.startswith(f"- [reproduced]{{.verdict-{BADGES['reproduced']}}} IPO")
    assert line.endswith("(negative_gradient.ipynb))")
    for claim in claims.claims()["claim"]:
        assert text.count(f"{claim} ([") == 1
    for title in overview.QUESTIONS.values():
        assert title in text


def test_theory_stands_on_the_dashboard_with_its_verdicts():
    lines = overview.dashboard({}).splitlines()
    theory = [line for line in lines if line.endswith("(theory.ipynb))")]
    assert len(theory) == (claims.claims()["question"] == "theory").sum() == len(overview.theory())
    case_3 = next(line for line in theory if "c₁ p₂" in line)
    assert case_3.startswith(f"- [not reproduced]{{.verdict-{BADGES['not reproduced']}}} ")
    case_2 = next(line for line in theory if "c₀ p₁" in line)
    assert "[reproduced]" in case_2 and "(not its printed proof)" in case_2


def test_a_claim_of_several_comparisons_counts_them(chapters):
    first, second = [r for r in claims.rules() if r.claim == "Q2-bandit-r1"][:2]
    chapters["negative_gradient"].verdicts = [
        claims.Verdict(first, "reproduced"), claims.Verdict(second, "inconclusive")]  # fmt: skip
    line = next(x for x in overview.dashboard(chapters).splitlines() if "IPO and best" in x)
    assert line.startswith(f"- [partly]{{.verdict-{BADGES['partly']}}} (1 of 2) IPO")
    heading = next(x for x in overview.dashboard(chapters).splitlines()
                   if x.startswith(f"**{overview.QUESTIONS[2]}**"))  # fmt: skip
    assert heading.endswith("0 are not, 1 are open; 0 of the open ones exclude the "
                            "difference as it is claimed.")


def test_sources_name_every_chapter(chapters):
    text = overview.sources(chapters)
    for name in experiments.CHAPTERS:
        assert f"({name}.ipynb)" in text
    assert text.count("smoke, computed now") == 2


def test_standing_and_its_figure(chapters):
    table = overview.standing(chapters)
    assert len(table) == 6 and set(table["n"]) == {3}
    (panel,) = figures.standing(table).axes
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["RWR", "DPO", "IPO", "RWR", "IPO"]
    assert {"offline", "on-policy"} <= {text.get_text() for text in panel.texts}
    markers = [line for line in panel.lines if line.get_linestyle() == "None"]
    drawn = sorted(float(line.get_xdata()[0]) for line in markers)
    assert drawn == pytest.approx(sorted(table["mean"]))


def test_the_clock_leaves_out_who_misses_a_seed():
    reached = {"dpo": [5, 5, 6], "rwr": [3, 3, 99], "ipo": [9, 9, 9]}
    found = {f"{name}@R1[alone=True]": timed(at) for name, at in reached.items()}
    alone = [Setting(name, "R1", (("alone", True),)) for name in reached]
    chapter = SimpleNamespace(settings=lambda: alone, reported=found.get)
    said = overview._clock({"wall_clock": chapter}, "R1")
    assert said.startswith("**DPO** 0.53 (") and "level" not in said

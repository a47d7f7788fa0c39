"""The decision chart as text: what a screen reader hears, and what opens."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from lib import chart, decisions
from tests.test_decisions import ALL, ALSO, CLEAR, FAR, results, verdicts

FEW = results({"dpo_offline": [-20.0] * 2, "rwr_offline": [-2.0] * 2}, "min")


def leaves(table, found=()):
    return decisions.leaves(table, verdicts(*found), ALL)


@pytest.fixture
def text():
    return chart.chart(leaves(pd.concat([CLEAR, FEW]), ("reproduced", "not reproduced")))


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_lists_and_leaves_are_closed_and_nested(text):
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.seen.count("details") == parser.seen.count("summary") == 9
    assert parser.seen.count("ul") == 1 + 3 * 2 and parser.seen.count("li") == 3 + 3 * 4


def test_markdown_between_lines_of_html_stands_alone(text):
    """An HTML block ends at an empty line: Markdown that touches one would be printed as it is."""
    for block in text.split("\n\n"):
        if block.startswith("<"):
            assert "**" not in block and "](" not in block


def test_it_is_read_as_question_answer_outcome_methods(text):
    heard = re.sub(r"<[^>]+>|[*]", "", text)
    heard = re.sub(r"\s+", " ", heard)
    start = ("Can you sample while you train? No, the data are fixed. Where is the reward's peak? "
             "Near what the model writes. not computed yet")  # fmt: skip
    assert heard.strip().startswith(start)
    assert ("Far from it. Do the preference pairs come near the peak? No: they are what the model "
            "writes. Leading: offline DPO. paper: mixed") in heard  # fmt: skip


def test_a_leaf_gives_frequency_interval_n_costs_and_links(text):
    line = next(x for x in text.splitlines() if x.startswith("- **DPO (offline)**"))
    assert "first in 6 of 6 (61% to 100%); final reward" in line
    assert "final reward 0.90 (0.90 to 0.90), worst run 0.90" in line
    assert "100 completions given, 2.0" in line
    assert "- Behind (seeds in which it came first): RWR (offline) 0" in text
    assert f"**{FAR.title}** (untrained -99.00): 6 seeds. Evidence" in text
    assert "- Peak memory, estimated: 10 MiB" in text
    counts = "1 reproduced, 1 not reproduced"
    assert f"bear on this: {counts} ([negative gradient](negative_gradient.ipynb))." in text
    few = ("2 seeds; too few seeds to count. Seeds in which each came first: RWR (offline) 2, "
           "DPO (offline) 0.")  # fmt: skip
    assert f"**{ALSO.title}**: {few} Evidence: [a](a.ipynb)." in text


@pytest.mark.parametrize(("table", "found", "says"), [
    (CLEAR, ("reproduced",), "Leading: offline DPO."),
    (CLEAR, ("inconclusive",), "Leading so far: offline DPO."),
    (FEW, ("reproduced",), "Fewer than 5 seeds so far."),
    (pd.concat([CLEAR, results({"dpo_offline": [-20.0] * 6, "rwr_offline": [-2.0] * 6}, "min")]),
     ("reproduced",), "No method leads on all its problems."),
    (results({"dpo_offline": [0.9] * 6}, "R2"), (), ""),
])  # fmt: skip
def test_what_a_leaf_recommends(table, found, says):
    leaf = decisions.leaf("fixed", ("far", "apart"), table, verdicts(*found), ALL)
    assert chart.take(leaf) == says


@pytest.mark.parametrize(("verdict", "badge", "other"), [
    ("reproduced", "reproduced", "not"), ("not reproduced", "not", "reproduced"),
])  # fmt: skip
def test_an_outcome_has_the_badge_of_its_verdict(verdict, badge, other):
    text = chart.chart(leaves(CLEAR, (verdict,)))
    assert f'<span class="verdict-{badge}">' in text
    assert f'<span class="verdict-{other}">' not in text


def test_who_does_not_lead_but_was_first_once_is_named():
    table = results({"dpo_offline": [0.9] * 20, "rwr_offline": [0.3] * 19 + [1.0]})
    text = chart.chart(leaves(table, ("reproduced",)))
    assert "- Behind (seeds in which it came first): RWR (offline) 1" in text


def test_a_method_that_may_harm_is_named_apart():
    table = results({"dpo_offline": [0.9] * 5 + [0.1], "rwr_offline": [0.85] * 6}, start=0.3)
    leaf = decisions.leaf("fixed", ("far", "apart"), table, verdicts("reproduced"), ALL)
    safe, harmful = chart.take(leaf).split(". ")
    assert safe == "Leading: offline RWR"
    assert harmful == "Leading, but a run ended below the untrained model: offline DPO."


def test_a_method_that_some_problems_did_not_run_says_so():
    table = pd.concat([CLEAR, results({"dpo_offline": [-2.0] * 6, "pref_ft": [-2.0] * 6}, "min")])
    leaf = decisions.leaf("fixed", ("far", "apart"), table, verdicts("reproduced"), ALL)
    assert chart.take(leaf) == "Leading: offline DPO, Pref-FT (1 of 2)."


def test_where_no_method_gains_the_problem_says_so():
    table = results({"dpo_offline": [0.1] * 6, "rwr_offline": [0.2] * 6}, start=0.3)
    text = chart.chart(leaves(table, ("reproduced",)))
    assert "(untrained 0.30, above which no method ends)" in text


def test_on_policy_and_offline_methods_are_told_apart():
    table = pd.concat([CLEAR, results({"dpo": [0.9] * 6, "ppo_sequence": [0.9] * 6},
                                      choice="rare")])  # fmt: skip
    found = decisions.leaf("rare", ("far", "apart"), table, verdicts("reproduced"), ALL)
    assert chart.take(found) == "Leading so far: on-policy DPO, PPO; offline DPO."
    assert "6 seeds, one sampling for 50 updates." in chart.chart(
        decisions.leaves(table, verdicts("reproduced"), ALL))  # fmt: skip


def test_a_rare_sampling_is_answered_for_each_number_of_updates():
    """What leads on problems where it serves 4 need not lead where it serves 50."""
    parts = [results({"rwr": [-2.0] * 6, "dpo_offline": [-20.0] * 6}, "min", choice="rare"),
             results({"rwr": [0.1] * 6, "dpo": [0.9] * 6, "dpo_offline": [0.8] * 6},
                     choice="rare")]  # fmt: skip
    table = pd.concat([parts[0].assign(serves=4), parts[1].assign(serves=50)])
    found = decisions.leaf("rare", ("far", "apart"), table, verdicts("reproduced"), ALL)
    assert found.recommended == ("DPO (on-policy)",)
    said = chart.take(found)
    assert said.index("For 4 updates: leading so far: on-policy RWR.") < said.index(
        "For 50 updates: leading so far: on-policy DPO.")  # fmt: skip


def test_the_table_has_every_method_of_every_leaf():
    table = chart.table(leaves(pd.concat([CLEAR, FEW])))
    assert len(table) == 4 and set(table["problem"]) == {"R1", "min"}
    assert {"first", "low", "high", "seconds", "memory", "outcome"} <= set(table)

"""Reward models checked: accuracy, calibration and slope, on made-up scores and on a real model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lib import judges, lengths
from lib.judges import Judged
from tests.lm_folder import prepared_folder


@pytest.fixture(scope="module")
def have(tmp_path_factory):
    return lengths.Prepared(str(prepared_folder(tmp_path_factory.mktemp("have"), prompts=60)))


def made(scores, gold) -> Judged:
    gold = np.array(gold, float)
    return Judged("min", np.array(scores, float), gold, -gold.astype(int))


PAIRS = made([[2, 0], [0, 1], [1, 1], [5, 0], [3, 3]],
             [[-1, -9], [-2, -40], [-3, -5], [-4, -4], [-60, -20]])  # fmt: skip


def test_margins_by_hand():
    """The fourth pair is tied and left out; an equal score is not right."""
    assert PAIRS.untied.tolist() == [True, True, True, False, True]
    assert PAIRS.gap.tolist() == [8, 38, 2, 40]
    assert PAIRS.margin.tolist() == [2, -1, 0, 0]
    assert PAIRS.right.tolist() == [True, False, False, False]


@given(arrays.arrays(float, (7, 2), elements=st.integers(-20, 20).map(float)),
       arrays.arrays(float, (7, 2), elements=st.integers(-60, 0).map(float)))  # fmt: skip
def test_the_order_within_a_pair_does_not_matter(scores, gold):
    one, other = Judged("min", scores, gold, -gold), Judged(
        "min", scores[:, ::-1], gold[:, ::-1], -gold[:, ::-1])  # fmt: skip
    assert one.margin.tolist() == other.margin.tolist()
    assert one.gap.tolist() == other.gap.tolist()


def test_accuracy_by_difference():
    table = judges.accuracy([PAIRS]).set_index("gap")
    assert table.loc["all", "right"] == 0.25 and table.loc["all", "n"] == 4
    assert table.loc["6 to 15", "right"] == 1
    assert table.loc["31 and more", "right"] == 0 and table.loc["31 and more", "n"] == 2
    assert table.loc["16 to 30", "n"] == 0 and np.isnan(table.loc["16 to 30", "right"])
    assert table.drop("all")["n"].sum() == table.loc["all", "n"]


def test_fractions_of_a_token_are_counted_once():
    """On Mode a difference may be 15.5 tokens: every pair falls into exactly one class."""
    gold = [[0, -gap] for gap in (0.5, 5.5, 6, 15.5, 16, 30.5, 31)]
    table = judges.accuracy([made([[1, 0]] * 7, gold)]).set_index("gap")
    assert table["n"].tolist() == [7, 2, 2, 2, 1]


def test_a_calibrated_model_is_on_the_diagonal():
    generator = np.random.default_rng(0)
    scores = generator.normal(0, 1.5, (20_000, 2))
    likely = 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    first = generator.random(20_000) < likely
    table = judges.calibration([made(scores, np.where(first[:, None], [0, -9], [-9, 0]))])
    assert len(table) == 6 and table["n"].sum() == 20_000
    assert table["right"].to_numpy() == pytest.approx(table["sure"].to_numpy(), abs=0.03)


def test_a_model_that_is_always_right_is_underconfident():
    generator = np.random.default_rng(0)
    scores = np.sort(generator.random((500, 2)))[:, ::-1]
    table = judges.calibration([made(scores, [[-1, -20]] * 500)])
    assert (table["right"] == 1).all() and (table["sure"] < 1).all()


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_summary_of_knowing_nothing_and_everything():
    gold = np.array([[-1, -20], [-30, -4], [-7, -9]], float)
    nothing = judges.summary([made(np.zeros((3, 2)), gold)]).loc["min"]
    assert nothing["loss"] == pytest.approx(np.log(2)) and nothing["accuracy"] == 0
    everything = judges.summary([made(gold, gold)]).loc["min"]
    assert everything["accuracy"] == 1 and everything["rank"] == pytest.approx(1)
    assert everything["loss"] < np.log(2) and everything["pairs"] == 3


def test_held_out_pairs_are_scored_by_the_model(have):
    """The score of one response, through transformers alone."""
    one, pairs = judges.judged(have, "min"), have.data("min").pairs["validation"]
    model = judges.model(have, "min").model
    ids = pairs.prompts[2] + pairs.second[2]
    with torch.no_grad():
        state = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        score = model.score(state).item()
    assert one.scores[2, 1] == pytest.approx(score, abs=1e-4)
    assert one.gold[2].tolist() == (-pairs.lengths[2]).tolist()


def test_cut_texts_are_cut(have):
    scores = judges.cut_scores(have, "min")
    own = have.data("min").pairs["validation"]
    order = np.argsort(-own.lengths[:, 0], kind="stable")
    longer = own.lengths[order, 0][: judges.LONG, None] > np.array(judges.CUTS)
    assert (np.isnan(scores) == ~longer).all()
    prompt, eos = own.prompts[order[0]], own.eos[0]
    model = judges.model(have, "min").model
    number = judges.CUTS.index(4)
    ids = [*prompt, *own.first[order[0]][:4], eos]
    with torch.no_grad():
        state = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        expected = model.score(state).item()
    assert scores[0, number] == pytest.approx(expected, abs=1e-4)


def test_a_flat_score_resolves_nothing_and_a_steep_one_everything(have):
    flat = np.zeros((5, len(judges.CUTS)))
    steep = np.tile(-100.0 * np.arange(len(judges.CUTS)), (5, 1))
    table = judges.resolution(have, {"min": flat, "skew": steep})
    assert (table[table["task"] == "min"]["better"] == 0.5).all()
    assert table.groupby("task")["right"].max().to_dict() == {"min": 0, "skew": 5}
    assert table[table["task"] == "skew"]["better"].to_numpy() == pytest.approx(1)
    upside_down = judges.resolution(have, {"min": -steep})
    assert upside_down["better"].to_numpy() == pytest.approx(0)


def test_modes_sides_of_the_target_are_not_compared(have):
    steep = np.tile(-np.abs(np.array(judges.CUTS) - have.target), (3, 1))
    table = judges.resolution(have, {"mode": steep})
    assert (table["better"] > 0.5).all()
    across = (table["short"] < have.target) & (table["long"] > have.target)
    assert not across.any()


def test_curve_has_every_response_once(have):
    one, cuts = judges.judged(have, "min"), judges.cut_scores(have, "min")
    table = judges.curve(one, cuts)
    own = table[table["kind"] == "own"]
    _, sizes = np.unique(one.lengths.ravel() // judges.BIN, return_counts=True)
    assert sorted(own["n"]) == sorted(sizes[sizes > 1])
    assert ((table["low"] <= table["mean"]) & (table["mean"] <= table["high"])).all()


def test_shown_has_a_column_per_task_and_marks_what_is_empty():
    table = judges.accuracy([PAIRS])
    shown = judges.shown(table, "gap", "right")
    assert list(shown.columns) == ["gap", "Min"]
    assert shown["Min"].tolist()[0].startswith("0.25 (")
    assert shown.set_index("gap")["Min"]["16 to 30"] == "-"
    steps = pd.DataFrame({"task": ["min", "skew"], "short": [1, 2], "long": [2, 3],
                          "better": [0.51, 0.6], "n": [3, 3]})  # fmt: skip
    assert judges.resolution_shown(steps).values.tolist() == [
        ["1 or 2", "0.51", "-"], ["2 or 3", "-", "0.60"]]  # fmt: skip


def test_numbers_have_what_the_prose_quotes(have):
    verdicts = [judges.judged(have, task) for task in lengths.TASKS]
    cuts = {task: judges.cut_scores(have, task) for task in lengths.TASKS}
    found = judges.numbers(have, verdicts, cuts)
    assert {"close_min", "seen_min_4", "favourite_mode", "accuracy_skew"} <= set(found)
    right, count = map(int, found["order_min_4"].split(" of "))
    assert 0 <= right <= count > 0
    assert found["favourite_min"] in judges.CUTS

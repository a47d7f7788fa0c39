"""Lengths, geometry and coverage of a prepared folder, against counting and known limits."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import lengths, stats
from lib.experiments import PROFILES
from lib.lm.length import TASKS
from tests.lm_folder import prepared_folder


@pytest.fixture(scope="module")
def have(tmp_path_factory):
    return lengths.Prepared(str(prepared_folder(tmp_path_factory.mktemp("have"), prompts=60)))


@pytest.fixture(scope="module")
def covered(have):
    return lengths.coverage(have, count=24)


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "policy").mkdir()
    with pytest.raises(FileNotFoundError, match="lacks pairs.parquet, reward-min.*lm.prepare"):
        lengths.Prepared(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'nowhere'"):
        lengths.Prepared("nowhere")


def test_a_folder_of_some_tasks_is_said_to_need_the_others(have, tmp_path):
    few = shutil.copytree(have.folder, tmp_path / "few")
    shutil.rmtree(few / "reward-skew")
    with pytest.raises(FileNotFoundError, match="lacks reward-skew and needs all tasks.*prepare "
                       f"with the options .* --tasks min mode skew --out {few}"):  # fmt: skip
        lengths.Prepared(str(few))


def test_a_folder_of_preferences_is_said_to_follow_no_rule(tmp_path):
    (tmp_path / "reward-given").mkdir()
    with pytest.raises(FileNotFoundError, match="follow no rule. Make it.* --out A_NEW_FOLDER"):
        lengths.Prepared(str(tmp_path))


def test_records_are_read_where_there_are_any(have, tmp_path):
    assert have.record == {} and have.training == {}
    assert have.cap == 12
    assert "not recorded" in lengths.story(have)["value"].tolist()
    root = prepared_folder(tmp_path, prompts=6)
    table = pd.read_parquet(root / "pairs.parquet")
    table["first"] = table["first"].map(lambda ids: ids[:3])  # the second ones have up to 12
    table.to_parquet(root / "pairs.parquet")
    assert lengths.Prepared(str(root)).cap == 12
    (root / "prepared.json").write_text(json.dumps({"pairs": {"max_tokens": 20}}))
    (root / "policy/training.json").write_text(json.dumps({"command": "make", "pairs": {"t": 3}}))
    other = lengths.Prepared(str(root))
    assert other.cap == 20
    assert {"make", "3"} <= set(lengths.story(other)["value"])


def test_samples_are_repeatable_and_end_where_they_say(have):
    table = lengths.samples(have, count=5, seed=3)
    assert len(table) == 5 and (table["tokens"] <= have.cap).all()
    assert (table["tokens"][table["ends"] == "cap"] == have.cap).all()
    assert (table["tokens"][table["ends"] == "EOS"] < have.cap).all()
    assert lengths.samples(have, count=5, seed=3).equals(table)
    assert not lengths.samples(have, count=5, seed=4)["response"].equals(table["response"])


def test_special_tokens_are_visible(tmp_path):
    root = prepared_folder(tmp_path, prompts=6)
    table = pd.read_parquet(root / "pairs.parquet")
    table["first"], table["second"] = [[65, 66, 256]] * len(table), [[65] * 12] * len(table)
    table.to_parquet(root / "pairs.parquet")
    text = lengths.spelled(lengths.Prepared(str(root)))
    assert "first response: 2 tokens and EOS\nbc<eos>" in text
    assert "second response: 12 tokens\n" in text


def test_quoted_text_is_no_markup():
    table = lengths.pd.DataFrame({"a": ["x|y\n$z$ *b*", ""], "n": [1, 2]})
    assert lengths.quoted(table)["a"].tolist() == [r"x\|y / \$z\$ \*b\*", "(nothing)"]
    assert lengths.quoted(table)["n"].tolist() == [1, 2]


@pytest.mark.parametrize("task", TASKS)
def test_distributions_are_those_of_the_sides(have, task):
    table = lengths.distributions(have)
    rows = table[table["task"] == task]
    assert rows.groupby("side")["share"].sum().tolist() == pytest.approx([1, 1, 1])
    means = {s: r["share"] @ r["length"] for s, r in rows.groupby("side")}
    counted = lengths.counts(have).set_index("task").loc[lengths.TITLES[task]]
    assert means["preferred"] == pytest.approx(counted["mean length, preferred"])
    assert means["policy"] == pytest.approx(have.lengths.mean())
    if task != "mode":
        assert means["preferred"] < means["dispreferred"]


def test_counts_of_ties_and_cuts(have):
    table = lengths.counts(have).set_index("task")
    pairs = have.data("min").pairs["train"]
    ties = int((pairs.lengths[:, 0] == pairs.lengths[:, 1]).sum())
    assert table["ties"]["Min"] == ties
    assert table["cut on purpose, %"]["Min"] == table["cut on purpose, %"]["Mode"] == 0
    assert table["cut on purpose, %"]["Skew"] > 20
    assert table["without EOS, %"]["Skew"] <= table["without EOS, %"]["Min"]


# --- [C1] -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(-50, 0), min_size=1, max_size=6), st.integers(1, 4))
def test_best_of_is_the_mean_over_all_draws(rewards, count):
    draws = np.array(np.meshgrid(*[rewards] * count)).reshape(count, -1)
    found = lengths.best_of(np.array(rewards, float), count)
    assert found == pytest.approx(draws.max(0).mean(), abs=1e-9)


def test_best_of_many_is_the_best():
    rewards = np.array([-3.0, -1.0, -7.0])
    assert lengths.best_of(rewards, 1) == pytest.approx(rewards.mean())
    assert lengths.best_of(rewards, 200) == pytest.approx(-1.0)


@given(st.integers(0, 30), st.integers(1, 30))
def test_a_share_lies_in_its_interval(hits, more):
    part, low, high = stats.share(hits, hits + more)
    assert 0 <= low <= part <= high <= 1
    assert low < high


def test_geometry_counts_what_is_near(have):
    table = lengths.geometry(have)
    near = np.abs(have.lengths - have.target) <= 5
    assert table.loc["mode", "near"] == near.mean()
    assert table.loc["mode", "nats"] == pytest.approx(-np.log(near.mean()))
    assert table.loc["min", "near"] == (have.lengths <= 5).mean()
    assert table.loc["min", "reward"] == pytest.approx(-have.lengths.mean())
    assert table.loc["min"].drop("peak").equals(table.loc["skew"].drop("peak"))
    assert (table["best"] >= table["reward"]).all()


def test_nothing_near_is_infinitely_far(have, monkeypatch):
    monkeypatch.setattr(lengths.Prepared, "lengths", np.array([50, 60]))
    row = lengths.geometry(lengths.Prepared(have.name)).loc["min"]
    assert row["near"] == 0 and row["nats"] == np.inf and row["high"] > 0


def test_frontier_runs_from_the_reference_to_the_best_length(have):
    table = lengths.frontier(have, np.geomspace(1e4, 1e-2, 60))
    for task, rows in table.groupby("task"):
        rows, rewards = rows.sort_values("kl"), have.gold(task, have.lengths)
        assert (rows["reward"].diff().dropna() > -1e-9).all()
        assert rows["reward"].iloc[0] == pytest.approx(rewards.mean(), abs=0.05)
        assert rows["reward"].iloc[-1] == pytest.approx(rewards.max(), abs=1e-3)
        best = (rewards == rewards.max()).mean()
        assert rows["kl"].iloc[-1] == pytest.approx(-np.log(best), abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_no_law_of_lengths_beats_the_frontier(have, seed):
    """At beta, gold - beta KL is largest for the frontier's law: any other one is below it."""
    values, counted = np.unique(have.lengths, return_counts=True)
    p, beta = counted / counted.sum(), 3.0
    q = np.random.default_rng(seed).dirichlet(p * len(p) + 0.01)
    inside = q > 0
    kl = (q[inside] * np.log(q[inside] / p[inside])).sum()
    row = lengths.frontier(have, [beta]).set_index("task").loc["min"]
    assert row["reward"] - beta * row["kl"] >= -(q @ values) - beta * kl - 1e-9


def test_answering_nothing_costs_what_the_policy_says(have):
    found, data = lengths.empty_nats(have), have.data("min")
    model = have.policy.network.model
    for i in (0, 3):
        with torch.no_grad():
            logits = model(torch.tensor([data.prompts["validation"][i]])).logits[0, -1]
        assert found[i] == pytest.approx(-logits.log_softmax(-1)[data.ids.eos[0]].item(), abs=1e-4)


# --- [C2] -----------------------------------------------------------------------------------------


def test_coverage_is_what_the_model_gives_each_response(have, covered):
    """One pair by hand, through the model's own forward pass."""
    pairs, model = have.data("min").pairs["train"], have.policy.network.model
    rows = covered[covered["task"] == "min"].reset_index(drop=True)
    index = lengths.uniforms([0], 0, 0, (len(pairs),))[0].argsort()[:24].tolist()
    untied = [i for i in index if len(set(pairs.lengths[i])) > 1]
    assert len(rows) == len(untied)
    i = untied[0]
    chosen = (pairs.first, pairs.second)[int(pairs.lengths[i].argmin())][i]
    prompt = pairs.prompts[i]
    with torch.no_grad():
        logp = model(torch.tensor([prompt + chosen])).logits[0].log_softmax(-1)
    each = [logp[len(prompt) - 1 + t, token].item() for t, token in enumerate(chosen)]
    assert rows["chosen_logp"][0] == pytest.approx(sum(each), abs=1e-3)
    assert rows["chosen_token"][0] == pytest.approx(np.mean(each), abs=1e-4)
    assert rows["chosen_length"][0] == pairs.lengths[i].min()
    if chosen[-1] in pairs.eos:
        assert rows["chosen_end"][0] == pytest.approx(each[-1], abs=1e-4)
    else:
        assert np.isnan(rows["chosen_end"][0])


def test_sides_of_coverage_follow_the_rule(have, covered):
    for task, rows in covered.groupby("task"):
        chosen, rejected = (have.gold(task, rows[f"{side}_length"].to_numpy())
                            for side in ("chosen", "rejected"))  # fmt: skip
        assert (chosen > rejected).all()


def test_min_and_mode_have_the_same_responses(covered):
    total = covered[["chosen_logp", "rejected_logp"]].sum(axis=1)
    sums = total.groupby(covered["task"]).sum()
    assert len(covered[covered["task"] == "min"]) == len(covered[covered["task"] == "mode"])
    assert sums["min"] == pytest.approx(sums["mode"], rel=1e-6)
    assert sums["min"] != pytest.approx(sums["skew"], rel=1e-3)


def test_overlap_is_one_for_the_policys_own_lengths(have):
    table = lengths.overlap(have)
    assert table.loc[["min", "mode"], "overlap"].tolist() == pytest.approx([1, 1])
    assert 0 < table.loc["skew", "overlap"] < 1
    assert table.loc["skew", "near"] > table.loc["min", "near"]


def test_table_2_holds_the_papers_words(have, covered):
    table = lengths.table_2(have, covered)
    assert list(table.columns[1:]) == ["Min", "Mode", "Skew"]
    assert table.iloc[0, 1:].tolist() == ["disjoint", "overlap", "disjoint"]
    assert table.iloc[3, 1:].tolist() == ["high", "high", "low"]
    assert table.iloc[4, 1:3].tolist() == ["1.00", "1.00"]


def test_numbers_are_plain(have, covered):
    glued = {}
    lengths.glued(lengths.numbers(have, covered), lambda k, v, display: glued.__setitem__(k, v))
    assert {"target", "near_mode", "overlap_skew", "gap_min", "empty"} <= set(glued)
    assert all(type(v) in (str, float, int) for v in glued.values())


def test_prose_is_for_the_shipped_policy(have):
    assert "may not hold here" in lengths.reading(have)


def test_the_shipped_tasks_differ_as_table_2_says():
    """What the later chapters' comparisons rest on."""
    have = lengths.Prepared("tiny")
    near, cover = lengths.geometry(have), lengths.overlap(have)
    assert near.loc["mode", "low"] > 5 * near.loc["min", "high"]
    assert near.loc["min", "nats"] > near.loc["mode", "nats"] + 1
    assert cover.loc["skew", "overlap"] < 0.5 < cover.loc["min", "overlap"]


def test_a_profile_shows_the_folder_that_its_runs_are_on(monkeypatch):
    monkeypatch.setattr(lengths, "Prepared", lambda name: name)
    shown = {profile: lengths.at(profile) for profile in ("auto", *PROFILES)}
    small = dict.fromkeys(("auto", "smoke", "cpu", "full"), "tiny")
    assert shown == {**small, "gpu": "smollm2", "paper": "pythia"}
    assert lengths.at("gpu", "mine") == "mine"

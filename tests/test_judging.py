"""The full-scale chapter's tables: effects of the factorial, calibration, pairs."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import experiments, judging, stats
from lib.lm.full_scale import DATA
from lib.lm.models import load_policy
from lib.lm.pairs import Pairs, save
from tests.tiny_lm import save_tiny_policy

SEEDS = range(5, 10)


def made(value):
    """Eight cells whose value by seed is `value(policy, pairs, kind, seed)`."""
    return {levels: pd.Series({s: float(value(*levels, s)) for s in SEEDS})
            for levels in product((0, 1), repeat=3)}  # fmt: skip


def test_effects_are_the_coefficients_that_the_cells_were_made_of():
    """y = 3 policy - 2 kind + 8 policy kind + seed: with half levels the interaction's share goes
    to the main effects, as the usual contrasts define them."""
    found = judging.effects(made(lambda p, d, k, s: 3 * p - 2 * k + 8 * p * k + s))
    effect = found.set_index("label")["effect"]
    assert effect["large policy"] == pytest.approx(3 + 4)
    assert effect["distinct pairs"] == pytest.approx(-2 + 4)
    assert effect["large policy with distinct pairs"] == pytest.approx(4)
    rest = effect.drop(["large policy", "distinct pairs", "large policy with distinct pairs"])
    assert np.allclose(rest, 0) and len(effect) == 7
    assert (found["n"] == len(SEEDS)).all()


def test_what_differs_between_seeds_alone_has_no_effect_and_no_spread():
    found = judging.effects(made(lambda p, d, k, s: 100 * s))
    assert np.allclose(found[["effect", "low", "high"]], 0)


def test_the_interval_is_that_of_the_seeds():
    found = judging.effects(made(lambda p, d, k, s: p * s))
    row = found.set_index("label").loc["large policy"]
    assert row["effect"] == pytest.approx(np.mean(SEEDS))
    assert row["high"] - row["low"] == pytest.approx(2 * 2.776 * np.std(SEEDS, ddof=1) / 5**0.5,
                                                     abs=1e-2)  # fmt: skip


def test_without_all_eight_cells_there_are_no_effects():
    cells = made(lambda *_: 0)
    assert len(judging.effects(cells)) == 7
    del cells[0, 1, 0]
    assert judging.effects(cells).empty


def test_policies_of_one_size_are_one_level_and_not_two_equal_ones():
    profile = experiments.profile_named("full_scale", "paper")
    assert len({*profile.policies}) == 1
    asked = SimpleNamespace(profile=profile, has=lambda name: True,
                            reported=lambda name: curve())  # fmt: skip
    found = judging.cells(asked, "dpo_offline", "final reward")
    assert set(found) == {(0, j, k) for j in (0, 1) for k in (0, 1)}


def test_looks_in_the_middle_and_at_the_end_are_told_apart():
    """RWR: from fresh samples -6 then -7 and -5, from old ones -5 then -4; nobody judged DPO."""

    def rows(*ends):
        return pd.concat([pd.DataFrame({"seed": seed, "update": [0, 24, 48], "gold": [-7, *both]})
                          for seed, both in enumerate(ends)])  # fmt: skip

    given = {"rwr@similar[judged=True]": rows((-6, -7), (-6, -5)),
             "rwr@similar[judged=True,sets=4]": rows((-5, -4), (-5, -6)),
             "dpo@similar[judged=True]": rows((0, 0)).drop(columns="gold")}  # fmt: skip
    asked = SimpleNamespace(profile=SimpleNamespace(updates=48), has=given.__contains__,
                            reported=given.__getitem__)  # fmt: skip
    found = judging._looks(asked)
    assert found["mid_gap"].startswith("-1.00") and found["worse"] == "1 of 2"
    assert found["late_rwr"].startswith("0.00") and found["late_rwr_old"].startswith("0.00")
    assert {found["late_dpo"], found["late_reinforce"]} == {judging.NOT_RUN}


def test_the_judge_puts_its_own_answer_first_and_repetition_far_below():
    found = judging.calibration().set_index("label")
    assert found.index[0] == "own answer" and (found["n"] == 64).all()
    for worse in ("the answer to another prompt", "own answer, words shuffled",
                  "own answer, said twice", "the prompt, three times", "one stock refusal", "yes",
                  "nothing"):  # fmt: skip
        assert found.loc[worse, "effect"] < found.loc["own answer", "effect"] - 0.5, worse
        assert found.loc[worse, "loses to own answer"] > 0.75, worse
    assert np.isnan(found.loc["own answer", "loses to own answer"])


def test_no_kind_of_answer_needs_the_row_above_it():
    labels = judging.calibration()["label"]
    assert set(judging.SPELLED.values()) <= set(labels)
    assert not labels.str.match(r"it\b|its\b").any()


@pytest.mark.parametrize("kind", judging.KINDS)
def test_shipped_pairs_have_the_better_answer_first_and_share_no_prompt(kind):
    table = judging.shipped(kind)
    assert (table["gold_first"] > table["gold_second"]).all()
    texts = {split: set(part["instruction"]) for split, part in table.groupby("split")}
    assert not texts["train"] & texts["validation"]
    assert min(map(len, texts.values())) >= 90


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of pairs that were read, of one kind, and the chapter of its runs."""
    root = tmp_path_factory.mktemp("own")
    policy = save_tiny_policy(root / "policy-mine")
    tokens = [[65, 66, 256]] * 8
    splits = {"train": Pairs(tokens, tokens, [[67, 68, 256]] * 8, (256,)),
              "validation": Pairs(tokens[:3], tokens[:3], [[67, 256]] * 3, (256,))}  # fmt: skip
    texts = {split: pd.DataFrame({"instruction": ["AB"] * len(p)}) for split, p in splits.items()}
    save(root / "similar.parquet", splits, texts)
    return root, chapter_of(root, policy)


def chapter_of(folder, policy):
    run = SimpleNamespace(folder=folder, policy_folder=policy)
    return SimpleNamespace(profile=None, settings=lambda: [SimpleNamespace(run=lambda *_: run)])


def test_pairs_of_ones_own_are_the_ones_that_are_shown(own):
    """By their own policy; nobody judged them, so that they have no gold reward."""
    reference = judging.Reference(own[1])
    (row,) = judging.pairs_table(reference).to_dict("records")
    assert list(row) == ["pairs", "to train on", "held out", "log pi_ref of y_w",
                         "log pi_ref of y_l"]  # fmt: skip
    assert (row["pairs"], row["to train on"], row["held out"]) == ("similar", 8, 3)
    logits = load_policy(own[0] / "policy-mine")[0](torch.tensor([[65, 66, 256, 67, 68, 256]]))
    exact = logits.logits[0, 2:5].log_softmax(-1)[range(3), [67, 68, 256]].mean()
    assert row["log pi_ref of y_l"] == pytest.approx(exact.item(), abs=1e-5)
    table = judging.examples(reference)
    assert list(table) == ["pairs", "instruction", "preferred", "other"] and len(table) == 2


def test_pairs_that_lie_elsewhere_are_the_shipped_ones_here(tmp_path):
    reference = judging.Reference(chapter_of(tmp_path, tmp_path / "policy-mine"))
    table = judging.pairs_table(reference)
    assert reference.folder == DATA and table["pairs"].tolist() == list(judging.KINDS)
    assert table["preferred is by"].str.contains("SmolLM2|the tiny policy").all()


def curve(**columns):
    return pd.DataFrame({"run": "a", "seed": 5, "update": [0, 1], "reward": [0.0, 1.0], **columns})


def test_a_gold_reward_that_nobody_judged_is_said_not_guessed():
    with pytest.raises(stats.MissingColumn, match="final gold needs 'gold'"):
        stats.per_run(curve(), "final gold")
    assert stats.per_run(curve(gold=[-7.0, -5.5]), "gain in gold").tolist() == [1.5]
    lines = {"judged": curve(gold=[-7.0, np.nan]), "plain": curve()}
    assert {label: len(rows) for label, rows in judging.looked_at(lines).items()} == {"judged": 1}


def test_final_values_have_the_share_that_ends():
    rows = curve(gold=[-7.0, -5.5], proxy=0.0, kl_ref=0.0, length=9.0, ended=[1.0, 0.531])
    assert judging.ends({"a": rows})["end in EOS"].tolist() == ["53%"]
    assert judging.ends({}).empty


def test_effects_on_similar_pairs_do_not_read_distinct_ones():
    cells = made(lambda p, d, k, s: 3 * p - 2 * d + 100 * k * p + s)
    found = judging.effects_on_similar(cells)
    assert (found["policy"] == 3).all() and (found["pairs"] == -2).all()


@pytest.mark.parametrize("kind", judging.KINDS)
def test_the_two_of_a_pair_share_a_little_more_than_answers_to_different_prompts(kind):
    pair, others = judging.shared(kind)
    assert 0.15 < others < pair < others + 0.1

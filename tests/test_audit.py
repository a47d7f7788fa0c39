"""The table of deviations, its effects from hand-made results, its arithmetic, and its switches."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import audit, claims, experiments, methods, overview, stats
from lib.advantages import Moments
from lib.audit import Audit, Deviation, Effect
from lib.bandit.config import CONVENTIONS, BanditRun
from lib.bandit.reference import histogram
from lib.experiments import Setting
from lib.lm.config import LengthRun
from tests.bandit.helpers import small, start

ROW = asdict(audit.deviations()[0])
FULL = {name: grid.profiles["full"] for name, grid in experiments.CHAPTERS.items()}
GRID = {
    s.name: (s, FULL[name])
    for name in audit.HOMES for s in experiments.settings(name, FULL[name])
}  # fmt: skip
CONTRASTS = [c for d in audit.deviations() for c in audit.split(d.contrasts)]
SWITCHES = sorted({claims.terms(c)[0][1] for c in CONTRASTS if audit.label(c)})


def rows(rewards, seeds=(5, 6, 7, 8, 9), rate=0.1):
    """One run per seed, from 0 to its final reward in a straight line."""
    return pd.concat([
        pd.DataFrame({"run": f"r{seed}", "seed": seed, "update": [0, 100], "reward": [0.0, end],
                      "kl_ref": [0.0, 10 * end], "length": [50.0, 10 * end], "entropy": 1.0,
                      "samples": [0, 100], "diverged": False, "learning_rate": rate})
        for seed, end in zip(seeds, rewards, strict=True)
    ], ignore_index=True)  # fmt: skip


class Handmade:
    """A chapter with given rows per setting."""

    published, profile_name, is_interpreted = None, "smoke", False
    profile = SimpleNamespace(report_seeds=(5, 6, 7, 8, 9), sweep_seeds=(0, 1), sets=(10,))

    def __init__(self, **settings):
        self.rows = {name.replace("_at_", "@"): found for name, found in settings.items()}

    def has(self, *names):
        return set(names) <= set(self.rows)

    def reported(self, name):
        return self.rows[name]

    swept = reported


def changed(**values):
    return Deviation(**{**ROW, **values})


# The table


def test_every_kind_is_there_and_every_setting_is_in_a_published_grid():
    found = audit.deviations()
    assert {d.kind for d in found} == set(audit.KINDS) and len(found) > 40
    for contrast in CONTRASTS:
        for _, name in claims.terms(contrast):
            assert name in GRID, name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "guess"}, "kind must be one of"),
        ({"why": ""}, "why must not be empty"),
        ({"elsewhere": "something"}, "elsewhere is for kind 'inconsistent'"),
        ({"kind": "inconsistent"}, "elsewhere is for kind 'inconsistent'"),
        ({"arithmetic": "sums"}, r"arithmetic must be one of \('ceiling'"),
        ({"statistics": "final speed"}, "statistic must be one of"),
        ({"contrasts": "rwr at R1"}, "cannot read the contrast"),
        ({"contrasts": "dpo@min - dpo@R1"}, "compares the bandit with the length problems"),
    ],
)
def test_a_bad_row_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        changed(**values)


def test_a_repeated_id_is_refused(tmp_path):
    path = tmp_path / "deviations.csv"
    pd.DataFrame([ROW, ROW]).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"repeated ids \['completion-length'\]"):
        audit.deviations(path)


def test_statistics_belong_to_the_problem_of_a_contrast():
    mixed = changed(contrasts="rwr@R1[temperature=0.05] - rwr@R1; dpo@min - ipo@min",
                    statistics="final reward; final length")  # fmt: skip
    assert [name for _, name in mixed.compared()] == ["final reward", "final length"]
    usual = changed(contrasts="dpo@min - ipo@min; dpo@R1 - ipo@R1", statistics="")
    assert [name for _, name in usual.compared()] == ["final length", audit.SPEED, audit.FINAL]


# Switches


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_changes_exactly_the_fields_it_names(name):
    """With more passes over a sample a length problem draws fewer samples: that field follows."""
    setting, profile = GRID[name]
    found = audit.switched(setting, profile)
    named = dict(setting.options)
    follows = {"iterations"} if "inner_steps" in named and name.split("@")[1][0] != "R" else set()
    assert set(found) == set(named) | follows
    assert {field: found[field][1] for field in named} == named
    assert audit.switched(setting.base, profile) == {}


def test_switches_named_in_the_table_are_those_that_are_measured():
    for deviation in audit.deviations():
        own = {k for c in audit.split(deviation.contrasts) if audit.label(c)
               for k, _ in GRID[claims.terms(c)[0][1]][0].options}  # fmt: skip
        options = dict(re.findall(r"`(\w+)(?:=([^`]*))?`", deviation.option))
        assert own <= set(options), deviation.id
        for option, value in options.items():
            fields = {**BanditRun.__dataclass_fields__, **LengthRun.__dataclass_fields__}
            if value and option in CONVENTIONS:
                assert eval(value) in CONVENTIONS[option]
            elif option in methods.INTERVALS | methods.CHOICES and value:
                methods.check_hyperparameter(option, eval(value))
            assert option in fields or option == "ppo_token"


# Where in a run each switch acts first. All that comes earlier must stay bit for bit as it is.
STAGES = ("prompts", "completions", "rewards", "logp", "labels", "loss", "trained")
ACTS_ON = {
    "prompts": "prompts", "length": "completions", "histogram": "completions",
    "completions": "completions", "reward_over": "rewards", "shift": "logp",
    "standardise": "labels", "weights": "labels", "temperature": "labels", "gap": "labels",
    "beta": "loss", "threshold": "loss", "ratio_over": "loss", "kl_penalty": "loss",
    "margin_over": "loss", "dropout": "trained", "reference_dropout": "trained",
    "inner_steps": "trained",
}  # fmt: skip


def stages(run):
    """What a run has made of its seed by each stage, as lists of tensors."""
    problem, state, updates = start(run)
    state.behaviour = state.reference
    batch = problem.collect(state, problem.method)
    moments = Moments()
    for rewards in (torch.zeros_like(batch.rewards), batch.rewards):  # the first ones are long gone
        moments.add(rewards)
    labels = problem.method.prepare(batch, {**run.hyper, "moments": moments})
    nudge = torch.linspace(-3, 3, batch.logp.numel()).view_as(batch.logp)  # away from pi = pi_ref
    loss, _ = problem.method.loss(batch.labelled(labels), batch.logp + nudge, run.hyper)
    trained = [next(updates)["grad_norm"].clone() for _ in range(2)]
    return {"prompts": [batch.prompts], "completions": [batch.completions],
            "rewards": [batch.rewards], "logp": [batch.logp], "labels": list(labels.values()),
            "loss": [loss.flatten(1).sum(-1)], "trained": trained}  # fmt: skip


def alike(first, second):
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [n for n in SWITCHES if "@R1" in n])
def test_every_switch_of_the_bandit_acts_where_it_says_and_not_before(name):
    setting, _ = GRID[name]
    base = small(setting.method, rate=0.01, completions=10)
    options = {k: min(v, 5) if k == "prompts" else v for k, v in setting.options}
    before, after = stages(base), stages(replace(base, **options))
    first = min(STAGES.index(ACTS_ON[option]) for option in options)
    kept = [stage for stage in STAGES[:first] if not alike(before[stage], after[stage])]
    assert kept == []
    assert not alike(before[STAGES[first]], after[STAGES[first]])
    if set(options) == {"reward_over"}:
        assert alike(before["logp"], after["logp"])
        prompt = audit.costs.reward_table("R1")[before["prompts"][0]][..., None]
        torch.testing.assert_close(after["rewards"][0], (9 * before["rewards"][0] + prompt) / 10)


# Effects


@pytest.mark.parametrize(
    ("low", "high", "n", "word"),
    [
        (-0.02, 0.02, 5, "no effect"), (0.0, 0.0, 5, "no effect"), (0.021, 0.3, 5, "raises"),
        (-0.3, -0.021, 5, "lowers"), (-0.3, 0.01, 5, "undecided"), (0.01, 0.3, 5, "undecided"),
        (0.2, 0.3, 4, "undecided"), (float("-inf"), float("inf"), 1, "undecided"),
    ],
)  # fmt: skip
def test_readings(low, high, n, word):
    assert audit.reading(low, high, 0.02, n) == word


def test_an_effect_is_the_paired_difference_across_chapters():
    chapters = {"a": Handmade(rwr_at_R1=rows([0.5, 0.6, 0.7, 0.8, 0.9])),
                "b": Handmade(rwr_offline_at_R1=rows([0.1, 0.2, 0.2, 0.3, 0.4]))}  # fmt: skip
    deviation = changed(contrasts="rwr@R1 - rwr_offline@R1; dpo@R1 - ipo@R1", statistics="")
    speed, end = audit.effects(deviation, chapters)
    differences = [0.4, 0.4, 0.5, 0.5, 0.5]
    assert (end.effect, end.low, end.high) == pytest.approx(stats.interval(differences))
    assert speed.effect == pytest.approx(np.mean(differences) / 2)
    assert (end.n, end.reading) == (5, "raises")
    text = audit.card(deviation, [speed, end])
    assert "`rwr@R1 - rwr_offline@R1`, 5 seeds" in text and "1 more: not at this profile" in text
    assert "[matters]{.verdict-partly}" in text.splitlines()[0]


def test_summaries():
    def effect(reading):
        return Effect("x", "dpo@R1 - ipo@R1", audit.FINAL, 0.0, 0.0, 0.0, 5, reading)

    runs, computed, plain = (changed(), changed(arithmetic="ceiling", contrasts=""),
                             changed(contrasts=""))  # fmt: skip
    assert audit.summary(runs, [effect("no effect")]) == "no effect"
    assert audit.summary(runs, [effect("no effect"), effect("undecided")]) == "undecided"
    assert audit.summary(runs, [effect("lowers"), effect("undecided")]) == "matters"
    assert audit.summary(computed, []) == "arithmetic"
    assert audit.summary(plain, []) == "not measured here"


def test_without_results_every_entry_is_shown_and_says_so():
    book = Audit({})
    assert book.table().empty and book.forest("convention", audit.FINAL).empty
    text = "".join(book.cards(kind) for kind in audit.KINDS)
    assert text.count("{dropdown}") == len(audit.deviations())
    assert text.count("not at this profile") == sum(bool(d.contrasts) for d in audit.deviations())
    assert set(book.numbers()) == set(Audit({"a": Handmade()}).numbers())
    assert audit.sources({}).count("none at this profile") == len(audit.HOMES)
    with pytest.raises(ValueError, match="kind must be one of"):
        book.of("guess")


def test_labels_are_of_a_setting_against_its_own_base():
    assert audit.label("rwr@R1[temperature=0.05] - rwr@R1") == "RWR (on-policy): temperature = 0.05"
    assert audit.label("ipo_offline@R2[prompts=100] - ipo_offline@R2") == (
        "IPO (offline), R2: prompts = 100")  # fmt: skip
    assert audit.label("dpo@R1 - ipo@R1") == ""
    assert audit.label("rwr@R1[weights=raw] - rwr@R1[weights=clipped]") == ""


# Arithmetic


def test_the_ceiling_and_the_size_of_the_network():
    assert "(9 × 1 + 0.177) / 10 = 0.918" in audit.ceiling()
    assert audit.parameters() == "94,992 parameters, 0.09M"
    assert "h = 1/(2τ²) = 200 nats" in audit.ipo_target()


def test_tails_are_those_of_the_sampled_histogram():
    for kind, inverse in (("clipped", lambda x: x), ("squashed", np.arctanh)):
        counted = histogram(kind)
        for exact, sampled in zip(audit.tails(inverse), counted[[0, -1]], strict=True):
            spread = 4 * np.sqrt(exact * (1 - exact) / 10_000)
            assert sampled == pytest.approx(exact, abs=spread)


def test_kl_axes_by_hand():
    """Nine tokens of 1/9 nat and a prompt of none: a mean of 1/10, summed over the samples."""
    completion = np.array([0.0, *[1 / 9] * 9])
    for name, samples in (("reference", 100), ("sampler", 1000)):
        assert audit.kl_factors()[name] == pytest.approx(samples * completion.mean())


def test_a_running_variance_with_a_counter_that_starts_again_is_negative():
    """The released code's sums, step by step, over two samplings of the reference's rewards."""
    generator = np.random.default_rng(0)
    tokens = generator.choice(100, (2, 100, 9), p=histogram())
    rewards = audit.costs.reward_table("R1").double().numpy()[tokens].mean(-1)
    total, squares = rewards[0].sum() + rewards[1, 0], (rewards[0] ** 2).sum() + rewards[1, 0] ** 2
    said = re.search(r"sum of rewards of ([\d.]+) on R1 and of their squares of ([\d.]+)\.",
                     audit.running_variance())  # fmt: skip
    assert float(said[1]) == pytest.approx(rewards[0].sum(), rel=0.2)
    assert float(said[2]) == pytest.approx((rewards[0] ** 2).sum(), rel=0.3)
    assert squares - total**2 / 1 < 0 and re.search(r"= -\d+, and", audit.running_variance())


def test_small_steps_vanish_in_bfloat16():
    weight = torch.tensor(0.02, dtype=torch.bfloat16)
    assert weight + torch.tensor(max(audit.PAPER_RATES), dtype=torch.bfloat16) == weight
    assert weight + torch.tensor(7e-5, dtype=torch.bfloat16) != weight
    assert "1.2e-04 apart, so that a step of Adam below 6e-05" in audit.bfloat16_steps()


def test_printed_gap_by_hand():
    """Equal spreads of five seeds: Welch's freedom is 8, and t(0.975, 8) = 2.306."""
    first, second = (SimpleNamespace(value=v, spread_as_printed=0.1) for v in (0.9, 0.5))
    gap, low, high = audit.gap_interval(first, second, "standard error")
    assert (gap, high - gap) == pytest.approx((0.4, 2.306 * 0.1 * np.sqrt(2)), abs=1e-4)
    _, _, narrow = audit.gap_interval(first, second, "standard deviation")
    assert (narrow - gap) * np.sqrt(5) == pytest.approx(high - gap)
    with pytest.raises(ValueError, match="spread must be one of .'standard error'"):
        audit.gap_interval(first, second, "range")


def test_rows_of_table_3():
    assert audit.printed("bandit_r1", "rwr").value == 0.88
    with pytest.raises(ValueError, match="bandit_r1, has .*'rwr'.*got 'pref_ft'"):
        audit.printed("bandit_r1", "pref_ft")
    assert "Skew: Offline DPO / IPO is faster, 0.12 against 0.4 hours" in audit.clock_statement()


def test_table_3_converts_and_selects():
    sweep = pd.concat([rows([0.2, 0.4], (0, 1), 0.1), rows([0.6, 0.8], (0, 1), 0.01)])
    sweep["run"] += sweep["learning_rate"].astype(str)
    chapter = Handmade(rwr_at_R1=rows([1.0] * 5))
    chapter.swept = lambda name: sweep
    (row,) = audit.table_3({"a": chapter}).to_dict("records")
    assert row["method"] == "RWR (on-policy)" and row["printed"] == "0.88 (0.01)"
    assert row["text"].startswith("1.00") and row["code"].startswith("0.92")
    assert audit.best_of_sweep(chapter, "rwr@R1").tolist() == pytest.approx([0.6, 0.8])
    assert row["best of the sweep"].startswith("0.65")  # (9 * 0.7 + 0.177) / 10


def test_lengths_are_those_of_the_shipped_pairs():
    from lib.lm.config import TINY
    from lib.lm.pairs import load

    pairs = load(TINY / "pairs.parquet", "train", (0,))
    assert sorted(audit.policy_lengths()) == sorted(pairs.lengths.ravel())
    mean = pairs.lengths.ravel().mean()
    assert audit.shorter() == f"{mean:.1f} tokens in the mean, {mean / 203:.0%} of the paper's 203"


def test_no_value_of_the_table_reads_as_the_number_of_a_list():
    """ "96. Why: ..." is an ordered list in Markdown."""
    values = [value for d in audit.deviations() for value in vars(d).values()]
    assert [value for value in values if re.match(r"\d+(\.\s|$)", value)] == []


def test_a_setting_is_found_in_the_first_chapter_that_has_it():
    first, second = Handmade(dpo_at_R1=rows([1.0] * 5)), Handmade(dpo_at_R1=rows([0.0] * 5))
    assert overview.home({"a": first, "b": second}, "dpo@R1") is first
    assert overview.home({"a": first}, Setting("ipo", "R1").name) is None

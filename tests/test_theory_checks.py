"""The verdicts on the theory: what is expected of each, and that a wrong formula would show."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from lib import claims
from lib.theory import cases, checks, contrast, draws, early, found, lemmas

ROOT = Path(__file__).parents[1]
STATEMENTS = {
    "T-updates": "reproduced", "T-case1": "reproduced", "T-case2": "reproduced",
    "T-case3": "not reproduced", "T-special": "reproduced", "T-early": "partly",
    "T-onpolicy-rkl": "partly", "T-contrast": "partly", "T-mode": "partly",
    "T-offline-fkl": "reproduced", "T-dpo-ipo-form": "partly",
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts():
    return checks.judge(1_000, seed=3)


def test_statements_proofs_and_corrections(verdicts):
    table = checks.summary(verdicts).set_index("claim")
    assert table["verdict"].to_dict() == STATEMENTS
    assert set(table["proof"]) <= {"", "not reproduced"}
    assert set(table["corrected"]) <= {"", "reproduced"}
    assert (table["deviation"] < 1e-10).all()


def test_every_claim_of_the_theory_is_judged_and_no_other():
    table = claims.claims()
    theory = set(table.index[table["question"] == "theory"])
    assert theory == {c.claim for c in checks.checks()} == set(STATEMENTS)
    assert all(any(c.claim == claim and c.part == "statement" for c in checks.checks())
               for claim in theory)  # fmt: skip


def test_every_function_is_a_check_and_a_refuted_one_shows_its_counterexample(verdicts):
    assert {c.id for c in checks.checks()} == set(checks.FUNCTIONS)
    for v in verdicts:
        assert v.found.cases > 0, v.check.id
        assert bool(v.found.violations) == bool(v.found.example), v.check.id


def test_equations_of_the_chapter_are_cited_by_the_code():
    chapter = (ROOT / "book" / "theory.ipynb").read_text()
    labels = set(re.findall(r"\$\$ \((eq-[a-z0-9-]+)\)", chapter))
    code = "".join(p.read_text() for p in (ROOT / "lib" / "theory").glob("*.py"))
    cited = set(re.findall(r"\((eq-[a-z0-9-]+)\)", code))
    assert len(labels) > 20 and labels == cited


def test_tables_for_the_reader_say_what_each_claim_is_true_for(verdicts):
    table = checks.shown(verdicts, str.upper).set_index("claim")
    assert table["statement"]["Theorem 5.2 (3)"] == "NOT REPRODUCED"
    constants = checks.constants(verdicts).set_index("claim")
    assert set(checks.TRUE_FOR) == set(STATEMENTS) and constants["true for"].notna().all()
    assert constants["counterexample"]["Theorem 5.2 (3)"].startswith("p = (0.5, 0.245")
    details = checks.details(verdicts, str)
    assert len(details) == len(verdicts)
    for frame in (table, constants, details):
        assert not any("|" in str(cell) for cell in frame.to_numpy().ravel())  # Markdown
    assert checks.numbers(verdicts)["bad_case3_statement"] == "50"


def test_rules_decide():
    always = [checks.decide("always", found.Found(10, n)) for n in (0, 1)]
    assert always == ["reproduced", "not reproduced"]
    most = [checks.decide("most", found.Found(100, n)) for n in (0, 10, 11, 89, 90, 100)]
    assert most == ["reproduced", "reproduced", "partly", "partly", "not reproduced",
                    "not reproduced"]  # fmt: skip


def test_numbers_depend_on_the_seed_alone():
    again = [checks.FUNCTIONS["case2-proof"](500, seed) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_a_wrong_formula_is_caught(monkeypatch):
    """A sign in the reverse push, a factor in eq-lift, a weight: each turns its verdict."""
    right = cases.dynamics.reverse_push
    monkeypatch.setitem(cases.dynamics.OBJECTIVES, "reverse", lambda p, q: -right(p, q))
    assert checks.FUNCTIONS["updates-reverse"](100, 0).violations > 0
    monkeypatch.setattr(contrast, "lift", lambda logp, *pair: 2 * logp.exp()[..., 0])
    assert lemmas.aligned_lift(100, 0).violations > 0
    monkeypatch.setattr(contrast, "dpo_weight", lambda h, beta: torch.sigmoid(-beta * h))
    assert checks.FUNCTIONS["dpo-form"](100, 0).violations > 0


def test_bad_rows_and_arguments_are_named(tmp_path):
    row = dict(id="special", claim="T-special", part="statement", rule="always", says="x")
    for name, bad in {"id": "none", "part": "remark", "rule": "often"}.items():
        with pytest.raises(ValueError, match=f"{name} must be one of .*{bad!r}"):
            checks.Check(**{**row, name: bad})
    path = tmp_path / "checks.csv"
    pd.DataFrame([row, row]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="repeated check ids"):
        checks.checks(path)
    for bad in (5, 150.5, "1e5", True, float("nan")):
        with pytest.raises(ValueError, match="draws must be a whole number from 100 to 10"):
            checks.judge(bad)
    for seed in (-1, 0.5, None):
        with pytest.raises(ValueError, match="seed must be a whole number from 0 to 4294967295"):
            checks.judge(200, seed)
    assert checks.sizes(1e5, 1.0) == (100_000, 1)
    with pytest.raises(ValueError, match="'lemma'"):
        checks.judge(200, part="lemma")


def test_random_distributions_reach_the_corners():
    pairs = draws.pairs(2_000, 0)
    assert [p.shape[-1] for p, _ in pairs] == list(draws.CATEGORIES)
    for logp, logq in pairs:
        for logs in (logp, logq):
            assert logs.isfinite().all()
            torch.testing.assert_close(logs.exp().sum(-1), torch.ones(len(logs)).double())
    smallest = min(float(p.min()) for p, _ in pairs)
    flattest = max(float(-p.amax(-1).min()) for p, _ in pairs[:1])
    assert smallest < -500 and flattest > 0.6


def test_ties_and_order_keep_the_mass():
    logp = draws.pairs(500, 0)[2][0]
    for changed in (draws.tied(logp), draws.ordered(logp)):
        torch.testing.assert_close(changed.exp().sum(-1), logp.exp().sum(-1))
    assert torch.equal(draws.tied(logp)[:, 0], draws.tied(logp)[:, 1])
    assert (draws.ordered(logp)[:, 0] >= draws.ordered(logp)[:, 1]).all()


def test_not_a_number_is_a_violation():
    nan = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    assert found.equal(nan, torch.ones(2).double()).violations == 1
    assert found.positive(nan).violations == 1


# Early stopping


def test_family_measures_what_a_single_trajectory_does():
    names, logp, logq = early.kinds(2, 0)
    table = early.family(2, 0)
    assert len(table) == 36 and table.groupby(["start", "count", "heights"]).size().eq(2).all()
    row = 7
    for objective in ("forward", "reverse"):
        path = early.dynamics.trajectory(logp[row], logq[row], objective, early.RATE, early.STEPS)
        half = early.dynamics.halfway(path, logq[row])
        expected = float(half.steps) * early.RATE if half.reached else float("inf")
        assert table[f"time_{objective}"][row] == pytest.approx(expected)
    torch.testing.assert_close(logq.exp()[:, :2].sum(-1)[0], torch.tensor(0.95).double())
    assert names["count"].tolist() == table["count"].tolist()


def test_comparisons_follow_from_the_times_and_shares():
    table = early.compared(2, 0)
    assert ((table["time_reverse"] < table["time_forward"]) == (table["sooner"] == 1)).all()
    known = table.dropna(subset=["subset_reverse"])
    split = (known["least_reverse"] < early.LEFT) & (known["most_reverse"] > early.AHEAD)
    assert (split == (known["subset_reverse"] == 1)).all()
    kinds = early.by_kind(table)
    assert kinds["targets"].sum() == len(table) and kinds["start"].tolist()[0] == "flat"


def test_curves_start_at_one_and_fall():
    table = early.curves(2, 0, points=10)
    median = table.groupby(["start", "objective"])["median"]
    assert (median.first() > 0.9).all() and (median.last() < 0.1).all()
    assert (table["low"] <= table["high"]).all()


def test_heights_are_checked():
    with pytest.raises(ValueError, match="'tall'"):
        early.target(1, 2, "tall", torch.Generator())

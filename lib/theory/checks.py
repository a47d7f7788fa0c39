"""Verdicts on the theory: each claim as exact checks of its statement, its proof, its correction.

`data/theory_checks.csv` says what is checked and by which rule; the checks are functions in
`lib.theory.cases` (E.2) and `lib.theory.lemmas` (E.1), each run on n random cases. Nothing here is
sampled from a model, so there are no intervals: one counterexample refutes. Chapter: theory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lib import claims
from lib.allowed import one_of
from lib.theory import cases, lemmas
from lib.theory.found import Found

RULES = Path(__file__).parents[2] / "data" / "theory_checks.csv"
PARTS = ("statement", "proof", "corrected")
KINDS = ("always", "most")  # of rules
# Set after a pilot, as the chapter says: shares of a family that reproduce, or refute; else partly.
MOST, FEW = 0.9, 0.1
FUNCTIONS: dict[str, Callable[[int, int], Found]] = {**cases.CHECKS, **lemmas.CHECKS}


@dataclass(frozen=True)
class Check:
    """One check of a claim.

    Args:
        id, claim: its own name, as in `FUNCTIONS`, and the claim it belongs to.
        part: "statement" as the paper prints it, "proof" a step of it, "corrected" what holds.
        rule: "always" (one violation refutes) or "most" (of a family of cases).
        says: in words.
    Raises: ValueError that names the bad value and the allowed ones.
    """

    id: str
    claim: str
    part: str
    rule: str
    says: str

    def __post_init__(self) -> None:
        allowed = {"id": FUNCTIONS, "part": PARTS, "rule": KINDS}
        for name, values in allowed.items():
            one_of(f"{self.id}: {name}", getattr(self, name), values)


@dataclass(frozen=True)
class Verdict:
    """A check with what was found and its verdict, in the words of `lib.claims.VERDICTS`."""

    check: Check
    found: Found
    verdict: str


def checks(path: Path = RULES) -> list[Check]:
    """All checks. Raises: ValueError for a bad row or a repeated id."""
    table = pd.read_csv(path)
    if repeated := sorted(table["id"][table["id"].duplicated()]):
        raise ValueError(f"repeated check ids {repeated} in {path.name}")
    return [Check(**row) for row in table.to_dict("records")]


def decide(rule: str, found: Found) -> str:
    """ "always": no violation; "most": at least 0.9 of the family; up to 0.1 refutes."""
    if rule == "always":
        return "reproduced" if found.violations == 0 else "not reproduced"
    share = found.share
    return "reproduced" if share >= MOST else "not reproduced" if share <= FEW else "partly"


def sizes(draws: float, seed: float) -> tuple[int, int]:
    """Both as whole numbers; 1e5, a float to papermill, is one.

    Raises: ValueError, naming the bad value and the allowed ones.
    """
    return _whole("draws", draws, 100, 10**9), _whole("seed", seed, 0, 2**32 - 1)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or value != int(value):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)


def judge(draws: int = 2_000, seed: int = 0, part: str | None = None) -> list[Verdict]:
    """Runs the checks, all or those of a part, each on about `draws` random cases.

    Raises: ValueError as `sizes`, or if the part is unknown.
    """
    draws, seed = sizes(draws, seed)
    if part is not None:
        one_of("part", part, PARTS)
    verdicts = []
    for check in checks():
        if part in (None, check.part):
            found = FUNCTIONS[check.id](draws, seed)
            verdicts.append(Verdict(check, found, decide(check.rule, found)))
    return verdicts


def summary(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row per claim: the verdict on its statement, on its proof, on the corrected form.

    Columns: claim, says, figure, verdict (of the statement), proof, corrected ("" if not checked),
    holds and checks (of the statement), cases, deviation.
    """
    text, by_claim = claims.claims(), {}
    for v in verdicts:
        by_claim.setdefault(v.check.claim, []).append(v)
    return pd.DataFrame([_row(claim, text.loc[claim], found) for claim, found in by_claim.items()])


def _row(claim: str, text: pd.Series, found: list[Verdict]) -> dict:
    parts = {p: [v.verdict for v in found if v.check.part == p] for p in PARTS}
    verdict = {p: claims.parent(v) if v else "" for p, v in parts.items()}
    statement = parts["statement"]
    return {
        "claim": claim, "says": text["claim"], "figure": text["figure"],
        "verdict": verdict["statement"], "proof": verdict["proof"],
        "corrected": verdict["corrected"],
        "holds": statement.count("reproduced"), "checks": len(statement),
        "cases": sum(v.found.cases for v in found),
        "deviation": max((v.found.deviation for v in found if v.verdict == "reproduced"),
                         default=0.0),
    }  # fmt: skip


def table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row per check: claim, part, says, verdict, cases, violations, deviation, example."""
    return pd.DataFrame([
        {"claim": v.check.claim, "check": v.check.id, "part": v.check.part, "says": v.check.says,
         "verdict": v.verdict, "cases": v.found.cases, "violations": v.found.violations,
         "deviation": v.found.deviation, "example": v.found.example}
        for v in verdicts
    ])  # fmt: skip


# What makes each claim true, exactly: the results that the chapter derives.
TRUE_FOR = {
    "T-updates": "any p, q and step size",
    "T-case1": "delta1 >= beta / (2 artanh beta)",
    "T-case2": "every c0 >= 1, any beta and delta2; what the proof claims: every c0 >= e",
    "T-case3": "no constant c1, from four categories on; c1 = exp(-kappa) where KL(p to q) is at "
    "most kappa; three categories: some c1 if delta2 > (1 - beta) / 2",
    "T-special": "any two categories with equal q - p",
    "T-early": "sooner from flat starts, a subset from peaked ones",
    "T-onpolicy-rkl": "RL with a KL penalty; not weighted likelihood",
    "T-contrast": "some y_l; y_w rises where g_w . g_l < 0 and the step is small",
    "T-mode": "c2 > c1, as the largest gain; not always as most of the mass",
    "T-offline-fkl": "sum_y pi_ref F > 0",
    "T-dpo-ipo-form": "DPO: always; IPO: while h <= 1 / (2 tau)",
}


def shown(verdicts: Iterable[Verdict], badge: Callable[[str], str]) -> pd.DataFrame:
    """`summary` for a reader: where, statement, printed proof, corrected form, largest deviation.

    Args: badge: how a verdict is printed (`lib.chapter.badge`).
    """
    rows = summary(verdicts)
    columns = {"statement": "verdict", "printed proof": "proof", "corrected form": "corrected"}
    return pd.DataFrame({
        "claim": rows["figure"],
        **{title: [badge(v) if v else "-" for v in rows[name]] for title, name in columns.items()},
        "largest deviation": [f"{x:.0e}" if x else "-" for x in rows["deviation"]],
    })  # fmt: skip


def constants(verdicts: list[Verdict]) -> pd.DataFrame:
    """What each claim is true for, and the first counterexample: to its statement, else its proof.

    Columns: claim, true for, counterexample.
    """
    rows = summary(verdicts)
    broken = {
        claim: next((v.found.example for part in PARTS[:2] for v in verdicts
                     if (v.check.claim, v.check.part) == (claim, part) and v.found.example), "-")
        for claim in rows["claim"]
    }  # fmt: skip
    return pd.DataFrame({
        "claim": rows["figure"], "true for": rows["claim"].map(TRUE_FOR),
        "counterexample": rows["claim"].map(broken),
    })  # fmt: skip


def details(verdicts: Iterable[Verdict], badge: Callable[[str], str]) -> pd.DataFrame:
    """`table` for a reader: what is checked, the verdict, violations of cases, a counterexample."""
    rows = table(verdicts)
    return pd.DataFrame({
        "claim": rows["claim"], "part": rows["part"], "what is checked": rows["says"],
        "verdict": rows["verdict"].map(badge),
        "violations": [f"{b:,} of {n:,}" for b, n in zip(rows["violations"], rows["cases"],
                                                        strict=True)],
        "first one": [x or "-" for x in rows["example"]],
    })  # fmt: skip


def numbers(verdicts: Iterable[Verdict]) -> dict[str, str]:
    """For the prose: n_, bad_ and share_ of each check, such as "n_case1_region"."""
    found = {}
    for v in verdicts:
        name = v.check.id.replace("-", "_")
        found |= {f"n_{name}": f"{v.found.cases:,}", f"bad_{name}": f"{v.found.violations:,}",
                  f"share_{name}": f"{100 * v.found.share:.0f}%"}  # fmt: skip
    return found

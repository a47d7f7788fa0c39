"""Verdicts on the paper's claims, computed from result tables by rules that were written first.

`data/claims.csv` holds the claims, `data/claim_rules.csv` the comparisons that each is split into:
a contrast of settings such as `ipo@R1 - rwr@R1`, a statistic of a run, what the claim expects of
it, and margins. A comparison is made within seeds and judged by the 95% interval of its mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from lib import experiments, stats

DATA = Path(__file__).parents[1] / "data"
CLAIMS, RULES = DATA / "claims.csv", DATA / "claim_rules.csv"
DIRECTIONS = (">", "<", "=")
Rows = Callable[[experiments.Setting], pd.DataFrame]  # what is reported of a setting
VERDICTS = ("reproduced", "partly", "not reproduced", "inconclusive", "not judged")
_TERM = re.compile(r"\s*([+-]?)\s*(?:([\d.]+)\s*\*\s*)?(\w+@\w+(?:\[[^\]]*\])?)")


@dataclass(frozen=True)
class Rule:
    """One comparison of a claim.

    Args:
        id, claim: its own name, and the claim it belongs to.
        chapter: whose results it is judged on.
        contrast: weighted settings, "ipo@R1 - 0.5*rwr@R1".
        statistic: a name of `lib.stats.STATISTICS`.
        direction: ">" or "<" (the contrast beyond the margin), "=" (within the equivalence margin).
        margin, equivalence: in the statistic's units.
        min_seeds: fewer leave it inconclusive.
        says: the comparison in words.
    Raises: ValueError that names the bad value.
    """

    id: str
    claim: str
    chapter: str
    contrast: str
    statistic: str
    direction: str
    margin: float
    equivalence: float
    min_seeds: int
    says: str

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"{self.id}: direction must be one of {DIRECTIONS}, "
                             f"got {self.direction!r}")  # fmt: skip
        if self.statistic not in stats.STATISTICS:
            raise ValueError(f"{self.id}: unknown statistic {self.statistic!r}")
        if not (self.margin >= 0 and self.equivalence >= 0):
            raise ValueError(f"{self.id}: margins must not be negative")
        experiments.check_chapter(self.chapter)
        terms(self.contrast)

    @property
    def claimed(self) -> str:
        """ "> 0.02", "< -1", "within 2 of 0": where the interval of what is reproduced lies."""
        if self.direction == "=":
            return f"within {self.equivalence:g} of 0"
        return f"> {self.margin:g}" if self.direction == ">" else f"< {0 - self.margin:g}"


@dataclass(frozen=True)
class Verdict:
    """A rule with what the results say. effect, low, high: mean contrast and its 95% interval."""

    rule: Rule
    verdict: str
    effect: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    seeds: int = 0

    @property
    def excluded(self) -> bool:
        """Whether an open comparison excludes, with 95% confidence, the difference that is claimed:
        all of the interval lies short of the margin, but not so far that it counts against it."""
        if self.verdict != "inconclusive" or self.seeds < self.rule.min_seeds:
            return False
        ends = {">": self.high, "<": -self.low}
        return ends.get(self.rule.direction, np.inf) < self.rule.margin


def distinct(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Verdicts to count: a comparison that two claims share, by its numbers, stands in it once."""
    found: dict[object, Verdict] = {}
    for v in verdicts:
        numbers = (v.effect, v.low, v.high)
        known = np.isfinite(numbers).all()
        found.setdefault((v.rule.contrast, v.verdict, *numbers) if known else id(v), v)
    return list(found.values())


def terms(contrast: str) -> list[tuple[float, str]]:
    """Weights and setting names of a contrast. Raises: ValueError if it cannot be read."""
    found, end = [], 0
    for match in _TERM.finditer(contrast):
        if match.start() != end or (found and not match[1]):
            break
        weight = float(match[2] or 1) * (-1 if match[1] == "-" else 1)
        found.append((weight, match[3]))
        end = match.end()
    if not found or contrast[end:].strip():
        raise ValueError(f"cannot read the contrast {contrast!r}")
    return found


def rules() -> list[Rule]:
    """All comparisons. Raises: ValueError for a bad row or a repeated id."""
    table = pd.read_csv(RULES)
    found = [Rule(**row) for row in table.to_dict("records")]
    if repeated := sorted(table["id"][table["id"].duplicated()]):
        raise ValueError(f"repeated rule ids {repeated} in {RULES.name}")
    return found


def claims() -> pd.DataFrame:
    """The paper's claims: id, question, figure, setting, claim."""
    return pd.read_csv(CLAIMS).set_index("id")


def by_seed(
    contrast: str, statistic: str, rows: Callable[[str], pd.DataFrame | None]
) -> pd.Series | None:
    """A statistic of a contrast within each seed that every one of its settings has.

    Args: rows: what is reported of a setting, by its name; None where it is in no grid.
    Returns: None where a setting is in no grid, has no results, or none of the column that the
        statistic reads.
    Raises: ValueError where its results are not sound, such as two runs of one seed.
    """
    total = 0.0
    for weight, name in terms(contrast):
        try:
            if (own := rows(name)) is None:
                return None
            total = total + weight * stats.per_run(own, statistic)
        except (experiments.NoResults, stats.MissingColumn):  # left out, or judged by nobody
            return None
    return total.dropna()


def _all_reported(results: pd.DataFrame, profile: experiments.Profile) -> list[int]:
    """Every seed beyond the sweep's: the published ones and those that a reader adds."""
    first = min(profile.report_seeds)
    return [seed for seed in results["seed"].unique() if seed >= first]


def judge(rule: Rule, profile: experiments.Profile, rows: Rows) -> Verdict:
    """The verdict of one comparison."""
    grid = {s.name: s for s in experiments.settings(rule.chapter, profile)}
    values = by_seed(rule.contrast, rule.statistic,
                     lambda name: rows(grid[name]) if name in grid else None)  # fmt: skip
    if values is None or values.empty:
        return Verdict(rule, "not judged")
    effect, low, high = stats.interval(values)
    return Verdict(rule, _decide(rule, low, high, len(values)), effect, low, high, len(values))


def _decide(rule: Rule, low: float, high: float, seeds: int) -> str:
    """A rule's verdict on an interval; an end that lies at a margin is not beyond it."""
    if seeds < rule.min_seeds or not np.isfinite([low, high]).all():
        return "inconclusive"
    alike = -rule.equivalence <= low and high <= rule.equivalence
    if rule.direction == "=":
        apart = low > rule.equivalence or high < -rule.equivalence
        return "reproduced" if alike else "not reproduced" if apart else "inconclusive"
    if rule.direction == "<":
        low, high = -high, -low
    if low > rule.margin:
        return "reproduced"
    return "not reproduced" if alike or high < -rule.margin else "inconclusive"


def parent(verdicts: Iterable[str]) -> str:
    """A claim's verdict from those of its parts; parts that were not judged have no say.

    Where all agree, theirs. Where they differ, "partly" (reproduced) if any part is reproduced, if
    only partly; else "not reproduced": a claim says that all its parts hold, so one that does not
    is enough, however many others are inconclusive.
    """
    found = {v for v in verdicts if v != "not judged"}
    if not found:
        return "not judged"
    if len(found) == 1:
        return found.pop()
    return "partly" if found & {"reproduced", "partly"} else "not reproduced"


def judge_all(
    chapter: str, results: pd.DataFrame, profile: experiments.Profile,
    chosen: Callable[[experiments.Setting], float],
) -> list[Verdict]:  # fmt: skip
    """The verdicts of a chapter's comparisons, in the order of the rules.

    Args: results: with the columns that the chapter's `derive` adds. chosen: setting -> its rate.
    """
    seeds = _all_reported(results, profile)
    rows = cache(lambda s: experiments.reported(results, s, profile, seeds, chosen(s)))
    return [judge(rule, profile, rows) for rule in rules() if rule.chapter == chapter]


def summary(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row per claim: its verdict and how many of its comparisons say what."""
    text, by_claim = claims(), {}
    for v in verdicts:
        by_claim.setdefault(v.rule.claim, []).append(v.verdict)
    return pd.DataFrame([
        {"claim": claim, "says": text.loc[claim, "claim"], "figure": text.loc[claim, "figure"],
         "verdict": parent(parts), **{name: parts.count(name) for name in VERDICTS if
                                      name != "partly"}}
        for claim, parts in by_claim.items()
    ])  # fmt: skip

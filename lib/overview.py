"""What the chapters say together: which method when, each claim's verdict, what is published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

import pandas as pd

from lib import cards, claims, experiments, runs, stats
from lib.cards import short
from lib.chapter import Chapter, badge
from lib.decisions import NOT_YET
from lib.experiments import OFFLINE, ON_POLICY, REWARDS
from lib.experiments.bandit import CHAPTERS as BANDIT
from lib.runs.provenance import environment
from lib.tables import NEAR, interval_text, reaching
from lib.theory import checks

Chapters = Mapping[str, Chapter]
Values = Mapping[str, pd.Series]  # method -> a statistic by seed

QUESTIONS = {
    1: "When does sampling from the current policy help?",
    2: "When does a negative gradient help?",
    3: "Do the two add up?",
    "theory": "Does the theory hold?",
}
THEORY_DRAWS = 500  # random cases of each check of the theory: half a second in all
SPEED = "mean reward over updates"
PACKAGES = ("torch", "numpy", "pandas", "scipy", "pyarrow", "matplotlib", "papermill",
            "jupyter-book", "myst-nb")  # fmt: skip


def load(
    profile: str = "auto", recompute: bool = False, among: Iterable[str] = experiments.CHAPTERS
) -> dict[str, Chapter]:
    """The chapters that have results: published ones; with `recompute`, the bandit's computed now.

    The length problems' claims are then not judged: their chapters compute them.
    """
    return {
        name: Chapter(name, profile=profile, recompute=recompute)
        for name in among if (name in BANDIT if recompute else published(name, profile))
    }  # fmt: skip


def home(chapters: Chapters, setting: str) -> Chapter | None:
    """The first chapter whose grid has a setting."""
    return next((c for c in chapters.values() if c.has(setting)), None)


def published(chapter: str, profile: str = "auto") -> bool:
    """Whether a chapter has published results, at any profile for "auto"."""
    profiles = [path.stem for path in runs.published_files(chapter)]
    return bool(profiles) if profile == "auto" else profile in profiles


def values(chapters: Chapters, names: Sequence[str], reward: str, statistic: str) -> Values:
    """A statistic by seed for each of `names` that has reported results on `reward`."""
    found = {}
    for name in names:
        chapter = home(chapters, setting := f"{name}@{reward}")
        if chapter is not None:
            found[name] = stats.per_run(chapter.reported(setting), statistic)
    return found


def standing(chapters: Chapters, statistic: str = "final reward") -> pd.DataFrame:
    """One row per method and reward function: mean of a statistic, its 95% interval, n seeds."""
    rows = [
        (name, reward, *stats.interval(by_seed), len(by_seed))
        for reward in REWARDS
        for name, by_seed in values(chapters, (*OFFLINE, *ON_POLICY), reward, statistic).items()
    ]
    return pd.DataFrame(rows, columns=["method", "reward_function", "mean", "low", "high", "n"])


def best(found: Values) -> str:
    """The method with the best mean."""
    return max(found, key=lambda name: found[name].mean())


def not_told_apart(found: Values) -> list[str]:
    """Methods that the best one does not beat by more than 0.02 with 95% confidence."""
    top = best(found)
    others = {name: (found[top] - by_seed).dropna() for name, by_seed in found.items()
              if name != top}  # fmt: skip
    return [name for name, gap in others.items() if not stats.interval(gap)[1] > NEAR]


def _winner(found: Values) -> str:
    """ "**DPO** 0.97 (0.95 to 0.98), worst run 0.61; level with it: IPO"."""
    if not found:
        return NOT_YET
    top = best(found)
    text = f"**{short(top)}** {interval_text(found[top])}, worst run {found[top].min():.2f}"
    level = not_told_apart(found)
    if len(level) == len(found) - 1 and len(level) > 1:
        return f"{text}; level with it: all other on-policy methods"
    return text + (f"; level with it: {', '.join(map(short, level))}" if level else "")


def _clock(chapters: Chapters, reward: str) -> str:
    """Of the methods that reach 95% of the best final reward in every run, the first to do so."""
    chapter = chapters.get("wall_clock")
    if chapter is None:
        return NOT_YET
    found = {}
    for setting in (s for s in chapter.settings() if s.options and s.reward_function == reward):
        rows = chapter.reported(setting.name)
        found[setting.method] = reaching(rows, rows["target"].iloc[0])["seconds"]
    finite = {name: times for name, times in found.items() if times.max() < float("inf")}
    if not found:
        return "not timed"
    if not finite:
        return "no method on every seed"
    first = min(finite, key=lambda name: finite[name].mean())
    text = f"**{short(first)}** {interval_text(finite[first])} s"
    later = {n: (times - finite[first]).dropna() for n, times in finite.items() if n != first}
    level = [short(n) for n, gap in later.items() if not stats.interval(gap)[1] > 0]
    return text + (f"; level with it: {', '.join(level)}" if level else "")


def speed(chapters: Chapters) -> str:
    """Which on-policy method is quickest: a Markdown table by the bandit's reward functions."""
    updates = next((c.profile.updates for c in chapters.values()), 100)
    rows = {
        f"Best mean reward over {updates} updates": [
            _winner(values(chapters, ON_POLICY, reward, SPEED)) for reward in REWARDS],
        "First at 95% of the best reward, in every run, on one core": [
            _clock(chapters, reward) for reward in REWARDS],
    }  # fmt: skip
    columns = ["", "reward far from the model's habits (R1)", "reward near them (R2)"]
    table = pd.DataFrame([(what, *cells) for what, cells in rows.items()], columns=columns)
    return cards.markdown(table)


def unjudged(chapters: Chapters) -> str:
    """Which of the paper's claims the results shown say nothing about, or at what scale they do."""
    never = ("Of Mode Length it is not judged whether the more on-policy runs are sometimes "
             "unstable.")  # fmt: skip
    if "full_scale" in chapters:
        return ("Claims about AlpacaFarm and UltraFeedback are judged on pairs of the same two "
                f"kinds, at the scale that {cards.link('full_scale')} states. {never}")
    return ("Claims about AlpacaFarm and UltraFeedback are not judged in this version; they need "
            f"larger language models. {never}")  # fmt: skip


def dashboard(chapters: Chapters) -> str:
    """Every claim with its verdict and a link to the chapter that judges it, by question."""
    home: dict[str, str] = {}
    for rule in claims.rules():
        home.setdefault(rule.claim, rule.chapter)
    judged = {row["claim"]: _judged(row) for row in _summary(chapters)}
    judged |= {row["claim"]: _judged_theory(row) for row in theory()}
    home |= dict.fromkeys((row["claim"] for row in theory()), "theory")
    text = claims.claims()
    parts = []
    for question, title in QUESTIONS.items():
        asked = text[text["question"].astype(str) == str(question)]
        parts.append(f"**{title}** {_comparisons(chapters, asked.index)}\n")
        for claim, row in asked.iterrows():
            shown = judged.get(claim, f"[{NOT_YET}]{{.verdict-inconclusive}}")
            where = row["figure"] if str(row["figure"])[0].isalpha() else f"Figure {row['figure']}"
            parts.append(
                f"- {shown} {row['claim']} ([{where}, {row['setting']}]({home[claim]}.ipynb))"
            )
        parts.append("")
    return "\n".join(parts)


def _comparisons(chapters: Chapters, asked: Collection[str]) -> str:
    """ "Of 41 comparisons 22 are reproduced, 6 not, 13 open." for some claims; "" without any."""
    own = claims.distinct(v for c in chapters.values() for v in c.verdicts
                          if v.rule.claim in asked and v.verdict != "not judged")  # fmt: skip
    found = Counter(v.verdict for v in own)
    total = found.total()
    if not total:
        return ""
    return (f"Of {total} comparisons {found['reproduced']} are reproduced, "
            f"{found['not reproduced']} are not, {found['inconclusive']} are open; "
            f"{sum(v.excluded for v in own)} of the open ones exclude the difference as it is "
            "claimed.")  # fmt: skip


def _summary(chapters: Chapters) -> list[dict[str, Any]]:
    """One row per claim: its comparisons may be judged in several chapters."""
    return claims.summary(v for c in chapters.values() for v in c.verdicts).to_dict("records")


@cache
def theory() -> list[dict[str, Any]]:
    """The verdicts on the theory's claims, computed now: one row each (`checks.summary`)."""
    return checks.summary(checks.judge(THEORY_DRAWS)).to_dict("records")


def _judged_theory(row: Mapping[str, Any]) -> str:
    """The badge of a claim's statement, and a word on its printed proof if that does not hold."""
    notes = [f"{row['holds']} of {row['checks']}"] if row["checks"] > 1 else []
    if row["verdict"] == "partly" and not row["holds"]:
        notes = ["each of its checks holds in a part of the cases"]
    if row["verdict"] == "reproduced" and row["proof"] == "not reproduced":
        notes.append("not its printed proof")
    return badge(row["verdict"]) + (f" ({'; '.join(notes)})" if notes else "")


def _judged(row: Mapping[str, Any]) -> str:
    """A claim's badge, with how many of its comparisons are reproduced if it has several."""
    total = sum(row[v] for v in claims.VERDICTS if v in row)
    share = f" ({row['reproduced']} of {total})" if total > 1 else ""
    return badge(row["verdict"]) + share


def counts(chapters: Chapters) -> str:
    """How many claims have which verdict, in words."""
    judged = [row["verdict"] for row in _summary(chapters)]
    judged += [row["verdict"] for row in theory()]
    total = len(claims.claims())
    found = [f"{judged.count(v)} {v}" for v in claims.VERDICTS if judged.count(v)]
    if len(judged) < total:
        found.append(f"{total - len(judged)} {NOT_YET}")
    return f"{total} claims: " + ", ".join(found)


def sources(chapters: Chapters) -> str:
    """Profile, commit and date of the results that the page shows."""
    rows = []
    for name in experiments.CHAPTERS:
        link = cards.link(name)
        chapter = chapters.get(name)
        if chapter is None:
            rows.append((link, NOT_YET, "", "", ""))
        elif chapter.published is None:
            rows.append((link, f"{chapter.profile_name}, computed now", "", "", ""))
        else:
            meta = chapter.published.meta
            stale = " (stale)" if chapter.published.stale() else ""
            rows.append((link, chapter.profile_name, f"{meta['totals']['runs']:,}",
                         f"`{meta['commit'][:10]}`{stale}", meta["published"][:10]))  # fmt: skip
    columns = ["chapter", "profile", "runs", "commit", "date"]
    return cards.markdown(pd.DataFrame(rows, columns=columns), "llrll")


def all_published() -> list[runs.Published]:
    """Every published result, by chapter, from the smallest profile to the largest."""
    return [runs.Published.load(path) for chapter in experiments.CHAPTERS
            for path in runs.published_files(chapter)]  # fmt: skip


def published_table() -> str:
    """Every published result: runs, core-hours, commit, date, checks, staleness."""
    rows = [_published_row(result) for result in all_published()]
    if not rows:
        return "Nothing is published yet."
    columns = ["chapter", "profile", "runs", "core-hours", "commit", "date", "verified", "state"]
    return cards.markdown(pd.DataFrame(rows, columns=columns), "llrrllll")


def _published_row(result: runs.Published) -> tuple[Any, ...]:
    meta = result.meta
    hours = sum(meta["totals"]["seconds"].values()) / 3600
    checks, times = meta["verified"], {0: "not yet", 1: "once", 2: "twice"}
    return (
        cards.link(result.chapter), result.profile,
        f"{meta['totals']['runs']:,}", f"{hours:.2f}",
        "; ".join(filter(None, (f"`{meta['commit'][:10]}`", result.changes()))),
        meta["published"][:10],
        times.get(len(checks), f"{len(checks)} times"), result.notice() or "current",
    )  # fmt: skip


def environments_table() -> str:
    """The machines and versions that computed what is published."""
    rows: dict[tuple, set[str]] = {}  # chapters share runs
    for result in all_published():
        for entry in result.meta["environments"]:
            versions = ", ".join(f"{k} {v}" for k, v in entry["versions"].items())
            device = entry["device_name"] or entry["cpu"]
            key = (device, entry["capability"], entry["threads"], entry["dtype"], versions)
            rows.setdefault(key, set()).update(entry["runs"])
    if not rows:
        return "Nothing is published yet."
    columns = ["device", "CPU capability", "threads", "dtype", "versions", "runs"]
    return cards.markdown(pd.DataFrame([(*k, f"{len(found):,}") for k, found in rows.items()],
                                       columns=columns), "llrllr")  # fmt: skip


def here() -> str:
    """The machine and versions that executed this page."""
    now = environment("cpu", "float32")
    rows = [("processor", now["cpu"]), ("CPU capability", now["capability"]),
            ("system", now["system"]), ("python", now["versions"]["python"])]  # fmt: skip
    rows += [(name, metadata.version(name)) for name in PACKAGES if _installed(name)]
    return cards.markdown(pd.DataFrame(rows, columns=["what", "this page"]))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True

"""Where the paper's text, its released code and this book part, and what each difference costs.

`data/deviations.csv` holds one deviation a row. Where a switch of the engine brings a reading back,
the row names contrasts of settings such as `rwr@R1[temperature=0.05] - rwr@R1`, which are computed
from published results, seed by seed; where it is a matter of arithmetic, a function of this module.
What the released code does is known from reading it: it was not executed. Chapter: audit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from math import atan, atanh, pi, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from myst_nb import glue
from scipy import stats as scipy_stats

from lib import cards, claims, costs, experiments, methods, overview, stats
from lib.allowed import one_of
from lib.bandit import reference
from lib.bandit.config import BanditRun
from lib.bandit.network import GPT_NANO
from lib.chapter import Chapter, contrast_text
from lib.decisions import MIN_SEEDS
from lib.experiments import REWARDS, Setting
from lib.experiments.length import PAPER_RATES
from lib.lm.config import TINY
from lib.overview import Chapters
from lib.tables import NEAR, interval_text

DEVIATIONS = claims.DATA / "deviations.csv"
KINDS = {
    "convention": "the text and the released code part",
    "inconsistent": "the text says two things",
    "undetermined": "the text does not say",
    "slip": "a slip in print",
    "choice": "this book departs from both",
}
# Chapters whose results hold the switched settings.
HOMES = ("on_policy", "negative_gradient", "on_policy_length", "negative_gradient_length",
         "complementary_length")  # fmt: skip
SPEED, FINAL, KL = "mean reward over updates", "final reward", "final KL to reference"


@dataclass(frozen=True)
class Measure:
    """A statistic as effects are judged by it.

    Args: words: on the page. margin: half the width of "no effect", in the statistic's units (the
        margins of this book's verdicts). usual: computed where a row names no statistics.
    """

    words: str
    margin: float
    usual: bool = False


MEASURES: dict[str, dict[str, Measure]] = {
    "bandit": {
        SPEED: Measure("mean reward over training", NEAR, usual=True),
        FINAL: Measure("reward at the end", NEAR, usual=True),
        KL: Measure("KL at the end, nats", 1.0),
        "mean reward over the first 100 updates": Measure("reward, first 100 updates", NEAR),
    },
    "length": {
        "final length": Measure("length at the end, tokens", 2.0, usual=True),
        "mean reward over the first 768 samples": Measure("reward, first 768 samples", 0.5),
    },
}
STATISTICS = {name: m for measures in MEASURES.values() for name, m in measures.items()}
# How a whole deviation is summed up, and the colour of that verdict.
SUMMARIES = {"matters": "partly", "no effect": "reproduced", "undecided": "inconclusive",
             "arithmetic": "inconclusive", "not measured here": "inconclusive"}  # fmt: skip

BETAS = (0.01, 0.05, 0.1, 0.5)  # Table 6
SUMMED = {"reference": 100, "sampler": 1000}  # samples over which the released code sums a KL
PAPER_SEEDS = 5  # I.3
PAPER_LENGTH = 203  # tokens: Figure 12, J.1
SPREADS = ("standard error", "standard deviation")  # what the brackets of Table 3 may be



@dataclass(frozen=True)
class Deviation:
    """One row of `data/deviations.csv`.

    Args:
        id: its own name. kind: of `KINDS`. topic: in a few words. where: in the paper.
        text: what the paper's text says. elsewhere: what it also says ("inconsistent" only).
        released_code: what the code does; empty where it has no part in it.
        this_book, why: the choice made here. option: what switches it; empty where nothing does.
        contrasts: of settings, separated by ";".
        statistics: of `MEASURES`, separated by ";"; empty for the usual ones of each problem.
        arithmetic: a name of `ARITHMETIC`.
    Raises: ValueError that names the row, the bad value and the allowed ones.
    """

    id: str
    kind: str
    topic: str
    where: str
    text: str
    elsewhere: str
    released_code: str
    this_book: str
    why: str
    option: str
    contrasts: str
    statistics: str
    arithmetic: str

    def __post_init__(self) -> None:
        required = {n: getattr(self, n) for n in ("topic", "where", "text", "this_book", "why")}
        if empty := [name for name, value in required.items() if not value]:
            raise ValueError(f"{self.id}: {', '.join(empty)} must not be empty")
        self._check("kind", self.kind, KINDS)
        if bool(self.elsewhere) != (self.kind == "inconsistent"):
            raise ValueError(f"{self.id}: elsewhere is for kind 'inconsistent', which needs it; "
                             f"got kind {self.kind!r} and {self.elsewhere!r}")  # fmt: skip
        if self.arithmetic:
            self._check("arithmetic", self.arithmetic, ARITHMETIC)
        for name in split(self.statistics):
            self._check("statistic", name, STATISTICS)
        for contrast in split(self.contrasts):
            problem(contrast)

    def _check(self, name: str, value: str, allowed: Iterable[str]) -> None:
        one_of(f"{self.id}: {name}", value, allowed)

    def compared(self) -> list[tuple[str, str]]:
        """(contrast, statistic) of every comparison that measures it."""
        named = split(self.statistics)
        return [
            (contrast, name)
            for contrast in split(self.contrasts)
            for name, measure in MEASURES[problem(contrast)].items()
            if (name in named if named else measure.usual)
        ]


@dataclass(frozen=True)
class Effect:
    """What a switch changes: the mean of a contrast over seeds, with its 95% interval.

    `reading`: "no effect" (the interval within the margin), "raises" or "lowers" (beyond it),
    else, or with fewer than five seeds, "undecided".
    """

    deviation: str
    contrast: str
    statistic: str
    effect: float
    low: float
    high: float
    n: int
    reading: str


def split(text: str) -> list[str]:
    """The parts of a cell that holds several values."""
    return [part.strip() for part in text.split(";") if part.strip()]


def problem(contrast: str) -> str:
    """ "bandit" or "length". Raises: ValueError if the contrast cannot be read or is of both."""
    tasks = {name.split("@")[1].split("[")[0] for _, name in claims.terms(contrast)}
    kinds = {"bandit" if task in REWARDS else "length" for task in tasks}
    if len(kinds) > 1:
        raise ValueError(f"{contrast!r} compares the bandit with the length problems")
    return kinds.pop()


@cache
def deviations(path: Path = DEVIATIONS) -> tuple[Deviation, ...]:
    """All rows. Raises: ValueError for a bad row or a repeated id."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    found = tuple(Deviation(**row) for row in table.to_dict("records"))
    if repeated := sorted(table["id"][table["id"].duplicated()]):
        raise ValueError(f"repeated ids {repeated} in {path.name}")
    return found


def switched(setting: Setting, profile: experiments.Profile) -> dict[str, tuple[Any, Any]]:
    """The fields in which a setting's runs differ from its base setting's: name -> (base, own)."""
    base, own = (vars(s.run(profile, profile.rates[0], 0)) for s in (setting.base, setting))
    return {name: (base[name], value) for name, value in own.items() if base[name] != value}


# Effects, from the results that there are


def load(profile: str = "auto", recompute: bool = False) -> dict[str, Chapter]:
    """The chapters whose results the audit reads; with `recompute`, the bandit's computed now."""
    return overview.load(profile, recompute, HOMES)


def by_seed(chapters: Chapters, contrast: str, statistic: str) -> pd.Series | None:
    """The contrast within every seed that all of its settings have; they may lie in two chapters.

    Returns: None as `claims.by_seed`.
    """

    def rows(setting: str) -> pd.DataFrame | None:
        chapter = overview.home(chapters, setting)
        return None if chapter is None else chapter.reported(setting)

    return claims.by_seed(contrast, statistic, rows)


def reading(low: float, high: float, margin: float, n: int) -> str:
    """An effect's interval in a word: see `Effect`."""
    if n < MIN_SEEDS:  # too few for an effect, as for a claim
        return "undecided"
    if -margin <= low and high <= margin:
        return "no effect"
    return "raises" if low > margin else "lowers" if high < -margin else "undecided"


def effects(deviation: Deviation, chapters: Chapters) -> list[Effect]:
    """Its comparisons that there are results for."""
    found = []
    for contrast, statistic in deviation.compared():
        values = by_seed(chapters, contrast, statistic)
        if values is not None and len(values):
            mean, low, high = stats.interval(values)
            word = reading(low, high, STATISTICS[statistic].margin, len(values))
            found.append(Effect(deviation.id, contrast, statistic, mean, low, high, len(values),
                                word))  # fmt: skip
    return found


def summary(deviation: Deviation, found: Iterable[Effect]) -> str:
    """A deviation in a word, of `SUMMARIES`."""
    readings = {effect.reading for effect in found}
    if readings & {"raises", "lowers"}:
        return "matters"
    if readings:
        return "no effect" if readings == {"no effect"} else "undecided"
    return "arithmetic" if deviation.arithmetic else "not measured here"


class Audit:
    """Every deviation with its effects, computed once. Args: chapters: of `load`."""

    def __init__(self, chapters: Chapters):
        self.chapters = chapters
        self.effects = {d.id: effects(d, chapters) for d in deviations()}

    def of(self, kind: str) -> list[Deviation]:
        """The deviations of a kind. Raises: ValueError that names the kinds."""
        one_of("kind", kind, KINDS)
        return [d for d in deviations() if d.kind == kind]

    def table(self) -> pd.DataFrame:
        """All effects, one a row (`Effect`)."""
        return pd.DataFrame(
            [vars(e) for found in self.effects.values() for e in found],
            columns=list(Effect.__dataclass_fields__),
        )

    def forest(self, kind: str, statistic: str) -> pd.DataFrame:
        """Effects as `lib.figures.curves.forest` takes them: those of bandit switches."""
        rows = [
            (label(e.contrast), e.effect, e.low, e.high, e.n)
            for d in self.of(kind) for e in self.effects[d.id]
            if e.statistic == statistic and label(e.contrast)
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["label", "effect", "low", "high", "n"])

    def number(self, name: str, contrast: str, statistic: str = FINAL, digits: int = 2) -> None:
        """Makes a contrast's mean and 95% interval available to the prose as `name`."""
        found = by_seed(self.chapters, contrast, statistic)
        glue(name, contrast_text(contrast, found, digits), display=False)

    def numbers(self) -> dict[str, str]:
        """For the prose: counts of deviations, and of the seeds that figures show."""
        counts = self.tally()
        total = sum(sum(found.values()) for found in counts.values())
        unmeasured = sum(found["not measured here"] for found in counts.values())
        found = {"n_deviations": total, "n_measured": total - unmeasured,
                 "n_convention": sum(counts["convention"].values()),
                 **{f"n_convention_{word}": counts["convention"][word]
                    for word in ("matters", "undecided")}}  # fmt: skip
        profile = next((c.profile for c in self.chapters.values()), None)
        found |= {
            "report_seeds": len(profile.report_seeds) if profile else 0,
            "sweep_seeds": len(profile.sweep_seeds) if profile else 0,
            "switch_seeds": _range(self.forest("convention", FINAL)["n"]),
        }
        return {name: str(number) for name, number in found.items()}

    def tally(self) -> dict[str, dict[str, int]]:
        """How many deviations of each kind are summed up how."""
        counts = {kind: dict.fromkeys(SUMMARIES, 0) for kind in KINDS}
        for d in deviations():
            counts[d.kind][summary(d, self.effects[d.id])] += 1
        return counts

    def cards(self, kind: str) -> str:
        """The deviations of a kind as MyST text, each folded behind a line that sums it up."""
        return "\n\n".join(card(d, self.effects[d.id]) for d in self.of(kind))


# On the page


def label(contrast: str) -> str:
    """ "RWR: temperature = 0.05" of a setting against its own base; "" for other contrasts."""
    names = [name for _, name in claims.terms(contrast)]
    base, _, options = names[0].partition("[")
    if len(names) != 2 or names[1] != base or not options:
        return ""
    method, reward = base.split("@")
    title = methods.get(method).title.replace(" (one ratio per completion)", "")
    switched = options.rstrip("]").replace("=", " = ").replace(",", ", ")
    return f"{title}{'' if reward == 'R1' else f', {reward}'}: {switched}"


def badge(word: str) -> str:
    """A summary as MyST text that carries its word, not only its colour."""
    return f"[{word}]{{.verdict-{SUMMARIES[word]}}}"


def card(deviation: Deviation, found: list[Effect]) -> str:
    """A deviation as a folded definition list: what is said, what is done here, the effect."""
    terms = {
        "The text": deviation.text,
        "The text as well": deviation.elsewhere,
        "The released code": deviation.released_code,
        "This book": f"{deviation.this_book}. Why: {deviation.why}",
        "Switched by": deviation.option,
        "Arithmetic": ARITHMETIC[deviation.arithmetic]() if deviation.arithmetic else "",
        "Measured": measured(deviation, found),
    }
    items = [f"{term}\n: {words}" for term, words in terms.items() if words]
    word = summary(deviation, found)
    shown = "" if word == "not measured here" and deviation.kind != "convention" else badge(word)
    title = f"{deviation.topic} ({deviation.where}) {shown}".rstrip()
    name = f":name: deviation-{deviation.id}"
    return f"````{{dropdown}} {title}\n{name}\n\n" + "\n\n".join(items) + "\n````"


def measured(deviation: Deviation, found: list[Effect]) -> str:
    """The effects as a list under a definition, or why there are none; "" without contrasts."""
    if not deviation.contrasts:
        return ""
    if not found:
        return "not at this profile: none of the settings is in its grid"
    by_contrast: dict[str, list[Effect]] = {}
    for effect in found:
        by_contrast.setdefault(effect.contrast, []).append(effect)
    lines = [f"- {_name(contrast)}, {own[0].n} seeds: " + "; ".join(map(_words, own))
             for contrast, own in by_contrast.items()]  # fmt: skip
    missing = len(split(deviation.contrasts)) - len(by_contrast)
    if missing:
        lines.append(f"- {missing} more: not at this profile")
    return "\n".join(lines).replace("\n", "\n  ")


def _range(counts: pd.Series) -> str:
    """ "5 to 10" of the numbers in a column."""
    if counts.empty:
        return "no"
    low, high = counts.min(), counts.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _name(contrast: str) -> str:
    return label(contrast) or f"`{contrast}`"


def _words(effect: Effect) -> str:
    """ "reward at the end +0.01 (-0.02 to +0.04), undecided"."""
    digits = 3 if STATISTICS[effect.statistic].margin < 0.1 else 1
    mean, low, high = (f"{round(x, digits) + 0.0:+.{digits}f}"  # no "-0.000"
                       for x in (effect.effect, effect.low, effect.high))  # fmt: skip
    shown = f"{mean} ({low} to {high})" if np.isfinite(effect.low) else mean
    return f"{STATISTICS[effect.statistic].words} {shown}, *{effect.reading}*"


def tally_text(counts: Mapping[str, Mapping[str, int]]) -> str:
    """How many deviations there are of each kind, and what became of them, as a Markdown list."""
    lines = []
    for kind, found in counts.items():
        shown = ", ".join(f"{n} {badge(word)}" for word, n in found.items() if n)
        lines.append(f"- **{KINDS[kind]}**: {sum(found.values())}, of which {shown}")
    return "\n".join(lines)


def sources(chapters: Chapters) -> str:
    """Which results the page shows, what is missing, and whether its sentences fit them."""
    parts = []
    for name in HOMES:
        chapter = chapters.get(name)
        link = cards.link(name)
        if chapter is None:
            parts.append(f"{link}: none at this profile, so its effects are missing below")
            continue
        meta = chapter.published and chapter.published.meta
        shown = f"commit `{meta['commit'][:10]}`" if meta else "computed now"
        stale = " (**stale**)" if meta and chapter.published.notice() else ""
        parts.append(f"{link}: `{chapter.profile_name}`, {shown}{stale}")
    fits = all(name in chapters and chapters[name].is_interpreted for name in HOMES)
    words = ("The sentences that interpret them were written for these results." if fits else
             "**The sentences that interpret them were written for other results than these, and "
             "may not hold for them.**")  # fmt: skip
    kind, listed = ("note" if fits else "warning"), "\n".join(f"- {part}" for part in parts)
    return f"```{{{kind}}}\nResults shown here:\n\n{listed}\n\n{words}\n```"


# What arithmetic alone can say


def ceiling() -> str:
    """The largest reward that a mean over prompt and completion can have."""
    best, prompt = costs.in_papers_convention(1.0), costs.in_papers_convention(0.0) * 10
    return (
        f"a random prompt token is worth {prompt:.3f} under R1, so the best policy of all has "
        f"(9 × 1 + {prompt:.3f}) / 10 = {best:.3f}; Table 3 prints 0.92 for its best methods"
    )


def tails(unsquash: Callable[[float], float]) -> tuple[float, float]:
    """Exact mass on the first and on the last of 100 bins of (-1, 1), for draws of the Cauchy.

    Args: unsquash: the inverse of what brings a draw into (-1, 1), applied to a bin's inner edge.
    """

    def below(x: float) -> float:
        return 0.5 + atan((x - reference.LOCATION) / reference.SCALE) / pi

    edge = 0.98
    return below(unsquash(-edge)), 1 - below(unsquash(edge))


def histogram() -> str:
    """Mass on the two end tokens, either way."""
    (first, last), (squashed_first, squashed_last) = tails(lambda x: x), tails(atanh)
    return (f"clipping puts {first:.0%} of the mass on token 0 and {last:.0%} on token 99, tanh "
            f"{squashed_first:.0%} and {squashed_last:.0%}")  # fmt: skip


def kl_factors() -> dict[str, float]:
    """What the released code draws for a KL of 1 nat per completion, by its kind: a sum over
    samples of the mean over prompt and completion."""
    return {name: samples / costs.PROMPT_AND_RESPONSE for name, samples in SUMMED.items()}


def kl_axes() -> str:
    """Nats per completion against the released code's axes."""
    factor = kl_factors()
    return (f"1 nat per completion is about {factor['reference']:.0f} on the code's axis to the "
            f"reference and {factor['sampler']:.0f} on its axis to the sampler (plus what the "
            "prompt's own token adds): the two axes differ by a factor "
            f"{factor['sampler'] / factor['reference']:.0f} among themselves")  # fmt: skip


def running_variance() -> str:
    """What the released code takes the root of at the first reward of its second sampling."""
    rewards, mass = reference.reward_table("R1").double().numpy(), reference.histogram()
    run = BanditRun("reinforce", "R1", 0.0, 0)
    tokens, count = run.length, run.schedule.batch
    mean = float(mass @ rewards)
    square = mean**2 + float(mass @ rewards**2 - mean**2) / tokens
    before, after = count * square, count * square - (count * mean) ** 2
    return (f"{count} completions of the reference policy have an expected sum of rewards of "
            f"{count * mean:.1f} on R1 and of their squares of {before:.1f}. With the counter at 1 "
            f"again the variance is about {before:.1f} - {count * mean:.1f}² = {after:.0f}, and "
            "negative for any rewards between 0 and 1 whose sum is above 1")  # fmt: skip


def bfloat16_steps() -> str:
    """The smallest change of a bfloat16 weight beside the largest learning rate in print."""
    weight = 0.02
    gap = float(torch.finfo(torch.bfloat16).eps * 2 ** np.floor(np.log2(weight)))
    return (f"neighbours of {weight} in bfloat16 are {gap:.1e} apart, so that a step of Adam below "
            f"{gap / 2:.0e} leaves such a weight as it is; the largest rate in print is "
            f"{max(PAPER_RATES):g}")  # fmt: skip


def ipo_target() -> str:
    """The margin that IPO's loss asks for, in the three forms."""
    tau = methods.get("ipo").hyper["tau"]
    target = 1 / (2 * tau)
    return (
        f"1/(2τ) = {target:g} at τ = {tau:g}, so the bandit's two forms are one. With τ inside "
        f"the square the same τ asks for h = 1/(2τ²) = {target / tau:g} nats, of every token"
    )


def parameters() -> str:
    """The size of GPT-nano, counted."""
    count = sum(prod(shape) for shape in GPT_NANO.shapes().values())
    return f"{count:,} parameters, {count / 1e6:.2f}M"


def betas() -> str:
    """By how much a choice of beta scales an implicit reward."""
    return (f"Table 6 has β from {min(BETAS):g} to {max(BETAS):g}: the same log-ratios differ by a "
            f"factor {max(BETAS) / min(BETAS):g} on Figure 9's axis")  # fmt: skip


@cache
def policy_lengths() -> np.ndarray:
    """(n,) lengths in tokens, without EOS, of the shipped policy's responses."""
    eos = json.loads((TINY / "policy" / "generation_config.json").read_text())["eos_token_id"]
    table = pd.read_parquet(TINY / "pairs.parquet")
    responses = chain(*(table.loc[table["split"] == "train", name] for name in ("first", "second")))
    return np.array([len(ids) - (len(ids) > 0 and ids[-1] == eos) for ids in responses])


def mean_and_mode() -> str:
    """How far mean, median and mode of a policy's lengths are apart, on this book's own."""
    lengths = policy_lengths()
    counts = np.bincount(lengths)
    return (f"the shipped policy's responses have a mean length of {lengths.mean():.1f} tokens and "
            f"a median of {np.median(lengths):.0f}; the commonest length is {counts.argmax()} "
            f"({counts.max() / len(lengths):.1%} of responses)")  # fmt: skip


def shorter() -> str:
    """The mean length of this book's responses beside the paper's."""
    mean = policy_lengths().mean()
    return (f"{mean:.1f} tokens in the mean, {mean / PAPER_LENGTH:.0%} of the paper's "
            f"{PAPER_LENGTH}")  # fmt: skip


def printed(setting: str, method: str) -> Any:
    """The row of the paper's Table 3 that holds a method of this book.

    Raises: ValueError that names the methods there are.
    """
    rows = costs.printed(setting)
    if method not in rows:
        raise ValueError(f"Table 3, {setting}, has {tuple(rows)}, got {method!r}")
    return rows[method]


def gap_interval(first: Any, second: Any, spread: str) -> tuple[float, float, float]:
    """The difference of two printed means and its 95% interval (Welch), by what the brackets mean.

    Args: first, second: rows of Table 3. spread: of five seeds, from SPREADS.
    Raises: ValueError for another `spread`.
    """
    one_of("spread", spread, SPREADS)
    scale = 1.0 if spread == "standard error" else 1 / sqrt(PAPER_SEEDS)
    errors = np.array([first.spread_as_printed, second.spread_as_printed]) * scale
    freedom = (errors**2).sum() ** 2 * (PAPER_SEEDS - 1) / (errors**4).sum()
    half = scipy_stats.t.ppf((1 + stats.CONFIDENCE) / 2, freedom) * sqrt((errors**2).sum())
    gap = first.value - second.value
    return gap, gap - half, gap + half


def spread() -> str:
    """Whether Table 3 tells on-policy RWR from offline IPO, by each meaning of its brackets."""
    first, second = (printed("bandit_r1", name) for name in ("rwr", "ipo_offline"))
    words = []
    for meaning in SPREADS:
        gap, low, high = gap_interval(first, second, meaning)
        told = "above 0" if low > 0 else "may be 0"
        words.append(f"as a {meaning}, {gap:+.2f} ({low:+.2f} to {high:+.2f}): {told}")
    length = printed("min_length", "ppo_token")
    return (f"on-policy RWR {first.value:.2f} ({first.spread_as_printed:.2f}) less offline "
            f"{second.value:.2f} ({second.spread_as_printed:.2f}), if the brackets are of "
            f"{PAPER_SEEDS} seeds: {'; '.join(words)}. And PPO's {length.value:g} "
            f"({length.spread_as_printed:g}) on Min Length has a spread above its mean, though no "
            "length is below 0")  # fmt: skip


def clock_statement() -> str:
    """Where Table 3 has on-policy DPO/IPO level with or behind another row."""
    found = []
    for setting, title in (("bandit_r1", "bandit"), ("min_length", "Min"), ("skew_length", "Skew")):
        own = printed(setting, "dpo")
        for row in costs.paper(setting).itertuples():
            if row.ours == own.ours:
                continue
            level = ["result"] if row.value == own.value else []
            level += ["time"] if row.hours == own.hours else []
            found += [f"{title}: {row.method} ties in {word}" for word in level]
            if row.hours < own.hours:
                found.append(f"{title}: {row.method} is faster, {row.hours:g} against "
                             f"{own.hours:g} hours")  # fmt: skip
    return "; ".join(found)


ARITHMETIC: dict[str, Callable[[], str]] = {
    f.__name__: f for f in (ceiling, histogram, kl_axes, running_variance, bfloat16_steps,
                            ipo_target, parameters, betas, mean_and_mode, shorter, spread,
                            clock_statement)
}  # fmt: skip


# The paper's Table 3 under each convention


def table_3(chapters: Chapters) -> pd.DataFrame:
    """The bandit column of Table 3 beside this book's runs, by convention.

    Columns: method, printed, and this book's final reward on R1 as: text (mean over the
    completion), code (over prompt and completion), best of the sweep (that, by the paper's rule:
    the rate with the best final reward, on the seeds that chose it).
    """
    rows = []
    for line in costs.paper().itertuples():
        for name in line.ours.split("|"):
            for setting in (f"{name}@R1", f"{name}@R1[prompts=100]"):
                chapter = overview.home(chapters, setting)
                if chapter is not None:
                    rows.append(_reward_row(chapter, setting, line))
    columns = ["method", "printed", "text", "code", "best of the sweep"]
    return pd.DataFrame(rows, columns=columns)


def _reward_row(chapter: Chapter, setting: str, line: Any) -> tuple[str, ...]:
    ours = stats.per_run(chapter.reported(setting), FINAL)
    options = setting.partition("[")[2].rstrip("]")
    title = methods.get(setting.split("@")[0]).title.replace(" (one ratio per completion)", "")
    best = "-" if options else interval_text(
        best_of_sweep(chapter, setting).map(costs.in_papers_convention))  # fmt: skip
    return (f"{title}, {options}".removesuffix(", "),
            f"{line.value:.2f} ({line.spread_as_printed:.2f})", interval_text(ours),
            interval_text(ours.map(costs.in_papers_convention)), best)  # fmt: skip


def best_of_sweep(chapter: Chapter, setting: str) -> pd.Series:
    """Final reward by seed at the rate of the sweep that ends best: the paper's rule."""
    by_rate = {
        rate: stats.per_run(rows, FINAL)
        for rate, rows in chapter.swept(setting).groupby("learning_rate", observed=True)
    }
    return by_rate[max(by_rate, key=lambda rate: by_rate[rate].mean())]

"""The landing page's short answers: sentences worded by what the results shown support.

First a default: the methods that failed on the fewest problems, with fresh samples and on fixed
data. A method fails on a problem where it does not lead or where a run of it harms (`lib.decisions`
has both words). A problem that nobody solved counts for none. Left out are methods that half of
the problems or fewer ran, or that led on half of those or fewer. A method that harmed is named with
a warning. This summary was written after the results were in: it tests nothing.

Then three answers, each with a strong wording and a neutral one, a sentence that sorts the
problems, and the numbers folded away below it. The strong wording takes intervals over seeds that
support it on every problem that counts: one with at least `lib.decisions.MIN_SEEDS` seeds. A gap
counts when its 95% interval lies beyond the problem's margin. Problems, and where the peak of their
reward lies: `lib.decisions.PROBLEMS`.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lib import cards, decisions, experiments, methods, overview, stats
from lib.chapter import Chapter
from lib.decisions import MIN_SEEDS, PROBLEMS, Entry, Problem, Standing, label
from lib.experiments import Setting
from lib.overview import Chapters, Values
from lib.tables import interval_text

ALIKE = 2  # margins of a problem: how far methods' means may part for the loss to matter little
ENDED = 0.9  # share of answers that end, below which the page warns
PICKS = 3  # methods that the default names for either kind of data, at most
PLACES = {("far", "apart"): "far", ("far", "close"): "far, pairs near it", ("near", None): "near"}
Gaps = Mapping[Problem, pd.Series]  # a paired difference by seed, for each problem that has it


def short_answers(chapters: Chapters) -> str:
    """Four answers as a Markdown list: a default, sample or not, old samples, fixed data."""
    results = decisions.collect(chapters)
    found = (default(results), sampling(results), old_samples(results, chapters),
             fixed_data(results, chapters))  # fmt: skip
    return "\n".join(f"- {textwrap.indent(text, '  ').lstrip()}" for text in found)


# --- one default ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What became of a method, by its short name, on the problems that ran it."""

    name: str
    found: tuple[tuple[Standing, Entry], ...]
    missed: tuple[Problem, ...] = ()  # those that count and did not run it

    @property
    def ran(self) -> tuple[Problem, ...]:
        """The problems that ran it, those left out that nobody solved."""
        return tuple(s.problem for s, _ in self.found if s.solved)

    @property
    def led(self) -> tuple[Problem, ...]:
        return tuple(s.problem for s, e in self.found if s.solved and e.leads)

    @property
    def harmed(self) -> tuple[Problem, ...]:
        """Those on which a run ended below the untrained model, solved or not."""
        return tuple(s.problem for s, e in self.found if e.harms)

    @property
    def order(self) -> tuple[int, int, float]:
        """By the problems on which it failed either way, then by those on which it led."""
        behind = set(self.ran) - set(self.led)
        first = sum(e.first / s.n for s, e in self.found) / len(self.found)
        return len(behind | set(self.harmed)), -len(self.led), -first

    @property
    def side(self) -> str:
        return decisions.SIDES[not methods.get(self.found[0][1].method).on_policy]

    @property
    def needs(self) -> str:
        """A reward for every answer, or else pairs, which are enough."""
        if all("rewards" in methods.get(e.method).needs for _, e in self.found):
            return "a reward for every answer"
        return "pairs" if self.side == "offline" else "pairs of fresh answers (a judge)"

    @property
    def record(self) -> str:
        """ "DPO (5 of 6; behind on Mode Length: -13.43, the best -8.07 tokens; not run on R2)"."""
        behind = [f"{s.problem.title}: {e.mean:.2f}, the best {max(o.mean for o in s.entries):.2f}"
                  + s.problem.unit for s, e in self.found if s.solved and not e.leads]  # fmt: skip
        parts = [f"{len(self.led)} of {len(self.ran)}"]
        parts += [f"behind on {'; '.join(behind)}"] if behind else []
        parts += [f"not run on {_and([p.title for p in self.missed])}"] if self.missed else []
        return f"{self.name} ({'; '.join(parts)})"

    @property
    def warning(self) -> str:
        """In a sentence, where a run ended below the untrained model."""
        return (f"{self.record}, which needs {self.needs}, comes with a warning: a run of it ended "
                f"below the untrained model on {_and([p.title for p in self.harmed])}.")

    def row(self) -> dict[str, str]:
        """Where it led and where it failed, as a row of a table."""
        return {
            "method": f"{self.name} ({self.side})", "needs": self.needs,
            "level with the best of its kind on": _titles(self.led),
            "behind it on": _titles(p for p in self.ran if p not in self.led),
            "a run ended below the untrained model by more than the margin on": _titles(
                self.harmed),
        }  # fmt: skip


def _titles(problems: Iterable[Problem]) -> str:
    return ", ".join(p.title for p in problems) or "\N{EN DASH}"


def default(results: pd.DataFrame) -> str:
    """What to take unseen: the methods that failed least often, with fresh samples and without."""
    fresh, fixed = (_standings(results, choice) for choice in ("fresh", "fixed"))
    left = _records(fresh, True), _records(fixed, False)
    sampled, given = (records[:PICKS] for records in left)
    named = [*sampled, *given]
    if not named:
        none = (f"No method with {MIN_SEEDS} seeds was run on more than half of the problems and "
                "led on more than half of those")  # fmt: skip
        return f"**One default?** {none if len(results) else overview.NOT_YET.capitalize()}."
    seen = {s.problem for s in fresh}
    every = [*fresh, *(s for s in fixed if s.problem not in seen)]
    head = ("**If you want one default**, and no branch of the chart below fits, go by the "
            "problems on which a method is *level with the best* of its kind, on-policy or "
            "offline, which is not shown to be ahead of it by a margin that matters:")
    told = [head, _advice("If you can sample while you train", sampled, ""),
            _advice("If your data are fixed", given, " if you have {}")]  # fmt: skip
    if unsolved := [s.problem.title for s in every if not s.solved]:
        told.append(f"- On {_and(unsolved)} no method ends above the untrained model: being level "
                    "there counts for none.")  # fmt: skip
    legend = ("Final reward, the mean over seeds. **Bold**: the best of the column, on-policy "
              "and offline together, or level with it. \N{DAGGER}: a run ended below the untrained "
              "model by more than the margin. \N{EN DASH}: not run.")  # fmt: skip
    rule = (f"Of the on-policy methods {len(left[0])}, of the offline ones {len(left[1])} were run "
            "on more than half of the problems and led on more than half of those. The default "
            f"names at most {PICKS} of either, those that failed least often.")  # fmt: skip
    failed = cards.markdown(pd.DataFrame([r.row() for r in named]))
    numbers = "\n\n".join([failed, rule, cards.markdown(matrix(every)), legend])
    return _answer("\n".join(filter(None, told)), numbers,
                   "Where they failed, and every method on every problem")  # fmt: skip


def _advice(case: str, records: Sequence[Record], needs: str) -> str:
    """An item of a list: which of the methods to take in a case, the others with their warnings.

    Args: needs: how what a method needs is said after its record.
    """
    safe = [r.record + needs.format(r.needs) for r in records if not r.harmed]
    told = [f"take {_and(safe, 'or')}."] if safe else []
    told += [r.warning for r in records if r.harmed]
    return f"- *{case}:* {' '.join(told)}" if told else ""


def seeds(results: pd.DataFrame) -> str:
    """ "20 on bandit R1 and bandit R2, 5 on the others": how many seeds the problems have."""
    found = {s.problem: s for choice in ("fixed", "fresh") for s in _standings(results, choice)}
    titles: dict[int, list[str]] = {}
    for p in PROBLEMS:
        if p in found:
            titles.setdefault(found[p].n, []).append(p.title)
    *some, most = sorted(titles, key=lambda n: len(titles[n])) or [None]
    if most is None:
        return f"fewer than {MIN_SEEDS}" if len(results) else overview.NOT_YET
    return ", ".join([*(f"{n} on {_and(titles[n])}" for n in some),
                      f"{most} on the others" if some else f"{most}"])  # fmt: skip


def _standings(results: pd.DataFrame, choice: str) -> list[Standing]:
    found = (decisions.standing(results, p, choice) for p in PROBLEMS)
    return [s for s in found if s is not None and s.votes]


def _records(standings: Sequence[Standing], on_policy: bool) -> list[Record]:
    """Methods that more than half of the problems ran and that led on more than half of those, the
    one that failed least often first."""
    ran: dict[str, list[tuple[Standing, Entry]]] = {}
    for s in standings:
        for e in s.entries:
            if methods.get(e.method).on_policy is on_policy:
                ran.setdefault(overview.short(e.method), []).append((s, e))
    found = [Record(name, tuple(of), _missed(of, standings)) for name, of in ran.items()
             if 2 * len(of) > len(standings)]  # fmt: skip
    mostly = (record for record in found if 2 * len(record.led) > len(record.ran))
    return sorted(mostly, key=lambda record: record.order)


def _missed(
    found: Sequence[tuple[Standing, Entry]], standings: Sequence[Standing]
) -> tuple[Problem, ...]:
    ran = [s for s, _ in found]
    return tuple(s.problem for s in standings if s.solved and s not in ran)


def matrix(standings: Sequence[Standing]) -> pd.DataFrame:
    """Final rewards: a row per method, on-policy ones first, a column per problem."""
    cells: dict[str, dict[str, str]] = {"untrained": {}}
    for s in standings:
        title = s.problem.title + (f" ({s.problem.unit.strip()})" if s.problem.unit else "")
        cells["untrained"][title] = f"{s.start:.2f}"
        for e in sorted(s.entries, key=lambda e: not methods.get(e.method).on_policy):
            text = f"{e.mean:.2f}" + ("\N{DAGGER}" if e.harms else "")
            cells.setdefault(label(e.method), {})[title] = f"**{text}**" if e.leads else text
    table = pd.DataFrame.from_dict(cells, orient="index").fillna("\N{EN DASH}")
    kinds = [name.endswith("(offline)") for name in table.index]
    table = table.iloc[sorted(range(len(table)), key=kinds.__getitem__)]
    return table.rename_axis("method").reset_index()


# --- sample or not --------------------------------------------------------------------------------


def sampling(results: pd.DataFrame) -> str:
    """Whether to sample while training, by the gap between the best methods of either kind."""
    sides = {p: (_values(results, p, "fresh"), _values(results, p, "fixed")) for p in PROBLEMS}
    gaps = _each(lambda p: _lead(*sides[p]))
    if not gaps:
        return f"**Sample while you train?** {overview.NOT_YET.capitalize()}."
    counted = _counted(gaps)
    never_worse = all(stats.interval(gap)[2] > -p.margin for p, gap in counted.items())
    pays = never_worse and any(_beyond(p, gap) for p, gap in counted.items())
    head = "Sample while you train, if you can." if pays else "Sampling while you train:"
    best = _sorted("The best on-policy method against the best offline one", counted)
    rows = [
        _place(p) | {
            "best on-policy": _named(sides[p][0]), "best offline": _named(sides[p][1]),
            "difference": interval_text(gap, signed=True) + p.unit,
            "all on-policy means": _range(sides[p][0]),
            "completions": _completions(results, p),
        } for p, gap in counted.items()
    ]  # fmt: skip
    notes = ("*Completions*: how many each kind of run labels or is given, offline first. The best "
             "method of each kind is picked on the seeds shown, which flatters both. On the length "
             "problems the labels of on-policy methods are a reward model's, which learned from "
             "more pairs than an offline run reads ([data](length.ipynb)).")  # fmt: skip
    told = " ".join(filter(None, [best, _labels(results, counted), _loss(counted, sides)]))
    return _answer(f"**{head}** {told}", _numbers(rows, gaps, notes))


def _labels(results: pd.DataFrame, counted: Iterable[Problem]) -> str:
    """On which problems the on-policy runs have more labels than the offline ones."""
    more: dict[float, list[Problem]] = {}
    for p in counted:
        offline, on_policy = _drawn(results, p)
        if on_policy > offline:
            more.setdefault(on_policy / offline, []).append(p)
    times = [f"{ratio:,.0f} times the labels on {_and([p.title for p in found])}"
             for ratio, found in more.items()]  # fmt: skip
    return f"On-policy runs had {_and(times)}." if times else ""


def _loss(counted: Iterable[Problem], sides: Mapping[Problem, tuple[Values, Values]]) -> str:
    """How much the on-policy methods differ among themselves, in a sentence."""
    ends = {p: [v.mean() for v in sides[p][0].values() if len(v) >= MIN_SEEDS] for p in counted}
    spread = {p: max(e) - min(e) for p, e in ends.items() if len(e) > 1}
    if not spread:
        return ""
    little = [p.title for p, gap in spread.items() if gap <= ALIKE * p.margin]
    much = [p.title for p in spread if p.title not in little]
    if not little or not much:
        return "The loss matters as well." if much else "Which loss you take then matters little."
    return (f"Which on-policy loss you take matters little (means within {ALIKE} margins) on "
            f"{_and(little)}; on {_and(much)} their means are far apart.")  # fmt: skip


def _range(found: Values) -> str:
    means = [v.mean() for v in found.values() if len(v) >= MIN_SEEDS]
    return f"{min(means):.2f} to {max(means):.2f}" if means else "-"


def _completions(results: pd.DataFrame, problem: Problem) -> str:
    """ "100 and 10,000": what the offline and the fresh on-policy runs had labelled."""
    return " and ".join(f"{count:,.0f}" for count in _drawn(results, problem))


def _drawn(results: pd.DataFrame, problem: Problem) -> tuple[float, float]:
    """Medians of the completions of the offline and the fresh on-policy runs of a problem."""
    own = results[results["problem"] == problem.name].groupby("choice")["completions"].median()
    return float(own["fixed"]), float(own["fresh"])


# --- old samples ----------------------------------------------------------------------------------


def old_samples(results: pd.DataFrame, chapters: Chapters) -> str:
    """Which loss bears rare sampling, by what it does to the mean reward where the peak is far.

    A reward that is judged a few times only has no such mean: there it is the final one.
    """
    found = {p: rare for p in PROBLEMS if p.peak == "far"
             if len(rare := rare_sampling(chapters, p)) > 1}  # fmt: skip
    if not found:
        return f"**If sampling is slow:** {overview.NOT_YET}."
    counted = {p: rare for p, rare in found.items() if _seeds(rare) >= MIN_SEEDS}
    split = bool(counted) and all(_split(p, rare) for p, rare in counted.items())
    serves = {p: _serves(chapters, p) for p in counted}
    groups: dict[tuple, list[str]] = {}
    for p, rare in counted.items():
        if _apart(p, rare):
            slower = p.column == "reward"
            key = serves[p], tuple(rare), tuple(map(overview.short, _extremes(rare))), slower
            groups.setdefault(key, []).append(p.title)
    said: dict[tuple, list[str]] = {}
    for (n, ran, (best, worst), slower), titles in groups.items():
        costs = "slow {} more than {}" if slower else "cost {} more final reward than {}"
        said.setdefault((n, ran), []).append(f"{costs.format(worst, best)} on {_and(titles)}")
    order = [f"Old samples {'; they '.join(parts)} (one sampling for {n} updates; {_listed(ran)} "
             "ran)." for (n, ran), parts in said.items()]  # fmt: skip
    gains: dict[tuple[str, bool], list[str]] = {}
    for p, rare in counted.items():
        for name in (n for n, change in rare.items() if _beyond(p, change)):
            gains.setdefault((name, p.column == "reward"), []).append(p.title)
    order += [f"{overview.short(name)} even {'learns faster' if faster else 'ends higher'} with "
              f"old samples on {_and(titles)}."
              for (name, faster), titles in gains.items()]  # fmt: skip
    rows = [
        {"problem": p.title, "updates per sampling": serves[p],
         "what old samples change in": _judged(p),
         "surest to lose little": _ends(p, rare, 0), "surest to lose much": _ends(p, rare, 1)}
        for p, rare in counted.items()
    ]  # fmt: skip
    head = "**If sampling is slow:** no loss is told apart from another."
    if groups:
        head = "take a loss with a negative gradient." if split else "mind the loss."
        head = f"**If sampling is slow, {head}**"
    shortest = {p: min(rare.values(), key=len) for p, rare in found.items()}
    told = " ".join(filter(None, [head, _level(results), *order]))
    return _answer(told, _numbers(rows, shortest))


def _level(results: pd.DataFrame) -> str:
    """Who ends level with the best however rare the sampling, in a sentence; "" if nobody does."""
    groups: dict[int, list[Standing]] = {}
    for found in _standings(results, "rare"):
        groups.setdefault(found.serves, []).append(found)
    parts, side = [], f" ({decisions.SIDES[0]})"
    for serves, own in sorted(groups.items()):
        ran = Counter(label(e.method) for s in own for e in s.entries)
        named = [f"{name.removesuffix(side)} ({ran[name]})"
                 for name in decisions.recommended(own) if name.endswith(side)]  # fmt: skip
        parts += [f"{_and(named)} with one sampling for {serves} updates"] if named else []
    if not parts:
        return ""
    return ("Level with the best at the end on every problem that ran them (so many): "
            f"{'; '.join(parts)}.")  # fmt: skip


def _listed(names: Sequence[str]) -> str:
    """The names of a few methods, or how many there are."""
    few = len(names) < 4
    return _and([overview.short(name) for name in names]) if few else f"{len(names)} methods"


def _and(words: Sequence[str], last: str = "and") -> str:
    """ "a, b and c"."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def rare_sampling(chapters: Chapters, problem: Problem) -> Values:
    """What the rarest sampling of the grid changes in the mean reward, by on-policy method."""
    found = {}
    statistic = overview.SPEED if problem.column == "reward" else f"final {problem.column}"
    for chapter, s in _stalest(chapters, problem):
        fresh = replace(s, options=problem.base)
        change = chapter.contrast(f"{s.name} - {fresh.name}", statistic)
        found |= {} if change is None else {s.method: change}
    return found


def _stalest(chapters: Chapters, problem: Problem) -> list[tuple[Chapter, Setting]]:
    own = (chapters[name] for name in problem.chapters if name in chapters)
    return [(c, s) for c in own for s in decisions.stalest(c.settings(), problem)]


def _serves(chapters: Chapters, problem: Problem) -> int:
    """How many updates the rarest sampling of the grid serves."""
    return max(dict(s.options)["sets"] for _, s in _stalest(chapters, problem))


def _judged(problem: Problem) -> str:
    """What is told of a problem: the mean over training, or the end where a judge looked."""
    column = problem.column
    return "mean reward over training" if column == "reward" else f"final {column} reward"


def _split(problem: Problem, rare: Values) -> bool:
    """Whether every loss with a negative gradient bears it better than every one without."""
    order = sorted(rare, key=lambda name: rare[name].mean(), reverse=True)
    pushed = [methods.get(name).negative_gradient for name in order]
    sorted_out = pushed == sorted(pushed, reverse=True) and len(set(pushed)) == 2
    return sorted_out and _apart(problem, rare)


def _apart(problem: Problem, rare: Values) -> bool:
    """Whether who bears it best and who worst can be told apart."""
    best, worst = _extremes(rare)
    return _beyond(problem, (rare[best] - rare[worst]).dropna())


def _ends(problem: Problem, rare: Values, which: int) -> str:
    """ "RWR: -0.97 (-1.91 to -0.04) tokens, n = 5": who bears it best (0) or worst (1)."""
    name = _extremes(rare)[which]
    lost = interval_text(rare[name], signed=True)
    return f"{overview.short(name)}: {lost}{problem.unit}, n = {len(rare[name])}"


def _extremes(rare: Values) -> tuple[str, str]:
    """Who loses least even at the bad end of its interval, and most even at the good end of its.

    By their means, a method whose seeds scatter widely could be called either.
    """
    means, lows, highs = ({name: stats.interval(values)[i] for name, values in rare.items()}
                          for i in range(3))  # fmt: skip
    best = max(rare, key=lambda name: (lows[name], means[name]))
    others = (name for name in rare if name != best)
    return best, min(others, key=lambda name: (highs[name], means[name]))


def fixed_data(results: pd.DataFrame, chapters: Chapters) -> str:
    """Which loss for fixed data, by the gap that a negative gradient makes on each problem."""
    sides = {p: by_gradient(results, p) for p in PROBLEMS}
    gaps = _each(lambda p: _lead(*sides[p]))
    if not gaps:
        return f"**If the data are fixed:** {overview.NOT_YET}."
    counted = _counted(gaps)
    best = _sorted("The best loss with a negative gradient against the best without", counted)
    rows = [
        _place(p) | {
            "best with a negative gradient": _named(sides[p][0]),
            "best without": _named(sides[p][1]),
            "difference": interval_text(gap, signed=True) + p.unit,
        } for p, gap in counted.items()
    ]  # fmt: skip
    notes = "In brackets: the worst run."
    told = " ".join(filter(None, [_turn(counted), best, _leaning(counted),
                                  _unended(chapters)]))
    return _answer(told, _numbers(rows, gaps, notes))


def _turn(gaps: Gaps) -> str:
    """On what it hangs whether a negative gradient helps: who wrote the pairs, or else the peak."""
    gains = {p: _beyond(p, gap) for p, gap in gaps.items()}
    losses = {p: _beyond(p, -gap) for p, gap in gaps.items()}
    apart, close = ([p for p in gaps if p.pairs == pairs] for pairs in ("apart", "close"))
    if apart and all(gains[p] for p in apart):
        if any(losses[p] for p in close) and not any(gains[p] for p in close):
            return ("**If the data are fixed, ask who wrote the pairs.** Push bad answers down if "
                    "your model did; only pull good ones up if they lie where the reward is.")
        near = [p for p in gaps if p.peak == "near"]
        if near and not any(gains[p] for p in near) and all(gains[p] for p in close):
            return "**If the data are fixed, ask where the reward is.**"
    return "**If the data are fixed:**"


def _leaning(gaps: Gaps) -> str:
    """What to do where the problems that differ sort by their pairs, others not."""
    gains = [p for p, gap in gaps.items() if _beyond(p, gap)]
    losses = [p for p, gap in gaps.items() if _beyond(p, -gap)]
    sorts = {p.pairs for p in gains} == {"apart"} and {p.pairs for p in losses} == {"close"}
    unsure = {p.pairs for p in gaps if p not in (*gains, *losses)} & {"apart", "close"}
    if not sorts or not unsure:
        return ""
    which = "both kinds also hold" if len(unsure) > 1 else "one of these kinds also holds"
    return ("Where the two differ, the rule was: push down if both answers of a pair are your own "
            "model's, only pull up if the preferred ones lie where the reward is. But "
            f"{which} a problem on which neither is ahead.")  # fmt: skip


def _unended(chapters: Chapters) -> str:
    """A warning where offline DPO's answers no longer end; "" if they do everywhere."""
    shares: dict[str, float] = {}
    for p in PROBLEMS:
        setting = Setting("dpo_offline", p.name, p.base).name
        chapter = overview.home(chapters, setting)
        rows = None if chapter is None else chapter.reported(setting)
        if rows is not None and len(rows) and "ended" in rows:
            shares[p.title] = float(experiments.final(rows)["ended"].mean())
    few = [f"{share:.0%} on {title}" for title, share in shares.items() if share < ENDED]
    if not few:
        return ""
    return (f"Offline DPO can stop ending its answers: after training {_and(few)} still end. Watch "
            "that share and try small learning rates ([how it happens]"
            "(negative_gradient_length.ipynb)).")  # fmt: skip


def by_gradient(results: pd.DataFrame, problem: Problem) -> tuple[Values, Values]:
    """Final reward of the offline methods with and without a negative gradient."""
    found = _values(results, problem, "fixed")
    return tuple(
        {name: v for name, v in found.items() if methods.get(name).negative_gradient is sign}
        for sign in (True, False)
    )


# --- parts of sentences ---------------------------------------------------------------------------


def _values(results: pd.DataFrame, problem: Problem, choice: str) -> Values:
    """Final reward by seed of each method at a choice of sampling."""
    rows = results[(results["problem"] == problem.name) & (results["choice"] == choice)]
    return {name: part.set_index("seed")["reward"].astype(float)
            for name, part in rows.groupby("method", observed=True, sort=False)}  # fmt: skip


def _each(gap: Callable[[Problem], pd.Series | None]) -> dict[Problem, pd.Series]:
    found = {p: gap(p) for p in PROBLEMS}
    return {p: by_seed for p, by_seed in found.items() if by_seed is not None}


def _lead(first: Values, second: Values) -> pd.Series | None:
    """The paired difference between the best of `first` and the best of `second`, by seed."""
    if not first or not second:
        return None
    gap = (first[overview.best(first)] - second[overview.best(second)]).dropna()
    return None if gap.empty else gap


def _answer(text: str, numbers: str, summary: str = "In numbers") -> str:
    """A sentence or two, and the numbers behind them to be opened."""
    parts = (text.rstrip(), "<details>", f"<summary>{summary}</summary>", numbers, "</details>\n")
    return "\n\n".join(parts)


def _place(problem: Problem) -> dict[str, str]:
    return {"problem": problem.title, "peak": PLACES[problem.place]}


def _named(found: Values) -> str:
    """ "DPO 0.87 (0.37)": the best method, its mean and its worst run."""
    top = overview.best(found)
    return f"{overview.short(top)} {found[top].mean():.2f} ({found[top].min():.2f})"


def _numbers(rows: Sequence[Mapping[str, Any]], gaps: Gaps, notes: str = "") -> str:
    """A table of the problems that count, and a sentence that names the others."""
    few = [f"{p.title} ({len(gap)})" for p, gap in gaps.items() if len(gap) < MIN_SEEDS]
    parts = [cards.markdown(pd.DataFrame(rows)), notes] if rows else []
    parts += [f"Too few seeds to say: {', '.join(few)}."] if few else []
    return "\n\n".join(filter(None, parts))


def _sorted(subject: str, gaps: Gaps) -> str:
    """Where a gap lies beyond the margin, on either side, where within it, and where neither."""
    ahead = [p for p, gap in gaps.items() if _beyond(p, gap)]
    behind = [p for p, gap in gaps.items() if _beyond(p, -gap)]
    alike = [p for p, gap in gaps.items() if _within(p, gap)]
    rest = [p for p in gaps if p not in (*ahead, *behind, *alike)]
    parts = [f"{word} on {', '.join(p.title for p in found)}" for word, found in
             (("ahead", ahead), ("behind", behind), ("alike", alike), ("undecided", rest))
             if found]  # fmt: skip
    return f"{subject}: {'; '.join(parts)}." if parts else ""


def _counted(gaps: Gaps) -> dict[Problem, pd.Series]:
    return {p: gap for p, gap in gaps.items() if len(gap) >= MIN_SEEDS}


def _seeds(found: Values) -> int:
    return min(map(len, found.values()))


def _within(problem: Problem, gap: pd.Series) -> bool:
    _, low, high = stats.interval(gap)
    return -problem.margin < low and high < problem.margin


def _beyond(problem: Problem, gap: pd.Series) -> bool:
    return stats.interval(gap)[1] > problem.margin

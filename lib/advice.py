"""The landing page's short answers: sentences worded by what the results shown support.

Each has a strong wording and a neutral one, a sentence that sorts the problems, and the numbers
folded away below it. The strong wording takes intervals over seeds that support it on every problem
that counts: one with at least `lib.decisions.MIN_SEEDS` seeds. A gap counts when its 95% interval
lies beyond the problem's margin. Problems, and where the peak of their reward lies:
`lib.decisions.PROBLEMS`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace

import pandas as pd

from lib import decisions, methods, overview, stats
from lib.decisions import MIN_SEEDS, PROBLEMS, Problem
from lib.overview import Chapters, Values
from lib.tables import interval_text

ALIKE = 5  # margins of a problem: how far methods' means may part for the loss to matter little
PLACES = {
    ("far", "apart"): "where the reward lies far from what the model writes",
    ("far", "close"): "where it lies far and the pairs come near it",
    ("near", None): "where it lies near",
}
Gaps = Mapping[Problem, pd.Series]  # a paired difference by seed, for each problem that has it


def short_answers(chapters: Chapters) -> str:
    """Three answers as a Markdown list: sample or not, old samples, fixed data."""
    results = decisions.collect(chapters)
    found = (sampling(results), old_samples(chapters), fixed_data(results))
    return "\n".join(f"- {textwrap.indent(text, '  ').lstrip()}" for text in found)


def sampling(results: pd.DataFrame) -> str:
    """Whether to sample while training, by the gap between the best methods of either kind."""
    gaps = _each(lambda p: _lead(_values(results, p, "fresh"), _values(results, p, "fixed")))
    if not gaps:
        return f"**Sample while you train?** {overview.NOT_YET.capitalize()}."
    counted = _counted(gaps)
    never_worse = all(stats.interval(gap)[2] > -p.margin for p, gap in counted.items())
    pays = never_worse and any(_beyond(p, gap) for p, gap in counted.items())
    head = "Sample while you train, if you can." if pays else "Sampling while you train:"
    shown = {p: (len(gap), interval_text(gap, signed=True) + p.unit) for p, gap in gaps.items()}
    best = _sorted("The best on-policy method against the best offline one", counted)
    loss, means = _loss(results)
    numbers = f"{_told('Best on-policy minus best offline method', shown)} {means}"
    return _answer(f"**{head}** {best} {loss}", numbers)


def _loss(results: pd.DataFrame) -> tuple[str, str]:
    """How much the on-policy methods differ among themselves: a sentence, and the numbers."""
    means = {}
    for p in PROBLEMS:
        found = _values(results, p, "fresh")
        ends = [v.mean() for name, v in found.items()
                if methods.get(name).on_policy and len(v) >= MIN_SEEDS]  # fmt: skip
        if len(ends) > 1:
            means[p] = min(ends), max(ends)
    if not means:
        return "", ""
    little = all(high - low <= ALIKE * p.margin for p, (low, high) in means.items())
    loss = "Which loss you take then matters little." if little else "The loss matters as well."
    told = ", ".join(f"{low:.2f} and {high:.2f}{p.unit} on {p.title}"
                     for p, (low, high) in means.items())  # fmt: skip
    return loss, f"The on-policy methods' means lie between {told}."


def old_samples(chapters: Chapters) -> str:
    """Which loss bears rare sampling, by what it does to the mean reward where the peak is far.

    A reward that is judged a few times only has no such mean: there it is the final one.
    """
    found = {p: rare for p in PROBLEMS if p.peak == "far"
             if len(rare := rare_sampling(chapters, p)) > 1}  # fmt: skip
    if not found:
        return f"**If sampling is slow:** {overview.NOT_YET}."
    counted = {p: rare for p, rare in found.items() if _seeds(rare) >= MIN_SEEDS}
    split = bool(counted) and all(_split(p, rare) for p, rare in counted.items())
    head = "take a loss with a negative gradient." if split else "mind the loss."
    shown = {p: (_seeds(rare), _ends(p, rare)) for p, rare in found.items()}
    judged = {text for p in shown if (text := _judged(p))}
    mean = "the mean reward over training" + "".join(f" ({text})" for text in sorted(judged))
    lead = f"What drawing for many updates at once does to {mean}"
    places: dict[tuple[str, str], list[str]] = {}
    for p, rare in counted.items():
        if _apart(p, rare):
            places.setdefault(tuple(map(overview.short, _extremes(rare))), []).append(p.title)
    order = "; ".join(f"{best} bears it best and {worst} worst on {', '.join(titles)}"
                      for (best, worst), titles in places.items())  # fmt: skip
    brief = f" {order}." if order else ""
    return _answer(f"**If sampling is slow, {head}**{brief}", _told(lead, shown))


def rare_sampling(chapters: Chapters, problem: Problem) -> Values:
    """What the rarest drawing of the grid changes in the mean reward, by on-policy method."""
    found = {}
    statistic = overview.SPEED if problem.column == "reward" else f"final {problem.column}"
    for chapter in (chapters[name] for name in problem.chapters if name in chapters):
        for s in decisions.stalest(chapter.settings(), problem):
            fresh = replace(s, options=problem.base)
            change = chapter.contrast(f"{s.name} - {fresh.name}", statistic)
            found |= {} if change is None else {s.method: change}
    return found


def _judged(problem: Problem) -> str:
    """What is told of a problem in place of the mean reward over training, if anything is."""
    column = problem.column
    return "" if column == "reward" else f"{problem.title}: the final {column} reward"


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


def _ends(problem: Problem, rare: Values) -> str:
    return " and ".join(f"{interval_text(rare[name], signed=True)}{problem.unit} with "
                        f"{overview.short(name)}" for name in _extremes(rare))  # fmt: skip


def _extremes(rare: Values) -> tuple[str, str]:
    """Who loses least even at the bad end of its interval, and most even at the good end of its.

    By their means, a method whose seeds scatter widely could be called either.
    """
    means, lows, highs = ({name: stats.interval(values)[i] for name, values in rare.items()}
                          for i in range(3))  # fmt: skip
    best = max(rare, key=lambda name: (lows[name], means[name]))
    others = (name for name in rare if name != best)
    return best, min(others, key=lambda name: (highs[name], means[name]))


def fixed_data(results: pd.DataFrame) -> str:
    """Which loss for fixed data, by the gap that a negative gradient makes on each problem."""
    sides = {p: by_gradient(results, p) for p in PROBLEMS}
    gaps = _each(lambda p: _lead(*sides[p]))
    if not gaps:
        return f"**If the data are fixed:** {overview.NOT_YET}."
    counted = _counted(gaps)
    head = _turn(counted)
    shown = {p: (len(gap), interval_text(gap, signed=True) + p.unit + _pair(*sides[p]))
             for p, gap in gaps.items()}  # fmt: skip
    lead = "Best loss with a negative gradient minus best without"
    best = _sorted("The best loss with a negative gradient against the best without", counted)
    return _answer(f"{head} {best}", _told(lead, shown))


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


def by_gradient(results: pd.DataFrame, problem: Problem) -> tuple[Values, Values]:
    """Final reward of the offline methods with and without a negative gradient."""
    found = _values(results, problem, "fixed")
    return tuple(
        {name: v for name, v in found.items() if methods.get(name).negative_gradient is sign}
        for sign in (True, False)
    )


def _pair(pushed: Values, pulled: Values) -> str:
    """ " with DPO (worst run 0.61) over RWR (0.07)"."""
    first, second = overview.best(pushed), overview.best(pulled)
    return (f" with {overview.short(first)} (worst run {pushed[first].min():.2f}) over "
            f"{overview.short(second)} ({pulled[second].min():.2f})")  # fmt: skip


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


def _answer(text: str, numbers: str) -> str:
    """A sentence or two, and the numbers behind them to be opened."""
    parts = (text.rstrip(), "<details>", "<summary>In numbers</summary>", numbers, "</details>\n")
    return "\n\n".join(parts)


def _sorted(subject: str, gaps: Gaps) -> str:
    """Where a gap lies beyond the margin, on either side, and where it does not."""
    ahead = [p for p, gap in gaps.items() if _beyond(p, gap)]
    behind = [p for p, gap in gaps.items() if _beyond(p, -gap)]
    rest = [p for p in gaps if p not in (*ahead, *behind)]
    parts = [f"{word} on {', '.join(p.title for p in found)}" for word, found in
             (("ahead", ahead), ("behind", behind), ("undecided", rest)) if found]  # fmt: skip
    return f"{subject}: {'; '.join(parts)}." if parts else ""


def _counted(gaps: Gaps) -> dict[Problem, pd.Series]:
    return {p: gap for p, gap in gaps.items() if len(gap) >= MIN_SEEDS}


def _seeds(found: Values) -> int:
    return min(map(len, found.values()))


def _beyond(problem: Problem, gap: pd.Series) -> bool:
    return stats.interval(gap)[1] > problem.margin


def _told(lead: str, found: Mapping[Problem, tuple[int, str]]) -> str:
    """A sentence on the problems that count, by where their peak lies; one that names the others.

    Args: found: problem -> number of seeds, and what they say.
    """
    parts = []
    for where, place in PLACES.items():
        told = [f"{text} on {p.title}" for p, (n, text) in found.items()
                if n >= MIN_SEEDS and p.place == where]  # fmt: skip
        parts += [f"{place}: {', '.join(told)}"] if told else []
    few = [f"{p.title} ({n})" for p, (n, _) in found.items() if n < MIN_SEEDS]
    sentences = [f"{lead}, {'; '.join(parts)}."] if parts else []
    sentences += [f"Too few seeds to say: {', '.join(few)}."] if few else []
    return " ".join(sentences)

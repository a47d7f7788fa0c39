"""The landing page's short answers: sentences worded by what the results shown support.

Each has a strong wording, used only where intervals over seeds support it, and a neutral one that
gives the numbers alone. A gap counts when its 95% interval lies beyond `lib.tables.NEAR`.
"""

from __future__ import annotations

import pandas as pd

from lib import methods, overview, stats
from lib.experiments import OFFLINE, ON_POLICY, REWARDS
from lib.overview import Chapters, Values
from lib.tables import NEAR, interval_text

FAR, CLOSE = REWARDS
ALIKE = 0.1  # of reward: how far on-policy methods' means may part for the loss to matter little
FINAL = "final reward"


def short_answers(chapters: Chapters) -> str:
    """Three answers as a Markdown list: sample or not, old samples, fixed data."""
    found = (sampling(chapters), old_samples(chapters), fixed_data(chapters))
    return "\n".join(f"- {text}" for text in found)


def sampling(chapters: Chapters) -> str:
    """Whether to sample while training, by the gap between the best methods of either kind."""
    on, off = ({r: overview.values(chapters, names, r, FINAL) for r in REWARDS}
               for names in (ON_POLICY, OFFLINE))  # fmt: skip
    if not all([*on.values(), *off.values()]):
        return f"**Sample while you train?** {overview.NOT_YET.capitalize()}."
    gaps = {r: _lead(on[r], off[r]) for r in REWARDS}
    adds = " and ".join(f"{interval_text(gap, signed=True)} under {r}" for r, gap in gaps.items())
    means = [by_seed.mean() for found in on.values() for by_seed in found.values()]
    spread = f"lie between {min(means):.2f} and {max(means):.2f}"
    loss = (f"which loss you take matters little: the on-policy methods' means {spread}"
            if max(means) - min(means) <= ALIKE
            else f"the loss still matters: the on-policy methods' means {spread}")  # fmt: skip
    never_worse = all(stats.interval(gap)[2] > -NEAR for gap in gaps.values())
    pays = any(_beyond(gap) for gap in gaps.values()) and never_worse
    head = "Sample while you train, if you can." if pays else "Sampling while you train:"
    return (f"**{head}** The best method that does ends {adds} above the best offline one, "
            f"and {loss}.")  # fmt: skip


def old_samples(chapters: Chapters) -> str:
    """Which loss bears rare sampling, by what the largest k does to the mean reward under R1."""
    found = overview.rare_sampling(chapters, FAR)
    if len(found) < 2:
        return f"**If sampling is slow:** {overview.NOT_YET}."
    order = sorted(found, key=lambda name: found[name].mean(), reverse=True)
    shown = [f"{interval_text(found[name], signed=True)} with {overview.short(name)}"
             for name in (order[0], order[-1])]  # fmt: skip
    pushed = [methods.get(name).negative_gradient for name in order]
    apart = _beyond((found[order[0]] - found[order[-1]]).dropna())
    split = pushed == sorted(pushed, reverse=True) and len(set(pushed)) == 2
    head = "take a loss with a negative gradient." if split and apart else "mind the loss."
    k = max(chapters["on_policy"].profile.sets)
    return (f"**If sampling is slow, {head}** Drawing for {k} updates at once changes the mean "
            f"reward over training by {shown[0]} and by {shown[1]} ({FAR}).")  # fmt: skip


def fixed_data(chapters: Chapters) -> str:
    """Which loss for fixed data, by the gap that a negative gradient makes under each reward."""
    found = {r: overview.by_gradient(chapters, r) for r in REWARDS}
    if not all(side for sides in found.values() for side in sides):
        return f"**If the data are fixed:** {overview.NOT_YET}."
    gaps = {r: _lead(*sides) for r, sides in found.items()}
    turns = _beyond(gaps[FAR]) and not _beyond(gaps[CLOSE])
    head = "If the data are fixed, ask where the reward is." if turns else "If the data are fixed:"
    places = {FAR: "Far from what the model writes", CLOSE: "near it"}
    said = [f"{place}, {_sides(*found[r])} ({r})" for r, place in places.items()]
    return f"**{head}** {'; '.join(said)}."


def _sides(pushed: Values, pulled: Values) -> str:
    """ "a negative gradient ends at 0.92 (DPO, worst run 0.61) and none at 0.30 (RWR, ...)"."""
    words = [f"{found[top].mean():.2f} ({overview.short(top)}, worst run {found[top].min():.2f})"
             for found in (pushed, pulled) for top in [overview.best(found)]]  # fmt: skip
    return f"the best with a negative gradient ends at {words[0]}, without at {words[1]}"


def _lead(first: Values, second: Values) -> pd.Series:
    """The paired difference between the best of `first` and the best of `second`, by seed."""
    return (first[overview.best(first)] - second[overview.best(second)]).dropna()


def _beyond(gap: pd.Series) -> bool:
    return stats.interval(gap)[1] > NEAR

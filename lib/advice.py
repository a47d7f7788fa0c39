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
PLACES = {FAR: "where the reward lies far from what the model writes", CLOSE: "where it lies near"}
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
    adds = ", ".join(f"{interval_text(gap, signed=True)} {PLACES[r]} ({r})"
                     for r, gap in gaps.items())  # fmt: skip
    means = [by_seed.mean() for found in on.values() for by_seed in found.values()]
    little = max(means) - min(means) <= ALIKE
    loss = "Which loss you take then matters little" if little else "The loss matters as well"
    never_worse = all(stats.interval(gap)[2] > -NEAR for gap in gaps.values())
    pays = any(map(_beyond, gaps.values())) and never_worse
    head = "Sample while you train, if you can." if pays else "Sampling while you train:"
    return (f"**{head}** Best on-policy minus best offline method: {adds}. {loss}: the on-policy "
            f"methods' means lie between {min(means):.2f} and {max(means):.2f}.")  # fmt: skip


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
    far, close = (_sides(*found[r]) for r in (FAR, CLOSE))
    return (f"**{head}** Under {FAR} the best loss with a negative gradient ends at {far[0]}, the "
            f"best without at {far[1]}; under {CLOSE} at {close[0]} and {close[1]}.")  # fmt: skip


def _sides(*sides: Values) -> list[str]:
    """The best of each side: "0.92 (DPO, worst run 0.61)"."""
    return [f"{found[top].mean():.2f} ({overview.short(top)}, worst run {found[top].min():.2f})"
            for found in sides for top in [overview.best(found)]]  # fmt: skip


def _lead(first: Values, second: Values) -> pd.Series:
    """The paired difference between the best of `first` and the best of `second`, by seed."""
    return (first[overview.best(first)] - second[overview.best(second)]).dropna()


def _beyond(gap: pd.Series) -> bool:
    return stats.interval(gap)[1] > NEAR

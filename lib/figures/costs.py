"""Figures of what runs cost, from the tables of `lib.costs`. Chapter: wall_clock."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.figures import style
from lib.stats import PHASES

SHADES = {"sampling": "#0072B2", "scoring": "#E69F00", "training": "0.6"}
HATCHES = {"sampling": "", "scoring": "//", "training": ""}


def phases(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Seconds of a run by phase (`lib.costs.split`), one bar per method, the slowest on top."""
    table = table.sort_values("total")
    with style.panels(1) as (figure, axes):
        figure.set_size_inches(style.WIDTH, 0.3 * len(table) + 0.7)
        axis, left = axes[0, 0], np.zeros(len(table))
        for phase in PHASES:
            axis.barh(table["method"].map(style.short), table[phase], left=left, label=phase,
                      color=SHADES[phase], hatch=HATCHES[phase], edgecolor="white")  # fmt: skip
            left += table[phase].to_numpy()
        axis.set(xlabel="seconds of a whole run, alone")
        axis.grid(False, axis="y")
        style.legend_below(figure, [axis])
    return figure, table


def prices(
    panels: Mapping[str, pd.DataFrame], looks: Mapping[str, dict]
) -> tuple[Figure, pd.DataFrame]:
    """Median cost of reaching a reward, in multiples of the cheapest method's at the same price.

    Args: panels: title -> `lib.costs.priced`. looks: method -> how it is drawn. A method whose
        median run never reaches the reward has no line, and is named in its panel.
    Returns: the figure and the tables with a column `relative`.
    """
    drawn = []
    with style.panels(min(2, len(panels)), -(-len(panels) // 2), sharey=True) as (figure, axes):
        for axis, (title, table) in zip(axes.flatten(), panels.items(), strict=False):
            cheapest = table.groupby("price")["cost"].transform("min")
            table = table.assign(panel=title, relative=table["cost"] / cheapest)
            absent = [label for label in looks if not _price_line(axis, table, label, looks[label])]
            axis.set(xscale="log")
            style.label(axis, "seconds per judgement", "cost, times the cheapest", title)
            if absent:
                words = "\n".join(["not reached:", *map(style.short, absent)])
                axis.text(0.03, 0.97, words, va="top", transform=axis.transAxes)
            drawn.append(table)
        axes[0, 0].set_ylim(bottom=0.8)  # now that the largest is known: all panels share it
        style.outer_labels(axes)
        style.legend_below(figure, axes.flat, looks)
    return figure, pd.concat(drawn)


def _price_line(axis: Axes, table: pd.DataFrame, label: str, look: Mapping) -> bool:
    """Whether the method's median run gets there, so that there is a line; True if not run."""
    line = table[table["method"] == label]
    if len(line) and not np.isfinite(line["cost"]).all():
        return False
    axis.plot(line["price"], line["relative"], label=label, markersize=4, markevery=3, **look)
    return True

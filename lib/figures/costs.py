"""Figures of what runs cost, from the tables of `lib.costs`. Chapter: wall_clock."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.costs import PHASES
from lib.figures import style

SHADES = {"sampling": "#0072B2", "scoring": "#E69F00", "training": "0.6"}
HATCHES = {"sampling": "", "scoring": "//", "training": ""}


def phases(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Seconds of a run by phase (`lib.costs.split`), one bar per method, the slowest on top."""
    table = table.sort_values("total")
    with style.panels(1) as (figure, axes):
        figure.set_size_inches(2 * style.PANEL[0], 0.3 * len(table) + 1.2)
        axis, left = axes[0, 0], np.zeros(len(table))
        for phase in PHASES.values():
            axis.barh(table["method"], table[phase], left=left, color=SHADES[phase],
                      hatch=HATCHES[phase], edgecolor="white", label=phase)  # fmt: skip
            left += table[phase].to_numpy()
        axis.set(xlabel="seconds of 100 updates, one run alone")
        axis.grid(False, axis="y")
        style.legend_below(figure, axis, columns=3)
    return figure, table


def prices(
    panels: Mapping[str, pd.DataFrame], looks: Mapping[str, dict]
) -> tuple[Figure, pd.DataFrame]:
    """Cost of reaching a reward against the price of a labelled completion, both in seconds.

    Args: panels: title -> `lib.costs.priced`. looks: method -> how it is drawn. A method whose
        median run never reaches the reward has no line, and is named in its panel.
    """
    with style.panels(min(2, len(panels)), -(-len(panels) // 2), sharey=True) as (figure, axes):
        for axis, (title, table) in zip(axes.flatten(), panels.items(), strict=False):
            absent = []
            for label in looks:
                line = table[table["method"] == label]
                if len(line) and np.isfinite(line["cost"]).all():
                    axis.plot(line["price"], line["cost"], label=label, markersize=4,
                              markevery=3, **looks[label])  # fmt: skip
                    _quartiles(axis, line, looks[label]["color"])
                elif len(line):
                    absent.append(label)
            axis.set(title=title, xscale="log", yscale="log", xlabel="seconds a completion costs",
                     ylabel="seconds to get there")  # fmt: skip
            if absent:
                axis.text(0.03, 0.97, "never: " + "\n".join(absent), va="top", fontsize=8,
                          transform=axis.transAxes)  # fmt: skip
        style.legend_below(figure, _fullest(axes.flatten()))
    return figure, pd.concat([t.assign(panel=name) for name, t in panels.items()])


def _quartiles(axis, line: pd.DataFrame, colour: str) -> None:
    """The middle half of the runs; left open above where the third quartile never gets there."""
    if np.isfinite(line["high"]).all():
        axis.fill_between(line["price"], line["low"], line["high"], color=colour, alpha=0.18,
                          linewidth=0)  # fmt: skip


def _fullest(axes) -> object:
    return max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))

"""Drawings of the chapter audit, from the tables of `lib.rankings`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import cards, methods
from lib.figures.style import WIDTH, legend_below, panels

SHADE = "YlGnBu"
ROW, HEAD = 0.31, 0.75  # inches: a method's row, a panel's title and column names
# Families of methods are no methods: their colours are none of theirs.
LOOKS = {
    "all": {"color": "#555555", "marker": "s"},
    "on-policy": {"color": "#762A83", "marker": "o"},
    "offline": {"color": "#8C510A", "marker": "^"},
}


def cells(
    texts: Mapping[str, pd.DataFrame], shades: Mapping[str, pd.DataFrame]
) -> tuple[Figure, pd.DataFrame]:
    """Tables as coloured cells, one below the other, methods as rows.

    Args: texts: title -> what each cell says; shades: the same shape, 0 (light) to 1 (dark).
    Returns: the figure and the texts as one table.
    """
    rows = max(len(table) for table in texts.values())
    with panels(1, len(texts)) as (figure, axes):
        figure.set_size_inches(WIDTH, len(texts) * (ROW * rows + HEAD))
        for axis, (title, table) in zip(axes[:, 0], texts.items(), strict=True):
            _cells(axis, table, shades[title].to_numpy(float))
            axis.set_title(title, loc="left", fontweight="bold")
    drawn = [t.rename_axis("method").reset_index().assign(panel=k) for k, t in texts.items()]
    return figure, pd.concat(drawn, ignore_index=True)


def _cells(axis: Axes, table: pd.DataFrame, shade: np.ndarray) -> None:
    sns.heatmap(shade, annot=table, fmt="", cmap=SHADE, vmin=0, vmax=1.15, cbar=False, ax=axis,
                xticklabels=["\n".join(name.rsplit(" ", 1)) for name in table],
                yticklabels=[_title(name) for name in table.index])  # fmt: skip
    axis.xaxis.tick_top()
    axis.tick_params(length=0, rotation=0)
    axis.grid(False)
    on_policy = [methods.get(name).on_policy for name in table.index]
    for at in np.flatnonzero(np.diff(on_policy)):
        axis.axhline(at + 1, color="black", linewidth=1.2)


def _title(name: str) -> str:
    return cards.short(name).replace(" + negative gradient", "\n+ negative")


def taus(tables: Mapping[str, pd.DataFrame]) -> tuple[Figure, pd.DataFrame]:
    """Kendall's tau of changed rankings: a row of panels per table, the end left, speed right.

    Args: tables: title -> `lib.rankings.sensitivity`. Bars: 2.5% to 97.5% of the draws.
    """
    sizes = [table["change"].nunique() for table in tables.values()]
    with panels(2, len(tables), height_ratios=sizes, sharex=True) as (figure, axes):
        figure.set_size_inches(WIDTH, 0.36 * sum(sizes) + 0.7 * len(tables))
        for row, (title, table) in zip(axes, tables.items(), strict=True):
            for axis, criterion in zip(row, ("end", "speed"), strict=True):
                _taus(axis, table[table["criterion"] == criterion], list(dict.fromkeys(
                    table["change"])))  # fmt: skip
                axis.set_title(f"{title}, {criterion}")
            row[1].set_yticklabels([])
        for axis in axes[-1]:
            axis.set_xlabel("tau")
        legend_below(figure, [axes[0, 0]])
    drawn = [table.assign(panel=title) for title, table in tables.items()]
    return figure, pd.concat(drawn, ignore_index=True)


def _taus(axis: Axes, table: pd.DataFrame, changes: list[str]) -> None:
    for shift, (family, look) in zip((-0.22, 0.0, 0.22), LOOKS.items(), strict=True):
        rows = table[table["family"] == family].dropna(subset="tau")
        y = np.array([changes.index(change) for change in rows["change"]]) + shift
        spread = np.stack([rows["tau"] - rows["low"], rows["high"] - rows["tau"]])
        axis.errorbar(rows["tau"], y, xerr=np.where(np.isfinite(spread), spread, 0), fmt="none",
                      color=look["color"], linewidth=1.2)  # fmt: skip
        axis.plot(rows["tau"], y, linestyle="none", markersize=5, label=family, **look)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(changes)), changes)
    axis.set(xlim=(-1.08, 1.08), ylim=(len(changes) - 0.4, -0.6), xticks=(-1, 0, 1))

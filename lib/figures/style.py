"""One look for every figure: a colour per method, a line style per property, phone-sized text.

Colours are Okabe and Ito's palette (distinct under the common colour-vision deficiencies). A line
style says what a method is: solid for on-policy, dashed for offline; the marker says whether it has
a negative gradient (triangle down) or not (circle). Nothing is told by colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import methods

Drawn = tuple[Figure | None, pd.DataFrame]  # a figure, None where nothing is there to draw; numbers
# One colour for a loss, whether it is fed on-policy or offline: the line style tells those apart.
COLOURS = {
    "best_of_n": "#0072B2", "best_of_n_offline": "#0072B2", "best_of_n_negative": "#56B4E9",
    "rwr": "#009E73", "rwr_offline": "#009E73", "reinforce": "#E69F00", "ppo_sequence": "#000000",
    "ppo_token": "#000000", "pref_ft": "#56B4E9",
    "dpo": "#CC79A7", "dpo_offline": "#CC79A7", "ipo": "#D55E00", "ipo_offline": "#D55E00",
}  # fmt: skip
SEQUENTIAL = "viridis"  # for a dial (k, T, prompts): dark is the most on-policy
# Inches. Every figure is two panels wide and all its text 10 pt or more, so that it reads the same
# beside the text (custom.css) and at 10 px where a phone shows the figure 325 px wide.
PANEL = (2.2, 2.2)
WIDTH = 2 * PANEL[0]
CHARACTER, HANDLE, ROW = 0.075, 0.45, 0.19  # inches of a legend: a letter, a line's sample, a row
RC = {
    "figure.dpi": 200, "savefig.dpi": 200, "font.size": 10, "axes.titlesize": 10,
    "axes.labelsize": 10, "legend.fontsize": 10, "legend.frameon": False, "xtick.labelsize": 10,
    "ytick.labelsize": 10, "legend.handlelength": 1.8, "legend.columnspacing": 1.0,
    "legend.borderaxespad": 0.2, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 1.8,
}  # fmt: skip

_MATH = re.compile(r"\$[^$]*\$")


def look(method: str) -> dict:
    """Colour, line style and marker of a method, as keyword arguments of `Axes.plot`."""
    entry = methods.get(method)
    return {
        "color": COLOURS[method],
        "linestyle": "-" if entry.on_policy else "--",
        "marker": "v" if entry.negative_gradient else "o",
    }


def dial_colours(count: int) -> list:
    """`count` colours of a dial, dark first."""
    return sns.color_palette(SEQUENTIAL, count + 1)[:count]


def nothing() -> Drawn:
    """What a figure returns that has nothing to draw: `lib.chapter.Page.show` says so."""
    return None, pd.DataFrame()


@contextmanager
def panels(columns: int, rows: int = 1, **options) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure with a (rows, columns) array of panels in the book's style.

    Usage: `with panels(2) as (figure, axes): ...; return figure`. Closes the figure for pyplot, so
    that a notebook shows it once, where it is displayed.
    """
    size = (PANEL[0] * columns, PANEL[1] * rows)
    with plt.rc_context(RC):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False,
                                    layout="constrained", **options)  # fmt: skip
        yield figure, axes
        plt.close(figure)


def short(title: str) -> str:
    """A method's title as it fits a narrow figure."""
    for ending in (" (one ratio per completion)", " (one ratio per token)", " (Binary FeedMe)"):
        title = title.replace(ending, "")
    return title.replace(" + negative gradient", " +\nneg. gradient")


def legend_below(figure: Figure, axes: Iterable[Axes], order: Iterable[str] = ()) -> None:
    """One legend for all panels below them, where it covers no line; the figure grows by it.

    Args: order: labels that come first, in this order.
    """
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True)) | found
    shown = [label for label in order if label in found]
    shown += [label for label in found if label not in shown]
    if not shown:
        return
    texts = [short(label) for label in shown]
    longest = max(len(_MATH.sub("xx", line)) for text in texts for line in text.split("\n"))
    columns = max(1, min(4, len(shown), int(WIDTH / (HANDLE + CHARACTER * longest))))
    rows = -(-len(shown) // columns) + sum(text.count("\n") for text in texts)
    figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + ROW * rows)
    figure.legend([found[s] for s in shown], texts, loc="outside lower center", ncols=columns)


def label(axis: Axes, x: str, y: str, title: str = "") -> None:
    """Words on the axes of a panel; what is longer than its side is broken."""
    x, y = (words if "$" in words else fill(words, width) for words, width in ((x, 22), (y, 18)))
    axis.set(title=short(title), xlabel=x, ylabel=y)


def outer_labels(axes: np.ndarray) -> None:
    """Leaves out a label that the panel to the left, or the one below, has as well.

    Args: axes: (rows, columns), drawn; hidden panels have no say.
    """
    for row in axes:
        for left, right in zip(row[:-1][::-1], row[1:][::-1], strict=True):
            if left.get_ylabel() == right.get_ylabel():
                right.set_ylabel("")
    for upper, lower in zip(axes[:-1].flat, axes[1:].flat, strict=True):
        if lower.get_visible() and upper.get_xlabel() == lower.get_xlabel():
            upper.set_xlabel("")

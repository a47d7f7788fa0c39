"""Drawings of the chapter methods."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from lib.figures.style import WIDTH, panels, short


def pushes(table: pd.DataFrame) -> Figure:
    """How each loss pushes the completions of one prompt: up (blue), not at all, down (red).

    Args: table: of `cards.pushes`: a row per loss, a column per completion, in [-1, 1].
    """
    with panels(1) as (figure, axes):
        figure.set_size_inches(WIDTH, 0.36 * len(table) + 0.9)
        panel = axes[0, 0]
        panel.imshow(table, cmap="RdBu", vmin=-1.4, vmax=1.4, aspect="auto")
        for row, values in enumerate(table.to_numpy()):
            for column, value in enumerate(values):
                text = "0" if abs(value) < 0.005 else f"{value:+.2f}"
                colour = "white" if abs(value) > 0.8 else "black"
                panel.text(column, row, text, ha="center", va="center", color=colour)
        panel.set_xticks(range(table.shape[1]), [c.removeprefix("reward ") for c in table.columns])
        panel.set_yticks(range(len(table)), map(short, table.index))
        panel.set_xlabel("reward of the completion")
        panel.xaxis.tick_top()
        panel.xaxis.set_label_position("top")
        panel.tick_params(length=0)
        panel.grid(False)
        panel.spines[:].set_visible(False)
    return figure

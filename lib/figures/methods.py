"""Drawings of the chapter methods."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lib.figures.style import WIDTH, panels, short


def pushes(table: pd.DataFrame) -> Figure:
    """How each loss pushes the completions of one prompt: up (blue), not at all, down (red).

    Args: table: of `cards.pushes`: a row per loss, a column per completion, in [-1, 1].
    """
    with panels(1) as (figure, axes):
        figure.set_size_inches(WIDTH, 0.36 * len(table) + 0.9)
        panel = axes[0, 0]
        texts = table.map(lambda value: "0" if abs(value) < 0.005 else f"{value:+.2f}")
        sns.heatmap(table, annot=texts, fmt="", cmap="RdBu", vmin=-1.4, vmax=1.4, cbar=False,
                    ax=panel, xticklabels=[c.removeprefix("reward ") for c in table],
                    yticklabels=list(map(short, table.index)))  # fmt: skip
        panel.set(xlabel="reward of the completion", ylabel="")
        panel.xaxis.tick_top()
        panel.xaxis.set_label_position("top")
        panel.tick_params(length=0, rotation=0)
        panel.grid(False)
    return figure

"""The drawing of the landing page, from the table of `lib.overview.standing`."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib import methods
from lib.figures.style import WIDTH, look, panels

OFFSET = {"R1": 0.14, "R2": -0.14}  # the two rewards of a method, side by side in its row


def standing(table: pd.DataFrame) -> Figure:
    """Final reward by method: filled for R1, hollow for R2, with 95% intervals; offline on top."""
    names = [n for n in methods.METHODS if n in set(table["method"])]
    names.sort(key=lambda name: methods.get(name).on_policy)  # stable: registry's order within
    place = {name: len(names) - i for i, name in enumerate(names)}
    with panels(1) as (figure, axes):
        figure.set_size_inches(WIDTH, 0.32 * len(names) + 1.5)
        panel = axes[0, 0]
        for row in table.to_dict("records"):
            _point(panel, place[row["method"]], row)
        panel.set_yticks([place[n] for n in names], [_label(methods.get(n).title) for n in names])
        panel.set(xlabel="final reward", xlim=(-0.02, 1.04), ylim=(0.4, len(names) + 0.6))
        _divide(panel, sum(methods.get(n).on_policy for n in names), len(names))
        figure.legend(handles=_key(), loc="outside lower center", ncols=2)
    return figure


def _label(title: str) -> str:
    """A method's title on a narrow page: the line across the figure says which are on-policy."""
    return title.split(" (")[0].replace(" + negative gradient", "\n+ neg. gradient")


def _divide(panel: Axes, on_policy: int, total: int) -> None:
    """A line between offline (above) and on-policy methods, and the two words at the right."""
    panel.axhline(on_policy + 0.5, color="black", linewidth=0.8)
    words = {"on-policy": (0.5, on_policy + 0.5), "offline": (on_policy + 0.5, total + 0.5)}
    for word, (low, high) in words.items():
        if high > low:
            panel.text(1.06, (low + high) / 2, word, rotation=-90, ha="left", va="center")


def _point(panel: Axes, height: float, row: dict) -> None:
    style = look(row["method"])
    y = height + OFFSET[row["reward_function"]]
    if row["n"] > 1:
        panel.plot([row["low"], row["high"]], [y, y], color=style["color"], linewidth=1.6)
    face = style["color"] if row["reward_function"] == "R1" else "white"
    panel.plot(row["mean"], y, marker=style["marker"], color=style["color"], markersize=6.5,
               markerfacecolor=face, linestyle="none")  # fmt: skip


def _key() -> list[Line2D]:
    plain = {"linestyle": "none", "color": "black", "markersize": 6.5}
    return [
        Line2D([], [], marker="s", label="filled: R1, far", **plain),
        Line2D([], [], marker="s", markerfacecolor="white", label="hollow: R2, near", **plain),
        Line2D([], [], marker="v", label="pushes bad answers down", **plain),
        Line2D([], [], marker="o", label="only pulls good ones up", **plain),
    ]

"""Drawings of the chapter length, from the tables of `lib.lengths` and `lib.judges`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.figures.style import WIDTH, legend_below, panels
from lib.judges import GAPS
from lib.lengths import TITLES

# Neither tasks nor sides of a pair are methods: no colour is one of theirs.
LOOKS = {
    "min": {"color": "#8C510A", "linestyle": "-", "marker": "o"},
    "mode": {"color": "#01665E", "linestyle": "--", "marker": "s"},
    "skew": {"color": "#762A83", "linestyle": ":", "marker": "^"},
}
SIDES = {
    "policy": {"color": "#B5B5B5", "fill": True, "label": "all that the policy wrote"},
    "preferred": {"color": "#117733", "linewidth": 1.8, "label": "preferred"},
    "dispreferred": {"color": "#882255", "linewidth": 1.8, "linestyle": (0, (2, 1)),
                     "label": "dispreferred"},
}  # fmt: skip
BIN = 4  # tokens


def distributions(table: pd.DataFrame, target: float) -> tuple[Figure, pd.DataFrame]:
    """Figure 3: a row of lengths per task. Args: table: of `lengths.distributions`; target: of the
    Mode task. Returns: the figure and the shares it draws, by bins of 4 tokens."""
    binned = table.assign(length=table["length"] // BIN * BIN)
    binned = binned.groupby(["task", "side", "length"], sort=False)["share"].sum().reset_index()
    with panels(1, len(TITLES), sharex=True) as (figure, axes):
        figure.set_size_inches(WIDTH, 1.45 * len(TITLES))
        for axis, (task, title) in zip(axes[:, 0], TITLES.items(), strict=True):
            for side, look in SIDES.items():
                rows = binned[(binned["task"] == task) & (binned["side"] == side)]
                axis.stairs(rows["share"], [*rows["length"], rows["length"].max() + BIN], **look)
            axis.set(title=f"{title} Length", ylabel=f"share\nper {BIN} tokens")
            if task == "mode":
                axis.axvline(target, color="black", linewidth=0.8)
                axis.annotate(" target", (target + 12, 0.9), va="top",
                              xycoords=("data", "axes fraction"))  # fmt: skip
        axes[-1, 0].set(xlabel="length of a response, tokens without EOS")
        legend_below(figure, [axes[0, 0]])
    return figure, binned


def frontier(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """What a nat can buy: lengths that a policy can have at each KL (`lengths.frontier`)."""
    titles = {"min": ("Min and Skew", "mean length, tokens"),
              "mode": ("Mode", "mean distance from\nthe target, tokens")}  # fmt: skip
    drawn = table.assign(tokens=-table["reward"])
    with panels(2) as (figure, axes):
        for axis, (task, (title, words)) in zip(axes[0], titles.items(), strict=True):
            rows = drawn[drawn["task"] == task].sort_values("kl")
            axis.plot(rows["kl"], rows["tokens"], **{**LOOKS[task], "marker": ""})
            axis.set(title=title, ylabel=words, ylim=(0, None),
                     xlim=(0, None))  # fmt: skip
        figure.supxlabel(r"KL($\pi\,\|\,\pi_\mathrm{ref}$), nats per response", fontsize=10)
    return figure, drawn


def accuracy(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Share of held-out pairs ordered rightly, by how far apart they are (`judges.accuracy`)."""
    drawn = table[table["gap"] != "all"].reset_index(drop=True)
    gaps = [gap for gap in GAPS if gap != "all"]
    with panels(1) as (figure, axes):
        axis = axes[0, 0]
        figure.set_size_inches(WIDTH, 2.6)
        for shift, (task, title) in enumerate(TITLES.items()):
            rows = drawn[(drawn["task"] == task) & (drawn["n"] > 0)]
            x = np.array([gaps.index(gap) for gap in rows["gap"]]) + 0.12 * (shift - 1)
            error = [rows["right"] - rows["low"], rows["high"] - rows["right"]]
            axis.errorbar(x, rows["right"], error, label=title, markersize=5, **LOOKS[task])
        axis.axhline(0.5, color="black", linewidth=0.8)
        axis.set(ylim=(0, 1.03), ylabel="share of pairs\nordered rightly",
                 xlabel="difference in gold reward, tokens")  # fmt: skip
        axis.set_xticks(range(len(gaps)), gaps)
        legend_below(figure, [axis])
    return figure, drawn


def calibration(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """How often a reward model is right against how sure it is (`judges.calibration`)."""
    with panels(1) as (figure, axes):
        axis = axes[0, 0]
        figure.set_size_inches(WIDTH, 3.0)
        axis.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8)
        for task, title in TITLES.items():
            rows = table[table["task"] == task]
            error = [rows["right"] - rows["low"], rows["high"] - rows["right"]]
            axis.errorbar(rows["sure"], rows["right"], error, label=title, markersize=5,
                          **LOOKS[task])  # fmt: skip
        axis.set(xlim=(0.49, 1.01), xlabel="probability that the model gives its favourite",
                 ylabel="share in which\nit is preferred")  # fmt: skip
        legend_below(figure, [axis])
    return figure, table


def scores(table: pd.DataFrame, target: float) -> tuple[Figure, pd.DataFrame]:
    """Score against length, a row per reward model: the same texts cut, and texts as written.

    Args: table: of `judges.curve`, all tasks; target: of the Mode task.
    """
    kinds = {
        "cut": {"color": "#777777", "linestyle": "-", "marker": "o",
                "label": "the same texts, cut"},
        "own": {"color": "black", "linestyle": "", "marker": "x", "label": "held-out responses"},
    }  # fmt: skip
    with panels(1, len(TITLES), sharex=True) as (figure, axes):
        figure.set_size_inches(WIDTH, 1.7 * len(TITLES))
        for axis, (task, title) in zip(axes[:, 0], TITLES.items(), strict=True):
            for kind, look in kinds.items():
                rows = table[(table["task"] == task) & (table["kind"] == kind)]
                error = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
                axis.errorbar(rows["length"], rows["mean"], error, markersize=4, linewidth=1.4,
                              elinewidth=1, **look)  # fmt: skip
            axis.set(title=f"reward model of {title}", ylabel="score")
            if task == "mode":
                axis.axvline(target, color="black", linewidth=0.8)
        axes[-1, 0].set(xlabel="length of a response, tokens without EOS")
        legend_below(figure, [axes[0, 0]])
    return figure, table

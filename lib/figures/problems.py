"""Drawings of the chapter problems, from the tables of `lib.geometry` and `lib.optima`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import optima
from lib.bandit.config import REWARD_FUNCTIONS
from lib.figures.style import WIDTH, panels

# Reward functions are no methods: neither colour is one of theirs.
LOOKS = {
    "R1": {"color": "#5D3A9B", "linestyle": "-"},
    "R2": {"color": "#6B6B6B", "linestyle": (0, (6, 1.5, 1.5, 1.5))},
}
BIN = 0.02  # of reward, in the histogram of sampled rewards


def tokens(table: pd.DataFrame) -> Figure:
    """Figure 2: pi_ref over tokens above, the two rewards below, on one axis of tokens.

    Args: table: of `geometry.token_table`.
    """
    with panels(1, 2, sharex=True) as (figure, axes):
        figure.set_size_inches(WIDTH, 4.2)
        above, below = axes[:, 0]
        x = table["token"]
        above.bar(x, table["squashed"], width=1.0, color="#B5B5B5", label="histogram")
        above.plot(x, table["network"], color="black", linewidth=1, label="fitted network")
        above.set(ylabel=r"probability under $\pi_\mathrm{ref}$")
        above.legend(loc="upper center")
        for name, peak in REWARD_FUNCTIONS.items():
            below.plot(x, table[name], **LOOKS[name])
            below.annotate(name, (peak + 2, 1.02), color=LOOKS[name]["color"])
            for panel in (above, below):
                panel.axvline(peak, linewidth=0.8, alpha=0.6, **LOOKS[name])
        below.set(xlabel="token", ylabel="reward of a token", ylim=(0, 1.15), xlim=(-1, 100))
    return figure


def sampled_rewards(completions: int = 10) -> tuple[Figure, pd.DataFrame]:
    """The law of a completion's reward under pi_ref, one draw against the best of several."""
    table = pd.concat([_binned(name, completions) for name in REWARD_FUNCTIONS])
    with panels(2, sharey=True) as (figure, axes):
        for panel, (name, rows) in zip(axes[0], table.groupby("reward_function"), strict=True):
            for column, alpha, label in (("one", 0.35, "one draw"), ("best", 1.0, None)):
                label = label or f"best of {completions}"
                panel.stairs(rows[column], [*rows["reward"], 1.0], fill=alpha < 1, alpha=alpha,
                             color=LOOKS[name]["color"], label=label, linewidth=1.8)  # fmt: skip
            panel.set(title=name, xlabel="reward", xlim=(0, 1))
            panel.legend(loc="upper right")
        axes[0, 0].set_ylabel(f"share of completions\nper {BIN}")
    return figure, table


def _binned(name: str, completions: int) -> pd.DataFrame:
    law = optima.reward_law(name)
    edges = np.arange(0, 1 + BIN / 2, BIN)
    place = np.minimum(np.digitize(law.scores, edges) - 1, len(edges) - 2)
    one, best = (np.bincount(place, mass, len(edges) - 1)
                 for mass in (law.mass, law.best_of(completions)))  # fmt: skip
    return pd.DataFrame({"reward_function": name, "reward": edges[:-1], "one": one, "best": best})


def alignment(table: pd.DataFrame) -> Figure:
    """[C1]: both divergences between pi_ref and exp(r / temperature), against the temperature.

    Args: table: of `geometry.alignment`.
    """
    titles = {"from_reference": r"KL($\pi_\mathrm{ref}\,\|\,$target)",
              "to_target": r"KL(target$\,\|\,\pi_\mathrm{ref}$)"}  # fmt: skip
    with panels(2, sharey=True) as (figure, axes):
        for panel, (column, title) in zip(axes[0], titles.items(), strict=True):
            _lines(panel, table, "temperature", column)
            panel.set(xscale="log", yscale="log", xlabel="temperature", title=title)
            panel.invert_xaxis()
            panel.set_xticks([1, 0.1, 0.01], ["1", "0.1", "0.01"])
        axes[0, 0].set_yticks([3, 10, 30, 100, 300], ["3", "10", "30", "100", "300"])
        axes[0, 0].yaxis.set_minor_formatter("")
        axes[0, 0].set_ylabel("nats per completion")
        axes[0, 0].legend(loc="upper left")
    return figure


def frontier(table: pd.DataFrame) -> Figure:
    """The most reward at each KL to pi_ref. Args: table: of `geometry.frontier`."""
    with panels(1) as (figure, axes):
        figure.set_size_inches(WIDTH, 3.0)
        _lines(axes[0, 0], table, "kl", "reward")
        axes[0, 0].set(xlabel=r"KL($\pi\,\|\,\pi_\mathrm{ref}$), nats per completion",
                       ylabel="largest mean reward", ylim=(0, 1.03), xlim=(0, None))  # fmt: skip
        axes[0, 0].legend(loc="lower right")
    return figure


def _lines(panel: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    for name, rows in table.groupby("reward_function"):
        panel.plot(rows[x], rows[y], label=name, **LOOKS[name])

"""Figures of how a negative gradient works: log-ratios of pairs, token marginals, break-even.

Drawn from result tables, and from the exact results of `lib.optima`. Each function returns the
figure and the table of what it drew; a panel without runs is left out, and where all are, so is the
figure (`style.nothing`). Chapter: negative_gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import optima, stats
from lib.bandit.config import REWARD_FUNCTIONS, VOCABULARY
from lib.bandit.problem import BINS
from lib.bandit.reference import histogram, reward_table
from lib.figures import curves, style
from lib.figures.style import Drawn

CHOSEN, REJECTED = "#0072B2", "#D55E00"
RATIOS = {
    "chosen_logratio": (r"$y_w$, trained on", CHOSEN, "-"),
    "rejected_logratio": (r"$y_l$, trained on", REJECTED, "-"),
    "held_out_chosen_logratio": (r"$y_w$, not trained on", CHOSEN, ":"),
    "held_out_rejected_logratio": (r"$y_l$, not trained on", REJECTED, ":"),
}
HELD_OUT = {  # where all that is shown are pairs that nobody trains on
    "chosen_logratio": (r"$y_w$", CHOSEN, "-"),
    "rejected_logratio": (r"$y_l$", REJECTED, "--"),
}
RATIO = r"$\log\pi-\log\pi_\mathrm{ref}$, nats"
Ratios = Mapping[str, tuple[str, str, str]]  # column -> label, colour, line style
WIDTH = VOCABULARY // BINS
EDGES = np.arange(0, VOCABULARY + 1, WIDTH)
MASSES = [f"mass_{start:02d}" for start in EDGES[:-1]]
DASHES = ("-", "--", ":", "-.")


def log_ratios(panels: Mapping[str, pd.DataFrame], ratios: Ratios = RATIOS) -> Drawn:
    """Figures 9 and 18: mean log pi - log pi_ref of y_w and y_l, one panel per setting.

    Not trained on: fresh completions of ten prompts that are not trained on either, as long as
    there are such (with 100 prompts trained on, there are none).
    Args: panels: title -> rows of one setting, one run per seed. ratios: what is drawn of them.
    """
    columns = {label: column for column, (label, _, _) in ratios.items()}
    looks = {label: {"color": colour, "linestyle": dash} for label, colour, dash in ratios.values()}
    lines = {
        title: {label: rows.assign(ratio=rows[column]) for label, column in columns.items()
                if column in rows and rows[column].notna().any()}
        for title, rows in panels.items()
    }  # fmt: skip
    figure, table = curves.curves(
        [curves.Panel(title, own, y="ratio", ylabel=RATIO) for title, own in lines.items()], looks
    )
    if figure is None:
        return style.nothing()
    for axis in figure.axes:
        axis.axhline(0, color="0.4", linewidth=1, zorder=1)
    return figure, table.assign(line=table["line"].map(columns)).drop(columns="y")


def marginals(
    panels: Mapping[str, Mapping[str, pd.DataFrame]], colours: Mapping[str, str]
) -> Drawn:
    """Where a policy's tokens lie before and after training, in bins of 5 tokens.

    Args: panels: "R1" or "R2" -> label -> rows of one setting. colours: label -> colour.
    """
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return style.nothing()
    drawn = []
    with style.panels(1, len(panels)) as (figure, axes):
        figure.set_size_inches(style.WIDTH, style.PANEL[1] * len(panels))
        for axis, (title, lines) in zip(axes.flatten(), panels.items(), strict=True):
            _hill(axis, title)
            drawn += [line.assign(panel=title) for line in _mass_lines(axis, lines, colours)]
            axis.set(title=title, xlabel="token", ylabel="share of tokens", xlim=(0, VOCABULARY))
        style.outer_labels(axes)
        style.legend_below(figure, axes.flat)
    return figure, pd.concat(drawn, ignore_index=True)


def _hill(axis: Axes, reward: str) -> None:
    """The reward of each token as a grey hill as high as the panel (not to scale)."""
    axis.fill_between(np.arange(VOCABULARY) + 0.5, reward_table(reward).numpy(), color="0.88",
                      linewidth=0, transform=axis.get_xaxis_transform(), zorder=0,
                      label="reward (not to scale)")  # fmt: skip


def _mass_lines(
    axis: Axes, lines: Mapping[str, pd.DataFrame], colours: Mapping[str, str]
) -> list[pd.DataFrame]:
    first = next(iter(lines.values()))
    before = _mass(first[first["update"] == 0])
    axis.stairs(before["mean"], EDGES, color="0.35", linewidth=1.6, label=r"$\pi_\mathrm{ref}$")
    drawn = [before.assign(line="before")]
    for i, (label, rows) in enumerate(lines.items()):
        after = _mass(rows[rows["update"] == rows["update"].max()])
        axis.stairs(after["mean"], EDGES, color=colours[label], linewidth=1.8, label=label,
                    linestyle=DASHES[i % len(DASHES)])  # fmt: skip
        if len(rows["seed"].unique()) > 1:
            axis.stairs(after["high"], EDGES, baseline=after["low"], fill=True, alpha=0.2,
                        color=colours[label], linewidth=0)  # fmt: skip
        drawn.append(after.assign(line=label))
    return drawn


def _mass(rows: pd.DataFrame) -> pd.DataFrame:
    """Mass of each bin over runs: token (the bin's first), mean, its 95% interval, n."""
    found = pd.DataFrame([stats.interval(rows[mass]) for mass in MASSES],
                         columns=["mean", "low", "high"])  # fmt: skip
    return found.assign(n=len(rows)).set_axis(EDGES[:-1]).rename_axis("token").reset_index()


def break_even(betas: Sequence[float]) -> tuple[Figure, pd.DataFrame]:
    """Which tokens best-of-N + negative gradient pushes up: `lib.optima.win_ratio` on R1 and R2.

    Args: betas: weights of the push-down, each drawn as its break-even line.
    """
    tokens, drawn = np.arange(VOCABULARY), []
    with style.panels(2, sharey=True) as (figure, axes):
        for axis, reward in zip(axes[0], REWARD_FUNCTIONS, strict=True):
            ratio = optima.win_ratio(reward)
            policy = histogram()
            axis.fill_between(tokens, policy / policy.max(), color="0.85", linewidth=0,
                              label=r"$\pi_\mathrm{ref}$ (not to scale)")  # fmt: skip
            axis.plot(tokens, ratio, color="black", label="win ratio of a token")
            for beta, colour in zip(betas, style.dial_colours(len(betas)), strict=True):
                axis.axhline(optima.break_even(beta), color=colour, linestyle="--",
                             label=rf"break-even, $\beta$ = {beta:g}")  # fmt: skip
            axis.set(title=reward, xlabel="token")
            drawn.append(pd.DataFrame({"reward": reward, "token": tokens, "win_ratio": ratio,
                                       "reference": policy}))  # fmt: skip
        axes[0, 0].set_ylabel("win ratio")
        style.legend_below(figure, axes.flat)
    return figure, pd.concat(drawn, ignore_index=True)

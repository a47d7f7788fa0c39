"""Drawings of the chapter theory, from the tables of `lib.theory.scenes`, `early` and `bridge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.figures.style import WIDTH, legend_below, panels
from lib.theory import early, regions

# Objectives are no methods: no colour is one of theirs.
LOOKS = {
    "forward": {"color": "#117733", "linestyle": "--", "marker": "o"},
    "reverse": {"color": "#882255", "linestyle": "-", "marker": "s"},
}
TRUE, FALSE, OPEN = "#CFE8D5", "#F3D3DC", "#EDEDED"  # fills; each is also named in its panel
GREY = "0.35"


def _line(objective: str, **more) -> dict:
    return {k: v for k, v in LOOKS[objective].items() if k != "marker"} | more


def steps(table: pd.DataFrame, shown: Sequence[int] = (0, 2, 6, 20)) -> Figure:
    """p (bars) and its target q (outlines), by objective and step: of `scenes.step_by_step`."""
    with panels(2, len(shown), sharex=True, sharey=True) as (figure, axes):
        figure.set_size_inches(WIDTH, 1.5 * len(shown))
        for column, (objective, part) in zip(axes.T, table.groupby("objective", sort=False),
                                             strict=True):  # fmt: skip
            for panel, step in zip(column, shown, strict=True):
                now = part[part["step"] == step]
                panel.bar(now["category"], now["p"], color=LOOKS[objective]["color"], alpha=0.75)
                panel.bar(now["category"], now["q"], color="none", edgecolor="black", width=0.9)
                panel.set_title(f"{objective} KL: start" if step == 0 else f"{step} steps")
                panel.set_xticks(range(1, 7))
                panel.grid(axis="x", visible=False)
        for panel in axes[:, 0]:
            panel.set_ylabel("probability")
        for panel in axes[-1]:
            panel.set_xlabel("category")
    return figure


# Where lines of equal push are labelled: clear of the frame and of each other
MARKED = {
    "forward": [(0.3 - push / 20, 0.3 + push / 20) for push in range(-5, 6)],
    "reverse": [(0.3, 0.5), (0.42, 0.4), (0.42, 0.33), (0.42, 0.26), (0.5, 0.25), (0.38, 0.06)],
}


def pushes(table: pd.DataFrame) -> Figure:
    """Lines of equal push in the (p, q) plane: of `scenes.push_grid`."""
    with panels(1, 2, sharex=True) as (figure, axes):
        figure.set_size_inches(WIDTH, 6.2)
        for panel, objective in zip(axes[:, 0], LOOKS, strict=True):
            grid = table.pivot(index="q", columns="p", values=objective)
            lines = panel.contour(grid.columns, grid.index, grid, np.arange(-5, 7) / 10,
                                  colors=LOOKS[objective]["color"], linewidths=1.2)  # fmt: skip
            panel.clabel(lines, fmt="%.1f", manual=MARKED[objective])
            panel.plot([0, 0.6], [0, 0.6], color=GREY, linestyle=":", linewidth=1)
            panel.set(title=f"{objective} KL", ylabel="target, q", xlim=(0, 0.6), ylim=(0, 0.6))
        axes[-1, 0].set_xlabel("mass now, p")
    return figure


def case1(tables: Mapping[float, pd.DataFrame]) -> Figure:
    """Where case 1 holds in the (p, q1) plane, by beta: of `scenes.case1_grid`."""
    with panels(len(tables), sharex=True) as (figure, axes):
        for panel, (beta, table) in zip(axes[0], tables.items(), strict=True):
            grid = table.pivot(index="q1", columns="p", values="margin")
            panel.contourf(grid.columns, grid.index, grid, [-99, 0, 99], colors=[FALSE, TRUE])
            panel.contour(grid.columns, grid.index, grid, [0], colors="black", linewidths=1.5)
            least = regions.smallest_delta1(beta)
            panel.axvline(least, color=GREY, linestyle=":")
            panel.text(least - 0.01, beta + 0.03 * (1 - beta), rf"$\delta_1={least:.3f}$",
                       ha="right")  # fmt: skip
            low, high = grid.index.min(), grid.index.max()
            panel.text(0.11, low + 0.6 * (high - low), r"$\Delta^r<\Delta^f$", ha="center")
            panel.text(0.36, low + 0.3 * (high - low), r"$\Delta^r>\Delta^f$", ha="center")
            panel.set(title=rf"$q_2=q_1-{beta:g}$", xlabel=r"$p_1=p_2$", xlim=(0, 0.5))
        axes[0, 0].set_ylabel(r"$q_1$")
    return figure


def case23(lines: pd.DataFrame, cloud: pd.DataFrame, c1: float) -> Figure:
    """Cases 2 and 3: the (p1, q) plane, and the exact boundary against KL(p || q).

    Args: of `scenes.case23_lines` and `scenes.case3_cloud`.
    """
    with panels(1, 2) as (figure, axes):
        figure.set_size_inches(WIDTH, 6.4)
        _plane(axes[0, 0], lines, c1)
        _boundary(axes[1, 0], cloud, c1)
    return figure


def _plane(panel: Axes, lines: pd.DataFrame, c1: float) -> None:
    x = lines["p1"]
    panel.fill_between(x, lines["always"], 0.5, color=TRUE, linewidth=0)
    panel.fill_between(x, 0, lines["always"], color=OPEN, linewidth=0)
    panel.plot(x, lines["always"], color="black")
    inside = lines["e p1"] < 0.5
    panel.plot(x, x.where(x < 0.5), color=GREY, linestyle="--")
    panel.plot(x[inside], lines["e p1"][inside], color=LOOKS["reverse"]["color"])
    panel.plot(x, c1 * lines["p2"], color=GREY, linestyle=":")
    panel.text(0.31, 0.36, r"$q=p_1$", rotation=48)
    panel.text(0.045, 0.27, r"$q=e\,p_1$", rotation=72)
    panel.text(0.42, 0.045, rf"$q={c1:g}\,p_2$")
    panel.text(0.2, 0.46, r"always $\Delta^r>\Delta^f$")
    panel.text(0.36, 0.15, "depends on the\nother categories")
    panel.set(xlabel=r"$p_1$  ($p_2=p_1/2$)", ylabel=r"$q_1=q_2=q$", xlim=(0, 0.66), ylim=(0, 0.5))


def _boundary(panel: Axes, cloud: pd.DataFrame, c1: float) -> None:
    kl = np.linspace(0, 16, 100)
    panel.fill_between(kl, np.exp(-kl), 10, color=TRUE, linewidth=0)
    panel.fill_between(kl, 1e-6, np.exp(-kl), color=FALSE, linewidth=0)
    panel.plot(kl, np.exp(-kl), color="black")
    for less, marker, colour in ((True, "o", "#882255"), (False, "x", "#117733")):
        part = cloud[(cloud["gap"] < 0) == less]
        label = r"case 3 true" if less else "case 3 false"
        panel.plot(part["kl"], part["height"], marker, color=colour, markersize=3, label=label,
                   markerfacecolor="none", markeredgewidth=0.8)  # fmt: skip
    panel.axhline(c1, color=GREY, linestyle=":")
    panel.text(15.7, c1 * 1.25, rf"$c_1={c1:g}$", ha="right")
    panel.text(10.5, 1e-4, r"$\Delta^r>\Delta^f$")
    panel.text(0.6, 2e-5, r"$\Delta^r<\Delta^f$")
    panel.set(yscale="log", xlim=(0, 16), ylim=(1e-5, 10), xlabel=r"KL$(p\,\|\,q)$, nats",
              ylabel=r"$q\,/\,I(p_1,p_2)$")  # fmt: skip
    panel.legend(loc="upper right", handletextpad=0.2)


def toward(table: pd.DataFrame) -> Figure:
    """Distance to pi*, by what is followed: of `scenes.toward_optimum`."""
    with panels(1) as (figure, axes):
        figure.set_size_inches(WIDTH, 3.0)
        panel = axes[0, 0]
        panel.plot(table["update"] + 1, table["reverse KL"], label="reverse KL", **_line("reverse"))
        panel.plot(table["update"] + 1, table["weighted likelihood"], color="#44AA99",
                   linestyle="-.", label="on-policy weighted likelihood")  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="updates + 1",
                  ylabel=r"KL($\pi\,\|\,\pi^*$), nats")  # fmt: skip
        panel.legend(loc="lower left")
    return figure


def lift(table: pd.DataFrame) -> Figure:
    """Where a push on y_l raises y_w: of `scenes.lift_grid`."""
    titles = {"one": "rest: one answer", "four": "rest: four answers"}
    with panels(2, sharey=True) as (figure, axes):
        for panel, (column, title) in zip(axes[0], titles.items(), strict=True):
            grid = table.pivot(index="p_l", columns="p_w", values=column)
            panel.contourf(grid.columns, grid.index, grid, [-9, 0, 9], colors=[FALSE, TRUE])
            panel.contour(grid.columns, grid.index, grid, [0], colors="black", linewidths=1.5)
            panel.set(title=title, xlabel=r"$p_w$")
            panel.text(0.4, 0.3, r"$y_w$ rises")
        axes[0, 0].text(0.02, 0.06, r"$y_w$ falls")
        axes[0, 1].annotate(r"$y_w$ falls", (0.05, 0.05), (0.42, 0.75),
                            arrowprops={"arrowstyle": "-", "linewidth": 0.8})  # fmt: skip
        axes[0, 0].set_ylabel(r"$p_l$")
    return figure


def freed(table: pd.DataFrame) -> Figure:
    """Who gains what y_l loses: of `scenes.freed`."""
    titles = {"alone": r"push on $y_l$ alone", "pair": r"DPO, IPO: $c_1=c_2$"}
    with panels(2, sharey=True) as (figure, axes):
        for panel, (column, title) in zip(axes[0], titles.items(), strict=True):
            colours = [LOOKS["reverse" if v < 0 else "forward"]["color"] for v in table[column]]
            panel.bar(table["category"], table[column], color=colours, alpha=0.8)
            panel.plot(table["category"], table["proportional"], "_", color="black",
                       markersize=14, markeredgewidth=1.6)  # fmt: skip
            panel.axhline(0, color="black", linewidth=0.8)
            names = {4: "\n$y_w$", 6: "\n$y_l$", 1: "\nmode"}
            panel.set_xticks(table["category"], [f"{k}{names.get(k, '')}"
                                                 for k in table["category"]])  # fmt: skip
            panel.set(title=title, xlabel="category")
            panel.grid(axis="x", visible=False)
        axes[0, 0].set_ylabel("change of mass\n(what $y_l$ loses = 1)")
    return figure


def weights(table: pd.DataFrame, tau: float = 0.05) -> Figure:
    """DPO's and IPO's weight against the margin: of `scenes.weights`."""
    with panels(1) as (figure, axes):
        figure.set_size_inches(WIDTH, 3.0)
        panel = axes[0, 0]
        panel.plot(table["margin"], table["DPO"], color="#CC79A7", label=r"DPO, $\beta=0.1$")
        panel.plot(table["margin"], table["IPO"], color="#D55E00", linestyle="--",
                   label=rf"IPO, $\tau={tau:g}$")  # fmt: skip
        panel.axhline(0, color="black", linewidth=0.8)
        panel.axvline(0.5 / tau, color=GREY, linestyle=":")
        panel.text(0.5 / tau + 0.5, 2.4, r"$h=\frac{1}{2\tau}$")
        panel.set(xlabel="margin h, nats", ylabel=r"weight $c$ / weight at $h=0$")
        panel.legend(loc="lower left")
    return figure


def resting(table: pd.DataFrame, tau: float = 0.05) -> Figure:
    """IPO's optimum on ranked completions, by the pairs it sees: of `scenes.resting`."""
    with panels(1) as (figure, axes):
        figure.set_size_inches(WIDTH, 3.0)
        panel = axes[0, 0]
        panel.plot(table["rank"], table["neighbours only"], "o--", color="#E69F00",
                   label="neighbours only")  # fmt: skip
        panel.plot(table["rank"], table["all pairs"], "s-", color="#0072B2", label="all pairs")
        panel.axhline(1 / tau, color=GREY, linestyle=":")
        panel.text(0, 1 / tau + 1.5, rf"$1/\tau={1 / tau:g}$ nats")
        panel.set(xlabel="rank of the completion (0 is the worst)",
                  ylabel=r"$\log\pi/\pi_\mathrm{ref}$ above" "\nthe worst, nats")  # fmt: skip
        panel.legend(loc="upper left", bbox_to_anchor=(0, 0.92))
    return figure


def distances(table: pd.DataFrame) -> Figure:
    """Mass left to move along whole trajectories, a panel for each start: of `early.curves`."""
    with panels(1, 3, sharex=True) as (figure, axes):
        figure.set_size_inches(WIDTH, 5.6)
        for panel, (name, part) in zip(axes[:, 0], table.groupby("start", sort=False), strict=True):
            for objective, rows in part.groupby("objective", sort=False):
                panel.plot(rows["time"], rows["median"], label=f"{objective} KL",
                           **_line(objective))  # fmt: skip
                panel.fill_between(rows["time"], rows["low"], rows["high"], alpha=0.18,
                                   color=LOOKS[objective]["color"], linewidth=0)  # fmt: skip
            panel.axhline(0.5, color=GREY, linestyle=":")
            panel.set(title=f"{name} start", xscale="log", ylim=(0, 1.05),
                      ylabel="mass left to move\n(start = 1)")  # fmt: skip
            panel.set_xticks([1, 10, 100], ["1", "10", "100"])
        axes[-1, 0].set_xlabel(r"time $\eta t$")
        legend_below(figure, [axes[0, 0]])
    return figure


STARTS = {"flat": ("o", "#332288"), "uneven": ("^", "#DDAA33"), "peaked": ("x", "#117733")}


def halves(table: pd.DataFrame) -> Figure:
    """Time to half of the mass, and how far apart likely categories then are: `early.compared`."""
    with panels(1, 2) as (figure, axes):
        figure.set_size_inches(WIDTH, 6.2)
        (upper,), (lower,) = axes
        limit = early.RATE * early.STEPS
        for name, (marker, colour) in STARTS.items():
            part = table[table["start"] == name]
            look = {"color": colour, "markersize": 3, "markerfacecolor": "none", "alpha": 0.7}
            upper.plot(part["time_forward"], part["time_reverse"].clip(upper=limit), marker,
                            label=f"{name} start", **look)  # fmt: skip
            spread = [part[f"most_{o}"] - part[f"least_{o}"] for o in ("forward", "reverse")]
            lower.plot(*spread, marker, **look)
        _diagonal(upper, (1, limit))
        _diagonal(lower, (0, 3))
        upper.set(xscale="log", yscale="log", title="time to half of the mass",
                       xlabel="forward KL", ylabel="reverse KL")  # fmt: skip
        lower.set(title="spread of progress there", xlabel="forward KL",
                       ylabel="reverse KL", xlim=(0, 3), ylim=(0, 3))  # fmt: skip
        upper.legend(loc="lower right", handletextpad=0.2)
    return figure


def _diagonal(panel: Axes, ends: tuple[float, float]) -> None:
    panel.plot(ends, ends, color=GREY, linestyle=":", linewidth=1)


RUNGS = {
    "theory": {"color": "black", "linestyle": "-", "linewidth": 2.6},
    "sampled": {"color": "#E69F00", "linestyle": "--"},
    "Adam": {"color": "#56B4E9", "linestyle": "-."},
    "network": {"color": "#009E73", "linestyle": ":", "linewidth": 2.4},
    "all three": {"color": "#D55E00", "linestyle": (0, (4, 1, 1, 1, 1, 1))},
}
TITLES = {"best_of_n_offline": "best-of-N (offline)", "reinforce": "REINFORCE"}


def bridge(table: pd.DataFrame) -> Figure:
    """Reward against KL along each run, by method, reward function and switch.

    Args: table: method, reward_function, switch, update, reward, kl_ref.
    """
    methods, rewards = (list(table[c].unique()) for c in ("method", "reward_function"))
    with panels(len(rewards), len(methods), sharey=True) as (figure, axes):
        for row, method in zip(axes, methods, strict=True):
            for panel, reward in zip(row, rewards, strict=True):
                part = table[(table["method"] == method) & (table["reward_function"] == reward)]
                _paths(panel, part)
                panel.set_title(f"{TITLES[method]}, {reward}")
            row[0].set_ylabel("mean reward")
        for panel in axes[-1]:
            panel.set_xlabel(r"KL($\pi\,\|\,\pi_\mathrm{ref}$), nats")
        legend_below(figure, [axes[0, 0]])
    return figure


def _paths(panel: Axes, part: pd.DataFrame) -> None:
    for switch, rows in part.groupby("switch", sort=False):
        panel.plot(rows["kl_ref"], rows["reward"], label=switch, **RUNGS[switch])
        panel.plot(rows["kl_ref"].iloc[-1], rows["reward"].iloc[-1], "o", markersize=5,
                   color=RUNGS[switch]["color"])  # fmt: skip
    panel.set_ylim(0, 1.04)

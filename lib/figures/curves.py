"""Drawings that several chapters share, each from result tables only.

`curves` draws reward (or another column) against updates, samples, seconds or KL; `dial` a
statistic of a run against k, T, the number of prompts or the learning rate; `forest` differences
with their intervals. Each returns the figure and the table of what it drew, which the page links. A
panel without runs is left out; where all are, there is no figure (`style.nothing`).
Every interval is the 95% confidence interval of a mean over seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, repeat

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import methods, stats
from lib.figures import style
from lib.figures.style import Drawn
from lib.lm.length import GIVEN

Lines = Mapping[str, pd.DataFrame]  # label -> rows of one setting, one run per seed
Points = Mapping[str, Mapping[float, pd.DataFrame]]  # label -> value of the dial -> such rows
AXES = {
    "update": "updates",
    "samples": "completions drawn",
    "seconds": "seconds",
    "reward": "mean reward",
    "kl_ref": r"KL($\pi\,\|\,\pi_\mathrm{ref}$), nats",
    "kl_gen": r"KL($\pi\,\|\,\pi_\mathrm{gen}$), nats",
    "entropy": "entropy, nats",
    "pushed_share": "share of the answers",
    "length": "response length, tokens",
    "proxy": "proxy reward",
    "gold": "gold reward, nats a token",
    "ended": "share that ends in EOS",
    "held_out_accuracy": "pair accuracy",
    "chosen_logratio": r"$\log \pi/\pi_\mathrm{ref}$ of $y_w$, nats",
    "rejected_logratio": r"$\log \pi/\pi_\mathrm{ref}$ of $y_l$, nats",
    "margin": "margin, nats",
    "support_share": "mass on tokens of the data",
}
LEVELS = (":", "-.", (0, (6, 2)))  # of the grey lines that a dial is compared with
DODGE = 0.03  # share of the axis over which a dial's lines are spread, to keep intervals apart


@dataclass(frozen=True)
class Panel:
    """One panel of `curves`.

    Args:
        title: above it; also names it in the table of what was drawn.
        lines: label -> rows.
        x, y: columns; x may also be "seconds" (sampling, scoring and training, not evaluation).
        limit: largest x to draw, None for all.
        ylabel: of the axis; None for the name in `AXES`.
    """

    title: str
    lines: Lines
    x: str = "update"
    y: str = "reward"
    limit: float | None = None
    ylabel: str | None = None


def gold(title: str, task: str, lines: Lines, x: str = "update") -> Panel:
    """A length problem's gold reward; of preferences without a rule, the proxy."""
    if task == GIVEN:
        return Panel(title, lines, x, "proxy")
    return Panel(title, lines, x, ylabel="gold reward, tokens")


def outcome(title: str, task: str, lines: Lines, x: str = "update") -> Panel:
    """What a length problem asks for: the length; on Mode Length, where the right one lies between,
    the gold reward (minus the distance from it, which the paper draws)."""
    if task in ("mode", GIVEN):
        return gold(title, task, lines, x)
    return Panel(title, lines, x, "length")


def method_looks(names: Iterable[str]) -> dict[str, dict]:
    """Title of each method -> how it is drawn in every figure of the book."""
    return {methods.get(name).title: style.look(name) for name in names}


def dial_looks(labels: Sequence[str]) -> dict[str, dict]:
    """Label of each value of a dial, in order -> colour (dark first) and marker."""
    markers, colours = "osv^DPX*", style.dial_colours(len(labels))
    return {
        label: {"color": colour, "marker": markers[i % len(markers)]}
        for i, (label, colour) in enumerate(zip(labels, colours, strict=True))
    }


def paired_looks(settings: Mapping[str, str]) -> dict[str, dict]:
    """Label -> the look of its setting's method: solid for the first of a method, then dotted,
    then dashed.

    Args: settings: label -> name of a setting, such as "dpo@min[label=rule]".
    """
    methods_of = {label: setting.partition("@")[0] for label, setting in settings.items()}
    styles = {method: cycle(("-", ":", "--")) for method in methods_of.values()}
    return {label: {**style.look(method), "linestyle": next(styles[method])}
            for label, method in methods_of.items()}  # fmt: skip


def staleness_looks(names: Iterable[str], last: int, minibatch: int = 64) -> dict[str, dict]:
    """ "Title, B = 64 k" -> the method's look: solid for the smallest B, dotted for the largest."""
    return paired_looks({f"{methods.get(name).title}, B = {minibatch * k}": name
                         for name in names for k in (1, last)})  # fmt: skip


def curves(panels: Sequence[Panel], looks: Mapping[str, dict]) -> Drawn:
    """Mean over seeds at each update, with its interval as a band.

    Where x differs between seeds (seconds, KL), it is averaged at the same update as y.
    Raises: ValueError for a label without a look.
    """
    _check_labels((p.lines for p in panels), looks)
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return style.nothing()
    columns = min(2, len(panels))
    with style.panels(columns, -(-len(panels) // columns)) as (figure, axes):
        flat = axes.flatten()
        drawn = [
            _curve_panel(axis, panel, looks) for axis, panel in zip(flat, panels, strict=False)
        ]
        _finish(figure, axes, len(panels), looks)
    return figure, pd.concat(drawn, ignore_index=True)


def dial(
    panels: Mapping[str, Points],
    looks: Mapping[str, dict],
    statistic: str | Sequence[str] = "final reward",
    x: str = "k",
    levels: Sequence[Mapping[str, float]] = (),
) -> Drawn:
    """A statistic of a run (`lib.stats.STATISTICS`) against a dial, on a logarithmic axis.

    Args:
        panels: title -> label -> value of the dial -> rows.
        statistic: one for all panels, or one for each.
        x: the dial's name on the axis.
        levels: for each panel, horizontal lines to compare with: words -> height.
    Raises: ValueError for a label without a look.
    """
    _check_labels(panels.values(), looks)
    statistics = repeat(statistic) if isinstance(statistic, str) else statistic
    asked = zip(panels.items(), statistics, chain(levels, repeat({})), strict=False)
    shown = [(*panel, name, marked) for panel, name, marked in asked if any(panel[1].values())]
    if not shown:
        return style.nothing()
    columns = min(2, len(shown))
    with style.panels(columns, -(-len(shown) // columns)) as (figure, axes):
        drawn = []
        for axis, (title, points, name, marked) in zip(axes.flat, shown, strict=False):
            drawn.append(_dial_panel(axis, points, looks, name).assign(panel=title))
            style.label(axis, x, name, title)
            _levels(axis, marked)
        _finish(figure, axes, len(shown), looks)
    return figure, pd.concat(drawn, ignore_index=True)


def forest(table: pd.DataFrame, xlabel: str, margin: float = 0.0) -> Drawn:
    """Differences with their intervals, one row each, and a grey band of those within `margin`.

    Args: table: label, effect, low, high, n, in the order from top to bottom.
    """
    if table.empty:
        return style.nothing()
    with style.panels(1) as (figure, axes):
        figure.set_size_inches(style.WIDTH, 0.42 * len(table) + 0.7)
        axis, y = axes[0, 0], np.arange(len(table))[::-1]
        axis.axvspan(-margin, margin, color="0.88", linewidth=0)
        axis.axvline(0, color="0.4", linewidth=1)
        numbers = table[["effect", "low", "high"]].astype(float)
        spread = np.stack([numbers["effect"] - numbers["low"], numbers["high"] - numbers["effect"]])
        axis.errorbar(numbers["effect"], y, xerr=np.where(np.isfinite(spread), spread, 0),
                      fmt="o", color="black", markersize=4, linewidth=1.4)  # fmt: skip
        for words, at in zip(table["label"], y + 0.42, strict=True):  # the page is narrow: above
            axis.annotate(words, (0, at), xycoords=("axes fraction", "data"), va="center",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
        axis.set(xlabel=xlabel, ylim=(-0.4, len(table) - 0.3), yticks=[])
        axis.grid(False, axis="y")
    return figure, table


def with_seconds(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds `seconds`: sampling, scoring and training so far, without evaluation and its data."""
    return rows.assign(seconds=stats.seconds(rows))


def by_value(rows: pd.DataFrame, column: str) -> dict[float, pd.DataFrame]:
    """Rows split by a column's value, as `dial` takes them."""
    return {float(value): part for value, part in rows.groupby(column, observed=True)}


def averaged(rows: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Per update: mean of `x`, mean of `y` over seeds, its 95% interval, and n.

    Returns: columns update, x, mean, low, high, n, in the order of the updates.
    """
    rows = with_seconds(rows) if x == "seconds" else rows
    found = []
    for update, group in rows.groupby("update", observed=True):
        values = group[y].dropna()
        if len(values):
            found.append((update, *stats.interval(values), len(values)))
    drawn = pd.DataFrame(found, columns=["update", "mean", "low", "high", "n"])
    if x != "update":
        drawn.insert(1, x, drawn["update"].map(rows.groupby("update", observed=True)[x].mean()))
    return drawn


def _check_labels(lines: Iterable[Mapping], looks: Mapping[str, dict]) -> None:
    missing = sorted({label for group in lines for label in group} - set(looks))
    if missing:
        raise ValueError(f"no look for {missing}; there are looks for {sorted(looks)}")


def _curve_panel(axis: Axes, panel: Panel, looks: Mapping[str, dict]) -> pd.DataFrame:
    drawn = []
    for label, rows in panel.lines.items():
        line = averaged(rows, panel.x, panel.y)
        if panel.limit is not None:
            line = line[line[panel.x] <= panel.limit]
        _line_with_band(axis, line, panel.x, label, looks[label])
        drawn.append(line.assign(panel=panel.title, line=label, y=panel.y))
    ylabel = panel.ylabel or AXES.get(panel.y, panel.y)
    style.label(axis, AXES.get(panel.x, panel.x), ylabel, panel.title)
    return pd.concat(drawn, ignore_index=True)


def _line_with_band(axis: Axes, line: pd.DataFrame, x: str, label: str, look: dict) -> None:
    """Where several updates share an x (samples drawn at once), the line waits for the next x.

    A line whose x falls again (a KL) has no band.
    """
    waits = x == "samples" and bool(line[x].duplicated().any())
    every = max(1, len(line) // 6)
    (path,) = axis.plot(line[x], line["mean"], label=label, markersize=4, markevery=every,
                        drawstyle="steps-post" if waits else "default", **look)  # fmt: skip
    folds = not line[x].is_monotonic_increasing  # back towards the reference: a band would overlap
    if len(line) and (line["n"] > 1).all() and not folds:
        axis.fill_between(line[x], line["low"], line["high"], color=path.get_color(), alpha=0.18,
                          step="post" if waits else None, linewidth=0)  # fmt: skip


def _dial_panel(
    axis: Axes, points: Points, looks: Mapping[str, dict], statistic: str
) -> pd.DataFrame:
    axis.set_xscale("log")
    values = sorted({value for parts in points.values() for value in parts})
    span = np.log(values[-1] / values[0]) if len(values) > 1 else 1.0
    drawn = []
    for i, (label, parts) in enumerate(points.items()):
        line = summarised(parts, statistic)
        shift = np.exp(span * DODGE * (i - (len(points) - 1) / 2) / max(1, len(points) - 1))
        spread = np.stack([line["mean"] - line["low"], line["high"] - line["mean"]])
        axis.errorbar(line["value"] * shift, line["mean"], markersize=4, label=label,
                      yerr=np.where(np.isfinite(spread), spread, 0), **looks[label])  # fmt: skip
        drawn.append(line.assign(line=label, statistic=statistic))
    _ticks(axis, values)
    return pd.concat(drawn, ignore_index=True)


def _levels(axis: Axes, marked: Mapping[str, float]) -> None:
    for dash, (words, height) in zip(LEVELS, marked.items(), strict=False):
        axis.axhline(height, color="0.45", linestyle=dash, linewidth=1.2, label=words)


def summarised(parts: Mapping[float, pd.DataFrame], statistic: str) -> pd.DataFrame:
    """Per value of a dial: mean of a statistic over seeds, its 95% interval, and n."""
    rows = []
    for value, table in sorted(parts.items()):
        found = stats.per_run(table, statistic)
        rows.append((value, *stats.interval(found), len(found)))
    return pd.DataFrame(rows, columns=["value", "mean", "low", "high", "n"])


def _ticks(axis: Axes, values: Sequence[float]) -> None:
    """The dial's own values as ticks where they fit, else the powers of ten."""
    if 0 < len(values) <= 7:
        apart: list[float] = []
        for value in values:
            apart += [value] if not apart or value >= 1.5 * apart[-1] else []
        axis.set_xticks(apart, [f"{v:g}" for v in apart])
        axis.minorticks_off()


def _finish(figure: Figure, axes: np.ndarray, used: int, looks: Mapping[str, dict]) -> None:
    """One legend for all panels, in the order of `looks`; panels left over are hidden."""
    for axis in axes.flatten()[used:]:
        axis.set_visible(False)
    style.outer_labels(axes)
    style.legend_below(figure, axes.flatten()[:used], looks)

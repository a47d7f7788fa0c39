"""What a run costs: seconds by phase, labelled completions, and the price at which methods cross.

Tables from result tables of runs that had the machine to themselves. Chapter: wall_clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib import experiments, methods, stats, tables
from lib.bandit.reference import reward_table
from lib.claims import DATA
from lib.tables import quantile, reaching

PROMPT_AND_RESPONSE = 10  # tokens that the paper's code averages over: the prompt and 9 more
HALF = 0.5  # of the best reward there is: the goal of the second price
Lines = Mapping[str, pd.DataFrame]  # label -> rows of one setting, one run per seed


def paper(setting: str = "bandit_r1") -> pd.DataFrame:
    """A column of the paper's Table 3; `ours` names this book's methods, split by "|".

    Args: setting: "bandit_r1", "min_length" or "skew_length".
    """
    table = pd.read_csv(DATA / "paper_results.csv")
    return table[table["setting"] == setting]


def printed(setting: str = "bandit_r1") -> dict[str, Any]:
    """The rows of a column of the paper's Table 3 by this book's methods."""
    return {name: row for row in paper(setting).itertuples() for name in row.ours.split("|")}


def in_papers_convention(reward: float) -> float:
    """A mean reward of R1 over the response as the released code reports it.

    Over prompt and response, the mean of 10 tokens: the prompt's reward, averaged over all prompts,
    enters once, so the ceiling is 0.918 and not 1.
    """
    prompt = float(reward_table("R1").mean())
    return ((PROMPT_AND_RESPONSE - 1) * reward + prompt) / PROMPT_AND_RESPONSE


def table_3(lines: Mapping[str, pd.DataFrame], titles: Mapping[str, str]) -> pd.DataFrame:
    """The bandit's column of the paper's Table 3 beside this book's runs: reward and time.

    Args: lines: method name -> rows with the column `seconds`. titles: method name -> title.
    """
    in_paper, found = printed(), []
    for name, rows in lines.items():
        row, finals = in_paper.get(name), stats.per_run(rows, "final reward")
        updates = int(rows["update"].max())
        found.append({
            "method": titles[name],
            "paper: reward": f"{row.value:.2f} ({row.spread_as_printed:.2f})" if row else "-",
            "ours, in its convention": f"{in_papers_convention(finals.mean()):.2f}",
            "ours": tables.interval_text(finals),
            "paper: hours": f"{row.hours:g}" if row else "-",
            f"ours: seconds of {updates} updates": f"{_ends(rows, 'seconds').mean():.2f}",
        })  # fmt: skip
    return pd.DataFrame(found)


def table_3_lengths(
    lines: Mapping[str, Mapping[str, pd.DataFrame]], tasks: Mapping[str, str]
) -> pd.DataFrame:
    """The paper's Table 3, Min and Skew Length, beside this book's runs.

    Args: lines: task -> title -> rows with `seconds` and `target` (one target for a task); tasks:
        task -> its title.
    """
    found = []
    for task, parts in lines.items():
        in_paper = printed(f"{task}_length")
        for title, rows in parts.items():
            row = in_paper.get(rows["method"].iloc[0])  # it has no preferences of one's own
            took = _cost(rows, rows["target"].iloc[0])
            found.append({
                "task": tasks[task], "method": title,
                "paper: length": f"{row.value:.1f} ({row.spread_as_printed:.1f})" if row else "-",
                "ours: length": tables.interval_text(stats.per_run(rows, "final length"), digits=1),
                "paper: hours": f"{row.hours:g}" if row else "-",
                "ours: reached by": took["reached by"], "seconds to it": _time(took["seconds"]),
                "updates": _count(took["updates"]), "responses": _count(took["completions"]),
            })  # fmt: skip
    return pd.DataFrame(found)


def _cost(rows: pd.DataFrame, target: float) -> pd.Series:
    """`tables.cost_to_reach` of one setting."""
    return tables.cost_to_reach({"": rows}, target).iloc[0]


def _ends(rows: pd.DataFrame, column: str) -> pd.Series:
    return experiments.final(rows)[column]


def _spent(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds of whole runs, by phase."""
    return experiments.final(rows.assign(**stats.phases(rows)))[list(stats.PHASES)]


def clock(lines: Lines, target: float) -> pd.DataFrame:
    """`tables.cost_to_reach` in print, with the quartiles of the seconds."""
    found = []
    for label, rows in lines.items():
        took, seconds = _cost(rows, target), reaching(rows, target)["seconds"]
        low, high = (_time(quantile(seconds, q)) for q in (0.25, 0.75))
        found.append({
            "method": label, "reached by": took["reached by"],
            "seconds": _time(took["seconds"]), "quartiles": f"{low} to {high}",
            "updates": _count(took["updates"]), "completions": _count(took["completions"]),
        })  # fmt: skip
    return pd.DataFrame(found)


def _time(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "not reached"


def _count(value: float) -> str:
    return f"{value:,.0f}" if np.isfinite(value) else "not reached"


def split(lines: Lines) -> pd.DataFrame:
    """Mean seconds of a whole run by phase: columns method, sampling, scoring, training, total."""
    found = {label: _spent(rows).mean() for label, rows in lines.items()}
    table = pd.DataFrame(found).T.rename_axis("method")
    return table.assign(total=table.sum(axis=1)).reset_index()


def priced(lines: Lines, target: float, prices: Sequence[float]) -> pd.DataFrame:
    """The cost of reaching `target` when a labelled completion costs `price` seconds.

    cost = seconds of computing + price * completions drawn. Median and quartiles over runs; inf
    where they include runs that never get there. Columns: method, price, low, cost, high, n.
    """
    found = []
    for label, rows in lines.items():
        took = reaching(rows, target)
        for price in prices:
            cost = took["seconds"] + price * took["samples"]
            found.append((label, price, *(quantile(cost, q) for q in (0.25, 0.5, 0.75)),
                          len(cost)))  # fmt: skip
    return pd.DataFrame(found, columns=["method", "price", "low", "cost", "high", "n"])


def crossing(thrifty: pd.DataFrame, hungry: pd.DataFrame, target: float) -> float:
    """The price of a completion, in seconds, above which the method that draws fewer is cheaper.

    From median seconds and completions to `target`. 0: it is cheaper at every price; inf: it does
    not get there, or is slower and draws as many. Raises: ValueError if it draws more.
    """
    few, many = (reaching(rows, target) for rows in (thrifty, hungry))
    t_few, t_many = quantile(few["seconds"], 0.5), quantile(many["seconds"], 0.5)
    n_few, n_many = quantile(few["samples"], 0.5), quantile(many["samples"], 0.5)
    if not np.isfinite(t_few):
        return float("inf")
    if not np.isfinite(t_many):
        return 0.0
    if n_few == n_many:
        return 0.0 if t_few <= t_many else float("inf")
    if n_few > n_many:
        raise ValueError(f"the first must draw fewer completions, got {n_few} and {n_many}")
    return max(0.0, (t_few - t_many) / (n_many - n_few))


def crossings(
    lines: Lines, titles: Mapping[str, str], targets: Sequence[float]
) -> pd.DataFrame:
    """`crossing` of every offline method with every on-policy one, for each target.

    Args: lines: method name -> rows. titles: method name -> title.
    """
    on_policy = [name for name in lines if methods.get(name).on_policy]
    offline = [name for name in lines if name not in on_policy]
    return pd.DataFrame([
        {"offline": titles[a], "on-policy": titles[b],
         **{f"price to turn, reward {t:.2f}": _price(crossing(lines[a], lines[b], t))
            for t in targets}}
        for a in offline for b in on_policy
    ])  # fmt: skip


def _price(value: float) -> str:
    if not np.isfinite(value):
        return "offline does not get there"
    return f"{1000 * value:.2g} ms" if value else "offline is cheaper at any"


def _turn(lines: Lines, on_policy: str) -> str:
    """The price, in milliseconds, at which offline DPO gets cheaper than a method, for half."""
    pair = [lines.get(name) for name in ("dpo_offline", on_policy)]
    known = all(rows is not None for rows in pair)
    return f"{1000 * crossing(*pair, HALF):.2g}" if known else "-"


def _saves(lines: Lines, first: str, second: str, target: float) -> str:
    """By how many seconds one method is sooner at `target` than another, in seeds where both get
    there."""
    pair = [lines.get(name) for name in (first, second)]
    if any(rows is None for rows in pair):
        return "-"
    a, b = (reaching(rows, target)["seconds"].replace(np.inf, np.nan) for rows in pair)
    both = (b - a).dropna()
    return tables.interval_text(both) if len(both) else "-"


def numbers(lines: Lines, target: float) -> dict[str, str]:
    """What the prose quotes, by name: milliseconds, counts of runs, ratios; "-" where not run.

    Args: lines: method name -> rows.
    """
    run = lines.get("ipo")
    ms = {"write_ms": _per_unit(run, "sampling", "samples"),
          "train_ms": _per_unit(run, "training", "update"),
          "train_best_ms": _per_unit(lines.get("best_of_n"), "training", "update")}  # fmt: skip
    reached = {f"{name}_reached": _cost(rows, target)["reached by"] for name, rows in lines.items()}
    turn = {"turn_ms": _turn(lines, "dpo"), "turn_best_ms": _turn(lines, "best_of_n"),
            "rwr_saves": _saves(lines, "rwr", "dpo", target)}  # fmt: skip
    rounds = {"rounds": _rounds(lines, [target]), "rounds_any": _rounds(lines, [target, HALF])}
    return ms | reached | turn | rounds | _dearer(lines)


def _dearer(lines: Lines) -> dict[str, str]:
    """How many times the seconds of offline IPO's update an on-policy one takes; best-of-N's apart,
    which trains on fewer completions."""
    took = {name: _ends(rows, "seconds").mean() for name, rows in lines.items()
            if methods.get(name).on_policy or name == "ipo_offline"}  # fmt: skip
    base = took.pop("ipo_offline", float("nan"))
    best = took.pop("best_of_n", float("nan")) / base
    ratios = [tables.number_text(s / base, digits=1) for s in sorted(took.values())] or ["-"]
    return {"dearer": f"{ratios[0]} to {ratios[-1]}",
            "dearer_best": tables.number_text(best, digits=1)}  # fmt: skip


def _rounds(lines: Lines, targets: Sequence[float]) -> str:
    """ "3 to 5": median updates of the on-policy methods that get to a target, each one drawing."""
    found = [
        quantile(reaching(rows, target)["update"], 0.5)
        for name, rows in lines.items() if methods.get(name).on_policy for target in targets
    ]  # fmt: skip
    found = [updates for updates in found if np.isfinite(updates)]
    return f"{min(found):.0f} to {max(found):.0f}" if found else "-"


def _per_unit(rows: pd.DataFrame | None, phase: str, unit: str) -> str:
    """Milliseconds of a phase for each completion or update, over whole runs."""
    if rows is None:
        return "-"
    return f"{1000 * (_spent(rows)[phase] / _ends(rows, unit)).mean():.2g}"

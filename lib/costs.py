"""What a run costs: seconds by phase, labelled completions, and the price at which methods cross.

Tables from result tables of runs that had the machine to themselves. Chapter: wall_clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lib import experiments, methods, stats, tables
from lib.bandit.reference import reward_table
from lib.claims import DATA

PHASES = {"seconds_sampling": "sampling", "seconds_scoring": "scoring",
          "seconds_training": "training"}  # fmt: skip
PROMPT_AND_RESPONSE = 10  # tokens that the paper's code averages over: the prompt and 9 more
Lines = Mapping[str, pd.DataFrame]  # label -> rows of one setting, one run per seed


def paper(setting: str = "bandit_r1") -> pd.DataFrame:
    """A column of the paper's Table 3; `ours` names this book's methods, split by "|".

    Args: setting: "bandit_r1", "min_length" or "skew_length".
    """
    table = pd.read_csv(DATA / "paper_results.csv")
    return table[table["setting"] == setting]


def in_papers_convention(reward: float) -> float:
    """A mean reward of R1 over the response as the released code reports it.

    Over prompt and response, the mean of 10 tokens: the prompt's reward, averaged over all prompts,
    enters once, so the ceiling is 0.918 and not 1.
    """
    prompt = float(reward_table("R1").mean())
    return ((PROMPT_AND_RESPONSE - 1) * reward + prompt) / PROMPT_AND_RESPONSE


def table_3(lines: Mapping[str, pd.DataFrame], titles: Mapping[str, str]) -> pd.DataFrame:
    """The paper's Table 3 beside this book's runs: reward, hours, and what reaching a target took.

    Medians are over the runs that reach the target. Args: lines: method name -> rows with the
        columns `seconds` and `target`. titles: method name -> title.
    """
    printed = {name: row for row in paper().itertuples() for name in row.ours.split("|")}
    found = []
    for name, rows in lines.items():
        row, finals = printed.get(name), stats.per_run(rows, "final reward")
        found.append({
            "method": titles[name],
            "paper: reward": f"{row.value:.2f} ({row.spread_as_printed:.2f})" if row else "-",
            "ours, in its convention": f"{in_papers_convention(finals.mean()):.2f}",
            "ours": tables.interval_text(finals),
            "paper: hours": f"{row.hours:g}" if row else "-",
            "ours: seconds of 100 updates": f"{_ends(rows, 'seconds').mean():.2f}",
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
        printed = {name: row for row in paper(f"{task}_length").itertuples()
                   for name in row.ours.split("|")}  # fmt: skip
        for title, rows in parts.items():
            row = printed[rows["method"].iloc[0]]
            took = reaching(rows, rows["target"].iloc[0])
            found.append({
                "task": tasks[task], "method": title,
                "paper: length": f"{row.value:.1f} ({row.spread_as_printed:.1f})",
                "ours: length": tables.interval_text(stats.per_run(rows, "final length"), digits=1),
                "paper: hours": f"{row.hours:g}",
                "ours: reached by": f"{np.isfinite(took['seconds']).sum()} of {len(took)}",
                "seconds to it": _time(_quantile(took["seconds"], 0.5)),
                "updates": _count(_quantile(took["update"], 0.5)),
                "responses": _count(_quantile(took["samples"], 0.5)),
            })  # fmt: skip
    return pd.DataFrame(found)


def _ends(rows: pd.DataFrame, column: str) -> pd.Series:
    return experiments.final(rows)[column]


def reaching(rows: pd.DataFrame, target: float) -> pd.DataFrame:
    """Seconds, updates and completions to `target`, one row per run; inf where it is never kept."""
    curves = [c.sort_values("update") for _, c in rows.groupby("run", observed=True)]
    return pd.DataFrame([
        {name: stats.reaching(c, target, name) for name in ("seconds", "update", "samples")}
        for c in curves
    ])  # fmt: skip


def clock(lines: Lines, target: float) -> pd.DataFrame:
    """Median over all runs of what reaching `target` took, with the quartiles of the seconds.

    A run that never reaches it counts as slower than every other; where half of them do not, the
    median is "not reached".
    """
    found = []
    for label, rows in lines.items():
        took = reaching(rows, target)
        low, middle, high = (_quantile(took["seconds"], q) for q in (0.25, 0.5, 0.75))
        found.append({
            "method": label, "reached by": f"{np.isfinite(took['seconds']).sum()} of {len(took)}",
            "seconds": _time(middle), "quartiles": f"{_time(low)} to {_time(high)}",
            "updates": _count(_quantile(took["update"], 0.5)),
            "completions": _count(_quantile(took["samples"], 0.5)),
        })  # fmt: skip
    return pd.DataFrame(found)


def _quantile(values: pd.Series, q: float) -> float:
    """A value of the sample, so that censored ones (inf) need no arithmetic."""
    return float(np.sort(values.to_numpy())[int(np.ceil(q * len(values))) - 1])


def _time(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "not reached"


def _count(value: float) -> str:
    return f"{value:,.0f}" if np.isfinite(value) else "not reached"


def split(lines: Lines) -> pd.DataFrame:
    """Mean seconds of a whole run by phase: columns method, sampling, scoring, training, total."""
    found = []
    for label, rows in lines.items():
        seconds = {name: _ends(rows, column).mean() for column, name in PHASES.items()}
        found.append({"method": label, **seconds, "total": sum(seconds.values())})
    return pd.DataFrame(found)


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
            found.append((label, price, *(_quantile(cost, q) for q in (0.25, 0.5, 0.75)),
                          len(cost)))  # fmt: skip
    return pd.DataFrame(found, columns=["method", "price", "low", "cost", "high", "n"])


def crossing(thrifty: pd.DataFrame, hungry: pd.DataFrame, target: float) -> float:
    """The price of a completion, in seconds, above which the method that draws fewer is cheaper.

    From median seconds and completions to `target`. 0: it is cheaper at every price; inf: it does
    not get there. Raises: ValueError if it does not draw fewer.
    """
    few, many = (reaching(rows, target) for rows in (thrifty, hungry))
    t_few, t_many = _quantile(few["seconds"], 0.5), _quantile(many["seconds"], 0.5)
    n_few, n_many = _quantile(few["samples"], 0.5), _quantile(many["samples"], 0.5)
    if not np.isfinite(t_few):
        return float("inf")
    if not np.isfinite(t_many):
        return 0.0
    if n_few >= n_many:
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
    return f"{value:.2g} s" if value else "offline is cheaper at any"


def numbers(lines: Lines, target: float) -> dict[str, str]:
    """What the prose quotes, by name: milliseconds, counts of runs, ratios; "-" where not run.

    Args: lines: method name -> rows.
    """
    run = lines.get("ipo")
    ms = {"write_ms": _per_unit(run, "seconds_sampling", "samples"),
          "train_ms": _per_unit(run, "seconds_training", "update")}  # fmt: skip
    reached = {
        f"{name}_reached": f"{np.isfinite(reaching(rows, target)['update']).sum()} of "
        f"{rows['run'].nunique()}" for name, rows in lines.items()
    }  # fmt: skip
    pair = [lines.get(name) for name in ("dpo_offline", "dpo")]
    known = all(rows is not None for rows in pair)
    turn = {"turn_ms": f"{1000 * crossing(*pair, 0.5):.2g}" if known else "-"}
    return ms | reached | turn


def _per_unit(rows: pd.DataFrame | None, column: str, unit: str) -> str:
    """Milliseconds of a phase for each completion or update, over whole runs."""
    return "-" if rows is None else f"{1000 * (_ends(rows, column) / _ends(rows, unit)).mean():.2g}"

"""Tables that chapters show, each from result tables only, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

from lib import experiments, methods, stats
from lib.lm.length import GIVEN

COLLAPSED = 0.01  # nats of entropy per completion: the policy answers a prompt in one way only
CEILING = 1.0  # of both reward functions: every token at the peak
RATES_TRIED = {"all": "all", "neighbours": "selected and neighbours", "base": "the base setting's"}
NEAR = 0.02  # of reward: what this book's verdicts treat as no difference


def shown(table: pd.DataFrame, digits: int = 2) -> Markdown:
    """A table in Markdown: text to the left, numbers to the right with `digits` decimals.

    NaN is "-"; inf, a cost at which no target was reached, is in words. So is a table without rows.
    """
    if table.empty:
        return Markdown("*This table has no rows for the runs asked for.*")
    numeric = [pd.api.types.is_numeric_dtype(table[c]) for c in table]
    lines = [_row(table.columns), _row("---:" if n else "---" for n in numeric)]
    lines += [_row(_cell(v, digits) for v in row) for row in table.itertuples(index=False)]
    return Markdown("\n".join(lines))


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float | np.floating):
        words = "-" if np.isnan(value) else "not reached" if np.isinf(value) else ""
        return words or f"{value:.{digits}f}"
    return str(value)


def interval_text(values: Sequence[float], signed: bool = False, digits: int = 2) -> str:
    """ "0.93 (0.91 to 0.95)": mean and its 95% interval; a single value has no interval."""
    return _interval(*stats.interval(values), signed, digits)


def _interval(mean: float, low: float, high: float, signed: bool, digits: int) -> str:
    text, *limits = (number_text(value, signed, digits) for value in (mean, low, high))
    return f"{text} ({limits[0]} to {limits[1]})" if np.isfinite(low) else text


def number_text(value: float, signed: bool = False, digits: int = 2) -> str:
    """ "0.15", or "+0.15" if signed; what rounds to zero has no sign. In words as in `shown`."""
    if not np.isfinite(value):
        return _cell(float(value), digits)
    value = round(float(value), digits) + 0.0  # no "-0.00"
    sign = "+" if signed and value else ""
    return f"{value:{sign}.{digits}f}"


def rate_text(rate: float) -> str:
    return f"{rate:g}"


def paired(a: pd.DataFrame, b: pd.DataFrame, statistic: str) -> pd.Series:
    """A statistic's difference a - b within every seed that both have."""
    return (stats.per_run(a, statistic) - stats.per_run(b, statistic)).dropna()


def effects(pairs: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]], statistic: str) -> pd.DataFrame:
    """Paired differences with their 95% intervals, as `lib.figures.curves.forest` takes them.

    Args: pairs: label -> (rows, rows it is compared with). Returns: label, effect, low, high, n.
    """
    rows = []
    for label, (a, b) in pairs.items():
        difference = paired(a, b, statistic)
        rows.append((label, *stats.interval(difference), len(difference)))
    return pd.DataFrame(rows, columns=["label", "effect", "low", "high", "n"])


def effects_shown(tables: Mapping[str, pd.DataFrame], digits: int = 1) -> Markdown:
    """Several `effects` side by side, one column of "mean (low to high)" each.

    Args: tables: column title -> effects of the same labels.
    """
    first = next(iter(tables.values()))
    columns = {
        title: [_interval(r.effect, r.low, r.high, True, digits) for r in table.itertuples()]
        for title, table in tables.items()
    }
    return shown(pd.DataFrame({"setting": first["label"], **columns, "seeds": first["n"]}))


def within(tables: Iterable[pd.DataFrame], bound: float = NEAR) -> int:
    """How many settings have an interval within `bound` of zero in each of several `effects`."""
    inside = [table[["low", "high"]].abs().le(bound).all(axis=1) for table in tables]
    return int(pd.concat(inside, axis=1).all(axis=1).sum())


def reaching(rows: pd.DataFrame, target: float) -> pd.DataFrame:
    """Seconds, updates and completions to `target`, one row per run, by seed; inf where it is never
    kept."""
    curves = [c.sort_values("update") for _, c in rows.groupby("run", observed=True)]
    return pd.DataFrame([
        {name: stats.reaching(c, target, name) for name in ("seconds", "update", "samples")}
        for c in curves
    ], index=pd.Index([c["seed"].iloc[0] for c in curves], name="seed"))  # fmt: skip


def quantile(values: pd.Series, q: float) -> float:
    """A value of the sample, so that censored ones (inf) need no arithmetic."""
    return float(np.sort(values.to_numpy())[int(np.ceil(q * len(values))) - 1])


def cost_to_reach(parts: Mapping[str, pd.DataFrame], target: float) -> pd.DataFrame:
    """Updates, completions and seconds until the reward reaches `target` and stays there.

    Medians over all runs: one that never gets there counts as slower than every other, so where
    more than half of them do not, the median is inf, "not reached" in print. `reached by` counts
    those that do.
    Args: parts: label -> rows of one setting, with a column `seconds`.
    """
    rows = []
    for label, table in parts.items():
        took = reaching(table, target)
        median = {name: quantile(took[name], 0.5) for name in took}
        reached = f"{np.isfinite(took['seconds']).sum()} of {len(took)}"
        rows.append({"setting": label, "reached by": reached, "updates": median["update"],
                     "completions": median["samples"], "seconds": median["seconds"]})  # fmt: skip
    return pd.DataFrame(rows)


def grid(settings: Sequence[experiments.Setting], profile: experiments.Profile) -> pd.DataFrame:
    """A chapter's grid: settings that differ only in a value, a reward or a method share a row."""
    values: dict[tuple, dict[str, list[str]]] = {}
    for s in settings:
        keys = ", ".join(name for name, _ in s.options)
        key = s.method, keys, _tried(s, profile), len(experiments.report_seeds(s, profile))
        group = values.setdefault(key, {}).setdefault(s.reward_function, [])
        group.append(", ".join(str(value) for _, value in s.options))
    rows: dict[tuple, list[str]] = {}
    for (name, keys, rates, seeds), group in values.items():
        rewards: dict[str, list[str]] = {}  # those with the same values
        for reward in sorted(group):
            rewards.setdefault("; ".join(dict.fromkeys(group[reward])) or "-", []).append(reward)
        for varied, same in rewards.items():
            row = (f"`{keys}`" if keys else "-", varied, ", ".join(same), rates, seeds)
            rows.setdefault(row, []).append(methods.get(name).title)
    columns = ["methods", "varied", "values", "reward", "rates tried", "seeds"]
    return pd.DataFrame([(", ".join(n), *row) for row, n in rows.items()], columns=columns)


def _tried(setting: experiments.Setting, profile: experiments.Profile) -> str:
    if setting.rate is not None:
        return "the one named"
    count = len(profile.competing(setting))
    fewer = setting.sweep == "all" and count < len(profile.rates)
    return f"the largest {count}" if fewer else RATES_TRIED[setting.sweep]


def selection(
    results: pd.DataFrame, settings: Sequence[experiments.Setting], profile: experiments.Profile
) -> pd.DataFrame:
    """The rate and final reward that each way of choosing the learning rate gives.

    This book's: the best mean reward over updates on the sweep seeds, reported on fresh seeds. The
    paper's: the best mean final reward, reported on the same seeds that chose it (appendix I.3).
    """
    rows = []
    for s in settings:
        ours = experiments.reported(results, s, profile)
        swept = experiments.matching(results, s, profile)
        swept = swept[swept["seed"].isin(profile.sweep_seeds)]
        best = experiments.selected_rate(results, s, profile, "final reward")
        theirs = stats.per_run(swept[swept["learning_rate"] == best], "final reward")
        rows.append({
            "method": methods.get(s.method).title, "reward": s.reward_function,
            "rate, ours": rate_text(float(ours["learning_rate"].iloc[0])),
            "final reward, fresh seeds": interval_text(stats.per_run(ours, "final reward"),
                                                       digits=3),
            "rate, paper's rule": rate_text(best),
            "final reward, best of the sweep": interval_text(theirs, digits=3),
            "rates near the best": near_best(swept),
        })  # fmt: skip
    return pd.DataFrame(rows)


def near_best(swept: pd.DataFrame) -> str:
    """How many rates of a sweep end within `NEAR` of the best one's mean final reward."""
    means = _final_means(swept)
    return f"{count_near_best(means)} of {len(means)}"


def count_near_best(means: pd.Series) -> int:
    """How many of some mean rewards are within `NEAR` of the best of them."""
    return int((means >= means.max() - NEAR).sum())


def _final_means(swept: pd.DataFrame) -> pd.Series:
    """Mean final reward by learning rate, lost runs counted as in `stats.per_run`."""
    parts = swept.groupby("learning_rate", observed=True)
    return pd.Series({rate: stats.per_run(part, "final reward").mean() for rate, part in parts})


def plateau(parts: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Where most methods of a sweep end within `NEAR` of the ceiling, in words for the prose.

    Args: parts: method -> rows at several rates. Returns: `low` and `high`, the lowest and the
        highest such rate; `factor` between them; `n`, how many methods are there at all of these
        rates; and `from_...`, the lowest rate that brings a method there. "-" where there is none.
    """
    means = pd.DataFrame({name: _final_means(rows) for name, rows in parts.items()})
    there = means >= CEILING - NEAR
    rates = there.index[there.mean(axis=1) > 0.5].sort_values()
    own = {f"from_{name}": there.index[there[name]].min() for name in there}
    found = {"low": "-", "high": "-", "factor": "-", "n": "-"}
    if len(rates):
        found = {"low": rate_text(rates[0]), "high": rate_text(rates[-1]),
                 "factor": f"{rates[-1] / rates[0]:.0f}",
                 "n": f"{int(there.loc[rates].all().sum())} of {len(parts)}"}  # fmt: skip
    return found | {key: "-" if np.isnan(rate) else rate_text(rate) for key, rate in own.items()}


def by_rate(parts: Mapping[float, pd.DataFrame], statistic: str, dial: str) -> pd.DataFrame:
    """Mean of a statistic over all seeds that ran, by learning rate (rows) and dial (columns).

    Args: parts: value of the dial -> rows at several rates, one run per rate and seed.
    """
    cells = {
        f"{dial} = {value:g}": {
            rate: stats.per_run(part, statistic).mean()
            for rate, part in rows.groupby("learning_rate", observed=True)
        }
        for value, rows in parts.items()
    }
    table = pd.DataFrame(cells).sort_index(ascending=False)
    table.insert(0, "learning rate", [rate_text(rate) for rate in table.index])
    return table.reset_index(drop=True)


def agreement(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """How far two methods' runs are apart at the same rate and seed, by learning rate.

    Columns: learning rate, pairs of runs, the largest difference in reward at any update.
    """
    keys = ["reward_function", "learning_rate", "seed", "update"]
    both = a[[*keys, "reward"]].merge(b[[*keys, "reward"]], on=keys, suffixes=("_a", "_b"))
    both["gap"] = (both["reward_a"] - both["reward_b"]).abs()
    rows = [
        {"learning rate": rate_text(rate), "pairs of runs": len(part[keys[:3]].drop_duplicates()),
         "largest difference in reward": part["gap"].max()}
        for rate, part in both.groupby("learning_rate", observed=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def collapse(results: pd.DataFrame) -> pd.DataFrame:
    """Per method and reward: on what the runs ended, each counted once.

    Columns: runs; those whose policy still varies; those that answer in one way only (entropy below
    `COLLAPSED` nats), apart by whether that is the best answer (within 0.001 of the ceiling); those
    that went non-finite.
    """
    rows = []
    for (name, reward), last in experiments.final(results).groupby(
        ["method", "reward_function"], observed=True, sort=False
    ):
        gone = last["diverged"].astype(bool)
        still = (last["entropy"] < COLLAPSED) & ~gone
        best = still & (last["reward"] > CEILING - 1e-3)
        rows.append({
            "method": methods.get(name).title, "reward": reward, "runs": len(last),
            "still varies": int((~still & ~gone).sum()), "one answer, the best": int(best.sum()),
            "one answer, not the best": int((still & ~best).sum()), "non-finite": int(gone.sum()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def pilot(
    results: pd.DataFrame, settings: Sequence[experiments.Setting], profile: experiments.Profile
) -> pd.DataFrame:
    """What the pilot of a length chapter saw: final proxy reward (and length) at each rate.

    Means over the pilot's seeds; `chosen` is the rate with the best proxy reward, which is the one
    that is reported.
    """
    rows = []
    for s in settings:
        swept = experiments.matching(results, s, profile)
        swept = experiments.final(swept[swept["seed"].isin(profile.sweep_seeds)])
        means = swept.groupby("learning_rate", observed=True)[["proxy", "length"]].mean()
        cells = {
            rate_text(rate): f"{means.proxy[rate]:.2f} ({means.length[rate]:.0f})"
            for rate in profile.rates if rate in means.index
        }  # fmt: skip
        rows.append({"method": methods.get(s.method).title, "task": s.reward_function,
                     **cells, "chosen": rate_text(experiments.selected_rate(results, s, profile))})
    return pd.DataFrame(rows)


def ends(parts: Mapping[str, pd.DataFrame], columns: Mapping[str, str]) -> pd.DataFrame:
    """Final values with 95% intervals. Args: parts: label -> rows; columns: statistic -> title.

    Preferences of one's own follow no rule: their reward is the proxy, and goes by its name.
    """
    rows = []
    if any("task" in table and (table["task"] == GIVEN).any() for table in parts.values()):
        columns = {s: title.replace("gold", "proxy") for s, title in columns.items()
                   if s != "final reward"}  # fmt: skip
    for label, table in parts.items():
        cells = {
            title: interval_text(stats.per_run(table, statistic))
            for statistic, title in columns.items()
        }
        rows.append({"setting": label, **cells, "seeds": table["seed"].nunique()})
    return pd.DataFrame(rows)


def spent(parts: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Final length, and what whole runs took: completions, and seconds by phase (means)."""
    rows = []
    for label, table in parts.items():
        last = experiments.final(table.assign(**stats.phases(table)))
        rows.append({
            "setting": label,
            "length": interval_text(stats.per_run(table, "final length"), digits=1),
            "responses": int(last["samples"].mean()),
            **{f"{phase}, s": float(last[phase].mean()) for phase in stats.PHASES},
        })  # fmt: skip
    return pd.DataFrame(rows)


def endless(results: pd.DataFrame) -> pd.DataFrame:
    """Per method and task, over all runs: how many end with a policy that mostly does not stop.

    Such a policy writes up to the cap: less than half of its completions end in EOS.
    """
    last = experiments.final(results)
    last = last.assign(endless=last["ended"] < 0.5)
    rows = [
        {"method": methods.get(name).title, "task": task, "runs": len(part),
         "no longer stops": int(part["endless"].sum()),
         "longest mean length": float(part["length"].max()),
         "largest KL, nats": float(part["kl_ref"].max()),
         "pair accuracy where it no longer stops":
             float(part.loc[part["endless"], "held_out_accuracy"].mean())}
        for (name, task), part in last.groupby(["method", "task"], observed=True, sort=False)
    ]  # fmt: skip
    return pd.DataFrame(rows)

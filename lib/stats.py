"""What a run's curve is reduced to, and intervals over seeds. Pure functions of result tables.

A *curve* is the rows of one run in the order of its updates, by column (see those of a result table
in the chapter status): a data frame, or a mapping of arrays, which is much quicker to take apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats
from scipy.integrate import trapezoid

from lib.allowed import one_of

Curve = Mapping[str, np.ndarray] | pd.DataFrame
PHASES = ("sampling", "scoring", "training")  # of a run, on its clock; evaluation is left out
CONFIDENCE = 0.95
SUSTAINED = 5  # evaluations that must stay at the target for it to count as reached


def final(curve: Curve, column: str = "reward") -> float:
    """The value after the last update."""
    return float(_array(curve, column)[-1])


def change(curve: Curve, column: str) -> float:
    """The last value minus the one before the first update."""
    values = _array(curve, column)
    return float(values[-1] - values[0])


def peak(curve: Curve, column: str) -> float:
    """The largest value during training; NaN is left out."""
    return float(np.fmax.reduce(_array(curve, column)))


def area(curve: Curve, column: str = "reward", over: str = "update", limit=None) -> float:
    """The mean height of the curve (trapezoid area / span) up to `limit`, which lies on a straight
    line where it is between two rows: how fast it learned."""
    x, y = _array(curve, over), _array(curve, column)
    if limit is not None and limit < x[-1]:
        kept, end = x <= limit, np.interp(limit, x, y)
        x, y = np.append(x[kept], limit), np.append(y[kept], end)
    return float(trapezoid(y, x) / (x[-1] - x[0]))


def at_kl(curve: Curve, kl: float) -> float:
    """The reward where KL(pi || pi_ref) first reaches `kl` nats, between rows by a straight line.

    A run that never gets there is given its best reward: more KL was not of use to it.
    """
    x, y = _array(curve, "kl_ref"), _array(curve, "reward")
    beyond = np.flatnonzero(x >= kl)
    if not len(beyond):
        return float(np.max(y))
    i = beyond[0]
    if i == 0:
        return float(y[0])
    return float(np.interp(kl, [x[i - 1], x[i]], [y[i - 1], y[i]]))


def reaching(curve: Curve, target: float, column: str = "update") -> float:
    """`column` at the first update whose reward reaches `target` and keeps it for 5 evaluations.

    Returns: inf where that never happens (a censored time).
    """
    above = _array(curve, "reward") >= target
    for i in range(len(above) - SUSTAINED + 1):
        if above[i : i + SUSTAINED].all():
            return float(_array(curve, column)[i])
    return float("inf")


def speed(curve: Curve) -> float:
    """One over the seconds to the run's target: inf where it is there from the start."""
    seconds = reaching(curve, final(curve, "target"), "seconds")
    return 1 / seconds if seconds else float("inf")


class MissingColumn(ValueError):
    """Results that a statistic cannot be taken of, such as a gold reward that nobody judged."""


def _array(curve: Curve, column: str) -> np.ndarray:
    """Raises: MissingColumn also for a column without any value."""
    values = np.asarray(curve[column], float) if column in curve else np.array([])
    if np.isnan(values).all():
        raise MissingColumn(f"{column!r}, which these results lack")
    return values


def phases(results: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each of `PHASES` that a run has spent since its first evaluation, by row.

    What comes before the row at update 0 is left out: there the bandit draws the answers that its
    evaluations follow, whatever the method. What a method trains on comes after it and counts:
    every answer that an on-policy method draws, the one set that an offline method draws on the
    bandit, and the scoring of a given data set, which costs nothing to draw.
    """
    spent = results[[f"seconds_{phase}" for phase in PHASES]].astype(float)
    spent = spent.set_axis(list(PHASES), axis=1)
    before = spent.where(results["update"] == 0).groupby(results["run"], observed=True)
    return spent - before.transform("max")


def seconds(results: pd.DataFrame) -> pd.Series:
    """Seconds of all `phases` together: the clock of this book."""
    return phases(results).sum(axis=1, skipna=False)


STATISTICS: dict[str, Callable[[Curve], float]] = {
    "final reward": final,
    "mean reward over updates": area,
    "mean reward over the first 100 updates": lambda c: area(c, limit=100),
    "mean reward over samples": lambda c: area(c, over="samples"),
    "mean reward over the first 384 samples": lambda c: area(c, over="samples", limit=384),
    "mean reward over the first 768 samples": lambda c: area(c, over="samples", limit=768),
    "reward at 10 nats": lambda c: at_kl(c, 10.0),
    "reward at 20 nats": lambda c: at_kl(c, 20.0),
    "final KL to reference": lambda c: final(c, "kl_ref"),
    "peak KL to sampler": lambda c: peak(c, "kl_gen"),
    "final chosen log-ratio": lambda c: final(c, "chosen_logratio"),
    "final rejected log-ratio": lambda c: final(c, "rejected_logratio"),
    "change of mass on tokens of the data": lambda c: change(c, "support_share"),
    "final proxy": lambda c: final(c, "proxy"),
    "mean proxy over updates": lambda c: area(c, "proxy"),
    "final gold": lambda c: final(c, "gold"),
    "gain in gold": lambda c: change(c, "gold"),
    "final length": lambda c: final(c, "length"),
    "final pair accuracy": lambda c: final(c, "held_out_accuracy"),
    "final margin": lambda c: final(c, "chosen_logratio") - final(c, "rejected_logratio"),
    "speed to target": speed,
}


REWARDS = ("reward", "proxy")  # of which a policy that went non-finite has the lowest there is
# The columns that a statistic may read.
CURVE = ("update", "samples", "seconds", "target", "reward", "proxy", "gold", "length", "kl_ref",
         "kl_gen", "chosen_logratio", "rejected_logratio", "held_out_accuracy",
         "support_share")  # fmt: skip


def per_run(results: pd.DataFrame, statistic: str) -> pd.Series:
    """A statistic of every run. Returns: values indexed by seed.

    Where the policy went non-finite, its reward counts as the lowest that any run of `results` had
    anywhere: such a run must not look better than those that can be evaluated, as it would with 0
    where rewards are negative. What else is non-finite at the end (a KL, a log-ratio) is no number
    to average: the run is left out.
    Raises: ValueError for an unknown statistic, or two runs of one seed; MissingColumn, also where
        one run has no value at all.
    """
    function = STATISTICS[one_of("statistic", statistic, STATISTICS)]
    values = {}
    runs, seeds = pd.factorize(results["run"])[0], results["seed"].to_numpy()
    order = np.lexsort((results["update"].to_numpy(), runs, seeds))
    arrays = {name: results[name].to_numpy(float)[order] for name in CURVE if name in results}
    arrays |= {name: _lowest_if_lost(arrays[name], runs[order]) for name in REWARDS
               if name in arrays}  # fmt: skip
    starts = np.flatnonzero(np.diff(runs[order], prepend=-1))
    for start, end in pairwise([*starts, len(order)]):
        seed = int(seeds[order[start]])
        if seed in values:
            raise ValueError(f"two runs of seed {seed}")
        try:
            value = function({name: array[start:end] for name, array in arrays.items()})
        except MissingColumn as error:
            raise MissingColumn(f"{statistic} needs {error}") from None
        values[seed] = value
    found = pd.Series(values, dtype=float)
    return found[np.isfinite(found)]


def _lowest_if_lost(values: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Non-finite values become the lowest of all, in runs that have a finite one."""
    lost = ~np.isfinite(values)
    evaluated = np.isin(runs, runs[~lost])
    return np.where(lost & evaluated, np.min(values, initial=np.inf, where=~lost), values)


def interval(values: np.ndarray | pd.Series) -> tuple[float, float, float]:
    """Mean and the limits of its 95% confidence interval (Student's t).

    One value has no interval: its limits are infinite.
    """
    values = np.asarray(values, float)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, float("-inf"), float("inf")
    half = scipy_stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
    return mean, float(mean - half), float(mean + half)


def share(hits: int, count: int) -> tuple[float, float, float]:
    """A share and the limits of its 95% interval (Wilson's)."""
    found = scipy_stats.binomtest(int(hits), int(count)).proportion_ci(CONFIDENCE, "wilson")
    return hits / count, found.low, found.high

"""What a grid is made of: profiles, settings, a chapter's grid; and which results are whose.

Every setting's learning rate is chosen on sweep seeds and reported on other seeds, so that choosing
does not flatter the result. Hence stages: a later one needs the results of those before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import pandas as pd

from lib import stats
from lib.runs import Engine, identity
from lib.runs.configurations import is_default_of_later


class NoResults(ValueError):
    """A setting without results: its runs were left out."""


@dataclass(frozen=True)
class Profile:
    """How much of a grid to compute; a run's identity does not contain it.

    Args:
        rates: learning rates of the sweep.
        sweep_seeds, report_seeds: seeds that choose the rate, and seeds that are reported.
        dial_sweep_seeds, dial_seeds: the same for settings other than the base ones.
        updates: of every run.
        options: of every run (smoke makes them small).
        device: "cpu" or "cuda".
        select_by: the statistic that the best learning rate has most of, on the sweep seeds.
    """

    rates: tuple[float, ...]
    sweep_seeds: tuple[int, ...]
    report_seeds: tuple[int, ...]
    dial_sweep_seeds: tuple[int, ...]
    dial_seeds: tuple[int, ...]
    updates: int = 100
    options: tuple[tuple[str, Any], ...] = ()
    device: str = "cpu"
    select_by: str = "mean reward over updates"

    def configuration(self, setting: Setting, rate: float, seed: int) -> Any:
        """The run of a setting at a learning rate and seed: each kind of problem has its own."""
        raise NotImplementedError

    def competing(self, setting: Setting) -> tuple[float, ...]:
        """The learning rates of a setting that has a sweep over all of them."""
        return self.rates

    @property
    def few_seeds(self) -> tuple[int, ...]:
        """The seeds of settings of which few are reported."""
        return self.dial_seeds[:5]

    def sweep(self, setting: Setting) -> list[tuple[float, int]]:
        """Learning rate and seed of the runs that choose a setting's rate."""
        return list(product(self.competing(setting), self.sweep_seeds))

    def with_rates(self, rates: tuple[float, ...]) -> Profile:
        """The profile with other learning rates, of all settings."""
        return dataclasses.replace(self, rates=rates)


@dataclass(frozen=True)
class Setting:
    """One cell of a grid: a method on a reward function, with options.

    Args:
        reward_function: "R1" or "R2" of the bandit; a length task, "min", "mode" or "skew", or
            "given" (labelled pairs); at full scale what the pairs are, "similar" or "distinct".
        sweep: which learning rates compete: "all", "neighbours" (the base setting's and the next
            on either side) or "base" (the base setting's, without a sweep of its own).
        seeds: how many are reported: "report" (20 at full), "dial" (10), "few" (5) or "none" (the
            setting only chooses the rate of others).
    """

    method: str
    reward_function: str
    options: tuple[tuple[str, Any], ...] = ()
    sweep: str = "all"
    seeds: str = "report"

    @property
    def base(self) -> Setting:
        return Setting(self.method, self.reward_function)

    @property
    def name(self) -> str:
        """As claims and figures write it: "ipo@R1" or "best_of_n@R1[sets=10]"."""
        options = ",".join(f"{k}={v}" for k, v in self.options)
        return f"{self.method}@{self.reward_function}" + (f"[{options}]" if options else "")

    @property
    def rate(self) -> float | None:
        """The learning rate that the options name, in place of one that is chosen."""
        return dict(self.options).get("learning_rate")

    def run(self, profile: Profile, rate: float, seed: int) -> Any:
        """The configuration at a learning rate and seed."""
        others = tuple(option for option in self.options if option[0] != "learning_rate")
        return profile.configuration(dataclasses.replace(self, options=others), rate, seed)


@dataclass(frozen=True)
class Grid:
    """A chapter's runs.

    Args:
        profiles: by name.
        settings: profile -> settings.
        engine: device -> what computes the runs.
        jobs: processes that may share the machine, None for one per core.
        derive: (results, profile) -> results with the columns that its statistics need.
        fragile: (run, metric) -> whether it hangs on so many sampled tokens, even early, that the
            rounding of another machine has flipped one of them.
    """

    profiles: Mapping[str, Profile]
    settings: Callable[[Any], list[Setting]]
    engine: Callable[[str], Engine]
    jobs: int | None = None
    derive: Callable[[pd.DataFrame, Profile], pd.DataFrame] = lambda results, profile: results
    fragile: Callable[[Any, str], bool] = lambda run, metric: False


def final(results: pd.DataFrame) -> pd.DataFrame:
    """The last row of every run."""
    return results.loc[results.groupby("run", sort=False, observed=True)["update"].idxmax()]


def at_best(results: pd.DataFrame, column: str) -> pd.DataFrame:
    """The row of every run at which a column is largest, as of one who stops there."""
    known = results.dropna(subset=[column])
    return known.loc[known.groupby("run", sort=False, observed=True)[column].idxmax()]


def matching(results: pd.DataFrame, setting: Setting, profile: Profile) -> pd.DataFrame:
    """The rows of a setting, at every seed and every learning rate that it may have."""
    runs = results.drop_duplicates("run")  # a thirtieth of the rows: compared field by field
    keep = pd.Series(True, runs.index)
    run = setting.run(profile, 0.1, 0)
    for field in dataclasses.fields(run):
        if field.name not in ("learning_rate", "seed"):
            keep &= _equal(runs, field, getattr(run, field.name))
    if setting.rate is not None:
        keep &= runs["learning_rate"] == setting.rate
    return results[results["run"].isin(runs.loc[keep, "run"])]


def _equal(runs: pd.DataFrame, field: dataclasses.Field, value: Any) -> pd.Series:
    """Which runs have `value` in a field. A later field at its default may have no value, nor a
    column where that is so in all runs.

    Raises: KeyError for any other field without a column.
    """
    if field.metadata.get("later") and field.name not in runs:
        return pd.Series(value == field.default, runs.index)
    unset = value is None or is_default_of_later(field, value)
    return runs[field.name].isna() if unset else runs[field.name] == value


def candidates(setting: Setting, profile: Profile, base_rate: float | None) -> tuple[float, ...]:
    """The learning rates that compete in a setting."""
    if setting.rate is not None:
        return (setting.rate,)
    if setting.sweep == "all":
        return profile.competing(setting)
    if setting.sweep == "base" or not profile.dial_sweep_seeds:
        return (base_rate,)
    i = profile.rates.index(base_rate)
    return profile.rates[max(0, i - 1) : i + 2]


def sweep_runs(setting: Setting, profile: Profile, base_rate: float | None) -> list[Any]:
    """The runs that choose a setting's learning rate; none where it is the base's."""
    if setting.sweep == "base":
        return []
    if setting.sweep == "all":
        pairs = profile.sweep(setting)
    else:
        pairs = [*product(candidates(setting, profile, base_rate), profile.dial_sweep_seeds)]
    return [setting.run(profile, *pair) for pair in pairs]


def selector(
    results: pd.DataFrame, profile: Profile, statistic: str | None = None
) -> Callable[[Setting], float]:
    """setting -> its `selected_rate` in `results`, each computed once."""

    @cache
    def chosen(setting: Setting) -> float:
        base = None if setting.sweep == "all" else chosen(setting.base)
        return _selected(results, setting, profile, statistic or profile.select_by, base)

    return chosen


def assumer(results: pd.DataFrame | None, profile: Profile) -> Callable[[Setting], float]:
    """As `selector`, to plan with: where a sweep is not whole in `results`, the middle rate is
    taken (a dial: its base's), which changes no cost."""
    found = set() if results is None else set(results["run"])

    @cache
    def assumed(setting: Setting) -> float:
        base = None if setting.sweep == "all" else assumed(setting.base)
        sweep = {identity(run) for run in sweep_runs(setting, profile, base)}
        if sweep <= found:
            return _selected(results, setting, profile, profile.select_by, base)
        rates = candidates(setting, profile, base)
        return rates[len(rates) // 2] if base is None else base

    return assumed


def selected_rate(
    results: pd.DataFrame, setting: Setting, profile: Profile, statistic: str | None = None
) -> float:
    """The rate with the best `statistic` on the sweep seeds, in the mean.

    `statistic` names one of `lib.stats`; None is the rule of the profile.
    Raises: NoResults if the sweep has no runs in `results`.
    """
    return selector(results, profile, statistic)(setting)


def _selected(
    results: pd.DataFrame, setting: Setting, profile: Profile, statistic: str, base: float | None
) -> float:
    rates, seeds = candidates(setting, profile, base), _sweep_seeds(setting, profile)
    if len(rates) == 1:
        return rates[0]
    rows = matching(results, setting, profile)
    rows = rows[rows["seed"].isin(seeds) & rows["learning_rate"].isin(rates)]
    if rows.empty:
        raise NoResults(f"no sweep results for {setting.name}")
    means = {rate: stats.per_run(part, statistic).mean()
             for rate, part in rows.groupby("learning_rate")}  # fmt: skip
    return float(max(means, key=means.get))


def _sweep_seeds(setting: Setting, profile: Profile) -> tuple[int, ...]:
    return profile.sweep_seeds if setting.sweep == "all" else profile.dial_sweep_seeds


def report_seeds(setting: Setting, profile: Profile) -> tuple[int, ...]:
    """The seeds whose results are reported."""
    named = {"report": profile.report_seeds, "dial": profile.dial_seeds,
             "few": profile.few_seeds, "none": ()}  # fmt: skip
    return named[setting.seeds]


def reported(
    results: pd.DataFrame,
    setting: Setting,
    profile: Profile,
    seeds: Sequence[int] | None = None,
    rate: float | None = None,
) -> pd.DataFrame:
    """The rows of figures and verdicts: the selected rate, on seeds that did not select it.

    Args: rate: the selected one where the caller knows it already.
    """
    rate = selected_rate(results, setting, profile) if rate is None else rate
    seeds = report_seeds(setting, profile) if seeds is None else seeds
    rows = matching(results, setting, profile)
    return rows[(rows["learning_rate"] == rate) & rows["seed"].isin(seeds)]

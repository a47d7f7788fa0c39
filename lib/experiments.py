"""The grids of each chapter, by profile: which runs answer its question, and in which order.

A chapter is a list of settings (a method on a reward function, with options). Every setting's
learning rate is chosen on sweep seeds and reported on other seeds, so that choosing does not
flatter the result. It is chosen by the mean reward over all updates: the final reward would choose
at random among the many rates at which an on-policy method ends at the ceiling. Hence stages: a
later one needs the results of those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from lib import methods, stats
from lib.bandit.config import LEARNING_RATES, BanditRun, bandit_run
from lib.bandit.engine import BanditEngine

REWARDS = ("R1", "R2")
OFFLINE = tuple(name for name, m in methods.METHODS.items() if not m.on_policy)
ON_POLICY = tuple(name for name, m in methods.METHODS.items() if m.on_policy)


@dataclass(frozen=True)
class Profile:
    """How much of a grid to compute; a run's identity does not contain it.

    Args:
        rates: learning rates of the sweep.
        sweep_seeds, report_seeds: seeds that choose the rate, and seeds that are reported.
        dial_sweep_seeds, dial_seeds: the same for settings other than the base ones.
        sets, inner_steps, prompts: values of the dials k, T and of the number of prompts.
        switches: how many conventions are switched for each method, None for all.
        options: of every run (smoke makes them small).
        device: "cpu" or "cuda".
        select_by: the statistic that the best learning rate has most of, on the sweep seeds.
    """

    rates: tuple[float, ...]
    sweep_seeds: tuple[int, ...]
    report_seeds: tuple[int, ...]
    dial_sweep_seeds: tuple[int, ...]
    dial_seeds: tuple[int, ...]
    sets: tuple[int, ...] = (2, 5, 10, 50)
    inner_steps: tuple[int, ...] = (2, 5, 7, 10, 20)
    prompts: tuple[int, ...] = (20, 50, 100)
    switches: int | None = None
    updates: int = 100
    options: tuple[tuple[str, Any], ...] = ()
    device: str = "cpu"
    select_by: str = "mean reward over updates"


FULL = Profile(
    rates=LEARNING_RATES,
    sweep_seeds=tuple(range(5)),
    report_seeds=tuple(range(5, 25)),
    dial_sweep_seeds=(0, 1),
    dial_seeds=tuple(range(5, 15)),
)
PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        rates=(0.01, 0.001),
        sweep_seeds=(0,),
        report_seeds=(5, 6),
        dial_sweep_seeds=(),
        dial_seeds=(5, 6),
        sets=(2,),
        inner_steps=(2,),
        prompts=(8,),
        switches=1,
        updates=2,
        options=(("prompts", 4), ("completions", 4), ("evaluations", 2), ("held_out", False)),
    ),
    "cpu": Profile(
        rates=(0.01, 0.003, 0.001),
        sweep_seeds=(0,),
        report_seeds=(5, 6, 7),
        dial_sweep_seeds=(),
        dial_seeds=(5, 6),
        sets=(10, 50),
        inner_steps=(2, 5),
        prompts=(50,),
    ),
    "full": FULL,
    # The same grid on one GPU; the paper's own: five seeds, every rate, the best of the sweep.
    "gpu": replace(FULL, device="cuda"),
    "paper": replace(
        FULL,
        report_seeds=tuple(range(5)),
        dial_seeds=tuple(range(5)),
        select_by="final reward",
    ),
}


@dataclass(frozen=True)
class Setting:
    """One cell of a grid: a method on a reward function, with options.

    Args:
        sweep: which learning rates compete: "all", "neighbours" (the base setting's and the next
            on either side) or "base" (the base setting's, without a sweep of its own).
        seeds: how many are reported: "report" (20 at full), "dial" (10) or "few" (5).
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

    def run(self, profile: Profile, rate: float, seed: int) -> BanditRun:
        """The configuration at a learning rate and seed."""
        options = {**dict(profile.options), **dict(self.options)}
        updates = profile.updates
        if not methods.get(self.method).on_policy:
            options.setdefault("inner_steps", updates)
        else:
            options.setdefault("iterations", max(1, updates // options.get("sets", 1)))
            options.setdefault("held_out", False)  # of interest where the data are fixed
        return bandit_run(self.method, self.reward_function, rate, seed, **options)


def _base(names: Iterable[str], rewards: Sequence[str] = REWARDS) -> list[Setting]:
    return [Setting(name, reward) for reward in rewards for name in names]


def _staleness(profile: Profile) -> list[Setting]:
    """Dial B: k sets drawn at once, consumed in k updates; on R2 the other methods' end only."""
    dial = [("best_of_n", reward, k) for reward in REWARDS for k in profile.sets]
    others = [name for name in ON_POLICY if name != "best_of_n"]
    dial += [(name, "R1", k) for name in others for k in profile.sets if k not in (2, 5)]
    dial += [(name, "R2", max(profile.sets)) for name in others]
    return [
        Setting(name, r, (("sets", k),), "neighbours", "report" if name == "best_of_n" else "dial")
        for name, r, k in dial
    ]


def _reuse(profile: Profile) -> list[Setting]:
    """Dial T on R1: every value for RWR (Figure 14), two for the other on-policy methods."""
    few = [t for t in profile.inner_steps if t in (5, 10)] or profile.inner_steps
    judged = ("rwr", "reinforce", "ppo_sequence")
    dial = [("rwr", "R1", t) for t in profile.inner_steps]
    dial += [(name, "R1", t) for name in ON_POLICY if name != "rwr" for t in few]
    return [
        Setting(name, r, (("inner_steps", t),), "base", "dial" if name in judged else "few")
        for name, r, t in dial
    ]


def _conventions(names: Iterable[str], profile: Profile) -> list[Setting]:
    """Each switch of the conventions table, for the methods that it touches; on R1."""
    switches: dict[str, list[tuple[tuple[str, Any], ...]]] = {
        "best_of_n": [(("length", 10),), (("histogram", "clipped"),), (("shift", False),),
                      (("dropout", 0.1),), (("reward_over", "prompt_and_response"),)],
        "rwr": [(("standardise", "prompt"),), (("weights", "raw"),), (("weights", "clipped"),),
                (("temperature", 0.05),), (("reward_over", "prompt_and_response"),)],
        "reinforce": [(("standardise", "prompt"),), (("reward_over", "prompt_and_response"),)],
        "ppo_sequence": [(("ratio_over", "token"), ("kl_penalty", 0.05))],
        "dpo": [(("gap", 0.1),), (("completions", 2),)],
        "ipo": [(("completions", 2),)],
        "best_of_n_offline": [(("histogram", "clipped"),)],
        "best_of_n_negative": [(("beta", 0.1),), (("threshold", 0.5),)],
        "ipo_offline": [(("length", 10),), (("histogram", "clipped"),), (("shift", False),),
                        (("dropout", 0.1),)],
    }  # fmt: skip
    return [
        Setting(name, "R1", switched, "base", "few")
        for name in names for switched in switches.get(name, [])[: profile.switches]
    ]  # fmt: skip


def _one_token() -> list[Setting]:
    """The 1-token bandit of appendix J.3: every method has its own sweep there."""
    return [Setting(n, r, (("length", 1),), seeds="dial") for r in REWARDS for n in OFFLINE]


def _prompts(profile: Profile) -> list[Setting]:
    return [
        Setting("ipo_offline", reward, (("prompts", n),), "neighbours", "dial")
        for reward in REWARDS for n in profile.prompts
    ]  # fmt: skip


WALL_CLOCK = ("ipo_offline", "dpo_offline", "ppo_sequence", "rwr", "ipo", "dpo",
              "best_of_n", "reinforce")  # fmt: skip
ALONE = (("alone", True), ("evaluations", 100), ("held_out", False))


@dataclass(frozen=True)
class Grid:
    """A chapter's runs.

    Args:
        settings: profile -> settings.
        jobs: processes that may share the machine, None for one per core.
        derive: (results, profile) -> results with the columns that its statistics need.
    """

    settings: Callable[[Profile], list[Setting]]
    jobs: int | None = None
    derive: Callable[[pd.DataFrame, Profile], pd.DataFrame] = lambda results, profile: results


CHAPTERS: dict[str, Grid] = {
    "on_policy": Grid(
        lambda p: _base(ON_POLICY) + _staleness(p) + _reuse(p) + _conventions(ON_POLICY, p)
    ),
    "negative_gradient": Grid(
        lambda p: _base(OFFLINE) + _prompts(p) + _one_token() + _conventions(OFFLINE, p)
    ),
    "complementary": Grid(lambda p: _base(("ipo_offline", "ipo", "rwr", "ppo_sequence"))),
    "wall_clock": Grid(
        lambda p: (
            _base(WALL_CLOCK, ("R1",))
            + [Setting(name, "R1", ALONE, "base", "dial") for name in WALL_CLOCK]
        ),
        jobs=1,  # each run has the machine to itself
        derive=lambda results, profile: with_target(results, profile),
    ),
}


def check_chapter(chapter: str) -> str:
    """Raises: ValueError that names the chapters with runs of their own."""
    if chapter not in CHAPTERS:
        raise ValueError(f"chapter must be one of {tuple(CHAPTERS)}, got {chapter!r}")
    return chapter


def profile_named(name: str) -> Profile:
    """Raises: ValueError for an unknown profile, RuntimeError if its device is missing."""
    if name not in PROFILES:
        raise ValueError(f"profile must be one of {tuple(PROFILES)}, got {name!r}")
    profile = PROFILES[name]
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"profile {name!r} needs a CUDA device and none is available; "
            f"profiles for the CPU: {[n for n, p in PROFILES.items() if p.device == 'cpu']}"
        )
    return profile


def settings(chapter: str, profile: Profile, only: Sequence[str] | None = None) -> list[Setting]:
    """A chapter's settings, or those of the methods in `only`.

    Raises: ValueError for a method that is not in the chapter.
    """
    found = CHAPTERS[check_chapter(chapter)].settings(profile)
    if only is None:
        return found
    present = list(dict.fromkeys(s.method for s in found))
    unknown = [name for name in only if name not in present]
    if unknown or not only:
        raise ValueError(f"methods must be among {present}, got {list(only)}")
    return [s for s in found if s.method in only]


def final(results: pd.DataFrame) -> pd.DataFrame:
    """The last row of every run."""
    return results.loc[results.groupby("run", sort=False, observed=True)["update"].idxmax()]


def matching(results: pd.DataFrame, setting: Setting, profile: Profile) -> pd.DataFrame:
    """The rows of a setting, at every learning rate and seed."""
    runs = results.drop_duplicates("run")  # a thirtieth of the rows: compared field by field
    keep = pd.Series(True, runs.index)
    for name, value in vars(setting.run(profile, 0.1, 0)).items():
        if name not in ("learning_rate", "seed"):
            keep &= runs[name].isna() if value is None else runs[name] == value
    return results[results["run"].isin(runs.loc[keep, "run"])]


def candidates(setting: Setting, profile: Profile, base_rate: float | None) -> tuple[float, ...]:
    """The learning rates that compete in a setting."""
    if setting.sweep == "all":
        return profile.rates
    if setting.sweep == "base" or not profile.dial_sweep_seeds:
        return (base_rate,)
    i = profile.rates.index(base_rate)
    return profile.rates[max(0, i - 1) : i + 2]


def selected_rate(
    results: pd.DataFrame, setting: Setting, profile: Profile, statistic: str | None = None
) -> float:
    """The rate with the best `statistic` on the sweep seeds, in the mean.

    `statistic` names one of `lib.stats`; None is the rule of the profile.
    Raises: ValueError if the sweep has no runs in `results`.
    """
    if setting.sweep == "base" or (setting.sweep == "neighbours" and not profile.dial_sweep_seeds):
        return selected_rate(results, setting.base, profile, statistic)
    base = None if setting.sweep == "all" else selected_rate(results, setting.base, profile)
    rates, seeds = candidates(setting, profile, base), _sweep_seeds(setting, profile)
    rows = matching(results, setting, profile)
    rows = rows[rows["seed"].isin(seeds) & rows["learning_rate"].isin(rates)]
    if rows.empty:
        raise ValueError(f"no sweep results for {setting.name}")
    means = {rate: stats.per_run(part, statistic or profile.select_by).mean()
             for rate, part in rows.groupby("learning_rate")}  # fmt: skip
    return float(max(means, key=means.get))


def _sweep_seeds(setting: Setting, profile: Profile) -> tuple[int, ...]:
    return profile.sweep_seeds if setting.sweep == "all" else profile.dial_sweep_seeds


def report_seeds(setting: Setting, profile: Profile) -> tuple[int, ...]:
    """The seeds whose results are reported."""
    few = profile.dial_seeds[:5]
    return {"report": profile.report_seeds, "dial": profile.dial_seeds, "few": few}[setting.seeds]


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


TARGET_SHARE = 0.95  # of the best method's mean final reward


def with_target(results: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Adds `seconds` (all but evaluation) and `target`, the reward that the clock runs to."""
    phases = ["seconds_sampling", "seconds_scoring", "seconds_training"]
    results = results.assign(seconds=results[phases].sum(axis=1))
    alone = [s for s in CHAPTERS["wall_clock"].settings(profile) if s.options]
    means = [final(reported(results, s, profile))["reward"].mean() for s in alone
             if s.method in set(results["method"])]  # fmt: skip
    return results.assign(target=TARGET_SHARE * max(means))


def stages(
    chapter: str,
    profile: str | Profile,
    only: Sequence[str] | None = None,
    extra_seeds: Sequence[int] = (),
) -> list[Callable[[pd.DataFrame | None], list[BanditRun]]]:
    """What to run, in order: sweeps of base settings; reports and sweeps of dials; their reports.

    Args:
        only: these methods.
        extra_seeds: reported seeds beyond the profile's.
    """
    profile = profile_named(profile) if isinstance(profile, str) else profile
    grid = settings(chapter, profile, only)
    swept = list(dict.fromkeys(s if s.sweep == "all" else s.base for s in grid))
    dials = [s for s in grid if s.sweep != "all"]

    def sweep(_: pd.DataFrame | None) -> list[BanditRun]:
        return [
            s.run(profile, rate, seed)
            for s in swept for rate in profile.rates for seed in profile.sweep_seeds
        ]  # fmt: skip

    def dial_sweep(results: pd.DataFrame) -> list[BanditRun]:
        base = {s: selected_rate(results, s, profile) for s in swept if not s.options}
        return report([s for s in grid if s.sweep == "all"], results) + [
            s.run(profile, rate, seed)
            for s in dials if s.sweep == "neighbours"
            for rate in candidates(s, profile, base[s.base])
            for seed in profile.dial_sweep_seeds
        ]  # fmt: skip

    def report(some: list[Setting], results: pd.DataFrame) -> list[BanditRun]:
        rates = {s: selected_rate(results, s, profile) for s in some}
        return [
            s.run(profile, rate, seed)
            for s, rate in rates.items() for seed in (*report_seeds(s, profile), *extra_seeds)
        ]  # fmt: skip

    return [sweep, dial_sweep, lambda results: report(dials, results)]


def assumed(
    chapter: str,
    profile: Profile,
    only: Sequence[str] | None = None,
    extra_seeds: Sequence[int] = (),
) -> list[BanditRun]:
    """All runs of a chapter as if every sweep selected its middle rate: for planning its cost."""
    middle = profile.rates[len(profile.rates) // 2]
    configs = []
    for s in settings(chapter, profile, only):
        swept = s if s.sweep == "all" else s.base
        configs += [swept.run(profile, r, n) for r in profile.rates for n in profile.sweep_seeds]
        if s.sweep == "neighbours":
            rates = candidates(s, profile, middle)
            configs += [s.run(profile, r, n) for r in rates for n in profile.dial_sweep_seeds]
        seeds = (*report_seeds(s, profile), *extra_seeds)
        configs += [s.run(profile, middle, n) for n in seeds]
    return list(dict.fromkeys(configs))


def engine(chapter: str, device: str = "cpu") -> BanditEngine:
    check_chapter(chapter)
    return BanditEngine(device)

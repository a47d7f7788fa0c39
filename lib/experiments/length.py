"""The length problems' profiles and the grids of their chapters.

Every method's learning rate is chosen by a pilot: the final proxy reward, which is what somebody
without a gold reward could see, on two seeds that are not reported. Dials keep that rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from lib import methods, stats
from lib.experiments.settings import Grid, Profile, Setting, final, reported
from lib.lm.config import MINIBATCH, LengthRun, length_run, prepared_tasks
from lib.lm.length import GIVEN, TASKS
from lib.lm.places import spelled
from lib.runs import Engine
from lib.runs.configurations import checked

TITLES = {"min": "Min Length", "skew": "Skew Length", "mode": "Mode Length",
          GIVEN: "your preferences"}  # fmt: skip


def fields_of(run: type[LengthRun], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a run takes them: a folder in one spelling. Raises: ValueError, see `checked`."""
    options = checked(run, options)
    if "prepared" in options:
        options["prepared"] = spelled(options["prepared"])
    return options


@dataclass(frozen=True)
class PilotProfile(Profile):
    """A profile whose sweep is a pilot: no figure or table but the pilot's own shows its runs."""

    def sweep(self, setting: Setting) -> list[tuple[float, int]]:
        """Empty where there is one rate to choose from."""
        return super().sweep(setting) if len(self.competing(setting)) > 1 else []


@dataclass(frozen=True)
class LengthProfile(PilotProfile):
    """The length problems' dials beside what every profile has.

    Args:
        batches: values of B as multiples of M. inner_steps: values of T.
        every_value: all of these wherever B or T is varied, as in the paper's figures. Otherwise
            some settings have the ends or the largest alone.
        betas: of DPO, and temperatures: of RWR, beside their defaults.
        choices: values of best-of-N's N beside its default; an update is then of `TENS` responses.
        slowest: no rate below it is tried with on-policy methods. Fixed data need smaller rates:
            an offline run can leave them for good, an on-policy one sees where it went.
        extras: whether to run what no claim compares: IPO and REINFORCE beside the others,
            training on the rule's label, and other ways to standardise a score.
        reuse_rates: learning rates at which REINFORCE reuses its samples, whatever the pilot says.
    """

    batches: tuple[int, ...] = (2, 3, 4)
    inner_steps: tuple[int, ...] = (2, 4, 8)
    every_value: bool = False
    betas: tuple[float, ...] = (0.02, 0.5)
    temperatures: tuple[float, ...] = ()
    choices: tuple[int, ...] = ()
    slowest: float = 0.0
    extras: bool = True
    reuse_rates: tuple[float, ...] = ()

    def competing(self, setting: Setting) -> tuple[float, ...]:
        if not methods.get(setting.method).on_policy:
            return self.rates
        return tuple(rate for rate in self.rates if rate >= self.slowest)

    def with_rates(self, rates: tuple[float, ...]) -> LengthProfile:
        reused = rates if self.reuse_rates else ()
        return replace(self, rates=rates, slowest=0.0, reuse_rates=reused)

    def configuration(self, setting: Setting, rate: float, seed: int) -> LengthRun:
        options = fields_of(LengthRun, {**dict(self.options), **dict(setting.options)})
        if (share := options.pop("sets", None)) is not None:
            options["batch"] = share * options.get("minibatch", MINIBATCH)
        return length_run(
            setting.method, setting.reward_function, rate, seed, updates=self.updates, **options
        )


# What the profiles of all language-model chapters share: a pilot on seeds that are not reported.
SHARED: dict[str, dict[str, Any]] = {
    "full": dict(
        rates=(1e-3, 3e-4, 1e-4), sweep_seeds=(0, 1), report_seeds=tuple(range(5, 10)),
        dial_sweep_seeds=(), dial_seeds=tuple(range(5, 10)), select_by="final proxy",
    ),
    "cpu": dict(rates=(3e-4,), sweep_seeds=(0,), report_seeds=(5, 6), dial_seeds=(5, 6)),
    "smoke": dict(rates=(1e-3,), sweep_seeds=(0,), report_seeds=(5,), dial_seeds=(5,), updates=2),
}  # fmt: skip
# Options of a run at smoke.
SMALL_CAP = 24
SMALL = (("prompts", 4), ("held_out", 4), ("minibatch", 8), ("max_tokens", SMALL_CAP))
FULL = LengthProfile(
    **SHARED["full"], updates=48, options=(("evaluations", 12),), slowest=3e-4,
    reuse_rates=(1e-3, 3e-4),
)  # fmt: skip
GPU_RATES = (1e-4, 3e-5, 1e-5)  # a tenth of the tiny policy's: wider models bear less
TENS = 60  # completions of an update that 10 divides, next to 64
PAPER_RATES = (1e-5, 5e-6, 1e-6, 5e-7, 1e-7)  # Tables 6 to 10
PROFILES: dict[str, LengthProfile] = {
    "smoke": replace(
        FULL,
        **SHARED["smoke"],
        batches=(2,),
        inner_steps=(2,),
        betas=(0.5,),
        reuse_rates=SHARED["smoke"]["rates"],
        options=(("evaluations", 1), *SMALL),
    ),
    "cpu": replace(
        FULL,
        **SHARED["cpu"],
        batches=(4,),
        inner_steps=(8,),
        betas=(0.5,),
        reuse_rates=SHARED["cpu"]["rates"],
        options=(("evaluations", 6),),
    ),
    "full": FULL,
    # SmolLM2-135M-Instruct on one GPU; then the paper's policy, reward model and rates.
    "gpu": replace(
        FULL,
        rates=GPU_RATES,
        slowest=GPU_RATES[1],
        sweep_seeds=(0,),
        device="cuda",
        options=(("prepared", "smollm2"), ("dtype", "bfloat16"), *FULL.options),
        extras=False,
        reuse_rates=(),
    ),
    "paper": replace(
        FULL,
        rates=PAPER_RATES,
        slowest=0.0,
        updates=72,
        every_value=True,
        betas=(0.01, 0.05, 0.5),
        temperatures=(1.0, 10.0, 20.0),
        choices=(10,),
        reuse_rates=(),
        device="cuda",
        options=(("prepared", "pythia"), ("dtype", "bfloat16"), ("max_tokens", 256)),
    ),
}


def preset(profile: Profile) -> str:
    """The prepared folder that a profile's runs are on, by its name."""
    return dict(profile.options).get("prepared", "tiny")


def _base(names: Iterable[str], tasks: Sequence[str] = (*TASKS, GIVEN)) -> list[Setting]:
    return [Setting(name, task) for task in tasks for name in names]


def _present(settings: list[Setting], profile: LengthProfile) -> list[Setting]:
    """Those whose task the prepared folder has."""
    tasks = prepared_tasks(preset(profile))
    return [s for s in settings if s.reward_function in tasks]


def _dial(names: Iterable[str], option: str, values: Iterable[Any], tasks: Sequence[str]):
    return [
        Setting(name, task, ((option, value),), "base", "dial")
        for task in tasks for name in names for value in values
    ]  # fmt: skip


def _fewer(p: LengthProfile, values: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """A dial's ends, and its largest value alone; all values twice where a profile runs them."""
    ends = sorted({min(values), max(values)})
    return (values, values) if p.every_value else (ends, ends[-1:])


def _on_policy(p: LengthProfile) -> list[Setting]:
    """Dials of B and T, of REINFORCE's rate where it reuses samples, of RWR's temperature, and of
    best-of-N's N."""
    (two, one), (few, most) = _fewer(p, p.batches), _fewer(p, p.inner_steps)
    staleness = _dial(("ppo_token",), "sets", p.batches, ("min",))
    staleness += _dial(("ppo_token",), "sets", two, ("skew", GIVEN))
    staleness += _dial(("ppo_token",), "sets", one, ("mode",))
    staleness += _dial(("rwr", "reinforce"), "sets", one, (*TASKS, GIVEN))
    reuse = _dial(("best_of_n",), "inner_steps", p.inner_steps, ("skew", GIVEN))
    reuse += _dial(("best_of_n",), "inner_steps", few, ("min",))
    reuse += _dial(("ppo_token", "reinforce"), "inner_steps", most, ("min", "skew", GIVEN))
    reuse += [
        Setting("reinforce", task, (*passes, ("learning_rate", rate)), "base", "dial")
        for task in ("min", "skew") for rate in p.reuse_rates
        for passes in ((), (("inner_steps", max(p.inner_steps)),))
    ]  # fmt: skip
    sharper = _dial(("rwr",), "temperature", p.temperatures, ("min",))
    more = [
        Setting("best_of_n", task, (("completions", n), ("minibatch", TENS)), "base", "dial")
        for task in ("min", "skew") for n in p.choices
    ]  # fmt: skip
    learned = ("rwr", "reinforce", "ppo_token")
    base = _base(learned) + _base(("best_of_n",), ("min", "skew", GIVEN))
    return _present(base + staleness + reuse + sharper + more, p)


def _negative_gradient(p: LengthProfile) -> list[Setting]:
    """Offline methods on all tasks, IPO on Min; DPO's beta on Min."""
    names = ("pref_ft", "rwr_offline", "dpo_offline")
    beta = _dial(("dpo_offline",), "beta", p.betas, ("min",))
    return _present(_base(names) + _base(("ipo_offline",), ("min", GIVEN)) + beta, p)


# Weights of the released language-model code: exp(score) up to 20, of scores as they are.
RELEASED_RWR = (("standardise", "none"), ("temperature", 1.0), ("weights", "clipped"))


def _complementary(p: LengthProfile) -> list[Setting]:
    """On-policy contrastive methods against the best of either side; Min with the rule's label."""
    names = ("dpo_offline", "rwr", "ppo_token", "dpo")
    found = _base(names) + _base(("pref_ft",), ("skew", "mode"))
    if p.extras:
        found += _base(("ipo", "reinforce"), ("min",))
        found += _dial(("dpo", "reinforce"), "label", ("rule",), ("min",))
        found += _dial(("reinforce",), "standardise", ("running",), ("min",))
        found += [Setting("rwr", "min", RELEASED_RWR, "base", "dial")]
    return _present(found, p)


TARGET_SHARE = 0.95  # of the way from the reference's mean length to the best method's final one


def with_target(results: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Adds `seconds` (`lib.stats.seconds`) and `target`: the gold reward that the clock runs to.

    The target of a task lies 95% of the way from the reward before the first update to the best
    method's mean final reward: lengths have no natural zero that a share could be taken of.
    """
    results = results.assign(seconds=stats.seconds(results), target=float("nan"))
    for task in results["task"].unique():
        own = results["task"] == task
        start = results.loc[own & (results["update"] == 0), "reward"].mean()
        ends = [
            final(reported(results, s, profile))["reward"].mean()
            for s in _complementary(profile)
            if s.reward_function == task and not s.options and s.method in set(results["method"])
        ]
        if ends:
            results.loc[own, "target"] = start + TARGET_SHARE * (max(ends) - start)
    return results


# Metrics of a method on fixed data that no sampled token enters. Not the shares of pairs ranked
# right: at the start both responses are as likely as under the reference, and rounding ranks them.
ON_DATA = frozenset({"update", "samples", "diverged", "chosen_logratio", "rejected_logratio",
                     "loss", "grad_norm", "pair_margin", "pairs", "effective_samples"})  # fmt: skip


def fragile(run: LengthRun, metric: str) -> bool:
    """See `Grid`: an evaluation draws thousands of tokens, and on-policy training as many more."""
    return methods.get(run.method).on_policy or metric not in ON_DATA


def _engine(device: str = "cpu") -> Engine:
    """Imported when it is wanted: the bandit's chapters need no language-model library."""
    from lib.lm.engine import LengthEngine

    return LengthEngine(device)


_grid = partial(Grid, PROFILES, engine=_engine, fragile=fragile)

CHAPTERS: dict[str, Grid] = {
    "on_policy_length": _grid(_on_policy),
    "negative_gradient_length": _grid(_negative_gradient),
    "complementary_length": _grid(_complementary, derive=with_target),
}

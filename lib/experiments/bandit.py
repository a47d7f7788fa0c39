"""The bandit's profiles and the grids of its chapters.

Learning rates are chosen by the mean reward over all updates: the final reward would choose at
random among the many rates at which an on-policy method ends at the ceiling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from lib import methods, stats
from lib.bandit.config import LEARNING_RATES, BanditRun, bandit_run
from lib.bandit.engine import BanditEngine
from lib.experiments.settings import Grid, Profile, Setting, final, reported
from lib.runs.configurations import checked

REWARDS = ("R1", "R2")
OFFLINE = ("best_of_n_offline", "best_of_n_negative", "rwr_offline", "dpo_offline", "ipo_offline")
ON_POLICY = ("best_of_n", "rwr", "reinforce", "ppo_sequence", "dpo", "ipo")


@dataclass(frozen=True)
class BanditProfile(Profile):
    """The bandit's dials beside what every profile has.

    Args:
        sets, inner_steps, prompts: values of the dials k, T and of the number of prompts.
        switches: how many conventions are switched for each method, None for all.
    """

    sets: tuple[int, ...] = (2, 5, 10, 50)
    inner_steps: tuple[int, ...] = (2, 5, 7, 10, 20)
    prompts: tuple[int, ...] = (20, 50, 100)
    switches: int | None = None

    def configuration(self, setting: Setting, rate: float, seed: int) -> BanditRun:
        options = checked(BanditRun, {**dict(self.options), **dict(setting.options)})
        if methods.get(setting.method).on_policy:
            options.setdefault("held_out", False)  # of interest where the data are fixed
        return bandit_run(
            setting.method, setting.reward_function, rate, seed, updates=self.updates, **options
        )


FULL = BanditProfile(
    rates=LEARNING_RATES,
    sweep_seeds=tuple(range(5)),
    report_seeds=tuple(range(5, 25)),
    dial_sweep_seeds=(0, 1),
    dial_seeds=tuple(range(5, 15)),
)
PROFILES: dict[str, BanditProfile] = {
    "smoke": BanditProfile(
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
    # Few seeds fill a tenth of a stack, so that a dial's cost is its number of settings.
    "cpu": BanditProfile(
        rates=(0.01, 0.003, 0.001),
        sweep_seeds=(0,),
        report_seeds=(5, 6, 7),
        dial_sweep_seeds=(),
        dial_seeds=(5, 6),
        sets=(10,),
        inner_steps=(2,),
        prompts=(20,),
        switches=1,
        updates=40,
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


def _base(names: Iterable[str], rewards: Sequence[str] = REWARDS) -> list[Setting]:
    return [Setting(name, reward) for reward in rewards for name in names]


def _staleness(profile: BanditProfile) -> list[Setting]:
    """Dial B: k sets drawn at once, consumed in k updates; on R2 the other methods' end only."""
    dial = [("best_of_n", reward, k) for reward in REWARDS for k in profile.sets]
    others = [name for name in ON_POLICY if name != "best_of_n"]
    dial += [(name, "R1", k) for name in others for k in profile.sets if k not in (2, 5)]
    dial += [(name, "R2", max(profile.sets)) for name in others]
    return [
        Setting(name, r, (("sets", k),), "neighbours", "report" if name == "best_of_n" else "dial")
        for name, r, k in dial
    ]


def _reuse(profile: BanditProfile) -> list[Setting]:
    """Dial T on R1: every value for RWR (Figure 14), two for the other on-policy methods."""
    few = [t for t in profile.inner_steps if t in (5, 10)] or profile.inner_steps
    judged = ("rwr", "reinforce", "ppo_sequence")
    dial = [("rwr", "R1", t) for t in profile.inner_steps]
    dial += [(name, "R1", t) for name in ON_POLICY if name != "rwr" for t in few]
    return [
        Setting(name, r, (("inner_steps", t),), "base", "dial" if name in judged else "few")
        for name, r, t in dial
    ]


def _conventions(names: Iterable[str], profile: BanditProfile) -> list[Setting]:
    """Each switch of the conventions table, for the methods that it touches; on R1."""
    switches: dict[str, list[tuple[tuple[str, Any], ...]]] = {
        "best_of_n": [(("length", 10),), (("histogram", "clipped"),), (("shift", False),),
                      (("dropout", 0.1),), (("reward_over", "prompt_and_response"),)],
        "rwr": [(("standardise", "prompt"),), (("weights", "raw"),), (("weights", "clipped"),),
                (("temperature", 0.05),), (("reward_over", "prompt_and_response"),)],
        "reinforce": [(("standardise", "prompt"),), (("reward_over", "prompt_and_response"),),
                      (("standardise", "running"),)],
        "ppo_sequence": [(("ratio_over", "token"), ("kl_penalty", 0.05)),
                         (("standardise", "running"),)],
        "dpo": [(("gap", 0.1),), (("completions", 2),)],
        "ipo": [(("completions", 2),), (("reference_dropout", 0.1),)],
        "best_of_n_offline": [(("histogram", "clipped"),)],
        "best_of_n_negative": [(("beta", 0.1),), (("threshold", 0.5),)],
        "dpo_offline": [(("margin_over", "token"),)],
        "ipo_offline": [(("length", 10),), (("histogram", "clipped"),), (("shift", False),),
                        (("dropout", 0.1),), (("margin_over", "token"),),
                        (("dropout", 0.1), ("reference_dropout", 0.1))],
    }  # fmt: skip
    return [
        Setting(name, "R1", switched, "base", "few")
        for name in names for switched in switches.get(name, [])[: profile.switches]
    ]  # fmt: skip


def _one_token() -> list[Setting]:
    """The 1-token bandit of appendix J.3: every method has its own sweep there."""
    return [Setting(n, r, (("length", 1),), seeds="dial") for r in REWARDS for n in OFFLINE]


def _prompts(profile: BanditProfile) -> list[Setting]:
    return [
        Setting("ipo_offline", reward, (("prompts", n),), "neighbours", "dial")
        for reward in REWARDS for n in profile.prompts
    ]  # fmt: skip


WALL_CLOCK = ("ipo_offline", "dpo_offline", "ppo_sequence", "rwr", "ipo", "dpo",
              "best_of_n", "reinforce")  # fmt: skip
ALONE = (("alone", True), ("evaluations", 100), ("held_out", False))


TARGET_SHARE = 0.95  # of the best method's mean final reward


def with_target(results: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Adds `seconds` (`lib.stats.seconds`) and `target`, the reward that the clock runs to."""
    results = results.assign(seconds=stats.seconds(results))
    alone = [s for s in CHAPTERS["wall_clock"].settings(profile) if s.options]
    means = [final(reported(results, s, profile))["reward"].mean() for s in alone
             if s.method in set(results["method"])]  # fmt: skip
    return results.assign(target=TARGET_SHARE * max(means))


_grid = partial(Grid, PROFILES, engine=BanditEngine)

CHAPTERS: dict[str, Grid] = {
    "on_policy": _grid(
        lambda p: _base(ON_POLICY) + _staleness(p) + _reuse(p) + _conventions(ON_POLICY, p)
    ),
    "negative_gradient": _grid(
        lambda p: _base(OFFLINE) + _prompts(p) + _one_token() + _conventions(OFFLINE, p)
    ),
    "complementary": _grid(lambda p: _base(("ipo_offline", "ipo", "rwr", "ppo_sequence"))),
    "wall_clock": _grid(
        lambda p: (
            _base(WALL_CLOCK, ("R1",))
            + [Setting(name, "R1", ALONE, "base", "dial") for name in WALL_CLOCK]
        ),
        jobs=1,  # each run has the machine to itself
        derive=with_target,
    ),
}

"""The full-scale chapter's profiles and grid: kinds of pairs, policies by size, amounts of data.

Learning rates are chosen as for the length problems: by the final proxy reward on seeds that are
not reported, for the base policy and all pairs. Everything else keeps that rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from lib.experiments.length import (
    PAPER_RATES,
    SHARED,
    SMALL,
    PilotProfile,
    fields_of,
    fragile,
    preset,
)
from lib.experiments.settings import Grid, Setting
from lib.lm.config import MINIBATCH, length_run, prepared_folder
from lib.lm.full_scale import JUDGE, KINDS, FullScaleRun
from lib.lm.length import GIVEN
from lib.runs import Engine

OFFLINE = ("pref_ft", "dpo_offline")
ON_POLICY = ("rwr", "reinforce", "dpo")
BATCHED = ("rwr", "reinforce")  # Figure 7's


@dataclass(frozen=True)
class FullScaleProfile(PilotProfile):
    """The full-scale dials beside what every profile has.

    Args:
        sets: values of B as multiples of M. policies: the smallest, the base one, the largest.
        few, many: pairs of the small and the large data set. judge: the gold model.
        unjudged: evaluations of a run that nobody judges, None for as many as of the others.
    """

    sets: tuple[int, ...] = (4,)
    policies: tuple[str, ...] = ("64", "128", "256")
    few: int = 100
    many: int = 800
    judge: str = JUDGE
    unjudged: int | None = None

    def configuration(self, setting: Setting, rate: float, seed: int) -> FullScaleRun:
        options = fields_of(FullScaleRun, {**dict(self.options), **dict(setting.options)})
        minibatch = options.get("minibatch", MINIBATCH)
        options["batch"] = options.pop("sets", 1) * minibatch
        options.setdefault("policy", self.policies[1])
        if options.pop("judged", False):
            options["judge"] = self.judge_here
        elif self.unjudged is not None:
            options["evaluations"] = self.unjudged
        return length_run(
            setting.method, GIVEN, rate, seed, updates=self.updates, run=FullScaleRun,
            kind=setting.reward_function, **options,
        )  # fmt: skip

    @property
    def folder(self) -> Path | None:
        """The folder of pairs of the user's own; None for the shipped ones."""
        name = preset(self)
        return None if name == "tiny" else prepared_folder(name)

    @property
    def judge_here(self) -> str | None:
        """The gold model: of a folder of the user's own, the one that lies there, if one does."""
        if self.folder is None:
            return self.judge
        return "judge" if (self.folder / "judge").is_dir() else None

    def has(self, file: str) -> bool:
        """Whether the runs' folder has a file; one that is not prepared yet will have it."""
        return self.folder is None or not self.folder.is_dir() or (self.folder / file).exists()

    def can_run(self, setting: Setting) -> bool:
        """Whether the folder has the setting's pairs, as many as it compares, and its policy."""
        options, pairs = dict(setting.options), f"{setting.reward_function}.parquet"
        if not (self.has(pairs) and self.has(f"policy-{options.get('policy', self.policies[1])}")):
            return False
        if self.folder is None or not (file := self.folder / pairs).is_file():
            return True
        return options.get("subset", 0) <= _training_pairs(file, file.stat().st_mtime_ns)


@cache
def _training_pairs(file: Path, changed: int) -> int:
    """How many pairs a file has to train on, at its last change."""
    return int((pd.read_parquet(file, columns=["split"])["split"] == "train").sum())


FULL = FullScaleProfile(
    **{**SHARED["full"], "rates": (1e-3, 3e-4)}, updates=48, options=(("evaluations", 4),)
)
PROFILES: dict[str, FullScaleProfile] = {
    "smoke": replace(
        FULL,
        **SHARED["smoke"],
        sets=(2,),
        few=16,
        many=32,
        judge="tiny",  # the policy itself: only to see that it works
        options=(("evaluations", 1), *SMALL),
    ),
    "cpu": replace(
        FULL,
        **SHARED["cpu"],
        updates=24,
        options=(("evaluations", 4), ("prompts", 32)),
    ),
    "full": replace(FULL, unjudged=3),
    # SmolLM2-135M and 360M with a judge of the user's; then the paper's policies and gold model.
    "gpu": replace(
        FULL,
        rates=(1e-5, 5e-6, 1e-6),
        device="cuda",
        policies=("135m", "360m", "1.7b"),
        judge="judge",
        options=(("prepared", ".prepared/full_scale"), ("dtype", "bfloat16"), ("max_tokens", 128)),
    ),
    "paper": replace(
        FULL,
        rates=PAPER_RATES,
        device="cuda",
        sets=(2, 4, 16),
        policies=("sft", "sft", "sft"),  # one size a folder: pairs are token ids
        few=2000,
        many=16_000,
        judge="judge",
        options=(("prepared", ".prepared/full_scale_paper"), ("dtype", "bfloat16"),
                 ("max_tokens", 256)),
    ),
}


def settings(p: FullScaleProfile) -> list[Setting]:
    """Pilots; judged runs, on-policy ones by B; size of the policy by data by kind of pair.

    Without those that the runs' folder does not have the pairs or the policy for.
    """
    base = [Setting(name, kind, seeds="none") for kind in KINDS for name in OFFLINE]
    base += [Setting(name, KINDS[0], seeds="none") for name in ON_POLICY]
    judged = [_kept(s, judged=True) for s in base]
    judged += [_kept(Setting(name, KINDS[0]), judged=True, sets=k)
               for name in BATCHED for k in p.sets]  # fmt: skip
    return [s for s in base + judged + factorial(p) if p.can_run(s)]


def factorial(p: FullScaleProfile) -> list[Setting]:
    """2 x 2 x 2: smallest or largest policy, few or many pairs, similar or distinct ones."""
    ends, data = dict.fromkeys((p.policies[0], p.policies[-1])), (p.few, p.many)
    return [
        _kept(Setting(name, kind), policy=policy, subset=subset)
        for name, kind, policy, subset in product(OFFLINE, KINDS, ends, data)
    ]


def _kept(setting: Setting, **options: Any) -> Setting:
    """A base setting with options, at the learning rate that the base chose."""
    return replace(setting, options=tuple(options.items()), sweep="base", seeds="dial")


def _engine(device: str = "cpu") -> Engine:
    """Imported when it is wanted: other chapters need no language-model library."""
    from lib.lm.judged import FullScaleEngine

    return FullScaleEngine(device)


CHAPTERS: dict[str, Grid] = {"full_scale": Grid(PROFILES, settings, _engine, fragile=fragile)}

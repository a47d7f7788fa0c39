"""The chapters that have runs of their own: what to run, in which order, by which engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import pandas as pd
import torch

from lib.allowed import one_of
from lib.experiments import bandit, full_scale, length
from lib.experiments.settings import (
    Grid,
    Profile,
    Setting,
    report_seeds,
    selector,
    sweep_runs,
)
from lib.lm.config import LengthRun, prepared_folder
from lib.lm.places import check_prepared, cut_otherwise, spelled
from lib.runs import PROFILES, Engine, identity
from lib.runs.configurations import checked

CHAPTERS: dict[str, Grid] = {**bandit.CHAPTERS, **length.CHAPTERS, **full_scale.CHAPTERS}
# Fields of a run that its setting, learning rate and seed decide.
OF_SETTINGS = {"method", "reward_function", "task", "kind", "learning_rate", "seed"}


def check_chapter(chapter: str) -> str:
    """Raises: ValueError that names the chapters with runs of their own."""
    return one_of("chapter", chapter, CHAPTERS)


def profile_named(chapter: str, name: str) -> Profile:
    """A chapter's profile, whatever its device. Raises: ValueError for an unknown one."""
    return CHAPTERS[check_chapter(chapter)].profiles[one_of("profile", name, PROFILES)]


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


def check_options(chapter: str, options: Mapping[str, Any]) -> None:
    """Raises: ValueError for an option that is no field of the chapter's runs, or for a value of
    another kind; FileNotFoundError for a prepared folder that is not there."""
    full = CHAPTERS[check_chapter(chapter)].profiles["full"]
    run = settings(chapter, full)[0].run(full, full.rates[0], 0)
    for name in options:
        one_of("option", name, sorted({f.name for f in fields(run)} - OF_SETTINGS))
    checked(type(run), options)
    if "prepared" in options:
        check_prepared(options["prepared"])


def check_runs(
    chapter: str,
    profile: Profile,
    only: Sequence[str] | None,
    seeds: Sequence[int],
    options: Mapping[str, Any],
) -> None:
    """Builds a run of every setting, with the largest of `seeds`; says so where a folder was made
    with another cap of responses (but at smoke, whose numbers mean nothing).

    Raises: ValueError for a value that a run refuses, or an option that no run takes;
        FileNotFoundError where the data of a run are missing.
    """
    maker = "prepare_full" if chapter in full_scale.CHAPTERS else "prepare"
    folder = length.preset(profile)
    if not (place := prepared_folder(folder)).is_dir():
        raise FileNotFoundError(f"{chapter} at this profile runs on the folder {place}, which is "
                                f"not there: make it with lib.lm.{maker} (book/own_model.ipynb), or"
                                " give another one as prepared")  # fmt: skip
    if not settings(chapter, profile):
        policies = getattr(profile, "policies", ())
        named = f" and policies named {', '.join(dict.fromkeys(policies))}" if policies else ""
        raise ValueError(f"the prepared folder {folder!r} has nothing that {chapter} runs on: make "
                         f"one with lib.lm.{maker}{named}")  # fmt: skip
    try:
        built = [s.run(profile, profile.rates[0], max(seeds, default=0))
                 for s in settings(chapter, profile, only)]  # fmt: skip
        for run in built:
            identity(run)
    except TypeError as error:
        raise ValueError(f"options {dict(options)}: {error}") from error
    for name, value in options.items():
        value = spelled(value) if name == "prepared" else value
        if all(getattr(run, name) != value for run in built):
            raise ValueError(f"no run of {chapter} takes {name}={value!r}: its settings set it")
    own = dict(profile.options).get("max_tokens")
    if "max_tokens" not in options and own != length.SMALL_CAP:
        models = (run for run in built if isinstance(run, LengthRun))
        for said in {cut_otherwise(run) for run in models} - {None}:
            print(f"warning: {said}")


Rates = Callable[[Setting], float]


def stages(
    chapter: str,
    profile: str | Profile,
    only: Sequence[str] | None = None,
    extra_seeds: Sequence[int] = (),
    choose: Callable[[pd.DataFrame | None, Profile], Rates] = selector,
) -> list[Callable[[pd.DataFrame | None], list[Any]]]:
    """What to run, in order: sweeps of base settings; reports and sweeps of dials; their reports.

    Args:
        only: these methods.
        extra_seeds: reported seeds beyond the profile's, of settings that are reported.
        choose: how learning rates are chosen; `assumer` plans without all results.
    """
    profile = profile_named(chapter, profile) if isinstance(profile, str) else profile
    grid = settings(chapter, profile, only)
    swept = list(dict.fromkeys(s if s.sweep == "all" else s.base for s in grid))
    bases = [s for s in grid if s.sweep == "all"]
    dials = [s for s in grid if s.sweep != "all"]

    def sweep(_: Rates) -> list[Any]:
        return [run for s in swept for run in sweep_runs(s, profile, None)]

    def dial_sweep(chosen: Rates) -> list[Any]:
        return report(bases, chosen) + [
            run for s in dials for run in sweep_runs(s, profile, chosen(s.base))
        ]

    def report(some: list[Setting], chosen: Rates) -> list[Any]:
        seeds = {s: report_seeds(s, profile) for s in some}
        return [s.run(profile, chosen(s), seed)
                for s, own in seeds.items() if own for seed in (*own, *extra_seeds)]  # fmt: skip

    return [
        lambda results, stage=stage: stage(choose(results, profile))
        for stage in (sweep, dial_sweep, lambda chosen: report(dials, chosen))
    ]


def engine(chapter: str, device: str = "cpu") -> Engine:
    """What computes a chapter's runs. Raises: RuntimeError if the device is missing: what is
    published can be read without it."""
    grid = CHAPTERS[check_chapter(chapter)]
    if device == "cuda" and not torch.cuda.is_available():
        here = [name for name, profile in grid.profiles.items() if profile.device == "cpu"]
        raise RuntimeError(f"this profile of {chapter} needs a CUDA device to compute and none is "
                           f"available; profiles for the CPU: {here}")  # fmt: skip
    return grid.engine(device)

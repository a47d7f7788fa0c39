"""The chapters that have runs of their own: what to run, in which order, by which engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from lib.allowed import one_of
from lib.experiments import bandit, full_scale, length
from lib.experiments.settings import (
    Grid,
    Profile,
    Setting,
    candidates,
    report_seeds,
    selector,
)
from lib.runs import PROFILES, Engine

CHAPTERS: dict[str, Grid] = {**bandit.CHAPTERS, **length.CHAPTERS, **full_scale.CHAPTERS}


def check_chapter(chapter: str) -> str:
    """Raises: ValueError that names the chapters with runs of their own."""
    return one_of("chapter", chapter, CHAPTERS)


def profile_named(chapter: str, name: str) -> Profile:
    """A chapter's profile. Raises: ValueError for an unknown one, RuntimeError if its device is
    missing."""
    one_of("profile", name, PROFILES)
    profiles = CHAPTERS[check_chapter(chapter)].profiles
    profile = profiles[name]
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"profile {name!r} needs a CUDA device and none is available; "
            f"profiles for the CPU: {[n for n, p in profiles.items() if p.device == 'cpu']}"
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


def stages(
    chapter: str,
    profile: str | Profile,
    only: Sequence[str] | None = None,
    extra_seeds: Sequence[int] = (),
) -> list[Callable[[pd.DataFrame | None], list[Any]]]:
    """What to run, in order: sweeps of base settings; reports and sweeps of dials; their reports.

    Args:
        only: these methods.
        extra_seeds: reported seeds beyond the profile's.
    """
    profile = profile_named(chapter, profile) if isinstance(profile, str) else profile
    grid = settings(chapter, profile, only)
    swept = list(dict.fromkeys(s if s.sweep == "all" else s.base for s in grid))
    dials = [s for s in grid if s.sweep != "all"]

    def sweep(_: pd.DataFrame | None) -> list[Any]:
        return [s.run(profile, *pair) for s in swept for pair in profile.sweep(s)]

    def dial_sweep(results: pd.DataFrame) -> list[Any]:
        chosen = selector(results, profile)
        return report([s for s in grid if s.sweep == "all"], chosen) + [
            s.run(profile, rate, seed)
            for s in dials if s.sweep == "neighbours"
            for rate in candidates(s, profile, chosen(s.base))
            for seed in profile.dial_sweep_seeds
        ]  # fmt: skip

    def report(some: list[Setting], chosen: Callable[[Setting], float]) -> list[Any]:
        return [
            s.run(profile, chosen(s), seed)
            for s in some for seed in (*report_seeds(s, profile), *extra_seeds)
        ]  # fmt: skip

    return [sweep, dial_sweep, lambda results: report(dials, selector(results, profile))]


def assumed(
    chapter: str,
    profile: Profile,
    only: Sequence[str] | None = None,
    extra_seeds: Sequence[int] = (),
) -> list[Any]:
    """All runs of a chapter as if every sweep selected its middle rate: for planning its cost."""
    configs: list[Any] = []
    for s in settings(chapter, profile, only):
        swept = s if s.sweep == "all" else s.base
        rates = profile.competing(swept)
        middle = rates[len(rates) // 2]
        configs += [swept.run(profile, *pair) for pair in profile.sweep(swept)]
        if s.sweep == "neighbours":
            rates = candidates(s, profile, middle)
            configs += [s.run(profile, r, n) for r in rates for n in profile.dial_sweep_seeds]
        seeds = (*report_seeds(s, profile), *extra_seeds)
        configs += [s.run(profile, middle, n) for n in seeds]
    return list(dict.fromkeys(configs))


def engine(chapter: str, device: str = "cpu") -> Engine:
    return CHAPTERS[check_chapter(chapter)].engine(device)

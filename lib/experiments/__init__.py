"""The grids of each chapter, by profile: which runs answer its question, and in which order.

A chapter is a list of settings (a method on a reward function, with options).
"""

from lib.experiments.bandit import OFFLINE, ON_POLICY, REWARDS, with_target
from lib.experiments.chapters import (
    CHAPTERS,
    check_chapter,
    check_options,
    check_runs,
    engine,
    profile_named,
    settings,
    stages,
)
from lib.experiments.settings import (
    Grid,
    NoResults,
    Profile,
    Setting,
    assumer,
    at_best,
    candidates,
    final,
    matching,
    report_seeds,
    reported,
    selected_rate,
    selector,
)
from lib.runs import PROFILES

__all__ = [
    "CHAPTERS",
    "OFFLINE",
    "ON_POLICY",
    "PROFILES",
    "REWARDS",
    "Grid",
    "NoResults",
    "Profile",
    "Setting",
    "assumer",
    "at_best",
    "candidates",
    "check_chapter",
    "check_options",
    "check_runs",
    "engine",
    "final",
    "matching",
    "profile_named",
    "report_seeds",
    "reported",
    "selected_rate",
    "selector",
    "settings",
    "stages",
    "with_target",
]

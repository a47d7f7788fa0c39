"""Recompute a random sample of the published runs and compare: `python -m lib.verify`.

On a machine like the one that published (processor, versions, threads) every metric must be
bit-equal, unless the code was changed since and verified on another one: its rounding may have
changed as well. On another machine the first two evaluated updates must agree within tolerance, and
the final reward must lie in the range of the published seeds of the same setting: rounding flips a
sampled token sooner or later, and from there on a run is another seed of its setting. Another seed
is the lowest or the highest of n + 1 with chance 2 / (n + 1): a few runs of a large sample may lie
outside, and the table fails only where there are more than chance would give. Where fewer than
three seeds were published, as in pilots, nothing says where another seed may end: such a run passes
on its first updates alone, and how many did is printed.

A language model draws thousands of tokens before it is first evaluated, so that one of them has
flipped by then. Metrics that hang on them (`Grid.fragile`) are compared before the first update
alone, where a flip changes one completion of many: they may differ by the standard deviation of the
published runs there. One completion of 64 that turns from short to capped makes half of it.

When a table's whole sample passes although the code changed since, the table is stamped with the
present code; otherwise the exit status is 1 and the runs and values that differ are named. So it is
for a table that could not be verified because a file that its runs need is missing.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lib import runs
from lib.commands import until_stopped
from lib.publish import chapter_engine, check_chapter, configurations, positive
from lib.runs import provenance

FIRST_ROWS = 2  # evaluated updates that other machines must reproduce
EARLY = "first updates within tolerance"
FEW = f"{EARLY}; too few seeds to judge the end"
RELATIVE, ABSOLUTE = 1e-2, 1e-3  # their tolerance: one step amplifies float32's rounding
OUTCOME = "reward"
Fragile = Callable[[str], bool]  # whether a metric of a run hangs on many sampled tokens
MINIMUM_SEEDS = 3  # for a range of seeds to say anything
PLAUSIBLE = 0.01  # chance below which runs outside their range are a failure


@dataclass(frozen=True)
class Verdict:
    """How one recomputed run compares: which test decided, and what differed if it failed.

    Args: chance: that a right run fails the test, 0 for all but the range of the seeds.
    """

    run: str
    passed: bool
    test: str
    chance: float = 0.0

    def __str__(self) -> str:
        return f"{self.run}  {'passed' if self.passed else 'FAILED'}: {self.test}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    experiments = importlib.import_module("lib.experiments")
    options = _parser(experiments).parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    folder = runs.results_folder(options.results)
    try:
        tables = published_tables(folder, options.chapter)
    except (runs.PublishError, OSError, ValueError) as error:  # the last two: of its .json
        print(f"not verified: {folder}: {error}", file=sys.stderr)
        return 1
    if not tables:
        wanted = options.chapter or "any chapter"
        print(f"nothing is published for {wanted} in {folder}", file=sys.stderr)
        return 1
    print(f"a sample of {options.sample} runs per table, --seed {seed}")
    passed = [verify(table, experiments, options.sample, seed, options.jobs) for table in tables]
    return 0 if all(passed) else 1


def published_tables(folder: Path, chapter: str | None = None) -> list[runs.Published]:
    """All published tables, or those of one chapter."""
    return [
        runs.Published.load(path) for path in sorted(folder.glob(f"{chapter or '*'}/*.parquet"))
    ]


def verify(
    published: runs.Published,
    experiments: ModuleType,
    sample: int,
    seed: int,
    jobs: int | None = None,
) -> bool:
    """Recompute and compare a sample of one table, print a line per run, stamp if all pass.

    A table of a device that is missing here is passed over, and said to be. So is one whose data or
    judge are missing, or whose chapter or profile is none, which counts as a failure.
    """
    named = f"{published.chapter}/{published.profile}"
    try:
        engine = chapter_engine(experiments, published.chapter, published.profile)
    except (RuntimeError, ValueError) as error:
        print(f"{named}: not verified: {error}")
        return isinstance(error, RuntimeError)
    try:
        verdicts = _verdicts(published, experiments, engine, sample, seed, jobs)
    except FileNotFoundError as error:
        print(f"{named}: not verified: {error}")
        return False
    print(f"{named}: {published.notice() or 'code as published'}")
    print("\n".join(map(str, verdicts)))
    if few := sum(verdict.test.startswith(FEW) for verdict in verdicts):
        print(f"{few} of {len(verdicts)} runs judged by their first updates alone")
    passed = all(verdict.passed for verdict in verdicts) or _by_chance(verdicts)
    if passed and published.stale():
        _stamp(published, verdicts, seed, engine.modules)
    return passed


def _verdicts(
    published: runs.Published, experiments: ModuleType, engine: runs.Engine, sample: int, seed: int,
    jobs: int | None,
) -> list[Verdict]:  # fmt: skip
    """How a random sample of a table compares. Raises: FileNotFoundError for what runs need."""
    chosen = random.Random(seed).sample(sorted(published.runs), min(sample, len(published.runs)))
    stages = experiments.stages(published.chapter, published.profile)
    configs = configurations(stages, published.table)
    known = [run for run in chosen if run in configs]
    verdicts = [
        Verdict(run, False, "no configuration of the present grid has this identity")
        for run in chosen
        if run not in configs
    ]
    if known:
        fragile = experiments.CHAPTERS[published.chapter].fragile
        verdicts += _recompute(published, [configs[run] for run in known], engine, jobs, fragile)
    return verdicts


def _by_chance(verdicts: Sequence[Verdict]) -> bool:
    """Whether all failures are runs outside their seeds' range, and no more than chance gives."""
    ranged = [verdict for verdict in verdicts if verdict.chance]
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if not all(verdict.chance for verdict in failed):
        return False
    likely = max(verdict.chance for verdict in ranged)
    chance = float(stats.binom.sf(len(failed) - 1, len(ranged), likely))
    print(f"{len(failed)} of {len(ranged)} runs outside their seeds' range, "
          f"by chance with probability {chance:.2g} (failed below {PLAUSIBLE})")  # fmt: skip
    return chance >= PLAUSIBLE


def compare(
    published: runs.Published, run: str, fresh: pd.DataFrame, environment: dict[str, Any],
    fragile: Fragile = lambda metric: False,
) -> Verdict:  # fmt: skip
    """Judge a recomputed run's metrics (as its engine returned them) by the module's rule."""
    old = published.metrics(run)
    old = old.drop(columns=[name for name in old if _is_foreign(name, old, fresh)])
    names = [name for name in old.columns if not name.startswith("seconds_")]
    missing = sorted(set(names) - set(fresh.columns))
    if missing or len(old) != len(fresh):
        return Verdict(run, False, f"{len(fresh)} rows for {len(old)}, without columns {missing}")
    old, fresh = old[names], fresh[names].astype(old[names].dtypes.to_dict())
    difference = _difference(old, fresh)
    if not difference:
        return Verdict(run, True, "bit-equal")
    if _same_kind(published.runs[run], environment) and _same_rounding(published):
        return Verdict(run, False, f"not bit-equal on the same kind of machine: {difference}")
    difference = _early(published, old, fresh, fragile)
    if difference:
        return Verdict(run, False, f"first updates beyond tolerance: {difference}")
    return _within_seeds(published, run, float(fresh[OUTCOME].iloc[-1]))


def _early(
    published: runs.Published, old: pd.DataFrame, fresh: pd.DataFrame, fragile: Fragile
) -> str:
    """The first value of the first evaluated updates that differs by too much ("" if none does)."""
    loose = [name for name in old if fragile(name)]
    firm = [name for name in old if name not in loose]
    difference = _difference(old[firm][:FIRST_ROWS], fresh[firm][:FIRST_ROWS], RELATIVE, ABSOLUTE)
    starts = published.table.groupby("run", sort=False).head(1)
    for name in loose:
        allowed = ABSOLUTE + np.nan_to_num(starts[name].astype(float).std())
        difference = difference or _difference(old[[name]][:1], fresh[[name]][:1], 0.0, allowed)
    return difference


def _same_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a recorded machine is this one, and its versions are those that it records.

    Tables that were published before an engine named a package do not have its version.
    """
    recorded, here = old.get("versions", {}), new.get("versions", {})
    return recorded == {name: here.get(name) for name in recorded} and all(
        old.get(name) == value for name, value in new.items() if name != "versions"
    )


def _same_rounding(published: runs.Published) -> bool:
    """Whether every change of the code since was found to leave all numbers bit-equal."""
    return all(set(check["tests"]) == {"bit-equal"} for check in published.meta["verified"])


def _is_foreign(name: str, old: pd.DataFrame, fresh: pd.DataFrame) -> bool:
    """A metric that only other methods of the table have: this run's rows hold no value of it."""
    return name not in fresh and bool(old[name].isna().all())


def _recompute(
    published: runs.Published, configs: Sequence[Any], engine: runs.Engine, jobs: int | None,
    fragile: Callable[[Any, str], bool],
) -> list[Verdict]:  # fmt: skip
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        store = runs.Store(folder)
        if hasattr(engine, "afresh"):  # it keeps more than runs
            engine = engine.afresh(Path(folder))
        runs.compute(configs, store, engine, jobs)
        for config in configs:
            run, own = runs.identity(config), partial(fragile, config)
            table, record = store.read(run)
            verdicts.append(compare(published, run, table, record["environment"], own))
    return verdicts


def _difference(
    old: pd.DataFrame, new: pd.DataFrame, relative: float = 0.0, absolute: float = 0.0
) -> str:
    """The first value that differs by more than absolute + relative |old| ("" if none does)."""
    for name in old.columns:
        before, after = old[name].to_numpy(), new[name].to_numpy()
        if np.issubdtype(before.dtype, np.number):
            same = np.isclose(after, before, rtol=relative, atol=absolute, equal_nan=True)
        else:
            same = before == after
        if not same.all():
            row = int(np.argmin(same))
            return f"{name} in row {row} is {after[row]!s}, published {before[row]!s}"
    return ""


def _within_seeds(published: runs.Published, run: str, outcome: float) -> Verdict:
    """Whether a final outcome lies in the range of the published seeds of the run's setting."""
    last = published.table.groupby("run", sort=False).tail(1)
    setting = [name for name in published.meta["configuration"] if name != "seed"]
    own = last[last["run"] == run].iloc[0]
    alike = [
        last[name].eq(own[name]) | (last[name].isna() & pd.isna(own[name])) for name in setting
    ]
    seeds = last[np.logical_and.reduce(alike)][OUTCOME]
    low, high = float(seeds.min()) - ABSOLUTE, float(seeds.max()) + ABSOLUTE
    range_of = f"[{low:.4f}, {high:.4f}] of {len(seeds)} published seeds"
    if len(seeds) < MINIMUM_SEEDS:
        return Verdict(run, True, f"{FEW}, final {OUTCOME} {outcome:.4f} beside {range_of}")
    inside = low <= outcome <= high or (np.isnan(outcome) and seeds.isna().any())
    word = "within" if inside else "outside"
    return Verdict(
        run,
        inside,
        f"{EARLY}, final {OUTCOME} {outcome:.4f} {word} {range_of}",
        chance=2 / (len(seeds) + 1),
    )


def _stamp(
    published: runs.Published, verdicts: Sequence[Verdict], seed: int, modules: Sequence[str]
) -> None:
    """Take the present, committed code as the table's own."""
    tests = collections.Counter(verdict.test.partition(",")[0] for verdict in verdicts)
    commit = provenance.commit()
    verification = {"commit": commit, "seed": seed, "tests": dict(tests), "date": provenance.now()}
    try:
        runs.refuse_dirty_tree()
        published.stamp(verification, modules)
    except RuntimeError as error:  # a PublishError, or code that is not the one that was loaded
        print(f"passed, but not stamped: {error}")
        return
    print(f"stamped: verified by a sample of {len(verdicts)} at commit {commit[:10]}")


def _parser(experiments: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lib.verify", description=__doc__)
    parser.add_argument("--sample", type=positive, default=10, help="runs per published table")
    parser.add_argument("--chapter", type=lambda name: check_chapter(experiments, name))
    parser.add_argument("--seed", type=int, help="of the sample (default: drawn, and printed)")
    parser.add_argument("--jobs", type=positive, help="processes (default: one per core)")
    parser.add_argument("--results", type=Path, help="folder of published tables (data/results)")
    return parser


if __name__ == "__main__":
    sys.exit(until_stopped(main, "what is printed above holds"))

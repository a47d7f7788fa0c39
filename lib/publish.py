"""Recompute a chapter's runs, resumably, and publish them: `python -m lib.publish on_policy`.

Results and their provenance go to `data/results/<chapter>/<profile>.parquet` and `.json`. After a
change that moves the numbers of a few runs only, `--only dropout=0.1` computes those that have this
setting and puts them in the place of the old ones; `python -m lib.verify` then tells of the others.
After a grid has grown, `--missing` computes the runs that are not published yet and adds them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from lib import runs
from lib.commands import until_stopped

STORE = runs.ROOT / ".store"  # where finished runs are kept unless told otherwise

Stage = Callable[[pd.DataFrame | None], Sequence[Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    experiments = importlib.import_module("lib.experiments")
    parser = _parser(experiments)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(experiments.CHAPTERS))
        return 0
    if options.chapter is None:
        parser.error(f"name a chapter: {', '.join(experiments.CHAPTERS)}")
    try:
        _publish(experiments, options)
    except (RuntimeError, OSError) as error:  # the latter: what is missing, or cannot be written
        print(f"not published: {error}", file=sys.stderr)
        return 1
    return 0


def compute_stages(
    stages: Sequence[Stage], store: runs.Store, engine: runs.Engine, jobs: int | None = None
) -> pd.DataFrame:
    """The results of all stages; each gets the results of those before it (None: the first).

    A learning rate that is selected on the sweep's results is why stages exist. Raises
    PublishError before a stage is computed if the tree, or a record it would reuse, is not clean.
    """
    results: pd.DataFrame | None = None
    configs: dict[str, Any] = {}
    for stage in stages:
        configs |= {runs.identity(config): config for config in stage(results)}
        if not configs:  # one learning rate: no sweep
            continue
        runs.refuse_dirty_tree()  # before hours of work, and again after
        runs.refuse_dirty_records(list(configs.values()), store, engine)
        # runs of earlier stages are in the store by now, and are read from there
        results = runs.compute(list(configs.values()), store, engine, jobs)
    if results is None:
        raise ValueError("no stages given: this chapter has no runs at this profile")
    return results


def configurations(stages: Sequence[Stage], table: pd.DataFrame) -> dict[str, Any]:
    """Identity -> configuration of all stages, fed from results that exist already."""
    configs: dict[str, Any] = {}
    for number, stage in enumerate(stages):
        earlier = table[table["run"].isin(list(configs))].reset_index(drop=True)
        configs |= {runs.identity(c): c for c in stage(earlier if number else None)}
    return configs


def recompute(
    published: runs.Published,
    stages: Sequence[Stage],
    fields: Mapping[str, Any],
    store: runs.Store,
    engine: runs.Engine,
    jobs: int | None = None,
) -> pd.DataFrame:
    """The published runs whose configuration has these fields, computed by the present code.

    Raises PublishError if there are none, or if the grid, chosen on the new results, would be
    another one.
    """
    configs = configurations(stages, published.table)
    for name in fields:
        known = sorted(field.name for field in dataclasses.fields(next(iter(configs.values()))))
        if name not in known:
            raise runs.PublishError(f"{name!r} is no field of these runs; there are {known}")
    chosen = [
        config for run, config in configs.items()
        if run in published.runs
        and all(getattr(config, name) == value for name, value in fields.items())
    ]  # fmt: skip
    if not chosen:
        raise runs.PublishError(f"no published run has {fields}")
    table = compute_stages([lambda _: chosen], store, engine, jobs)
    if set(configurations(stages, published.merged(table))) != set(configs):
        raise runs.PublishError("with the new results the grid is another one: publish all of it")
    return table


def compute_missing(
    published: runs.Published,
    stages: Sequence[Stage],
    store: runs.Store,
    engine: runs.Engine,
    jobs: int | None = None,
) -> pd.DataFrame:
    """The runs of the grid that are not published yet, computed by the present code.

    Raises PublishError if there are none, if the published ones are of other code, or if the grid,
    chosen on all results, has no use for some of those.
    """
    if notice := published.notice():
        raise runs.PublishError(f"{published.path.name}: {notice}: verify it first")
    configs: dict[str, Any] = {}
    found, whole = None, published.table
    for number, stage in enumerate(stages):
        earlier = whole[whole["run"].isin(list(configs))].reset_index(drop=True)
        configs |= {runs.identity(c): c for c in stage(earlier if number else None)}
        new = [c for run, c in configs.items() if run not in published.runs]
        if new:
            found = compute_stages([lambda _, new=new: new], store, engine, jobs)
            whole = pd.concat([published.table, found], ignore_index=True)
    if found is None:
        raise runs.PublishError(f"all {len(configs):,} runs of the grid are published")
    if unused := set(published.runs) - set(configs):
        raise runs.PublishError(f"with the new results {len(unused):,} published runs are of no "
                                "use to the grid: publish all of it")  # fmt: skip
    return found


def check_chapter(experiments: ModuleType, chapter: str) -> str:
    """The chapter's name; ArgumentTypeError, naming those that exist, for an unknown one."""
    try:
        return experiments.check_chapter(chapter)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def setting(text: str) -> tuple[str, Any]:
    """A field and its value, as in "dropout=0.1". Raises: ArgumentTypeError for other texts."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def positive(text: str) -> int:
    """A count of a command line. Raises: ArgumentTypeError for what is not 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def chapter_engine(experiments: ModuleType, chapter: str, profile: str) -> runs.Engine:
    """The engine of a chapter on the device of a profile; RuntimeError if that is missing."""
    return experiments.engine(chapter, experiments.profile_named(chapter, profile).device)


def _publish(experiments: ModuleType, options: argparse.Namespace) -> None:
    store = runs.Store(options.store)
    stages = experiments.stages(options.chapter, options.profile)
    engine = chapter_engine(experiments, options.chapter, options.profile)
    jobs = options.jobs or experiments.CHAPTERS[options.chapter].jobs
    path = runs.results_folder(options.results) / options.chapter / f"{options.profile}.parquet"
    runs.check_writable(f"the folder {path.parent}", path.parent)
    command = f"python -m lib.publish {options.chapter} --profile {options.profile}"
    if options.only or options.missing:
        if not path.exists():
            raise runs.PublishError(f"{path} is not there: publish all of it")
        published = runs.Published.load(path)
        if options.only:
            name, value = options.only
            command += f" --only {name}={value}"
            table = recompute(published, stages, {name: value}, store, engine, jobs)
            done, change = "replaced {} of {}", published.replace
        else:
            command += " --missing"
            table = compute_missing(published, stages, store, engine, jobs)
            done, change = "added {} to {}", published.add
        records = store.provenance(table["run"].unique())
        change(table, records, command)
        print(f"{done.format(f'{len(records):,}', f'{len(published.runs):,}')} runs: {path}")
        return

    planned = experiments.stages(options.chapter, options.profile, choose=experiments.assumer)
    configs = [config for stage in planned for config in stage(None)]
    whole = runs.plan(configs, store, engine, jobs)
    print(f"all stages, rates assumed where a sweep chooses them: {whole}")
    runs.refuse_missing(engine, lambda: whole)
    table = compute_stages(stages, store, engine, jobs)
    published = runs.publish(table, store.provenance(table["run"].unique()), path, command)
    total = published.meta["totals"]
    kilobytes = path.stat().st_size / 1e3
    print(f"published {total['runs']:,} runs, {total['rows']:,} rows, {kilobytes:,.0f} kB: {path}")


def _parser(experiments: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lib.publish", description=__doc__)
    parser.add_argument("chapter", nargs="?", type=lambda name: check_chapter(experiments, name))
    parser.add_argument("--profile", choices=runs.PROFILES, default="full")
    parser.add_argument(
        "--jobs", type=positive, help="processes (default: one per core, or the chapter's own)"
    )
    parser.add_argument("--store", type=Path, default=STORE, help="folder of finished runs")
    parser.add_argument("--results", type=Path, help="folder to publish into (data/results)")
    some = parser.add_mutually_exclusive_group()
    some.add_argument(
        "--only", type=setting, metavar="FIELD=VALUE",
        help="compute only the published runs with this setting, and replace these",
    )  # fmt: skip
    some.add_argument(
        "--missing", action="store_true",
        help="compute only the runs of the grid that are not published yet, and add them",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the chapters and stop")
    return parser


if __name__ == "__main__":
    sys.exit(until_stopped(main, "finished runs are kept; the same command goes on from there"))

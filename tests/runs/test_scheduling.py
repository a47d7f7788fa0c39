"""Planning and computing: what is missing, once, over processes, through kills."""

from __future__ import annotations

import collections
import dataclasses
import errno
import os
import random
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lib import runs
from lib.runs import records, scheduling
from lib.runs.planning import duration, group, size
from tests.runs.fake import Walk, WalkEngine, exit_code, grid, killed, work


def quiet(text):
    pass


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_table_has_configuration_identity_and_metrics_in_order(store, engine):
    configs = grid()
    table = runs.compute(configs, store, engine, jobs=1, say=quiet)
    metrics = ["update", "reward", "seconds_training", "height"]
    settings = ["method", "step", "seed", "updates", "drift", "note"]
    assert list(table.columns) == [*settings, "run", *metrics]
    assert list(table["run"].unique()) == [runs.identity(config) for config in configs]
    assert len(table) == 6 * 41 and table["drift"].isna().all()
    assert sorted(engine.computed()) == sorted(map(runs.identity, configs))
    assert table["note"].isna().all() and table["note"].dtype == table["run"].dtype


def test_provenance_is_complete(store, engine, two_threads):
    engine = dataclasses.replace(engine, packages=("filelock",))
    runs.compute([Walk(seed=4)], store, engine, jobs=1, say=quiet)
    record = store.read(runs.identity(Walk(seed=4)))[1]
    environment = record["environment"]
    assert record["seed"] == 4 and record["configuration"]["fields"]["step"] == 0.5
    assert environment["threads"] == 1 and environment["device"] == "cpu" and environment["cpu"]
    assert set(environment["versions"]) == {"python", "torch", "numpy", "pandas", "filelock"}
    assert record["code"] == runs.code_fingerprint("lib.runs.files")
    assert record["seconds"] == {"training": 0.0}
    assert {"commit", "dirty", "finished", "block"} <= set(record)


def test_a_run_has_one_thread_and_gives_the_others_back(store, engine, two_threads, monkeypatch):
    seen, step = [], WalkEngine.run

    def spy(*block):
        seen.append(torch.get_num_threads())
        return step(*block)

    monkeypatch.setattr(WalkEngine, "run", spy)
    runs.compute([Walk()], store, engine, jobs=1, say=quiet)
    assert seen == [1] and torch.get_num_threads() == 2


@dataclasses.dataclass(frozen=True)
class Reader(Walk):
    """A walk that says it reads a file."""

    file: str = ""

    def data_files(self):
        return (Path(self.file),)


def test_data_that_are_not_committed_are_named(store, engine, repository):
    repository.write("data/pairs.parquet", "x")
    config = Reader(file=str(repository.root / "data/pairs.parquet"))
    engine = dataclasses.replace(engine, modules=("lib.core",))
    runs.compute([config], store, engine, jobs=1, say=quiet)
    assert store.read(runs.identity(config))[1]["dirty"] == ["data/pairs.parquet"]


def test_processes_give_the_numbers_of_one(store, engine, tmp_path):
    alone = runs.compute(grid(), store, engine, jobs=1, say=quiet)
    together = runs.compute(grid(), runs.Store(tmp_path / "second"), engine, jobs=2, say=quiet)
    pd.testing.assert_frame_equal(alone, together)


def test_only_what_is_missing_is_computed_and_the_reasons_are_told(store, engine):
    said = []
    runs.compute(grid(seeds=2), store, engine, jobs=1, say=quiet)
    damaged = store.path(runs.identity(Walk("plain", seed=0)))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    runs.compute(grid(seeds=3), store, engine, jobs=1, say=said.append)
    assert said[0].startswith("6 runs = 240 run-steps: 1 damaged, 3 stored, 2 missing")
    assert said[1].startswith("recomputed: ") and damaged.name in said[1]
    again = collections.Counter(engine.computed())
    assert again.pop(damaged.stem) == 2 and set(again.values()) == {1}


def test_results_of_changed_code_are_recomputed(store, engine, repository, monkeypatch):
    engine = dataclasses.replace(engine, modules=("lib.core",))
    runs.compute([Walk()], store, engine, jobs=1, say=quiet)
    repository.write("lib/helper.py", "LIMIT = 4  # raised\n")
    text = str(runs.plan([Walk()], store, engine))
    assert "1 stale (lib/helper.py changed)" in text
    monkeypatch.setattr("lib.runs.fingerprint._first_seen", {})
    runs.compute([Walk()], store, engine, jobs=1, say=quiet)
    assert len(engine.computed()) == 2
    assert runs.plan([Walk()], store, engine).counts == {"stored": 1}


def test_a_plan_counts_and_estimates_without_computing(store, engine):
    made = runs.plan([*grid(updates=100), *grid(updates=100)], store, engine, jobs=2)
    assert (len(made.runs), made.updates, made.jobs) == (6, 600, 2)
    assert made.seconds == pytest.approx(4.0)  # 2 methods, each a block of 2 and one half full
    assert str(made) == (
        "6 runs = 600 run-steps: 6 missing. To compute: 6 runs = 600 run-steps, "
        "about 4 s on 2 processes, 120 kB."
    )
    assert not engine.computed() and not store.root.exists()
    with pytest.raises(ValueError, match="no configurations"):
        runs.plan([], store, engine)


class OnGPU(WalkEngine):
    device = "cuda"


def test_a_cpus_estimate_is_not_given_for_a_gpu(store, engine):
    made = runs.plan(grid(), store, OnGPU(engine.log))
    assert made.jobs == 1 and "how long is known for CPUs only, on 1 process" in str(made)


def test_estimates_read_well():
    assert [duration(s) for s in (12.3, 840, 9000)] == ["12 s", "14 min", "2.5 h"]
    assert [size(b) for b in (2e4, 1.2e7, 2.5e9)] == ["20 kB", "12 MB", "2.5 GB"]


def test_blocks_share_a_key_fit_the_size_and_start_with_the_most_expensive(engine):
    blocks = group([*grid(updates=10), *grid(["long"], 3, 90)], engine)
    assert [len(block) for block in blocks] == [2, 1, 2, 1, 2, 1]
    assert all(len({engine.block_key(c) for c in block}) == 1 for block in blocks)
    assert blocks[0][0].method == blocks[1][0].method == "long"


def test_a_failing_block_is_named_and_the_others_are_stored(store, engine):
    failing = dataclasses.replace(engine, fail="other")
    with pytest.raises(runs.RunError, match=r"2 of 4 blocks failed[\s\S]*other went wrong"):
        runs.compute(grid(), store, failing, jobs=1, say=quiet)
    assert runs.plan(grid(), store, engine).counts == {"stored": 3, "missing": 3}


def test_a_full_disk_loses_nothing_that_was_stored(store, engine, monkeypatch):
    write, written = records.pq.write_table, []

    def fills_up(arrow, path, **options):
        if len(written) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        write(arrow, path, **options)

    monkeypatch.setattr(records.pq, "write_table", fills_up)
    with pytest.raises(runs.StoreFullError, match="no space left for a result"):
        runs.compute(grid(), store, engine, jobs=1, say=quiet)
    monkeypatch.setattr(records.pq, "write_table", write)
    assert not list(store.root.rglob("*.tmp"))
    assert runs.plan(grid(), store, engine).counts == {"stored": 3, "missing": 3}
    assert len(runs.compute(grid(), store, engine, jobs=1, say=quiet)) == 6 * 41


def test_wrong_tables_of_an_engine_are_refused(store, engine, monkeypatch):
    for tables, named in ([], "0 tables for 1 runs"), ([pd.DataFrame()], "no rows for the runs"):
        monkeypatch.setattr(WalkEngine, "run", lambda *a, tables=tables: tables)
        with pytest.raises(runs.RunError, match=named):
            runs.compute([Walk()], store, engine, jobs=1, say=quiet)


def test_a_metric_named_as_a_field_is_refused():
    with pytest.raises(ValueError, match=r"\['seed'\]"):
        runs.assemble([Walk()], [pd.DataFrame({"seed": [1]})])


def test_an_interrupt_keeps_what_is_stored(store, engine, monkeypatch):
    said, step = [], WalkEngine.run

    def interrupted(self, configs, checkpoint):
        if configs[0].method == "other":
            raise KeyboardInterrupt
        return step(self, configs, checkpoint)

    monkeypatch.setattr(WalkEngine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.compute(grid(), store, engine, jobs=1, say=said.append)
    assert said[-1].startswith("interrupted: 3 of 6 runs are stored")  # both blocks of "plain"


def test_an_interrupt_counts_published_runs_and_no_stale_ones(
    store, engine, repository, monkeypatch
):
    engine, said = dataclasses.replace(engine, modules=("lib.core",)), []
    table = runs.compute(grid(["other"], seeds=2), store, engine, jobs=1, say=quiet)
    repository.write("lib/helper.py", "LIMIT = 4  # raised\n")
    monkeypatch.setattr("lib.runs.fingerprint._first_seen", {})
    published = types.SimpleNamespace(
        runs=[runs.identity(config) for config in grid(["plain"])],
        notice=lambda: "",
        metrics=lambda run: table,
    )

    def interrupted(self, configs, checkpoint):
        raise KeyboardInterrupt

    monkeypatch.setattr(WalkEngine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.compute(grid(), store, engine, jobs=1, published=published, say=said.append)
    assert said[-1].startswith("interrupted: 3 of 6 runs are stored")


def test_killed_at_random_points_a_run_ends_with_the_numbers_of_an_undisturbed_one(
    store, engine, processes
):
    """After 1 to 12 of 40 steps, and at any point of the next one or two."""
    configs = grid(["plain"], 4, updates=20)
    slow = dataclasses.replace(engine, pause=0.01)
    generator, ends = random.Random(0), []
    while 0 not in ends and len(ends) < 30:
        when = generator.randint(1, 12), generator.uniform(0.0, 0.02)
        worker = processes.Process(target=killed, args=(configs, store.root, slow, *when))
        worker.start()
        ends.append(exit_code(worker))
    assert set(ends) == {0, -signal.SIGKILL} and len(ends) > 2
    disturbed = runs.compute(configs, store, slow, jobs=1, say=quiet)
    resumed = [store.read(runs.identity(c))[1]["block"]["resumed"] for c in configs]
    assert sum(resumed) > 0
    undisturbed = runs.compute(configs, runs.Store(store.root / "2"), engine, jobs=1, say=quiet)
    columns = ["run", "update", "reward"]
    pd.testing.assert_frame_equal(disturbed[columns], undisturbed[columns])
    assert not list(store.root.glob("checkpoints/*"))


def test_a_block_killed_while_it_was_stored_is_finished_from_its_checkpoint(
    store, engine, monkeypatch
):
    configs, store = grid(["plain"], 2), runs.Store(store.root, 0.0)
    write = runs.Store.write

    def dies(self, run, table, provenance):
        if run == runs.identity(configs[1]):
            raise SystemExit
        write(self, run, table, provenance)

    monkeypatch.setattr(runs.Store, "write", dies)
    with pytest.raises(SystemExit):
        runs.compute(configs, store, engine, jobs=1, say=quiet)
    monkeypatch.setattr(runs.Store, "write", write)
    runs.compute(configs, store, engine, jobs=1, say=quiet)
    assert store.read(runs.identity(configs[1]))[1]["block"] == {"runs": 2, "resumed": 1}


def test_a_block_that_was_stopped_is_no_hindrance_to_fewer_runs(store, engine, monkeypatch):
    configs, store = grid(["plain"], 2), runs.Store(store.root, 0.0)

    def dies(self, run, table, provenance):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(runs.Store, "write", dies)
        with pytest.raises(SystemExit):
            runs.compute(configs, store, engine, jobs=1, say=quiet)
    found = runs.compute(configs[1:], store, engine, jobs=1, say=quiet)
    assert found["run"].unique().tolist() == [runs.identity(configs[1])]


def test_another_engines_computation_leaves_what_can_be_resumed(
    store, engine, repository, monkeypatch
):
    """A chapter that was stopped goes on where it was after another chapter has run."""
    store = runs.Store(store.root, 0.0)
    engine = dataclasses.replace(engine, modules=("lib.core",))
    other = dataclasses.replace(engine, modules=("lib.other",))

    def dies(self, run, table, provenance):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(runs.Store, "write", dies)
        with pytest.raises(SystemExit):
            runs.compute([Walk()], store, engine, jobs=1, say=quiet)
    runs.compute([Walk(seed=1)], store, other, jobs=1, say=quiet)
    runs.compute([Walk()], store, engine, jobs=1, say=quiet)
    assert store.read(runs.identity(Walk()))[1]["block"]["resumed"] == 1


def test_workers_look_for_lib_where_this_process_has_it(store, engine, monkeypatch):
    """A notebook's path may hold its checkout as "" alone, which is another folder to a worker."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    runs.compute(grid(), store, engine, jobs=1, say=quiet)
    assert sys.path[0] == str(Path(__file__).resolve().parents[2])


def test_two_processes_on_one_store_compute_each_run_once(store, engine, processes):
    slow = dataclasses.replace(engine, pause=0.005)
    orders = [grid(seeds=5, updates=20), grid(seeds=5, updates=20)[::-1]]
    workers = [processes.Process(target=work, args=(o, store.root, slow)) for o in orders]
    for worker in workers:
        worker.start()
    assert [exit_code(worker) for worker in workers] == [0, 0]
    counts = collections.Counter(engine.computed())
    assert counts == {runs.identity(config): 1 for config in orders[0]}


def test_a_dead_owners_runs_are_taken_over(store, engine, processes):
    stuck = dataclasses.replace(engine, pause=600.0)
    given = grid(seeds=1), store.root, stuck
    owner = processes.Process(target=work, args=given, daemon=True)
    owner.start()
    deadline = time.monotonic() + 120
    while not list(store.root.glob("locks/*")):
        assert owner.is_alive() and time.monotonic() < deadline, "the owner has taken no lock"
        time.sleep(0.05)
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    table = runs.compute(grid(seeds=1), store, engine, jobs=1, say=quiet)
    assert np.isfinite(table["reward"]).all() and len(engine.computed()) == 2


@pytest.mark.parametrize("name", ["dpo@min", ""])
def test_the_bar_says_what_a_run_is_called(tmp_path, name):
    report = scheduling._Reporter(tmp_path / "block", name)
    report(0.5, {"gold": "-3", "proxy": "1"})
    moved = []
    bar = types.SimpleNamespace(n=0, total=8, update=moved.append,
                                set_postfix_str=lambda text, refresh: moved.append(text))
    scheduling._move(bar, {tmp_path / "block": 8})
    assert moved == [f"{name}: gold -3, proxy 1".removeprefix(": "), 4]

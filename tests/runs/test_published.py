"""Publishing: small, complete, refused when it could not be reproduced."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pandas as pd
import pytest

from lib import publish as command
from lib import runs
from lib.runs import published as module
from tests.runs import fake
from tests.runs.fake import Walk, WalkEngine, grid


def quiet(text):
    pass


@pytest.fixture
def engine(tmp_path, repository):
    return WalkEngine(tmp_path / "log", modules=("lib.core",), pause=1e-4)


def computed(configs, store, engine):
    table = runs.compute(configs, store, engine, jobs=1, say=quiet)
    return table, store.provenance(table["run"].unique())


def test_a_round_trip_keeps_every_value_in_float32(store, engine, repository):
    table, records = computed(grid(), store, engine)
    path = repository.root / "data/results/walks/cpu.parquet"
    made = runs.publish(table, records, path, "python -m lib.publish walks --profile cpu")
    assert (made.chapter, made.profile) == ("walks", "cpu")
    expected = table.sort_values(["method", "seed", "update"]).reset_index(drop=True)
    assert list(made.table.columns) == list(table.columns)
    np.testing.assert_array_equal(made.table["reward"], expected["reward"].astype("float32"))
    np.testing.assert_allclose(
        made.table["seconds_training"], expected["seconds_training"], rtol=2e-4
    )
    for name in ("method", "step", "seed", "updates", "drift", "note", "run", "update"):
        pd.testing.assert_series_equal(made.table[name], expected[name])
    assert made.meta["totals"] == {"runs": 6, "rows": 246, "seconds": {"training": 0.0}}
    assert made.meta["command"] == "python -m lib.publish walks --profile cpu"
    assert len(made.meta["environments"]) == 1
    run = runs.identity(Walk("other", seed=1))
    assert made.runs[run]["finished"] == records[run]["finished"]
    assert made.meta["code"] == records[run]["code"]
    assert list(made.metrics(run).columns) == ["update", "reward", "seconds_training", "height"]
    with pytest.raises(KeyError, match="0" * 20):
        made.metrics("0" * 20)


def test_publishing_twice_gives_the_same_bytes(store, engine, repository):
    table, records = computed(grid(), store, engine)
    path = repository.root / "data/results/walks/cpu.parquet"
    runs.publish(table, records, path)
    before = path.read_bytes()
    runs.publish(table.iloc[::-1].sort_values("update", kind="stable"), records, path)
    assert path.read_bytes() == before


@pytest.fixture
def walks(store, engine, repository):
    """Six walks, published at the first commit."""
    table, records = computed(grid(), store, engine)
    return runs.publish(table, records, repository.root / "data/results/walks/cpu.parquet")


def test_replaced_runs_name_their_own_commit_and_the_others_keep_theirs(
    walks, engine, repository, tmp_path
):
    few = [Walk("other", seed=seed) for seed in (0, 2)]
    repository.write("README", "")
    repository.commit()
    moved = dataclasses.replace(engine, shift=1.0)
    table, records = computed(few, runs.Store(tmp_path / "again"), moved)
    made = walks.replace(table, records, "again")
    for run, before in walks.runs.items():
        expected, own = walks.metrics(run), made.metrics(run)
        if run not in records:
            assert made.runs[run] == before
        else:
            assert made.runs[run]["commit"] == records[run]["commit"] != before["commit"]
            expected["reward"] = (table[table["run"] == run]["reward"]).to_numpy("float32")
            own, expected = (t.drop(columns="seconds_training") for t in (own, expected))
        pd.testing.assert_frame_equal(own, expected, check_exact=True)
    assert list(made.table["run"]) == list(walks.table["run"])
    same = ("commit", "command", "published", "code", "verified", "configuration")
    assert all(made.meta[name] == walks.meta[name] for name in same)
    assert {k: made.meta["totals"][k] for k in ("runs", "rows")} == {"runs": 6, "rows": 246}
    (entry,) = made.meta["replaced"]
    assert (entry["runs"], entry["command"]) == (2, "again")
    assert made.changes().startswith(f"2 runs again at commit `{entry['commit'][:10]}`, 20")
    assert walks.changes() == ""


def test_replacing_runs_by_the_same_ones_gives_the_same_bytes(walks, store, engine):
    before = walks.path.read_bytes()
    table, records = computed(grid(seeds=1), store, engine)
    made = walks.replace(table, records)
    assert walks.path.read_bytes() == before
    assert made.meta["environments"] == walks.meta["environments"]


def test_totals_follow_the_seconds_of_replaced_runs(walks, store, engine):
    table, records = computed(grid(seeds=1), store, engine)
    slow = {run: {**record, "seconds": {"training": 10.0}} for run, record in records.items()}
    assert walks.replace(table, slow).meta["totals"]["seconds"] == {"training": 20.0}


def test_a_stale_table_stays_stale_when_some_runs_are_replaced(
    walks, engine, repository, tmp_path, monkeypatch
):
    repository.write("lib/helper.py", "LIMIT = 50\n")
    repository.commit()
    module.fingerprint._first_seen.clear()
    table, records = computed([Walk()], runs.Store(tmp_path / "again"), engine)
    assert walks.replace(table, records).stale() == ["lib/helper.py"]


def test_added_runs_stand_beside_the_others_which_stay_as_they_were(
    walks, engine, repository, tmp_path
):
    repository.write("README", "")
    repository.commit()
    new = [Walk("plain", seed=9), Walk("plain", seed=9, drift=0.5, lean=0.1)]
    table, records = computed(new, runs.Store(tmp_path / "again"), engine)
    made = walks.add(table, records, "more")
    assert set(made.runs) == {*walks.runs, *records}
    for run, before in walks.runs.items():
        assert made.runs[run] == before
        pd.testing.assert_frame_equal(made.metrics(run), walks.metrics(run), check_exact=True)
    assert {made.runs[run]["commit"] for run in records} == {module.provenance.commit()}
    whole, wholly = computed([*grid(), *new], runs.Store(tmp_path / "whole"), engine)
    at_once = runs.publish(whole, wholly, walks.path.parent / "full.parquet")
    without = [c for c in made.table if not c.startswith("seconds")]
    pd.testing.assert_frame_equal(made.table[without], at_once.table[without], check_exact=True)
    assert made.meta["configuration"] == at_once.meta["configuration"]
    assert "lean" in made.table and "lean" not in walks.table
    assert set(made.table["lean"].dropna()) == {0.1}  # not the nearest float32
    assert {k: made.meta["totals"][k] for k in ("runs", "rows")} == {"runs": 8, "rows": 328}
    assert made.changes().startswith("2 runs more at commit `")
    with pytest.raises(runs.PublishError, match="are in cpu.parquet already"):
        made.add(table, records)


def test_runs_are_added_to_results_of_the_same_code_alone(walks, engine, repository, tmp_path):
    repository.write("lib/helper.py", "LIMIT = 50\n")
    repository.commit()
    module.fingerprint._first_seen.clear()
    table, records = computed([Walk(seed=9)], runs.Store(tmp_path / "again"), engine)
    before = walks.path.read_bytes()
    with pytest.raises(runs.PublishError, match=r"code changed since: lib/helper.py: verify it"):
        walks.add(table, records)
    assert walks.path.read_bytes() == before


def test_runs_that_are_not_published_replace_nothing(walks, store, engine):
    new, records = computed([Walk(seed=9)], store, engine)
    (run,) = records
    with pytest.raises(runs.PublishError, match=f"{run} are not in cpu.parquet: publish again"):
        walks.replace(new, records)
    table, records = computed([Walk()], store, engine)
    with pytest.raises(runs.PublishError, match="width are not in"):
        walks.replace(table.assign(width=1.0), records)


def test_a_dirty_tree_is_refused_now_and_when_a_run_was_computed(store, engine, repository):
    path = repository.root / "data/results/walks/cpu.parquet"
    table, records = computed([Walk()], store, engine)
    repository.write("lib/new.py", "X = 1\n")
    with pytest.raises(runs.PublishError, match="uncommitted changes.*lib/new.py"):
        runs.publish(table, records, path)
    assert not path.exists()
    repository.commit()
    runs.publish(table, records, path)  # the results it leaves in the tree do not make it dirty
    runs.publish(table, records, path)
    repository.write(
        "lib/core.py", "from lib import helper\n\n\ndef double(x):\n    return x + x\n"
    )
    dirty = Walk(seed=7)
    module.fingerprint._first_seen.clear()
    table, records = computed([dirty], store, engine)
    repository.commit()
    with pytest.raises(runs.PublishError, match=f"{runs.identity(dirty)}: lib/core.py"):
        runs.publish(table, records, path)


def test_runs_of_other_code_are_refused(store, engine, repository):
    table, records = computed([Walk()], store, engine)
    repository.write("lib/helper.py", "LIMIT = 50\n")
    repository.commit()
    path = repository.root / "data/results/walks/cpu.parquet"
    with pytest.raises(runs.PublishError, match="computed by other code .*lib/helper.py"):
        runs.publish(table, records, path)


def test_unknown_profiles_and_missing_provenance_are_refused(store, engine, repository):
    table, records = computed([Walk()], store, engine)
    with pytest.raises(ValueError, match=r"huge.parquet names no profile; allowed: smoke"):
        runs.publish(table, records, repository.root / "huge.parquet")
    with pytest.raises(runs.PublishError, match="no provenance given"):
        runs.publish(table, {}, repository.root / "cpu.parquet")


def test_stale_results_say_so_and_are_neither_hidden_nor_recomputed(store, engine, repository):
    table, records = computed(grid(), store, engine)
    made = runs.publish(table, records, repository.root / "data/results/walks/cpu.parquet")
    assert made.stale() == [] and made.notice() == ""
    repository.write("lib/helper.py", "LIMIT = 51\n")
    assert made.stale() == ["lib/helper.py"]
    text = f"computed by commit {made.meta['commit'][:10]}, code changed since: lib/helper.py"
    assert made.notice() == text
    empty = runs.Store(store.root / "empty")
    assert runs.plan(grid(), empty, engine, published=made).counts == {f"published ({text})": 6}
    again = runs.compute(grid(), empty, engine, jobs=1, published=made, say=quiet)
    assert len(engine.computed()) == 6
    np.testing.assert_array_equal(again["reward"], table["reward"].astype("float32"))


def test_a_table_that_is_not_the_described_one_is_refused(store, engine, repository):
    table, records = computed([Walk()], store, engine)
    path = repository.root / "data/results/walks/cpu.parquet"
    runs.publish(table, records, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(runs.PublishError, match="publish again"):
        runs.Published.load(path)


def test_the_largest_profile_is_found(store, engine, repository):
    table, records = computed([Walk()], store, engine)
    results = repository.root / "data/results"
    assert runs.largest_published("walks") is None
    for profile in ("full", "smoke", "cpu"):
        runs.publish(table, records, results / "walks" / f"{profile}.parquet")
    assert runs.largest_published("walks").profile == "full"
    assert runs.largest_published("walks", results).profile == "full"


def test_thousands_of_runs_stay_a_few_megabytes(tmp_path):
    generator = np.random.default_rng(0)
    count, rows = 3000, 26
    metrics = generator.normal(size=(count * rows, 18)).astype("float32")
    made = pd.DataFrame(metrics, columns=[f"metric_{i}" for i in range(18)])
    for name in ("sampling", "scoring", "training", "evaluation"):
        made[f"seconds_{name}"] = generator.uniform(size=(count, rows)).cumsum(axis=1).ravel()
    ids = [f"{i:020x}" for i in generator.permutation(count)]
    made = made.assign(run=np.repeat(ids, rows), update=np.tile(np.arange(rows) * 4, count))
    module._write_table(module._compact(made, []), tmp_path / "full.parquet")
    assert (tmp_path / "full.parquet").stat().st_size < 7e6


@pytest.fixture
def experiments(engine, monkeypatch):
    """Two stages: a sweep over steps, then fresh seeds at the step with the best mean reward."""

    def sweep(results):
        assert results is None
        return [Walk(step=step, seed=seed) for step in (0.1, 0.5) for seed in range(2)]

    def report(results):
        last = results[results["update"] == 40]
        assert set(last["seed"]) == {0, 1}
        return [
            Walk(step=last.groupby("step")["reward"].mean().idxmax(), seed=s) for s in range(5, 9)
        ]

    planned = [sweep, lambda _: [Walk(step=0.5, seed=s) for s in range(5, 9)]]
    made = fake.experiments(engine, [sweep, report], assumed=planned)
    monkeypatch.setitem(sys.modules, "lib.experiments", made)
    return made


def test_the_command_computes_the_stages_and_publishes(
    experiments, engine, repository, tmp_path, capsys
):
    arguments = ["walks", "--profile", "cpu", "--jobs", "1", "--store", str(tmp_path / "store")]
    assert command.main(arguments) == 0
    whole, *_ = capsys.readouterr().out.splitlines()
    assert whole.startswith("all stages, ") and "8 runs = 320 run-steps: 8 missing." in whole
    made = runs.largest_published("walks")
    assert made.meta["totals"]["runs"] == 8
    assert made.meta["command"] == "python -m lib.publish walks --profile cpu"
    assert sorted(made.table["seed"].unique()) == [0, 1, 5, 6, 7, 8]
    before = len(engine.computed())
    assert command.main(arguments) == 0  # resumed: all is stored
    assert len(engine.computed()) == before
    repository.write("lib/core.py", "X = 1\n")
    assert command.main(arguments) == 1
    assert "uncommitted changes" in capsys.readouterr().err
    assert command.main(["--list"]) == 0
    assert capsys.readouterr().out == "walks\nother\n"


def test_the_command_replaces_the_runs_with_a_setting(experiments, repository, tmp_path, capsys):
    arguments = ["walks", "--profile", "cpu", "--jobs", "1"]
    assert command.main([*arguments, "--only", "seed=6"]) == 1
    assert "cpu.parquet is not there: publish all of it" in capsys.readouterr().err
    assert command.main([*arguments, "--store", str(tmp_path / "store")]) == 0
    before = runs.largest_published("walks")
    again = [*arguments, "--store", str(tmp_path / "again"), "--only"]
    assert command.main([*again, "seed=6"]) == 0
    assert "replaced 1 of 8 runs" in capsys.readouterr().out
    made = runs.largest_published("walks")
    assert made.path.read_bytes() == before.path.read_bytes()
    assert made.meta["replaced"][0]["command"].endswith("walks --profile cpu --only seed=6")
    assert command.main([*again, "seed=99"]) == 1
    assert "no published run has {'seed': 99}" in capsys.readouterr().err
    assert command.main([*again, "methods=walk"]) == 1
    assert "'methods' is no field of these runs; there are [" in capsys.readouterr().err


def test_the_command_adds_what_a_larger_grid_has_and_computes_nothing_else(
    experiments, engine, repository, tmp_path, monkeypatch, capsys
):
    arguments = ["walks", "--profile", "cpu", "--jobs", "1"]
    assert command.main([*arguments, "--missing"]) == 1
    assert "cpu.parquet is not there: publish all of it" in capsys.readouterr().err
    assert command.main([*arguments, "--store", str(tmp_path / "store")]) == 0
    before, done = runs.largest_published("walks"), len(engine.computed())
    again = [*arguments, "--store", str(tmp_path / "again"), "--missing"]
    assert command.main(again) == 1
    assert "all 8 runs of the grid are published" in capsys.readouterr().err
    sweep, report = experiments.stages("walks", "cpu")
    more = [sweep, lambda results: [*report(results), Walk("other", seed=7)]]
    monkeypatch.setattr(experiments, "stages", lambda *_, **__: more)
    assert command.main(again) == 0
    assert "added 1 to 8 runs" in capsys.readouterr().out
    made = runs.largest_published("walks")
    assert len(engine.computed()) == done + 1
    assert len(made.runs) == 9 and set(before.runs) < set(made.runs)
    assert made.meta["added"][0]["command"].endswith("walks --profile cpu --missing")


def test_a_sweep_that_has_grown_feeds_what_comes_after_it(
    experiments, engine, repository, tmp_path, monkeypatch, capsys
):
    arguments = ["walks", "--profile", "cpu", "--jobs", "1"]
    assert command.main([*arguments, "--store", str(tmp_path / "store")]) == 0
    before, (sweep, report) = runs.largest_published("walks"), experiments.stages("walks", "cpu")
    best = before.table[before.table["seed"] == 5]["step"].iloc[0]
    again = [*arguments, "--store", str(tmp_path / "again"), "--missing"]

    def grown(step):
        def after(results):
            assert set(results["step"]) == {0.1, 0.5, step}
            return report(results)

        new = [Walk(step=step, seed=seed) for seed in (0, 1)]
        more = [lambda results: [*sweep(results), *new], after]
        monkeypatch.setattr(experiments, "stages", lambda *_, **__: more)

    further = 5.0 if best == 0.5 else -5.0  # than the larger of two steps, or the other way
    grown(further)
    assert command.main(again) == 1
    assert "4 published runs are of no use to the grid: publish" in capsys.readouterr().err
    assert runs.largest_published("walks").meta == before.meta
    grown(-further)
    assert command.main(again) == 0
    assert len(runs.largest_published("walks").runs) == 10


def test_results_of_other_code_are_not_added_to(
    experiments, engine, repository, tmp_path, capsys
):
    arguments = ["walks", "--profile", "cpu", "--jobs", "1"]
    assert command.main([*arguments, "--store", str(tmp_path / "store")]) == 0
    done = len(engine.computed())
    repository.write("lib/helper.py", "LIMIT = 50\n")
    repository.commit()
    module.fingerprint._first_seen.clear()
    assert command.main([*arguments, "--store", str(tmp_path / "again"), "--missing"]) == 1
    assert "code changed since: lib/helper.py: verify it first" in capsys.readouterr().err
    assert len(engine.computed()) == done


def test_results_that_choose_another_grid_replace_nothing(
    experiments, engine, repository, tmp_path, monkeypatch, capsys
):
    arguments = ["walks", "--profile", "cpu", "--jobs", "1"]
    assert command.main([*arguments, "--store", str(tmp_path / "store")]) == 0
    before = runs.largest_published("walks")
    chosen = before.table[before.table["seed"] == 5]["step"].iloc[0]
    moved = dataclasses.replace(engine, shift=-100.0)
    monkeypatch.setattr(experiments, "engine", lambda chapter, device: moved)
    again = [*arguments, "--store", str(tmp_path / "again"), "--only", f"step={chosen}"]
    assert command.main(again) == 1
    assert "the grid is another one" in capsys.readouterr().err
    assert runs.largest_published("walks").meta == before.meta


def test_all_records_of_uncommitted_code_are_named_before_anything_is_computed(
    experiments, engine, store, repository, capsys
):
    repository.write("lib/core.py", "X = 1\n")
    dirty = [Walk(step=0.1, seed=seed) for seed in range(2)]
    computed(dirty, store, engine)
    repository.commit()
    before = engine.computed()
    arguments = ["walks", "--profile", "cpu", "--jobs", "1", "--store", str(store.root)]
    assert command.main(arguments) == 1
    assert engine.computed() == before and len(before) == 2
    said = capsys.readouterr().err
    files = [store.path(runs.identity(walk)) for walk in dirty]
    assert "2 runs" in said and all(f"{file}: lib/core.py" in said for file in files)
    for file in files:
        file.unlink()
    assert command.main(arguments) == 0


def test_a_stage_may_have_nothing_to_run(engine, tmp_path):
    """As a sweep of one learning rate has."""
    store, run = runs.Store(tmp_path / "store"), Walk(step=0.1, seed=5)
    table = command.compute_stages([lambda _: [], lambda _: [run]], store, engine, jobs=1)
    assert set(table["seed"]) == {5}
    with pytest.raises(ValueError, match="no runs at this profile"):
        command.compute_stages([lambda _: []], store, engine, jobs=1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "chapter must be walks or other, got 'nowhere'"),
        (["walks", "--profile", "huge"], "invalid choice: 'huge'"),
        ([], "name a chapter: walks, other"),
        (["walks", "--jobs", "-1"], "'-1' is not a number of at least 1"),
        (["walks", "--jobs", "0"], "'0' is not a number of at least 1"),
        (["walks", "--only", "dropout"], "'dropout' is not FIELD=VALUE"),
    ],
)
def test_bad_arguments_are_named_before_work(experiments, arguments, named, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert named in capsys.readouterr().err


def test_a_store_that_is_a_file_is_said_in_one_line(experiments, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command.main(["walks", "--profile", "cpu", "--store", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == (
        f"not published: the store {tmp_path / 'file'} is a file: name a folder\n"
    )


def test_a_folder_that_cannot_be_published_into_is_said_before_work(experiments, tmp_path, capsys):
    (tmp_path / "file").touch()
    places = ["--store", str(tmp_path / "store"), "--results", str(tmp_path / "file")]
    assert command.main(["walks", "--profile", "cpu", *places]) == 1
    said = f"not published: the folder {tmp_path / 'file' / 'walks'} cannot be written: "
    assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / "store").exists()


def test_what_a_later_stage_lacks_is_said_before_the_first(
    experiments, engine, tmp_path, capsys, monkeypatch
):
    """Also where learning rates have to be chosen first."""

    def lacking(self, configs):
        if any(config.seed == 1 for config in configs):
            raise FileNotFoundError("the judge is not here")

    made = sys.modules["lib.experiments"]
    stages = [lambda _: [Walk(seed=0, updates=10)], lambda _: [Walk(seed=1, updates=10)]]
    monkeypatch.setattr(made, "stages", lambda *_, **__: stages)
    monkeypatch.setattr(made, "assumer", None, raising=False)
    monkeypatch.setattr(WalkEngine, "check", lacking, raising=False)
    before = engine.computed()
    assert command.main(["walks", "--profile", "cpu", "--store", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == "not published: the judge is not here\n"
    assert engine.computed() == before


def test_dataclass_of_published_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        runs.Published(None, None, {}).path = "elsewhere"

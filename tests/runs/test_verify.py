"""Verification: bit-equal here, within the seeds elsewhere, stamped or failed by name."""

from __future__ import annotations

import dataclasses
import shutil
import sys

import pytest

from lib import runs, verify
from tests.runs import fake
from tests.runs.fake import Walk, WalkEngine


def quiet(text):
    pass


CONFIGS = [Walk(seed=seed, updates=10) for seed in range(6)]
CONFIGS += [Walk("other", seed=seed, updates=10) for seed in range(3)]


@pytest.fixture
def published(store, repository, tmp_path):
    engine = WalkEngine(tmp_path / "log", modules=("lib.core",))
    table = runs.compute(CONFIGS, store, engine, jobs=1, say=quiet)
    records = store.provenance(table["run"].unique())
    return runs.publish(table, records, repository.root / "data/results/walks/cpu.parquet")


def experiments(published, monkeypatch, **changes):
    engine = WalkEngine(published.path.parent / "log", modules=("lib.core",), **changes)
    made = fake.experiments(engine, [lambda results: CONFIGS])
    monkeypatch.setitem(sys.modules, "lib.experiments", made)
    return engine


def edit_code(repository):
    repository.write("lib/helper.py", "LIMIT = 2 + 1\n")
    repository.commit()


def other_machine(monkeypatch):
    here = runs.environment("cpu", "float32")
    monkeypatch.setattr(
        "lib.runs.provenance.environment", lambda *about: {**here, "threads": 1, "cpu": "another"}
    )


def test_a_sample_is_recomputed_and_is_bit_equal(published, monkeypatch, capsys):
    engine = experiments(published, monkeypatch)
    assert verify.main(["--sample", "9", "--seed", "1", "--jobs", "1"]) == 0
    assert len(engine.computed()) == 9
    assert capsys.readouterr().out.count("passed: bit-equal") == 9
    assert runs.Published.load(published.path).meta["verified"] == []


def test_a_table_whose_runs_lack_something_fails_and_the_others_are_verified(
    published, monkeypatch, capsys
):
    def lacking(self, configs):
        raise FileNotFoundError("the judge is not here")

    engine = experiments(published, monkeypatch)
    other = published.path.parents[1] / "other"
    shutil.copytree(published.path.parent, other)
    made, plain = sys.modules["lib.experiments"], WalkEngine(engine.log, modules=("lib.core",))
    broken = type("Lacking", (WalkEngine,), {"check": lacking})(engine.log, modules=("lib.core",))
    engines = {"walks": plain, "other": broken}
    monkeypatch.setattr(made, "engine", lambda chapter, device: engines[chapter])
    assert verify.main(["--sample", "2", "--seed", "1", "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert "other/cpu: not verified: the judge is not here" in said
    assert said.count("passed: bit-equal") == 2


def test_an_engine_that_keeps_more_than_runs_starts_afresh(published, monkeypatch, tmp_path):
    """In a folder that is gone when all is compared."""
    engine, folders = experiments(published, monkeypatch), []
    other = dataclasses.replace(engine, log=tmp_path / "other")
    monkeypatch.setattr(WalkEngine, "afresh", lambda _, folder: folders.append(folder) or other,
                        raising=False)  # fmt: skip
    assert verify.main(["--sample", "3", "--seed", "1", "--jobs", "1"]) == 0
    assert not engine.log.exists() and len(other.computed()) == 3
    assert len(folders) == 1 and not folders[0].exists()


def test_changed_code_that_gives_the_same_numbers_is_stamped(published, repository, monkeypatch):
    experiments(published, monkeypatch)
    edit_code(repository)
    assert published.stale() == ["lib/helper.py"]
    monkeypatch.setattr("lib.runs.fingerprint._first_seen", {})
    assert verify.main(["--sample", "2", "--seed", "1", "--jobs", "1"]) == 0
    stamped = runs.Published.load(published.path)
    assert stamped.stale() == []
    assert stamped.meta["verified"][0]["tests"] == {"bit-equal": 2}
    assert stamped.meta["commit"] == published.meta["commit"]
    assert stamped.meta["verified"][0]["commit"] != published.meta["commit"]


@pytest.mark.parametrize(
    ("recorded", "test"),
    [
        ({}, "not bit-equal on the same kind of machine"),  # published before it was named
        ({"filelock": "0.0"}, "first updates within tolerance"),
    ],
)
def test_a_version_counts_where_the_published_record_has_it(published, recorded, test):
    run = runs.identity(CONFIGS[0])
    here = runs.environment("cpu", "float32", ("filelock",))
    assert "filelock" not in published.runs[run]["versions"]
    published.runs[run]["versions"] |= recorded
    fresh = published.metrics(run).assign(reward=lambda table: table["reward"] + 1e-6)
    assert verify.compare(published, run, fresh, here).test.startswith(test)


@pytest.mark.parametrize(
    ("tests", "passes"),
    [({"bit-equal": 2}, False), ({"bit-equal": 1, "first updates within tolerance": 1}, True)],
)
def test_rounding_may_move_once_a_change_was_verified_elsewhere(published, tests, passes):
    published.meta["verified"].append({"tests": tests})
    run = runs.identity(CONFIGS[0])
    fresh = published.metrics(run).assign(reward=lambda table: table["reward"] + 1e-6)
    verdict = verify.compare(published, run, fresh, runs.environment("cpu", "float32"))
    assert verdict.passed is passes


def test_a_stamp_forgets_what_the_runs_no_longer_execute(published, repository, monkeypatch):
    experiments(published, monkeypatch)
    assert "lib/helper.py" in published.meta["code"]
    repository.write("lib/core.py", "def double(x):\n    return 2 * x\n")
    repository.commit()
    monkeypatch.setattr("lib.runs.fingerprint._first_seen", {})
    assert verify.main(["--sample", "2", "--seed", "1", "--jobs", "1"]) == 0
    stamped = runs.Published.load(published.path)
    assert set(stamped.meta["code"]) == {"lib/__init__.py", "lib/core.py"}


def test_uncommitted_code_is_not_stamped(published, repository, monkeypatch, capsys):
    experiments(published, monkeypatch)
    repository.write("lib/helper.py", "LIMIT = 2 + 1\n")
    monkeypatch.setattr("lib.runs.fingerprint._first_seen", {})
    assert verify.main(["--sample", "2", "--jobs", "1"]) == 0
    assert "not stamped: uncommitted changes" in capsys.readouterr().out
    assert runs.Published.load(published.path).stale() == ["lib/helper.py"]


def test_code_that_was_committed_meanwhile_is_not_stamped(published, repository, capsys):
    """While the sample was computed, by the code that this process had loaded."""
    edit_code(repository)
    verify._stamp(published, [], 1, ["lib.core"])
    assert "not stamped: lib/helper.py changed since" in capsys.readouterr().out
    assert runs.Published.load(published.path).stale() == ["lib/helper.py"]


def test_other_numbers_on_the_same_machine_fail_by_name(published, repository, monkeypatch, capsys):
    experiments(published, monkeypatch, shift=1e-4)
    edit_code(repository)
    monkeypatch.setattr("lib.runs.fingerprint._first_seen", {})
    assert verify.main(["--sample", "2", "--seed", "1", "--jobs", "1"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED: not bit-equal on the same kind of machine: reward in row 0") == 2
    assert runs.Published.load(published.path).stale() == ["lib/helper.py"]


@pytest.mark.parametrize(
    ("shift", "status", "text"),
    [
        (1e-4, 0, "passed: first updates within tolerance, final reward"),
        (0.1, 1, "FAILED: first updates beyond tolerance: reward in row 0 is 0.1, published 0.0"),
    ],
)
def test_another_machine_is_judged_by_first_updates_and_seeds(
    published, monkeypatch, capsys, shift, status, text
):
    experiments(published, monkeypatch, shift=shift)
    other_machine(monkeypatch)
    assert verify.main(["--sample", "2", "--seed", "1", "--jobs", "1"]) == status
    assert capsys.readouterr().out.count(text) == 2


def test_a_metric_that_the_run_no_longer_has_fails(published):
    run = runs.identity(CONFIGS[-1])
    fresh = published.metrics(run).drop(columns="height")
    verdict = verify.compare(published, run, fresh, {})
    assert not verdict.passed and "without columns ['height']" in verdict.test


def test_a_final_reward_outside_the_seeds_fails(published, monkeypatch):
    run = runs.identity(CONFIGS[0])
    fresh = published.metrics(run)
    alike = published.table["method"] == "plain"
    last = published.table[alike & (published.table["update"] == 10)]["reward"]
    fresh.loc[10, "reward"] = last.max() + 0.01
    verdict = verify.compare(published, run, fresh, {"cpu": "another"})
    assert not verdict.passed and "outside" in verdict.test and "6 published seeds" in verdict.test
    fresh.loc[10, "reward"] = last.min()
    assert verify.compare(published, run, fresh, {"cpu": "another"}).passed
    assert not verify.compare(published, run, fresh[:-1], {"cpu": "another"}).passed


@pytest.mark.parametrize(("factor", "passes"), [(1.005, True), (1.05, False)])
def test_first_updates_are_held_to_a_hundredth(published, factor, passes):
    first = {run: abs(published.metrics(run).loc[1, "reward"])
             for run in map(runs.identity, CONFIGS)}  # fmt: skip
    run = max(first, key=first.get)
    assert first[run] > 0.3  # half a hundredth of it is beyond the absolute tolerance
    fresh = published.metrics(run)
    fresh.loc[1, "reward"] *= factor
    assert verify.compare(published, run, fresh, {"cpu": "another"}).passed is passes


@pytest.mark.parametrize(
    ("row", "by", "passes"),
    [(0, 0.9, True), (0, 1.1, False), (1, 9.0, True)],  # standard deviations of the first rows
)
def test_a_fragile_metric_is_compared_before_the_first_update_alone(published, row, by, passes):
    """By the spread of where runs start: a flipped token changes one completion of many."""
    first = published.table["update"] == 0
    published.table.loc[first, "height"] = range(first.sum())
    spread = published.table.loc[first, "height"].std()
    run = runs.identity(CONFIGS[-1])
    fresh = published.metrics(run)
    fresh.loc[row, "height"] += by * spread
    verdict = verify.compare(published, run, fresh, {"cpu": "another"}, lambda name: True)
    assert verdict.passed is passes
    assert passes or "height in row 0" in verdict.test
    assert not verify.compare(published, run, fresh, {"cpu": "another"}).passed


def test_a_chapter_says_which_metrics_are_fragile(published, monkeypatch, capsys):
    """Walks that start 0.1 aside pass where their metrics are fragile and start scattered."""
    engine = experiments(published, monkeypatch, shift=0.1)
    made = fake.experiments(engine, [lambda results: CONFIGS], fragile=True)
    monkeypatch.setitem(sys.modules, "lib.experiments", made)
    other_machine(monkeypatch)
    assert verify.main(["--sample", "2", "--seed", "1", "--jobs", "1"]) == 1
    assert "beyond tolerance: reward in row 0" in capsys.readouterr().out  # all start at 0
    monkeypatch.setattr(verify, "ABSOLUTE", 0.2)
    assert verify.main(["--sample", "2", "--seed", "1", "--jobs", "1"]) == 0


def test_chance_is_that_of_the_lowest_and_the_highest_of_all_seeds(published):
    """Of the run itself and the six that are published."""
    run = runs.identity(CONFIGS[0])
    fresh = published.metrics(run).assign(reward=lambda table: table["reward"] + 1e-6)
    verdict = verify.compare(published, run, fresh, {"cpu": "another"})
    assert verdict.chance == pytest.approx(2 / 7)


def test_two_published_seeds_are_too_few_to_judge_the_end(store, repository, tmp_path, monkeypatch,
                                                          capsys):  # fmt: skip
    """A pilot has two: on another processor the first updates decide alone."""
    monkeypatch.setattr(f"{__name__}.CONFIGS", CONFIGS[:2])
    engine = WalkEngine(tmp_path / "log", modules=("lib.core",))
    table = runs.compute(CONFIGS, store, engine, jobs=1, say=quiet)
    path = repository.root / "data/results/walks/cpu.parquet"
    published = runs.publish(table, store.provenance(table["run"].unique()), path)
    run = runs.identity(CONFIGS[0])
    fresh = published.metrics(run)
    fresh.loc[10, "reward"] = 99.0
    verdict = verify.compare(published, run, fresh, {"cpu": "another"})
    assert verdict.passed and verdict.chance == 0
    assert "too few seeds to judge the end, final reward 99.0000" in verdict.test
    fresh.loc[1, "reward"] += 0.1
    assert not verify.compare(published, run, fresh, {"cpu": "another"}).passed

    experiments(published, monkeypatch, shift=1e-4)
    other_machine(monkeypatch)
    edit_code(repository)
    monkeypatch.setattr("lib.runs.fingerprint._first_seen", {})
    assert verify.main(["--sample", "2", "--seed", "1", "--jobs", "1"]) == 0
    assert "2 of 2 runs judged by their first updates alone" in capsys.readouterr().out
    (check,) = runs.Published.load(path).meta["verified"]
    assert check["tests"] == {verify.FEW: 2}


def test_a_run_that_the_grid_no_longer_has_fails(published, monkeypatch, capsys):
    experiments(published, monkeypatch)
    monkeypatch.setattr(f"{__name__}.CONFIGS", [dataclasses.replace(CONFIGS[0], step=0.6)])
    assert verify.main(["--sample", "1", "--jobs", "1"]) == 1
    assert "no configuration of the present grid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--chapter", "nowhere"], "got 'nowhere'"),
        (["--sample", "0"], "'0' is not a number of at least 1"),
        (["--jobs", "-1"], "'-1' is not a number of at least 1"),
    ],
)
def test_bad_arguments_are_named(published, monkeypatch, capsys, arguments, named):
    experiments(published, monkeypatch)
    with pytest.raises(SystemExit):
        verify.main(arguments)
    assert named in capsys.readouterr().err


def test_nothing_published_is_told(repository, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lib.experiments", fake.experiments(None, []))
    assert verify.main(["--results", str(tmp_path / "none")]) == 1
    said = f"nothing is published for any chapter in {tmp_path / 'none'}\n"
    assert capsys.readouterr().err == said


def test_a_table_without_its_json_is_named(published, monkeypatch, capsys):
    experiments(published, monkeypatch)
    published.path.with_suffix(".json").unlink()
    assert verify.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("not verified: ") and str(published.path.with_suffix(".json")) in said


def test_a_table_of_no_chapter_fails_by_name(published, monkeypatch, capsys):
    def unknown(chapter, profile):
        raise ValueError(f"chapter must be one of (), got {chapter!r}")

    experiments(published, monkeypatch)
    monkeypatch.setattr(sys.modules["lib.experiments"], "profile_named", unknown)
    assert verify.main([]) == 1
    said = capsys.readouterr().out
    assert "walks/cpu: not verified: chapter must be one of (), got 'walks'" in said


def test_a_table_of_a_missing_device_is_passed_over_and_told(published, monkeypatch, capsys):
    engine = experiments(published, monkeypatch)

    def missing(chapter, device):
        raise RuntimeError("needs a CUDA device")

    monkeypatch.setattr(sys.modules["lib.experiments"], "engine", missing)
    assert verify.main(["--jobs", "1"]) == 0
    assert "walks/cpu: not verified: needs a CUDA device" in capsys.readouterr().out
    assert not engine.computed()


def outside(count, of, seeds=24):
    chance = 2 / (seeds + 1)
    return [verify.Verdict(str(i), i >= count, "range", chance) for i in range(of)]


@pytest.mark.parametrize(
    ("count", "of", "passes"), [(1, 3, True), (2, 10, True), (3, 3, False), (6, 10, False)]
)
def test_as_many_runs_outside_as_chance_gives_are_no_failure(count, of, passes, capsys):
    assert verify._by_chance(outside(count, of)) is passes
    assert f"{count} of {of} runs outside their seeds' range" in capsys.readouterr().out


def test_another_failure_is_never_chance():
    assert not verify._by_chance([*outside(1, 10), verify.Verdict("x", False, "not bit-equal")])

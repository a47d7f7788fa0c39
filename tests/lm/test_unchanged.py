"""What a process keeps of a prepared folder goes when the folder is prepared again."""

from __future__ import annotations

import os
import shutil

import pandas as pd
import pytest

from lib.lm import gold, judged, problem
from lib.lm.unchanged import kept_while_unchanged
from tests.lm_folder import prepared_folder
from tests.tiny_lm import save_tiny_policy


@pytest.fixture
def folder(tmp_path):
    return prepared_folder(tmp_path / "prepared")


def test_a_function_is_called_again_when_and_only_when_a_file_has_changed(tmp_path):
    calls = []

    @kept_while_unchanged("file", maxsize=2)
    def read(file, more=None):
        calls.append(file)
        return file.read_text()

    file = tmp_path / "a"
    file.write_text("one")
    os.utime(file, (1, 1))
    assert [read(file), read(file)] == ["one", "one"] and len(calls) == 1
    file.write_text("two")
    os.utime(file, (2, 2))
    assert [read(file), read(file)] == ["two", "two"] and len(calls) == 2
    file.write_text("three")
    os.utime(file, (2, 2))
    assert read(file) == "three"  # of another size
    read.cache_clear()
    assert read(file) == "three" and len(calls) == 4


def test_pairs_and_reference_scores_are_those_of_the_present_files(folder):
    where = (folder / "policy", folder / "pairs.parquet", "min")
    before = problem.task_data(*where)
    assert problem.task_data(*where) is before
    scores, _ = problem.reference_scores(*where, 1.0, "float32", "cpu")
    pd.read_parquet(where[1]).groupby("split").head(6).to_parquet(where[1])
    assert len(problem.task_data(*where).pairs["train"]) == 6 < len(before.pairs["train"])
    again, _ = problem.reference_scores(*where, 1.0, "float32", "cpu")
    assert len(again) == 6 < len(scores)
    save_tiny_policy(folder / "policy", seed=1, initializer_range=0.3)
    other, _ = problem.reference_scores(*where, 1.0, "float32", "cpu")
    assert other.shape == again.shape and not other.equal(again)


def test_instructions_are_those_of_the_present_file(tmp_path):
    file = tmp_path / "similar.parquet"
    for text in ("one", "another"):
        pd.DataFrame({"prompt": [[1, 2]], "instruction": [text]}).to_parquet(file)
        assert judged.instructions(file) == {(1, 2): text}


def test_a_judge_is_that_of_the_present_weights_and_outlives_its_scores(tmp_path):
    folder, file = save_tiny_policy(tmp_path / "judge"), tmp_path / "gold.sqlite"
    first = gold.kept_judge(str(folder), "cpu", file)
    first.score(["a"], ["x"])
    assert gold.kept_judge(str(folder), "cpu", file) is first
    shutil.rmtree(folder)
    save_tiny_policy(folder, seed=1)
    second = gold.kept_judge(str(folder), "cpu", file)
    assert second.source.resolved != first.source.resolved

"""The drawings of the chapter length show what is in their tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lib import judges, lengths
from lib.figures import lengths as figures
from tests.lm_folder import prepared_folder


@pytest.fixture(scope="module")
def have(tmp_path_factory):
    return lengths.Prepared(str(prepared_folder(tmp_path_factory.mktemp("have"), prompts=60)))


@pytest.fixture(scope="module")
def verdicts(have):
    return [judges.judged(have, task) for task in lengths.TASKS]


def test_distributions_draw_three_sides_of_three_tasks(have):
    figure, drawn = figures.distributions(lengths.distributions(have), have.target)
    assert len(figure.axes) == 3
    assert drawn.groupby(["task", "side"])["share"].sum().tolist() == pytest.approx([1] * 9)
    for axis, task in zip(figure.axes, lengths.TASKS, strict=True):
        for patch, side in zip(axis.patches, figures.SIDES, strict=True):
            rows = drawn[(drawn["task"] == task) & (drawn["side"] == side)]
            assert patch.get_data().values == pytest.approx(rows["share"].to_numpy())


def test_frontier_is_in_tokens(have):
    table = lengths.frontier(have, np.geomspace(1000, 0.1, 20))
    figure, drawn = figures.frontier(table)
    left, right = figure.axes
    assert sorted(left.lines[0].get_ydata()) == pytest.approx(
        sorted(-table[table["task"] == "min"]["reward"]))  # fmt: skip
    assert (drawn["tokens"] >= -1e-9).all()
    assert "distance" in right.get_ylabel()


def test_accuracy_leaves_out_what_has_no_pairs(verdicts):
    table = judges.accuracy(verdicts)
    figure, drawn = figures.accuracy(table)
    assert "all" not in set(drawn["gap"])
    points = [len(line.get_ydata()) for line in figure.axes[0].lines[:3]]
    assert sum(points) == (drawn["n"] > 0).sum()


def test_calibration_draws_every_bin(verdicts):
    table = judges.calibration(verdicts)
    figure, _ = figures.calibration(table)
    drawn = [len(container[0].get_xdata()) for container in figure.axes[0].containers]
    assert sum(drawn) == len(table)


def test_scores_draw_cut_and_own_texts(have, verdicts):
    parts = [judges.curve(one, judges.cut_scores(have, one.task)) for one in verdicts]
    figure, table = figures.scores(pd.concat(parts), have.target)
    assert len(figure.axes) == 3
    for axis, part in zip(figure.axes, parts, strict=True):
        drawn = [len(container[0].get_xdata()) for container in axis.containers]
        assert drawn == [(part["kind"] == kind).sum() for kind in ("cut", "own")]

"""The first updates against the committed trajectory, and the rules of recording one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests import record_trajectory
from tests.record_trajectory import FILE, METHODS, METRICS, SEEDS, UPDATES, trajectory

RECORDED = json.loads(FILE.read_text())
COMPARED = 3  # updates: later ones part where rounding flips a sampled token
TOLERANCE = 1e-4  # relative


@pytest.mark.parametrize("method", METHODS)
def test_first_updates_are_the_recorded_ones(method, monkeypatch):
    monkeypatch.setattr(record_trajectory, "UPDATES", COMPARED)
    found = trajectory(method)
    for name in METRICS:
        expected = RECORDED["trajectories"][method][name]
        np.testing.assert_allclose(found[name], expected[:COMPARED], rtol=TOLERANCE, err_msg=name)


def test_the_record_is_whole_and_says_where_it_comes_from():
    assert set(RECORDED["trajectories"]) == set(METHODS)
    for metrics in RECORDED["trajectories"].values():
        assert all(np.shape(metrics[name]) == (UPDATES, len(SEEDS)) for name in METRICS)
    assert len(RECORDED["commit"]) == 40
    assert {"torch", "numpy", "python"} <= set(RECORDED["versions"])
    assert RECORDED["device"] == "cpu" and RECORDED["capability"] and RECORDED["cpu"]


def test_a_tree_that_differs_from_the_commit_is_not_recorded(monkeypatch):
    before = FILE.read_bytes()
    monkeypatch.setattr(record_trajectory, "uncommitted", lambda paths: ["lib/losses.py"])
    with pytest.raises(SystemExit, match="commit first: lib/losses.py"):
        record_trajectory.main()
    assert FILE.read_bytes() == before

"""Benchmarks as a command: each one's lines go to the JSON file."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from benchmarks import __main__ as command
from benchmarks import store


def measured(monkeypatch, counts):
    """One process takes 32 seconds, several take 4."""
    monkeypatch.setattr(store, "measure", lambda n: (32.0 if n == 1 else 4.0, Counter(counts)))


def test_the_store_is_a_result_like_the_others(monkeypatch, tmp_path, capsys):
    measured(monkeypatch, {str(run): 1 for run in range(store.RUNS)})
    monkeypatch.setattr("sys.argv", ["benchmarks", "store", "--output", str(tmp_path / "out.json")])
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    assert command.main() == 0
    (line,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (line["name"], line["ratio"], line["ours"], line["theirs"]) == ("store", 8.0, 4.0, 32.0)
    assert "store: 8 times the speed of one process" in capsys.readouterr().out


def test_a_run_that_is_computed_twice_fails(monkeypatch):
    measured(monkeypatch, {str(run): 1 + (run == 3) for run in range(store.RUNS)})
    with pytest.raises(AssertionError, match="'3': 2"):
        list(store.shared(None))

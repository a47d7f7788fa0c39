"""Records, checkpoints and locks."""

from __future__ import annotations

import errno
import os
import signal
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from lib import runs
from lib.runs import files, records
from lib.runs.store import read_checkpoint

CODE = {"lib/core.py": "0"}
RUN = "ab" * 10


def table():
    return pd.DataFrame(
        {"update": [0, 5], "reward": np.float32([0.25, np.nan]), "note": ["first", None]}
    )


def provenance():
    return {"code": CODE, "finished": "2026-01-01T00:00:00+00:00"}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    path, leftover = tmp_path / "new[1]", tmp_path / ".new[1].99999.tmp"
    for folder in (path, leftover):  # what killed writers left
        folder.mkdir()
        (folder / "half").touch()

    def failing(new):
        new.mkdir()
        raise ValueError

    with pytest.raises(ValueError):
        files.write_folder_atomically(path, failing)
    assert [f.name for f in tmp_path.rglob("*")] == ["new[1]", "half"]

    def whole(new):
        new.mkdir()
        (new / "a").write_text("all")

    files.write_folder_atomically(path, whole)
    assert [f.name for f in tmp_path.rglob("*")] == ["new[1]", "a"]


def test_a_record_comes_back_as_it_was(store):
    store.write(RUN, table(), provenance())
    stored, record = store.read(RUN)
    pd.testing.assert_frame_equal(stored, table())
    assert record == {**provenance(), "identity": RUN}
    assert store.status(RUN, CODE).kind == "stored"


def test_the_sign_of_a_nan_damages_nothing(store):
    negative = np.float32([0.25, np.copysign(np.nan, -1)])
    store.write(RUN, table().assign(reward=negative), provenance())
    assert store.status(RUN, CODE).kind == "stored"


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_truncated_record_is_damaged(store, kept):
    store.write(RUN, table(), provenance())
    content = store.path(RUN).read_bytes()
    store.path(RUN).write_bytes(content[: int(kept * len(content))])
    status = store.status(RUN, CODE)
    assert status.kind == "damaged"
    assert RUN in status.reason and "\n" not in status.reason


def test_a_disk_that_cannot_be_read_damages_nothing(store, monkeypatch):
    """Else finished runs would be computed again, and checkpoints removed."""
    def refused(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    def missing(*_, **__):
        raise FileNotFoundError  # what safetensors makes of the same

    store.write(RUN, table(), provenance())
    saved = store.checkpoint([RUN], CODE)
    saved.save({"a": torch.ones(1)}, {})
    monkeypatch.setattr("lib.runs.records.pq.ParquetFile", refused)
    with pytest.raises(OSError, match="Too many open files"):
        store.status(RUN, CODE)
    for broken in (refused, missing):
        monkeypatch.setattr("lib.runs.store.safe_open", broken)
        with pytest.raises(OSError):
            saved.load()
        with pytest.raises(OSError):
            store.sweep()
        assert saved.path.exists()


def test_altered_values_and_swapped_files_are_damaged(store):
    store.write(RUN, table(), provenance())
    arrow = pq.read_table(store.path(RUN))
    altered = arrow.set_column(0, "update", [[0, 6]])
    pq.write_table(altered.replace_schema_metadata(arrow.schema.metadata), store.path(RUN))
    assert "checksum" in store.status(RUN, CODE).reason
    store.write(RUN, table(), provenance())
    other = "cd" * 10
    store.path(other).parent.mkdir(parents=True)
    os.replace(store.path(RUN), store.path(other))
    assert f"holds run {RUN}" in store.status(other, CODE).reason


def test_altered_provenance_is_damaged(store):
    store.write(RUN, table(), provenance())
    arrow = pq.read_table(store.path(RUN))
    altered = {key: value.replace(b'"lib/core.py": "0"', b'"lib/core.py": "1"')
               for key, value in arrow.schema.metadata.items()}  # fmt: skip
    assert altered != arrow.schema.metadata
    pq.write_table(arrow.replace_schema_metadata(altered), store.path(RUN))
    assert "checksum" in store.status(RUN, {"lib/core.py": "1"}).reason


def test_a_stale_record_names_the_module(store):
    store.write(RUN, table(), provenance())
    now = {"lib/core.py": "1", "lib/new.py": "2"}
    status = store.status(RUN, now)
    assert (status.kind, status.reason) == ("stale", "lib/core.py, lib/new.py changed")


def test_a_failed_write_leaves_the_old_record_and_no_temporary_file(store, monkeypatch):
    store.write(RUN, table(), provenance())
    monkeypatch.setattr(records.pq, "write_table", disk_full)
    with pytest.raises(runs.StoreFullError, match="no space left"):
        store.write(RUN, table()[:1], provenance())
    pd.testing.assert_frame_equal(store.read(RUN)[0], table())
    assert [p.name for p in store.path(RUN).parent.iterdir()] == [f"{RUN}.parquet"]


def disk_full(arrow, path, **options):
    path.write_bytes(b"half a rec")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_is_flushed_before_it_is_renamed(store, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: done.append("flush"))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    store.write(RUN, table(), provenance())
    assert done == ["flush", "rename", "flush"]


def test_temporary_files_of_a_killed_writer_go_with_the_next_write(store):
    folder = store.path(RUN).parent
    folder.mkdir(parents=True)
    (folder / f".{RUN}.parquet.99999.tmp").write_bytes(b"half")
    store.write(RUN, table(), provenance())
    assert [p.name for p in folder.iterdir()] == [f"{RUN}.parquet"]


def test_a_store_without_space_says_so_before_work(store):
    with pytest.raises(runs.StoreFullError, match="less free space"):
        store.prepare(needed=1e18)
    assert not (store.root / ".gitignore").exists()  # nothing is written where there is no room


def test_a_store_that_cannot_be_written_says_so_before_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=f"the store {tmp_path}/file is a file"):
        runs.Store(tmp_path / "file" / "below")
    with pytest.raises(OSError, match="the store /proc/below cannot be written: "):
        runs.Store("/proc/below").prepare(needed=0)


def test_a_store_in_a_folder_of_ones_own_leaves_its_gitignore_alone(store):
    store.prepare(needed=0)
    ignored = store.root / ".gitignore"
    assert ignored.read_text() == "*\n"
    ignored.write_text("*.tmp\n")
    store.prepare(needed=0)
    assert ignored.read_text() == "*.tmp\n"


def test_a_checkpoint_comes_back_to_its_own_runs_and_code_only(store):
    saved = store.checkpoint([RUN], CODE)
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(3, dtype=torch.uint8)}
    assert saved.load() is None
    saved.save(tensors, {"iteration": 7, "rate": 0.1})
    again = store.checkpoint([RUN], CODE)
    loaded, meta = again.load()
    assert meta == {"iteration": 7, "rate": 0.1} and again.resumed == 1
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert store.checkpoint([RUN, "cd" * 10], CODE).load() is None
    assert store.checkpoint([RUN], {"lib/core.py": "1"}).load() is None
    again.clear()
    assert store.checkpoint([RUN], CODE).load() is None


def test_a_damaged_checkpoint_is_told_and_not_resumed(store, capsys):
    saved = store.checkpoint([RUN], CODE)
    saved.save({"a": torch.ones(100)}, {})
    saved.path.write_bytes(saved.path.read_bytes()[:150])
    assert store.checkpoint([RUN], CODE).load() is None
    assert "is damaged" in capsys.readouterr().out
    temporary = saved.path.with_name(f".{saved.path.name}.1.tmp")
    temporary.touch()  # of a process that writes it anew
    store.sweep()
    assert not saved.path.exists() and temporary.exists()


def test_a_sweep_removes_what_nobody_can_resume(store, repository):
    code, other = runs.code_fingerprint("lib.core"), runs.code_fingerprint("lib.other")
    edited = {**code, "lib/core.py": "1"}
    made = [store.checkpoint([RUN], some) for some in (edited, code, other)]
    finished, old = store.checkpoint(["cd" * 10], code), store.checkpoint(["ef" * 10], code)
    old.header["code"] = runs.combined(code)  # as headers were before
    for checkpoint in (*made, finished, old):
        checkpoint.save({"a": torch.ones(1)}, {})
    store.write("cd" * 10, table(), {**provenance(), "code": code})
    store.sweep()
    assert [c.path.exists() for c in (*made, finished, old)] == [False, True, True, False, False]
    assert store.checkpoints(code) == store.checkpoints(other) == [(RUN,)]
    repository.write("lib/helper.py", "LIMIT = 4\n")  # which lib.core imports
    store.sweep()
    assert [c.path.exists() for c in made] == [False, False, True]


def test_checkpoints_are_due_after_the_interval_and_slow_ones_later(store, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoint = store.checkpoint([RUN], CODE)
    now[0] += 19.9
    assert not checkpoint.due()
    now[0] += 0.1
    assert checkpoint.due()
    checkpoint._saved_at, checkpoint._save_seconds = now[0], 3.0
    now[0] += 59
    assert not checkpoint.due()
    now[0] += 1
    assert checkpoint.due()
    assert read_checkpoint(checkpoint.path) is None


def hold(store, names, ready):
    with store.locked(names, wait=True):
        ready.set()
        time.sleep(600)


def test_a_live_owner_is_waited_for_and_a_dead_ones_lock_is_taken_over(store, processes):
    ready = processes.Event()
    owner = processes.Process(target=hold, args=(store, [RUN], ready), daemon=True)
    owner.start()
    assert ready.wait(120)
    with store.locked(["cd" * 10, RUN], wait=False) as held:
        assert not held
    with store.locked(["cd" * 10], wait=False) as held:
        assert held
    started = time.monotonic()
    os.kill(owner.pid, signal.SIGKILL)
    with store.locked(["cd" * 10, RUN], wait=True) as held:
        assert held
    assert time.monotonic() - started < 60
    owner.join()


def test_a_sweep_leaves_the_checkpoint_of_a_run_that_is_held(store, processes):
    saved = store.checkpoint([RUN], CODE)
    saved.save({"a": torch.ones(1)}, {})
    ready = processes.Event()
    owner = processes.Process(target=hold, args=(store, [RUN], ready), daemon=True)
    owner.start()
    assert ready.wait(120)
    store.sweep()  # its code is none that is here
    assert saved.path.exists()
    owner.kill()
    owner.join()
    store.sweep()
    assert not saved.path.exists()


def test_a_record_that_goes_away_while_sizes_are_read_is_left_out(store):
    store.write(RUN, table(), provenance())
    size = store.path(RUN).stat().st_size
    gone = store.path(RUN).parent / ".gone.parquet.tmp"  # a dangling link: listed, but not there
    gone.symlink_to("nowhere")
    assert store.record_bytes() == size

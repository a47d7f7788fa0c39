"""Fixtures of the store's tests: a store, an engine, a repository of its own."""

from __future__ import annotations

import subprocess

import pytest

from lib import runs
from lib.runs import fingerprint
from tests.runs.fake import WalkEngine


@pytest.fixture
def store(tmp_path):
    return runs.Store(tmp_path / "store")


@pytest.fixture
def engine(tmp_path):
    return WalkEngine(tmp_path / "log")


class Repository:
    """A git repository with a small `lib`, that stands in for this project's."""

    def __init__(self, root):
        self.root = root
        self.git("init", "--quiet")
        self.write("lib/__init__.py", "")
        self.write("lib/core.py", "from lib import helper\n\n\ndef double(x):\n    return 2 * x\n")
        self.write("lib/helper.py", "LIMIT = 3\n")
        self.write("lib/other.py", "UNUSED = 1\n")
        self.commit()

    def git(self, *arguments):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", self.root, *who, *arguments], check=True, capture_output=True)

    def write(self, path, text):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def commit(self):
        self.git("add", "-A")
        self.git("commit", "--quiet", "--message", "state")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "repository").mkdir()
    made = Repository(tmp_path / "repository")
    monkeypatch.setattr(fingerprint, "ROOT", made.root)
    monkeypatch.setattr(fingerprint, "_first_seen", {})
    return made

"""Fixtures that several tests share."""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and a busy machine is no failure.
settings.register_profile(
    "book", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("book")

# Before torch is imported anywhere: results then depend on no core count.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))  # `import build` in tests; `book` is not a package

from tests.minibook import FIGURE, MATH, write_chapter  # noqa: E402


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout under test."""
    return ROOT


@pytest.fixture(scope="session")
def processes():
    """Processes that start in milliseconds: a server has imported for them what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs.fake", "lib.lm.engine"])
    return context


@pytest.fixture(scope="session")
def mini_book(tmp_path_factory) -> Path:
    """A checkout of two small chapters with the real settings, assets and references."""
    mini = tmp_path_factory.mktemp("mini")
    (mini / "lib").mkdir()
    (mini / "lib" / "__init__.py").touch()
    (mini / "lib" / "chapter.py").write_text("VALUE = 1\n")
    (mini / "data").mkdir()
    (mini / "data" / "claims.csv").write_text("id\n")
    shutil.copytree(ROOT / "book" / "assets", mini / "book" / "assets")
    shutil.copy(ROOT / "book" / "references.bib", mini / "book")
    shutil.copy(ROOT / "_config.yml", mini)
    toc = "format: jb-book\nroot: book/index\nchapters:\n  - file: book/status\n"
    (mini / "_toc.yml").write_text(toc)
    load = "from lib.chapter import VALUE"
    write_chapter(mini / "book" / "index.ipynb", MATH, load, FIGURE)
    status = "# Status\n\nSee [index](index.ipynb).\n\n{{ execution_times }}\n"
    status += "\n```{bibliography}\n```\n"
    write_chapter(mini / "book" / "status.ipynb", status, load, FIGURE)
    return mini

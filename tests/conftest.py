"""Fixtures that several tests share."""

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

# Before torch is imported anywhere: results then depend on no core count.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))  # `import build` in tests; `book` is not a package

MATH = r"""# Index

Equation {eq}`ipo` is solved by $\log \pi / \pi_{ref} = 1 / (2 \tau)$;
see {cite:t}`rafailov2023direct`.

$$
\left(\log \frac{\pi(y_w)}{\pi(y_l)} - \frac{1}{2 \tau}\right)^2
$$ (ipo)
"""
FIGURE = """from matplotlib import pyplot
pyplot.plot([0, VALUE]);"""


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout under test."""
    return ROOT


def write_chapter(path: Path, text: str, *code: str) -> None:
    """A chapter as the book wants it: text, setup cell, parameters, then `code` (a figure last)."""
    import build

    tagged = new_code_cell('profile = "auto"\nrecompute = False\nplan_only = False')
    tagged.metadata["tags"] = ["parameters"]
    setup = new_code_cell(build.setup_cell(ROOT), metadata={"tags": ["remove-cell"]})
    cells = [new_markdown_cell(text), setup, tagged, *map(new_code_cell, code)]
    cells[-1].metadata["tags"] = ["figure"]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)


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

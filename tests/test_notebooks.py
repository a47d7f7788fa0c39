"""Every chapter is committed clean, starts anywhere and takes papermill's parameters."""

import shutil
from pathlib import Path

import build
import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
BOOK = build.Book(ROOT, ROOT / "_build")
COMMON = {"profile": "auto", "recompute": False, "plan_only": False}


def read(chapter: str):
    return nbformat.read(BOOK.notebook(chapter), as_version=4)


def code(chapter: str) -> list:
    return [cell for cell in read(chapter).cells if cell.cell_type == "code"]


def parameter_cells(chapter: str) -> list:
    return [c for c in code(chapter) if "parameters" in c.metadata.get("tags", [])]


def test_toc_names_every_notebook_and_no_other():
    notebooks = {
        p.relative_to(ROOT).with_suffix("").as_posix() for p in (ROOT / "book").glob("*.ipynb")
    }
    assert sorted(BOOK.chapters) == sorted(notebooks)
    assert BOOK.chapters[0] == "book/index"


@pytest.mark.parametrize("chapter", BOOK.chapters)
class TestChapter:
    def test_is_valid_and_has_no_outputs(self, chapter):
        nbformat.validate(read(chapter))
        assert [c.execution_count for c in code(chapter) if c.execution_count] == []
        assert [c.outputs for c in code(chapter) if c.outputs] == []

    def test_first_code_cell_is_the_setup_cell(self, chapter):
        """After a change of the cell or of the address: python book/build.py --write-setup"""
        first = code(chapter)[0]
        assert first.source == build.setup_cell(ROOT)
        assert "remove-cell" in first.metadata.tags

    def test_exactly_one_cell_holds_parameters(self, chapter):
        (cell,) = parameter_cells(chapter)
        values = {}
        exec(cell.source, values)  # assignments of constants; anything else fails here
        assert {name: values.get(name) for name in COMMON} == COMMON

    def test_code_cells_are_short(self, chapter):
        lengths = {number: len(c.source.splitlines()) for number, c in enumerate(code(chapter), 1)}
        assert {number: length for number, length in lengths.items() if length > 10} == {}

    def test_kernel_is_any_python_3(self, chapter):
        assert read(chapter).metadata.kernelspec.name == "python3"


@pytest.fixture
def checkout(tmp_path):
    """The parts of a checkout that the setup cell looks for."""
    (tmp_path / "lib").mkdir()
    shutil.copy(ROOT / "lib" / "chapter.py", tmp_path / "lib")
    (tmp_path / "book").mkdir()
    return tmp_path


@pytest.mark.parametrize("folder", [".", "book"], ids=["papermill", "jupyter"])
def test_setup_cell_moves_to_the_root(checkout, folder):
    """Started in the root (papermill) or in book/ (Jupyter), even twice, it ends in the root."""
    setup = build.setup_cell(ROOT)
    cells = [new_code_cell(source) for source in (setup, setup, "print(os.getcwd())")]
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    NotebookClient(notebook, resources={"metadata": {"path": str(checkout / folder)}}).execute()
    assert notebook.cells[-1].outputs[0].text.strip() == str(checkout.resolve())


def test_setup_cell_clones_elsewhere_and_upgrades_nothing(tmp_path, monkeypatch):
    """On Colab: clone the public address, install from the clone without --upgrade, move there."""
    calls = []

    def check_call(command):
        calls.append([str(part) for part in command])
        (tmp_path / "prefbook").mkdir(exist_ok=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.check_call", check_call)
    text = (ROOT / build.SETUP_CELL).read_text()
    exec(text.replace("{repository_url}", "https://github.com/owner/book"), {})
    clone, install = calls
    assert clone == ["git", "clone", "--depth=1", "https://github.com/owner/book", "prefbook"]
    assert install[1:] == ["-m", "pip", "install", "--quiet", "./prefbook[llm]"]
    assert Path.cwd() == tmp_path / "prefbook"

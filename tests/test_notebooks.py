"""Every chapter is committed clean, starts anywhere and takes papermill's parameters."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import build
import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from lib import experiments
from lib.chapter import LIFTS

ROOT = Path(__file__).resolve().parents[1]
BOOK = build.Book(ROOT, ROOT / "_build")
COMMON = {"profile": "auto", "recompute": False, "plan_only": False}
# Calls that do their work when they are made; a notebook shows any other value only where it is the
# last line of its cell.
EFFECTS = {"check_call", "counts", "display", "glue", "glued", "number", "number_at", "numbers",
           "print", "show"}  # fmt: skip


def read(chapter: str):
    return nbformat.read(BOOK.notebook(chapter), as_version=4)


def code(chapter: str) -> list:
    return [cell for cell in read(chapter).cells if cell.cell_type == "code"]


def parameter_cells(chapter: str) -> list:
    return [c for c in code(chapter) if "parameters" in c.metadata.get("tags", [])]


def thrown_away(source: str) -> list[str]:
    """Expressions of a cell whose value nobody sees: not its last line, no call of `EFFECTS`."""
    tree = ast.parse(source)
    seen = tree.body[-1] if tree.body else None
    dropped = (n.value for n in ast.walk(tree) if isinstance(n, ast.Expr) and n is not seen)
    return [ast.unparse(value) for value in dropped if called(value) not in EFFECTS]


def called(value: ast.expr) -> str:
    """ "show" of `page.show(...)`; "" of what is no call."""
    function = getattr(value, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


@pytest.mark.parametrize("source", [
    "tables.shown(a)\nb = 1", "Markdown(a)\nglue('b', 1)", "if a:\n    cards.card(a)", "a\nb",
    "for a in b:\n    tables.shown(a)",
])  # fmt: skip
def test_a_value_that_nobody_sees_is_found(source):
    assert len(thrown_away(source)) == 1


def test_a_value_that_is_shown_is_left_alone():
    shown = "page.show('a', b)\nif a:\n    display(a)\nglue('a', 1)\ntables.shown(a)"
    assert thrown_away(shown) == []


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
        assert first.source == build.setup_cell(ROOT, chapter)
        assert len(first.source.splitlines()) <= 14
        assert "remove-cell" in first.metadata.tags

    def test_exactly_one_cell_holds_parameters(self, chapter):
        (cell,) = parameter_cells(chapter)
        values = {}
        exec(cell.source, values)  # assignments of constants; anything else fails here
        assert {name: values.get(name) for name in COMMON} == COMMON

    def test_a_folder_is_the_profiles_unless_one_is_given(self, chapter):
        (cell,) = parameter_cells(chapter)
        exec(cell.source, values := {})
        assert values.get("prepared") is None

    def test_code_cells_are_short(self, chapter):
        """But for the setup cell, which cannot call `lib`."""
        lengths = {number: len(c.source.splitlines()) for number, c in enumerate(code(chapter), 1)}
        assert {n: length for n, length in lengths.items() if length > 10 and n > 1} == {}

    def test_options_are_a_parameter_of_every_chapter_with_runs(self, chapter):
        own, made = (cell.source for cell in code(chapter)[1:3])
        runs = re.findall(r"\bChapter\(", made)
        assert bool(runs) == ("options = None" in own) == ("options=options" in made)

    def test_plan_only_skips_every_cell_below(self, chapter):
        """No cell after the one that makes the chapter looks like it."""
        _, own, made, *below = (cell.source for cell in code(chapter))
        assert LIFTS.search(own) and LIFTS.search(made)
        assert [source for source in below if LIFTS.search(source)] == []

    def test_every_value_is_shown_or_used(self, chapter):
        assert [value for cell in code(chapter) for value in thrown_away(cell.source)] == []

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
    setup = build.setup_cell(ROOT, "book/on_policy")
    cells = [new_code_cell(source) for source in (setup, setup, "print(os.getcwd())")]
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    NotebookClient(notebook, resources={"metadata": {"path": str(checkout / folder)}}).execute()
    assert notebook.cells[-1].outputs[0].text.strip() == str(checkout.resolve())


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """run(chapter, url) -> commands of the setup cell in an empty folder, where pip may fail."""
    monkeypatch.chdir(tmp_path)
    machine = SimpleNamespace(packages=set(), pip_works=True)

    def run(chapter: str, url: str = "https://github.com/owner/book") -> list[list[str]]:
        calls = []

        def check_call(command):
            calls.append([str(part) for part in command])
            if command[0] == "git":
                (tmp_path / "prefbook" / "lib").mkdir(parents=True)
                (tmp_path / "prefbook" / "lib" / "chapter.py").touch()
            elif not machine.pip_works:
                raise subprocess.CalledProcessError(1, "pip")

        monkeypatch.setattr("subprocess.check_call", check_call)
        found = {name: True for name in machine.packages}
        monkeypatch.setattr("importlib.util.find_spec", found.get)
        address = f'url = "{url}" or'
        exec(build.setup_cell(ROOT, chapter).replace('url = "" or', address), {})
        return calls

    run.machine = machine
    return run


def test_setup_cell_clones_elsewhere_and_upgrades_nothing(colab, tmp_path):
    """On Colab: clone the public address, install from the clone without --upgrade, move there."""
    clone, install = colab("book/length")
    assert clone == ["git", "clone", "--depth=1", "https://github.com/owner/book", "prefbook"]
    assert install[1:] == ["-m", "pip", "install", "--quiet", "./prefbook[llm]"]
    assert Path.cwd() == tmp_path / "prefbook"


def test_setup_cell_installs_language_models_only_where_they_are_used(colab, monkeypatch, tmp_path):
    _, install = colab("book/on_policy")
    assert install[-1] == "./prefbook"
    monkeypatch.chdir(tmp_path)
    colab.machine.packages = {"myst_nb"}
    assert colab("book/on_policy") == []
    monkeypatch.chdir(tmp_path)
    assert colab("book/on_policy_length")[0][-1] == "./prefbook[llm]"


def test_setup_cell_installs_again_after_pip_failed(colab, tmp_path):
    colab.machine.pip_works = False
    with pytest.raises(subprocess.CalledProcessError):
        colab("book/length")
    assert Path.cwd() == tmp_path
    colab.machine.pip_works = True
    assert [command[3] for command in colab("book/length")] == ["install"]


def test_setup_cell_without_an_address_says_where_to_open_the_notebook(colab):
    with pytest.raises(SystemExit, match="a checkout of the book, or papermill --cwd ROOT"):
        colab("book/length", url="")


def test_setup_cell_asks_for_a_restart_when_pyarrow_was_replaced(colab, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(__version__="0.1"))
    with pytest.raises(SystemExit, match="Runtime > Restart session, then run again"):
        colab("book/length")


def test_chapters_of_language_models_are_those_that_need_them():
    """The others' imports work without the extra `llm`, as on Colab."""
    known = {Path(chapter).name for chapter in BOOK.chapters}
    assert set(experiments.length.CHAPTERS) <= build.LANGUAGE_MODELS <= known
    lines = ["import sys", "for name in ('accelerate', 'datasets', 'peft', 'transformers', 'trl'):",
             "    sys.modules[name] = None"]  # fmt: skip
    for chapter in BOOK.chapters:
        if Path(chapter).name not in build.LANGUAGE_MODELS:
            source = "\n".join(cell.source for cell in code(chapter))
            lines += re.findall(r"^(?:from lib|import lib).*", source, re.MULTILINE)
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr

"""Every chapter with runs goes through with any one of its methods, and says what it leaves out."""

import sys
from pathlib import Path

import nbformat
import pytest
from IPython.display import display

from lib import chapter, experiments

ROOT = Path(__file__).resolve().parents[1]
WHOLE = {name: experiments.profile_named(name, "full") for name in experiments.CHAPTERS}
# Every third pair, to be done in a minute: all chapters and most methods are among them.
ONE = sorted({(name, s.method) for name in WHOLE
              for s in experiments.settings(name, WHOLE[name], None)})[::3]  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(chapter, **parameters) -> texts shown, numbers glued; cells run in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(chapter, "FIGURE_DATA", tmp_path / "figure-data")
    texts, numbers = [], {}

    def glue(name, value, display=False):
        numbers[name] = value

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("lib", "myst_nb") and hasattr(module, "glue"):
            monkeypatch.setattr(module, "glue", glue)
    monkeypatch.setattr(chapter, "display", lambda shown: texts.append(getattr(shown, "data", "")))

    def run(name, **parameters):
        notebook = nbformat.read(ROOT / "book" / f"{name}.ipynb", as_version=4)
        _, given, *below = (cell.source for cell in notebook.cells if cell.cell_type == "code")
        names = {"display": display}
        exec(given, names)
        names |= parameters
        for source in below:
            exec(source, names)
        return texts, numbers

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name, method", ONE)
def test_published_results_of_one_method(run, name, method):
    _, numbers = run(name, methods=[method])
    assert [key for key, value in numbers.items() if "nan" in str(value)] == []


def test_the_example_of_the_readme(run, tmp_path):
    """Best-of-N alone has the figure of staleness; the sentence stands in its place."""
    texts, _ = run("on_policy", profile="smoke", recompute=True, methods=["dpo", "rwr"],
                   store=str(tmp_path / "store"))  # fmt: skip
    assert chapter.NOT_DRAWN in texts

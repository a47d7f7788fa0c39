"""Small chapters for the tests of the book's build."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]

MATH = r"""# Index

Equation {eq}`ipo` is solved by $\log \pi / \pi_{ref} = 1 / (2 \tau)$;
see {cite:t}`rafailov2023direct`.

$$
\left(\log \frac{\pi(y_w)}{\pi(y_l)} - \frac{1}{2 \tau}\right)^2
$$ (ipo)
"""
FIGURE = """from matplotlib import pyplot
pyplot.plot([0, VALUE]);"""


def write_chapter(path: Path, text: str, *code: str) -> None:
    """A chapter as the book wants it: text, setup cell, parameters, then `code` (a figure last)."""
    import build

    tagged = new_code_cell('profile = "auto"\nrecompute = False\nplan_only = False')
    tagged.metadata["tags"] = ["parameters"]
    setup = new_code_cell(build.setup_cell(ROOT, path.stem), metadata={"tags": ["remove-cell"]})
    cells = [new_markdown_cell(text), setup, tagged, *map(new_code_cell, code)]
    cells[-1].metadata["tags"] = ["figure"]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)

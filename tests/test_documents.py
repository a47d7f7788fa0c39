"""What README, CONTRIBUTING and the pages print runs as printed, and names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import lib
from lib.runs import code_fingerprint

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("data/*/README.md")),
    *sorted(ROOT.glob("book/*.ipynb")),
]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
# where a command may stand in a line of a console block, and at the start of a piece of code
FIRST = r"(?:^\s*\$ |&& |; |\bdo |\| )"
BARE = r"(?:papermill|torchrun|python3?|pip|jupyter|jupyter-book)\b(?!\.)"


def markdown(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def bare_commands(text: str) -> list[str]:
    """Commands, in console blocks and in the text, that run only with `.venv` activated."""
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [line.strip() for line in lines if re.search(FIRST + BARE, line)]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return found + re.findall(rf"`({BARE} (?!install git\+)[^`]+)`", prose)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_run_without_activating_anything(path):
    assert bare_commands(markdown(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "```console\n$ papermill a.ipynb b.ipynb\n```",
        "1. So:\n   ```console\n   $ python -m lib.verify\n   ```",
        "```console\n$ cd x && torchrun -m lib.lm.run\n```",
        "One run: `torchrun --help`.",
    ],
)
def test_a_bare_command_is_noticed(text):
    assert len(bare_commands(text)) == 1
    assert bare_commands(re.sub(BARE, r".venv/bin/\g<0>", text)) == []


def test_contributing_names_files_and_commands_that_exist():
    named = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:yml|md|csv))`", CONTRIBUTING)
    made = (".store", "book/NAME")
    assert len(named) > 20
    assert [n for n in named if not n.startswith(made) and not (ROOT / n).exists()] == []
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z]+)\b", CONTRIBUTING)) <= set(targets)


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("lib/methods.py", ["_entries", "CHOICES", "INTERVALS"]),
        ("tests/test_methods.py", ["TABLE_1", "BEYOND"]),
        ("tests/test_cards.py", ["test_pushes_by_hand"]),
        ("lib/cards.py", ["METRICS", "EVALUATION", "LENGTH_EVALUATION"]),
        ("lib/bandit/config.py", ["HYPER"]),
        ("lib/lm/config.py", ["HYPER"]),
        ("lib/allowed.py", ["LATER"]),
        ("lib/figures/style.py", ["COLOURS"]),
        ("lib/experiments/bandit.py",
         ["OFFLINE", "ON_POLICY", "_conventions", "WALL_CLOCK", "CHAPTERS"]),
        ("lib/experiments/length.py", ["_on_policy", "_negative_gradient", "_complementary"]),
        ("lib/experiments/full_scale.py", ["OFFLINE", "ON_POLICY", "BATCHED"]),
        ("lib/rankings.py", ["_LENGTH"]),
        ("lib/overview.py", ["QUESTIONS", "_clock"]),
        ("lib/decisions.py", ["PROBLEMS"]),
        ("lib/audit.py", ["HOMES"]),
        ("book/build.py", ["LANGUAGE_MODELS"]),
        ("lib/chapter.py", ["PROSE", "Page", "Chapter", "trial"]),
    ],
)  # fmt: skip
def test_contributing_names_what_the_code_has(file, names):
    code = (ROOT / file).read_text()
    for name in names:
        assert re.search(rf"^(?:def |class )?{name}\b", code, flags=re.MULTILINE), name
        assert re.search(rf"`(?:lib\.\w+\.)?{name}`", CONTRIBUTING), name


def seconds_of_runs(*chapters):
    """By the runs' own clocks; chapters share runs, and each is counted once."""
    tables = [pd.read_parquet(p) for chapter in chapters
              for p in sorted(ROOT.glob(f"data/results/{chapter}/full.parquet"))]  # fmt: skip
    clocks = [
        t.groupby("run", observed=True)[[c for c in t if c.startswith("seconds_")]].last()
        for t in tables
    ]
    clock = pd.concat([c.sum(axis=1).set_axis(c.index.astype(str)) for c in clocks])
    return clock[~clock.index.duplicated()]


def test_the_hours_in_readme_are_those_of_the_published_runs():
    hours = seconds_of_runs("*").sum() / 2 / 3600
    said = int(re.search(r"about (\d+) hours in all", (ROOT / "README.md").read_text())[1])
    assert said == pytest.approx(hours, abs=1)


def test_the_runs_of_over_a_minute_in_readme_are_those_that_are_published():
    clock = seconds_of_runs("*_length")
    said = re.search(r"(\d+) of the (\d+)\s+published ones take longer, up to (\d+) seconds",
                     (ROOT / "README.md").read_text())  # fmt: skip
    assert [int(x) for x in said.groups()] == [(clock > 60).sum(), len(clock), round(clock.max())]


def modules_of(room):
    """The modules of a package of `lib`, or the one of that name."""
    paths = sorted((ROOT / "lib" / room).rglob("*.py")) or [ROOT / "lib" / f"{room}.py"]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return [name.removesuffix(".__init__") for name in names]


def imported_by(room):
    """Rooms whose modules those of a room import, directly or not."""
    paths = map(Path, code_fingerprint(*modules_of(room)))
    return {path.parts[1].removesuffix(".py") for path in paths} - {room, "__init__"}


def test_rooms_import_only_downward():
    chain = lib.__doc__.partition("top to bottom:")[2].strip().partition("\n\n")[0]
    levels = [re.findall(r"\w+", level) for level in chain.split(">")]
    assert len(levels) > 5
    for place, level in enumerate(levels):
        above = {room for rooms in levels[: place + 1] for room in rooms}
        for room in level:
            assert not imported_by(room) & above, room
    assert not imported_by("runs")

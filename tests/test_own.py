"""What the chapter length shows of data of one's own, and that every mistake is refused."""

from __future__ import annotations

import json
import re

import pytest

from lib import own
from lib.lengths import Prepared
from lib.lm import prepare
from tests.lm_folder import prepared_folder
from tests.test_notebooks import read


@pytest.fixture(scope="module")
def have(tmp_path_factory):
    return Prepared(str(prepared_folder(tmp_path_factory.mktemp("have"))))


def test_the_identical_pair_is_dropped(have):
    text = own.as_read(have)
    assert "1 pairs of preferences.jsonl (2 rows;" in text and "1 identical" in text
    assert "A pear.<eos>" in text


def test_every_mistake_is_refused_with_what_was_found(have):
    table = own.refusals(have).set_index("mistake")["what is said"]
    assert "'prompts.jsonl'" in table["a file that is not there"]
    assert "['text']" in table["prompts under a name of their own"]
    assert "got 3" in table["a preference outside its range"]
    assert "pytorch_model.bin" in table["pickled weights"]
    assert not table.str.contains("/tmp").any()


def test_a_mistake_that_passes_is_noticed(have, monkeypatch):
    monkeypatch.setattr(own, "mistakes", lambda *_: {"none": lambda: 1})
    with pytest.raises(AssertionError, match="was not refused"):
        own.refusals(have)


def console_lines() -> list[str]:
    """The commands of the chapter, each on one line."""
    text = "\n".join(c.source for c in read("book/length").cells if c.cell_type == "markdown")
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.S)
    joined = re.sub(r"\\\n\s*", "", "\n".join(blocks))
    return [line.strip()[2:] for line in joined.splitlines() if line.strip().startswith("$ ")]


def test_commands_name_options_that_exist():
    commands = [c for c in console_lines() if "lib.lm.prepare" in c]
    assert len(commands) >= 4
    for command in commands:
        options = prepare._parser().parse_args(command.split("lib.lm.prepare")[1].split())
        assert options.policy and options.prompts and options.out


def test_papermill_passes_parameters_that_exist():
    commands = [c for c in console_lines() if "papermill" in c]
    assert len(commands) >= 4
    for command in commands:
        chapter = re.search(r"book/(\w+)\.ipynb", command)[1]
        (cell,) = (c for c in read(f"book/{chapter}").cells
                   if "parameters" in c.metadata.get("tags", []))  # fmt: skip
        for name in re.findall(r"-p (\w+) ", command):
            assert f"{name} = " in cell.source


def test_the_preference_file_is_json(tmp_path):
    path = own._lines(tmp_path / "x.jsonl", own.PREFERENCES)
    assert [json.loads(line) for line in path.read_text().splitlines()] == own.PREFERENCES

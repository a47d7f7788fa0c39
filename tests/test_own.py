"""What the chapter own_model shows of data of one's own, and that every mistake is refused."""

from __future__ import annotations

import json
import re

import pytest

from lib import own
from lib.lengths import Prepared
from lib.lm import prepare, prepare_full, supervise
from lib.lm.models import load_policy
from lib.lm.text import load_preferences, load_prompts
from tests.lm_folder import prepared_folder
from tests.test_notebooks import read


@pytest.fixture(scope="module")
def have(tmp_path_factory):
    return Prepared(str(prepared_folder(tmp_path_factory.mktemp("have"))))


def test_the_identical_pair_is_dropped(have):
    text = own.as_read(have)
    assert "1 pairs of preferences.jsonl (2 rows;" in text and "1 identical" in text
    assert "A pear.<eos>" in text
    assert f"{prepare.MAX_TOKENS}" in text and "512" not in text  # what `prepare` would do


def test_every_mistake_is_refused_with_what_was_found(have, tmp_path):
    (tmp_path / "config.json").write_text((have.folder / "policy/config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    texts = own._lines(tmp_path / "texts.jsonl", [{"text": "Name a fruit."}])
    ranked = own._lines(tmp_path / "ranked.jsonl", [
        {"prompt": "A fruit?", "response_1": "A pear.", "response_2": "A plum.", "preference": 3},
    ])  # fmt: skip
    mistakes = {
        "there is no file": lambda: load_prompts(tmp_path / "prompts.jsonl"),
        "has the columns ['text']": lambda: load_prompts(texts),
        "row 1: preference must be in [1, 2]": lambda: load_preferences(ranked),
        "not a causal language model": lambda: load_policy(have.folder / "reward-min"),
        "only ['pytorch_model.bin']": lambda: load_policy(tmp_path),
        "lacks policy, pairs.parquet, reward-min": lambda: Prepared(str(tmp_path)),
    }
    for found, call in mistakes.items():
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(found)) as refused:
            call()
        assert "\n" not in str(refused.value)


def console_lines() -> list[str]:
    """The commands of two chapters, each on one line."""
    cells = [*read("book/length").cells, *read("book/own_model").cells]
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.S)
    joined = re.sub(r"\\\n\s*", "", "\n".join(blocks))
    return [line.strip()[2:] for line in joined.splitlines() if line.strip().startswith("$ ")]


def test_commands_name_options_that_exist():
    commands = [c for c in console_lines() if "lib.lm.prepare " in c]
    assert len(commands) >= 4
    for command in commands:
        options = prepare._parser().parse_args(command.split("lib.lm.prepare ")[1].split())
        assert options.policy and options.prompts and options.out
    commands = [c for c in console_lines() if "lib.lm.supervise " in c]
    assert len(commands) >= 2
    for command in commands:
        options = supervise._parser().parse_args(command.split("lib.lm.supervise ")[1].split())
        after = console_lines()[console_lines().index(command) + 1]
        assert f"lib.lm.prepare --policy {options.out} " in after
    commands = [c for c in console_lines() if "lib.lm.prepare_full " in c]
    assert len(commands) >= 2
    for command in commands:
        options = prepare_full._parser().parse_args(command.split("prepare_full ")[1].split())
        assert options.policy and (options.similar or options.distinct) and options.out


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

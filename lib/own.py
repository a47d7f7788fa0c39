"""A policy and data of one's own: what they look like once read, and what errors say.

Everything here runs on small files that are written and read now. Chapter: length.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from lib.lengths import Prepared
from lib.lm.models import load_policy
from lib.lm.text import example, load_preferences, load_prompts

PREFERENCES = [
    {"prompt": [{"role": "user", "content": "Name a fruit."}],
     "chosen": [{"role": "assistant", "content": "A pear."}],
     "rejected": [{"role": "assistant", "content": "A pear is one of many fruits there are."}]},
    {"prompt": [{"role": "user", "content": "Why is the sky blue?"}],
     "chosen": [{"role": "assistant", "content": "Air scatters blue light the most."}],
     "rejected": [{"role": "assistant", "content": "Air scatters blue light the most."}]},
]  # fmt: skip


def as_read(prepared: Prepared) -> str:
    """A preference file of two pairs, one of them without a difference, as the policy reads it."""
    with TemporaryDirectory() as folder:
        path = _lines(Path(folder) / "preferences.jsonl", PREFERENCES)
        said = example(prepared.tokenizer, load_preferences(path))
        return said.replace(f"{folder}/", "")


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def mistakes(prepared: Prepared, folder: Path) -> dict[str, Callable[[], Any]]:
    """Common mistakes, each as a call that is refused."""
    pickled = folder / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((prepared.folder / "policy/config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    texts = _lines(folder / "texts.jsonl", [{"text": "Name a fruit."}])
    wrong = {"prompt": "Name a fruit.", "response_1": "A pear.", "response_2": "A plum.",
             "preference": 3}  # fmt: skip
    return {
        "a file that is not there": lambda: load_prompts(folder / "prompts.jsonl"),
        "prompts under a name of their own": lambda: load_prompts(texts),
        "a preference outside its range": lambda: load_preferences(
            _lines(folder / "ranked.jsonl", [wrong])),
        "a reward model where a policy belongs": lambda: load_policy(
            prepared.folder / "reward-min"),
        "pickled weights": lambda: load_policy(pickled),
        "a folder that was not prepared": lambda: Prepared(str(pickled)),
    }  # fmt: skip


def refusals(prepared: Prepared) -> pd.DataFrame:
    """What each of `mistakes` is answered. Columns: mistake, what is said.

    Raises: AssertionError if one is not refused.
    """
    with TemporaryDirectory() as folder:
        rows = []
        for mistake, call in mistakes(prepared, Path(folder)).items():
            said = _said(call).replace(str(prepared.folder), "FOLDER")
            rows.append((mistake, said.replace(f"{folder}/", "")))
    return pd.DataFrame(rows, columns=["mistake", "what is said"])


def _said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    raise AssertionError("a mistake was not refused")

"""Data of one's own: what a preference file looks like once read.

Everything here runs on small files that are written and read now. Chapter: own_model.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lib.lengths import Prepared
from lib.lm.prepare import MAX_PROMPT, MAX_TOKENS
from lib.lm.text import example, load_preferences

PREFERENCES = [
    {"prompt": [{"role": "user", "content": "Name a fruit."}],
     "chosen": [{"role": "assistant", "content": "A pear."}],
     "rejected": [{"role": "assistant", "content": "A pear is one of many fruits there are."}]},
    {"prompt": [{"role": "user", "content": "Why is the sky blue?"}],
     "chosen": [{"role": "assistant", "content": "Air scatters blue light the most."}],
     "rejected": [{"role": "assistant", "content": "Air scatters blue light the most."}]},
]  # fmt: skip


def as_read(prepared: Prepared) -> str:
    """A preference file of two pairs, one of them without a difference, as `prepare` reads it."""
    with TemporaryDirectory() as folder:
        path = _lines(Path(folder) / "preferences.jsonl", PREFERENCES)
        said = example(prepared.tokenizer, load_preferences(path), max_prompt_tokens=MAX_PROMPT,
                       max_response_tokens=MAX_TOKENS)  # fmt: skip
        return said.replace(f"{folder}/", "")


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path

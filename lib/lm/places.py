"""Where a prepared folder is, in one spelling: how it is written is part of a run's identity."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lib.lm.config import PRESETS, LengthRun, prepared_folder, prepared_tasks

NAMES = ("tiny", *PRESETS)


def spelled(name: str) -> str:
    """The name of a preset; the path of a folder from here if it lies below, else from the root.

    "data/length", "./data/length/" and its absolute path are one folder, and its runs the same.
    """
    if name in NAMES or not name:
        return name
    here, path = os.getcwd(), os.path.abspath(os.path.expanduser(name))
    below = os.path.commonpath([here, path]) == here
    return Path(os.path.relpath(path, here) if below else path).as_posix()


def check_prepared(name: str) -> str:
    """Raises: FileNotFoundError, naming the presets, for a folder that is not there."""
    if name not in NAMES and not prepared_folder(spelled(name)).is_dir():
        raise FileNotFoundError(f"prepared: there is no folder {name!r}; give one that "
                                f"lib.lm.prepare made, or one of {NAMES}")  # fmt: skip
    return name


def check_task(name: str, task: str) -> None:
    """Raises: ValueError that names a folder's tasks, for one that it has no reward model of."""
    if (there := prepared_tasks(name)) and task not in there:
        raise ValueError(f"task must be one of {there}, of which {name!r} has a reward model, got "
                         f"{task!r}: lib.lm.prepare --tasks {task} adds one, unless the folder is "
                         "of preferences")  # fmt: skip


def cut_otherwise(config: LengthRun) -> str | None:
    """What to say where completions are cut at another length than the folder's pairs were."""
    path = config.folder / "prepared.json"
    made = json.loads(path.read_text()).get("arguments", {}) if path.exists() else {}
    cap = made.get("max_tokens", str(config.max_tokens))
    if cap == str(config.max_tokens):
        return None
    return (f"completions are cut at {config.max_tokens} tokens, the pairs of {config.prepared!r} "
            f"at {cap}: the option max_tokens={cap} cuts both alike")  # fmt: skip

"""What a process has read of files, kept for as long as these stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from inspect import signature
from pathlib import Path
from typing import Any

from lib.lm.config import model_files

State = tuple[tuple[str, int, int], ...]


def kept_while_unchanged(*names: str, maxsize: int) -> Callable[[Callable], Callable]:
    """`lru_cache` by a function's arguments and by the files that some of them name: a folder that
    is prepared again in the same process is read again.

    Args: names: of the arguments that are files, or folders of models; a hub's name counts as it
        is. maxsize: results that are kept.
    """

    def decorated(function: Callable) -> Callable:
        bound = signature(function).bind

        @lru_cache(maxsize=maxsize)
        def kept(_: tuple[State, ...], *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            given = bound(*args, **kwargs).arguments
            return kept(tuple(state(given[name]) for name in names), *args, **kwargs)

        called.cache_clear = kept.cache_clear
        return called

    return decorated


def state(path: str | Path) -> State:
    """Name, time and size of a file, or of all that is read of a model's folder."""
    path = Path(path).expanduser()
    files = model_files(path) if path.is_dir() else [path] if path.is_file() else []
    stats = [(file.name, file.stat()) for file in files]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)

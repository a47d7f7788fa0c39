"""Writing a file or a folder so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


class StoreFullError(OSError):
    """No space is left where results are stored; what was stored before is whole."""


def check_writable(said: str, folder: Path) -> None:
    """Makes a folder and tries it. Raises: OSError where it cannot be made, or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{said} cannot be written: {error.strerror or error}") from None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file beside `path`, flush it to the disk, then rename it.

    A reader sees the old content or the new, never a part, also after a power cut. Temporary
    files that a killed process left for the same path are removed, so callers hold a lock on it.
    Raises StoreFullError when no space is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from error
        raise
    finally:
        _remove_temporary(path)


def write_folder_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary folder beside `path`, then rename it.

    `write` makes the folder. What is at `path` already, left by a killed writer, is replaced, and
    so are temporary folders of such; callers see to it that nobody else writes the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_folders(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        _remove_folders(path)


def remove(path: Path) -> None:
    """Remove a file and what killed writers of it left; the caller holds a lock on it."""
    path.unlink(missing_ok=True)
    _remove_temporary(path)


def _temporary(path: Path) -> Iterator[Path]:
    return path.parent.glob(f".{glob.escape(path.name)}.*.tmp")


def _remove_temporary(path: Path) -> None:
    for leftover in _temporary(path):
        leftover.unlink(missing_ok=True)


def _remove_folders(path: Path) -> None:
    for leftover in _temporary(path):
        shutil.rmtree(leftover, ignore_errors=True)


def _full(path: Path) -> StoreFullError:
    return StoreFullError(
        errno.ENOSPC,
        "no space left for a result; all that was stored before is whole. Free some space or "
        "choose another store, then start again: finished runs are not computed again",
        str(path),
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # some file systems refuse it for folders, each with an error of its own
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

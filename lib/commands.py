"""What the book's command lines share."""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections.abc import Callable, Sequence
from typing import Any

from safetensors import SafetensorError

STOPPED = 130  # what shells return for Ctrl-C


def command(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], Any],
    arguments: Sequence[str] | None,
) -> int:
    """Does `work` with the options of a command line; returns the exit status."""
    options = parser.parse_args(arguments)
    try:
        work(options)
    except (ValueError, OSError, SafetensorError, RuntimeError, sqlite3.Error) as error:
        # the third and the last: of a full disk; the fourth: of a loss that is not finite
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def until_stopped(main: Callable[[], int], said: str) -> int:
    """The exit status of a command; where Ctrl-C stops it, one line in place of a traceback.

    Args: said: what the user then has.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print(f"stopped: {said}", file=sys.stderr)
        return STOPPED

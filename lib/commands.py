"""What the book's command lines share."""

from __future__ import annotations

import sys
from collections.abc import Callable

STOPPED = 130  # what shells return for Ctrl-C


def until_stopped(main: Callable[[], int], said: str) -> int:
    """The exit status of a command; where Ctrl-C stops it, one line in place of a traceback.

    Args: said: what the user then has.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print(f"stopped: {said}", file=sys.stderr)
        return STOPPED

"""Settings in processes of their own that get ready side by side and are measured one by one.

Getting ready is importing and compiling, which keeps a CPU busy and a GPU idle; what is measured
has the GPU to itself. A setting that fails leaves the others alone.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

READY_SECONDS, TURN_SECONDS, END_SECONDS = 150, 120, 5
COMPILER_PROCESSES = 4  # of each setting: the compiler would start one for every core


class Lost(RuntimeError):
    """A setting that was not measured, and why."""


def in_turn(
    settings: Mapping[str, Callable[..., Any]], start: Callable[[], None], method: str = "spawn"
) -> Iterator[tuple[str, Any]]:
    """What each setting returns, or a `Lost`, as soon as it is known, in the order given.

    Args: settings: called with `turn`, which they call once, when all that is left to do is to be
        measured; it returns when the others are ready or done. start: what must have happened
        before a setting begins. method: how processes start.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(COMPILER_PROCESSES))
    context = multiprocessing.get_context(method)
    workers = {name: Worker(context, setting) for name, setting in settings.items()}
    try:
        start()
        for worker in workers.values():
            worker.send()
        deadline, lost = monotonic() + READY_SECONDS, {}
        for name, worker in workers.items():
            try:
                worker.receive("ready", deadline - monotonic())
            except Lost as error:
                lost[name] = error
                worker.end()
        for name, worker in workers.items():
            yield name, lost.get(name) or _measured(worker)
    finally:
        for worker in workers.values():
            worker.end(0)


def _measured(worker: Worker) -> Any:
    try:
        worker.send()
        return worker.receive("measured", TURN_SECONDS)
    except Lost as error:
        return error
    finally:
        worker.end()


class Worker:
    """One setting in its process, which waits for a word before it begins and at its turn."""

    def __init__(self, context: Any, setting: Callable[..., Any]):
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(setting, far), daemon=True)
        self.process.start()
        far.close()

    def send(self) -> None:
        """Lets it go on; where it has ended, `receive` says so."""
        try:
            self.pipe.send(None)
        except OSError:
            pass  # what it said before it ended can still be read

    def receive(self, kind: str, seconds: float) -> Any:
        """Its next message, of this kind. Raises: Lost for another, or for none in that time."""
        try:
            if not self.pipe.poll(max(0.0, seconds)):
                raise Lost(f"not {kind} in time")
            found, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(END_SECONDS)
            raise Lost(f"its process ended with {self.process.exitcode}") from None
        if found == "lost":
            raise Lost(value)
        if found != kind:
            raise Lost(f"it was {found} where it should have been {kind}")
        return value

    def end(self, seconds: float = END_SECONDS) -> None:
        """Waits for its end for so long, and then ends it."""
        self.pipe.close()
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(setting: Callable[..., Any], pipe: Connection) -> None:
    def turn() -> None:
        pipe.send(("ready", None))
        pipe.recv()

    try:
        pipe.recv()
        pipe.send(("measured", setting(turn=turn)))
    except EOFError:  # nobody asks any more
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send(("lost", f"{type(error).__name__}: {str(error).strip()[:300]}"))

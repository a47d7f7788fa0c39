"""Seconds by phase: nested, charged from elsewhere, and left out."""

from __future__ import annotations

import pytest

from lib import timing
from lib.timing import Clock


@pytest.fixture
def advance(monkeypatch):
    """Moves the time that clocks read."""
    now = [100.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def test_a_phase_inside_another_counts_for_itself_only(advance):
    clock = Clock()
    with clock.measure("training"):
        advance(1.0)
        with clock.measure("sampling"):
            advance(10.0)
            with clock.measure("scoring"):
                advance(100.0)
        with clock.measure("scoring"):
            advance(1000.0)
        advance(1.0)
    with clock.measure("training"):
        advance(3.0)
    assert clock.seconds == {"sampling": 10, "scoring": 1100, "training": 5, "evaluation": 0}


def test_what_is_aside_counts_for_nothing_and_a_charge_for_its_phase_alone(advance):
    clock = Clock()
    with clock.measure("training"):
        with clock.aside():
            advance(10.0)
        clock.charge("scoring", 7.0)
        advance(1.0)
    assert clock.seconds == {"sampling": 0, "scoring": 7, "training": 1, "evaluation": 0}


def test_clock_counts_on_from_what_was_restored_and_through_errors(advance):
    clock = Clock()
    clock.restore({"training": 5.0})
    with pytest.raises(ZeroDivisionError), clock.measure("training"):
        advance(1.0)
        _ = 1 / 0
    assert clock.seconds["training"] == 6
    with pytest.raises(KeyError, match="waiting"), clock.measure("waiting"):
        pass


class Event:
    """A mark in a GPU's queue: that GPU does nothing until someone waits for it."""

    queue: list[float] = []  # when each mark comes to be, of those that were recorded
    waits = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = Event.queue.pop(0)
        return self

    def synchronize(self):
        Event.waits += 1

    def elapsed_time(self, end):
        return end.time - self.time  # ms


class Stream:
    def record_event(self, event):
        return event.record()


def test_on_a_gpu_marks_are_waited_for_when_they_are_read(monkeypatch):
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(Event, "queue", [1000.0, 1500.0, 4500.0, 4600.0])
    monkeypatch.setattr(Event, "waits", 0)
    clock = Clock("cuda")
    with clock.measure("training"):
        with clock.measure("sampling"):
            pass
        assert Event.waits == 0
    assert clock.seconds == pytest.approx(
        {"training": 0.6, "sampling": 3.0, "scoring": 0, "evaluation": 0}
    )
    assert Event.waits > 0 and clock.seconds["training"] == pytest.approx(0.6)

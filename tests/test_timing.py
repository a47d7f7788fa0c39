"""Seconds by phase: nested, charged from elsewhere, and left out."""

from __future__ import annotations

from time import sleep

import pytest

from lib import timing
from lib.timing import Clock


def test_a_phase_inside_another_counts_for_itself_only():
    clock = Clock()
    with clock.measure("training"):
        sleep(0.02)
        with clock.measure("sampling"):
            sleep(0.05)
    assert clock.seconds["sampling"] >= 0.05
    assert 0.02 <= clock.seconds["training"] < 0.05


def test_what_is_aside_counts_for_nothing():
    clock = Clock()
    with clock.measure("training"):
        with clock.aside():
            sleep(0.1)
        sleep(0.01)
    assert 0.01 <= clock.seconds["training"] < 0.1
    assert sum(clock.seconds.values()) == clock.seconds["training"]


def test_a_charge_goes_to_its_phase_alone():
    clock = Clock()
    with clock.measure("training"):
        clock.charge("scoring", 7.0)
    assert clock.seconds["scoring"] == 7.0
    assert clock.seconds["training"] < 1


def test_an_unknown_phase_is_refused():
    with pytest.raises(KeyError), Clock().measure("thinking"):
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

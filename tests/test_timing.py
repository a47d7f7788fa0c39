"""Seconds by phase: nested, charged from elsewhere, and left out."""

from __future__ import annotations

from time import sleep

import pytest

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

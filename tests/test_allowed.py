"""Values are refused by name, with what is allowed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib.allowed import between, check_fields, one_of


def test_what_is_allowed_is_returned():
    assert one_of("kind", "k2", {"k1": 0, "k2": 0}) == "k2"
    assert one_of("decoder", None, (None, "static")) is None
    assert between("rate", 0.0, 0, 1) == 0.0 and between("rate", 1, 0, 1) == 1


@pytest.mark.parametrize("value", [-1e-9, 1.5, float("nan")])
def test_a_number_outside_its_range_is_named(value):
    with pytest.raises(ValueError, match=f"rate must be between 0 and 1, got {value!r}"):
        between("rate", value, 0, 1)


@pytest.mark.parametrize("value", ["k3", None, ["k1"]])
def test_a_choice_that_is_none_is_named_with_the_others(value):
    with pytest.raises(ValueError, match=r"kind must be one of \('k1', 'k2'\), got "):
        one_of("kind", value, iter(("k1", "k2")))


def test_fields_of_an_object():
    run = SimpleNamespace(kind="k1", rate=0.5)
    check_fields(run, {"kind": ("k1", "k2")}, {"rate": (0, 1)})
    with pytest.raises(ValueError, match="rate must be between 1 and 2, got 0.5"):
        check_fields(run, {"kind": ("k1",)}, {"rate": (1, 2)})
    with pytest.raises(ValueError, match="kind must be one of"):
        check_fields(run, {"kind": ("k2",)}, {"rate": (0, 1)})

"""Identity: stable, complete, and refused where it would not be."""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.runs import columns, configurations, identity


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Optimiser:
    rate: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.999)


@dataclass(frozen=True)
class Setting:
    method: str = "dpo"
    seed: int = 0
    beta: float | None = None
    shift: bool = True
    colour: Colour = Colour.RED
    optimiser: Optimiser = field(default_factory=Optimiser)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reader:
    path: str

    def data_files(self) -> tuple[Path, ...]:
        return (Path(self.path),)


@dataclass(frozen=True)
class Grown(Optimiser):
    """An Optimiser with a field that was added after runs were published."""

    nesterov: bool = field(default=False, metadata={"later": True})


@dataclass
class Thawed:
    seed: int = 0


def test_identity_is_the_one_recorded_when_this_test_was_written():
    assert identity(Setting()) == "8a571055dde639c6139d"


CHANGES = [
    {"method": "ipo"},
    {"seed": 1},
    {"beta": 0.0},
    {"shift": False},
    {"colour": Colour.BLUE},
    {"optimiser": Optimiser(rate=0.1 + 1e-16)},
    {"optimiser": Optimiser(betas=(0.9,))},
    {"extra": {"a": 1}},
]


def test_changing_any_field_changes_the_identity():
    changed = [dataclasses.replace(Setting(), **change) for change in CHANGES]
    assert {name for change in CHANGES for name in change} == set(columns_of(Setting))
    assert len({identity(Setting()), *map(identity, changed)}) == len(CHANGES) + 1


def test_a_field_added_later_leaves_what_was_before_as_it_was():
    """At its default neither identity nor columns know of it; at another value both do."""
    assert identity(Grown()) == identity(type("Grown", (Optimiser,), {})())
    assert columns(Grown()) == columns(Optimiser())
    assert identity(Grown(nesterov=True)) != identity(Grown())
    assert columns(Grown(nesterov=True)) == {**columns(Optimiser()), "nesterov": True}
    assert identity(Grown(rate=0.2)) != identity(Grown())


def columns_of(cls):
    return [f.name for f in dataclasses.fields(cls)]


def test_the_class_is_part_of_the_identity():
    @dataclass(frozen=True)
    class Other:
        rate: float = 0.1
        betas: tuple[float, ...] = (0.9, 0.999)

    assert identity(Other()) != identity(Optimiser())


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (Optimiser(rate=1), Optimiser(rate=1.0)),
        (Optimiser(rate=-0.0), Optimiser(rate=0.0)),
        (Optimiser(betas=(1, 0)), Optimiser(betas=[1.0, 0.0])),
        (Setting(seed=2.0), Setting(seed=2)),
        (Setting(seed=np.int64(2)), Setting(seed=2)),
        (Setting(beta=1), Setting(beta=np.float64(1.0))),
        (Setting(extra={"a": 1, "b": 2}), Setting(extra={"b": 2, "a": 1})),
    ],
)
def test_equal_values_written_differently_are_one_run(one, same):
    assert identity(one) == identity(same)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Setting(method={"dpo", "ipo"}), "Setting.method"),
        (Setting(method=len), "Setting.method"),
        (Setting(beta=math.nan), "Setting.beta = nan"),
        (Setting(method=object()), "Setting.method = <object"),
        (Setting(optimiser=Optimiser(betas=(0.9, math.nan))), r"Setting.optimiser.betas\[1\]"),
        (Setting(seed=0.5), "Setting.seed = 0.5 is a float; allowed: int"),
        (Setting(seed="1e3"), "Setting.seed = '1e3' is text; allowed: a whole number .*1000, not"),
        (Setting(beta="x"), "Setting.beta = 'x' is text"),
        (Setting(seed=True), "Setting.seed = True is a bool; allowed: int"),
        (Setting(extra={1: 2}), "Setting.extra"),
        (Thawed(), "Thawed is not frozen"),
        ({"seed": 0}, "frozen dataclass"),
        (Setting, "frozen dataclass"),
    ],
)
def test_values_without_a_deterministic_serialisation_are_refused_by_name(config, named):
    with pytest.raises(TypeError, match=named):
        identity(config)


@dataclass(frozen=True)
class Fields:
    """One of each kind."""

    rate: float = 0.1
    count: int | None = None
    on: bool = False
    name: str = "a"
    many: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rate", "1e-3", r"rate must be a number, got '1e-3' \(text: in YAML write 0.001, not 1e"),
        ("rate", "0.1", "leave the quotes away"),
        ("rate", "x", "rate must be a number, got 'x'$"),
        ("rate", None, "rate must be a number, got None"),
        ("count", 2.5, "count must be a whole number or null, got 2.5"),
        ("count", "abc", "count must be a whole number or null, got 'abc'"),
        ("count", True, "got True"),
        ("on", "yes", "on must be true or false, got 'yes'"),
        ("on", 1, "on must be true or false, got 1"),
        ("name", 1, "name must be text, got 1"),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_is_wanted(name, value, said):
    with pytest.raises(ValueError, match=said):
        configurations.checked(Fields, {name: value})


def test_values_of_the_fields_kind_are_taken():
    given = {"rate": 1, "count": 2.0, "on": True, "name": "b", "many": [1], "other": object()}
    taken = configurations.checked(Fields, given)
    assert taken == given and type(taken["count"]) is int
    del taken["other"], taken["many"]
    assert identity(Fields(**taken)) == identity(Fields(rate=1.0, count=2, on=True, name="b"))


def test_the_content_of_the_data_counts_and_its_place_does_not(tmp_path):
    (tmp_path / "a").write_text("one")
    before = identity(Reader(str(tmp_path / "a")))
    (tmp_path / "a").write_text("another")
    assert identity(Reader(str(tmp_path / "a"))) != before
    with pytest.raises(FileNotFoundError):
        identity(Reader(str(tmp_path / "missing")))


def test_columns_flatten_nested_fields_and_keep_numbers_numeric():
    row = columns(Setting())
    assert row["optimiser_rate"] == 0.1
    assert row["optimiser_betas"] == "[0.9, 0.999]"
    assert row["colour"] == "RED"
    assert math.isnan(row["beta"])

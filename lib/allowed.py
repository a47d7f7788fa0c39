"""Values that are refused, by name and with what is allowed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

# Metadata of a field that runs were published without (see `lib.runs.identity`).
LATER = {"later": True}


def one_of(name: str, value: Value, allowed: Iterable[Value]) -> Value:
    """`value`. Raises: ValueError, naming all that is allowed, if it is none of it."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def between(name: str, value: float, low: float, high: float) -> float:
    """`value`. Raises: ValueError unless low <= value <= high, so also for NaN."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value!r}")
    return value


def check_fields(
    owner: Any,
    choices: Mapping[str, Collection[Any]],
    ranges: Mapping[str, tuple[float, float]],
) -> None:
    """`one_of` and `between` of an object's fields, by their names."""
    for name, values in choices.items():
        one_of(name, getattr(owner, name), values)
    for name, (low, high) in ranges.items():
        between(name, getattr(owner, name), low, high)

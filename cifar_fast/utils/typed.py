"""Checks that values read from a file have the types that annotations name."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

LARGEST = 2**63 - 1


def check_types(instance: Any) -> None:
    """Raise ValueError if a field of the dataclass ``instance`` has another type than its annotation."""
    kind: Any = type(instance)
    hints = _hints_of(kind)
    check_values({name: getattr(instance, name) for name in hints}, hints)


@functools.cache
def _hints_of(kind: Any) -> dict[str, Any]:
    """Return the annotation of each field of the dataclass ``kind``."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise ValueError if ``values`` lacks a key of ``hints``, or has a value there of another type."""
    for name, hint in hints.items():
        if name not in values:
            raise ValueError(f"it lacks {name}")
        if not has_type(values[name], hint):
            expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
            raise ValueError(f"{name} must be {expected}, not {type(values[name]).__name__}")


def has_type(value: Any, hint: Any) -> bool:
    """Return whether ``value`` fits the annotation ``hint``, as JSON can hold it.

    A float may be an integer. An integer must fit into 64 bits. A bool does not count as a number.
    """
    kind, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(has_type(value, one) for one in inside)
    if kind in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and all(
            has_type(one, inside[i]) for pair in value.items() for i, one in enumerate(pair)
        )
    if kind is list:
        return isinstance(value, list) and all(has_type(one, inside[0]) for one in value)
    if hint in (int, float):
        allowed = (int, float) if hint is float else int
        in_range = isinstance(value, allowed) and (not isinstance(value, int) or abs(value) <= LARGEST)
        return in_range and not isinstance(value, bool)
    return isinstance(value, hint)


def are_finite(values: Any, count: int) -> bool:
    """Return whether ``values`` is a list of ``count`` finite numbers."""
    return has_type(values, list[float]) and len(values) == count and all(map(math.isfinite, values))

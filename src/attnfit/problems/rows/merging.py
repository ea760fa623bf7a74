"""Partial results of parts of the data, and their sum."""

from __future__ import annotations

from typing import Any


class PerPart(list[Any]):
    """One argument a part, where all others are the same for all parts."""


def merged(one: Any, other: Any) -> Any:
    """Return the sum of two partial results: item by item for tuples and dicts, by their own ``merge`` for
    accumulators.
    """
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, tuple):
        return tuple(merged(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one | {key: merged(one.get(key), value) for key, value in other.items()}
    return one.merge(other) if hasattr(one, "merge") else one + other

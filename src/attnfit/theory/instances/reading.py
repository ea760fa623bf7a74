"""Check what instances are made of; every message names the argument, the index and the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.elementwise import FUNCTIONS

Array = NDArray[np.float64]


def as_array(values: Any, name: str, shape: tuple[int | None, ...]) -> Array:
    """Return finite numbers of a shape, None standing for any length.

    Raises
    ------
    ValueError
        If anything is not a finite number or the shape is another.
    """
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as an array of numbers: {error}") from error
    wanted = ", ".join("any" if s is None else str(s) for s in shape)
    if array.ndim != len(shape) or any(
        s is not None and s != a for s, a in zip(shape, array.shape, strict=True)
    ):
        raise ValueError(f"{name} has shape {array.shape}; expected ({wanted})")
    if array.size == 0:
        raise ValueError(f"{name} is empty, shape {array.shape}; an instance needs at least one entry")
    require_finite(array, name)
    array.flags.writeable = False
    return array


def require_finite(array: Array, name: str) -> None:
    """Raise ValueError naming the index of the first entry that is not finite."""
    if not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(
            f"{name} is {array[index]} at index {index}; remove or replace entries that are not finite"
        )


def as_stack(values: Any, name: str, ndim: int, shape: tuple[int, ...] | None = None) -> Array:
    """Return groups along the first axis, adding that of a single group where it is left out."""
    wanted: tuple[int | None, ...] = (None,) * ndim if shape is None else tuple(shape)
    if np.ndim(values) == ndim - 1 and wanted[0] in (None, 1):
        return as_array(np.asarray(values)[None], name, wanted)
    return as_array(values, name, wanted)


def as_number(value: float | None, name: str, *, positive: bool = True) -> None:
    """Raise ValueError unless a number is finite (and positive), or None."""
    if value is None:
        return
    if not np.isfinite(value) or (positive and value <= 0.0):
        kind = "a positive number" if positive else "a finite number"
        raise ValueError(f"{name} is {value}; pass {kind}, or None where it may be left out")


def choose_function(function: str) -> None:
    """Raise ValueError unless the function is one of exp, cosh and sinh."""
    if function not in FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(map(repr, FUNCTIONS))}, not {function!r}")

"""What the entries of target maps tell about how they were stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.column import Column, pieces


def smallest_normal(b: NDArray[Any] | Column) -> float:
    """Return the smallest normal number of the narrowest format that holds every entry."""
    dtype = b.stored_dtype if isinstance(b, Column) else b.dtype
    for kind in (np.float16, np.float32):
        with np.errstate(over="ignore", under="ignore"):
            if dtype.itemsize <= np.dtype(kind).itemsize or all(
                (v.astype(kind) == v).all() for _, v in pieces(b)
            ):
                return float(np.finfo(kind).tiny)
    return float(np.finfo(np.float64).tiny)


class Signs(NamedTuple):
    """The smallest positive entry, infinite without one, and whether there are zeros and negative entries."""

    smallest: float
    zeros: bool
    negative: bool


def signs(b: NDArray[Any] | Column) -> Signs:
    """Return what the signs of the entries are."""
    smallest, zeros, negative = np.inf, False, False
    for _, values in pieces(b):
        smallest = min(smallest, float(values.min(initial=np.inf, where=values > 0)))
        zeros, negative = zeros or bool((values == 0).any()), negative or bool((values < 0).any())
    return Signs(smallest, zeros, negative)


def first_negative(b: NDArray[Any] | Column) -> tuple[int, float]:
    """Return the first negative entry and where it is, -1 if there is none."""
    for rows, values in pieces(b):
        if (values < 0).any():
            k = int(np.argmax(values < 0))
            return rows.start + k, float(values[k])
    return -1, 0.0

"""What the entries of target maps tell about how they were stored."""

from __future__ import annotations

from typing import Any

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


def smallest_positive(b: NDArray[Any] | Column) -> tuple[float, bool]:
    """Return the smallest positive entry, infinite without one, and whether some entry is not positive."""
    smallest, others = np.inf, False
    for _, values in pieces(b):
        positive = values > 0
        smallest = min(smallest, float(values.min(initial=np.inf, where=positive)))
        others = others or not positive.all()
    return smallest, others


def first_negative(b: NDArray[Any] | Column) -> tuple[int, float]:
    """Return the first negative entry and where it is, -1 if there is none."""
    for rows, values in pieces(b):
        if (values < 0).any():
            k = int(np.argmax(values < 0))
            return rows.start + k, float(values[k])
    return -1, 0.0

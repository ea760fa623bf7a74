"""Arithmetic on natural logarithms: constants such as ``exp(20 R^2)`` leave float64 from R = 4 on."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

LOG10 = float(np.log(10.0))


def log(values: ArrayLike) -> Array:
    """Return the logarithm, minus infinity at zero."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(values), dtype=np.float64)


def product(*factors: ArrayLike, exponent: ArrayLike = 0.0) -> Array:
    """Return the logarithm of the product of nonnegative factors and ``exp(exponent)``."""
    total = np.asarray(exponent, dtype=np.float64)
    for factor in factors:
        total = total + log(factor)
    return np.asarray(total)


def total(*logs: ArrayLike) -> Array:
    """Return the logarithm of a sum, from those of its nonnegative terms."""
    out = np.asarray(logs[0], dtype=np.float64)
    for term in logs[1:]:
        out = np.logaddexp(out, term)
    return np.asarray(out)


def largest(*logs: ArrayLike) -> Array:
    """Return the entrywise largest."""
    out = np.asarray(logs[0], dtype=np.float64)
    for term in logs[1:]:
        out = np.maximum(out, term)
    return np.asarray(out)


def log_norm(values: Array, scale: Array | float = 0.0) -> Array:
    """Return the logarithm of the Euclidean norms along the last axis of ``values exp(scale)``, without
    underflow.
    """
    top = np.max(np.abs(values), axis=-1, initial=0.0)
    safe = np.where(top > 0.0, top, 1.0)[..., None]
    out: Array = log(top) + 0.5 * log(np.sum((values / safe) ** 2, axis=-1).clip(1.0)) + np.asarray(scale)
    return out


def log_max(values: Array, scale: Array | float = 0.0) -> Array:
    """Return the logarithm of the largest magnitude along the last axis of ``values exp(scale)``."""
    out: Array = log(np.max(np.abs(values), axis=-1, initial=0.0)) + np.asarray(scale)
    return out

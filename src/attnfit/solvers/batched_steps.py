"""Trust-region steps of many small problems at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.solvers.trust_region import RANK_TOLERANCE

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Steps:
    """Steps, shape (k, d), the decreases their models promise, and which of them a radius bounded, (k,)."""

    p: Array
    predicted: Array
    bounded: Mask


class Eigenmodels:
    """Quadratic models of k problems in their eigenbases; `Eigenmodel` is the same for one.

    Parameters
    ----------
    hessians : ndarray, shape (k, d, d)
    """

    def __init__(self, hessians: Array) -> None:
        self.values, self.vectors = np.linalg.eigh(hessians)
        self.size = np.maximum(np.abs(self.values).max(axis=1), np.finfo(float).tiny)

    @property
    def negative(self) -> Mask:
        """Which models have negative curvature beyond rounding, shape (k,)."""
        return np.asarray(self.values[:, 0] < -1e-9 * self.size)

    def solve(self, g: Array, radius: Array) -> Steps:
        """Return the minimiser of each model within its radius, least norm where it is singular.

        Parameters
        ----------
        g : ndarray, shape (k, d)
        radius : ndarray, shape (k,)
            Infinite where none is known.
        """
        along = np.matmul(self.vectors.transpose(0, 2, 1), g[:, :, None])[:, :, 0]
        floor = RANK_TOLERANCE * self.size[:, None]
        flat = np.abs(self.values) <= floor
        lengths = np.linalg.norm(along, axis=1, keepdims=True)
        along = np.where(flat & (np.abs(along) <= 1e-3 * lengths), 0.0, along)
        idle = along == 0.0
        # Curvature that is negative by rounding counts by its size.
        q = np.where(idle, 0.0, -along / np.where(flat, 1.0, np.abs(self.values)))
        newton = ~self.negative & ~(flat & ~idle).any(axis=1)
        newton &= np.linalg.norm(q, axis=1) <= radius
        other = np.flatnonzero(~newton)
        if len(other):
            q[other] = _to_boundary(self.values[other], along[other], radius[other], floor[other])
        predicted = -np.sum(along * q + 0.5 * self.values * q * q, axis=1)
        return Steps(np.matmul(self.vectors, q[:, :, None])[:, :, 0], predicted, ~newton)

    def approach(self, g: Array) -> Array:
        """Return the Newton steps with the curvature taken by absolute value, off flat directions, shape
        (k, d): how far a stationary point is, whatever its kind.
        """
        along = np.matmul(self.vectors.transpose(0, 2, 1), g[:, :, None])[:, :, 0]
        size = np.where(
            np.abs(self.values) > RANK_TOLERANCE * self.size[:, None], np.abs(self.values), np.inf
        )
        return np.asarray(np.matmul(self.vectors, (-along / size)[:, :, None])[:, :, 0])


def _to_boundary(values: Array, along: Array, radius: Array, floor: Array) -> Array:
    """Solve ``||(H + shift)^-1 g|| = radius`` for shifts that make H + shift positive, by safeguarded
    Newton.
    """
    lengths = np.linalg.norm(along, axis=1)
    usual = np.linalg.norm(along / np.maximum(np.abs(values), floor), axis=1)
    radius = np.where(np.isfinite(radius), radius, np.sqrt(usual * lengths))
    radius = np.maximum(radius, np.finfo(float).tiny)
    # A gradient without a part along negative curvature (a saddle, the hard case) gets one that is
    # negligible.
    nudge = 1e-8 * np.maximum(lengths, np.abs(values[:, 0]) * radius)
    small = (values[:, 0] < -floor[:, 0]) & (np.abs(along[:, 0]) < nudge)
    along = along.copy()
    along[small, 0] = np.where(along[small, 0] < 0.0, -1.0, 1.0) * nudge[small]
    lowest = np.maximum(0.0, -values[:, 0])
    low, high = lowest, lowest + np.linalg.norm(along, axis=1) / radius + floor[:, 0]
    shift = 0.5 * (low + high)
    # Where the gradient vanishes no Newton step for the shift is known: the interval is halved.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for _ in range(100):
            denominators = values + shift[:, None]
            norm = np.linalg.norm(along / denominators, axis=1)
            if (np.abs(norm - radius) <= 1e-6 * radius).all():
                break
            low, high = np.where(norm > radius, shift, low), np.where(norm > radius, high, shift)
            slope = np.sum(along**2 / denominators**3, axis=1) / norm**2
            step = shift + (norm - radius) / (radius * slope)
            shift = np.where((low < step) & (step < high), step, 0.5 * (low + high))
        return np.asarray(np.where(along == 0.0, 0.0, -along / (values + shift[:, None])))

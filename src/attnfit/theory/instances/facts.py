"""Vectors and symmetric matrices on which the papers' elementary facts are tested."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.theory.instances.reading import as_array, as_number

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Facts:
    """Two vectors and two symmetric matrices.

    Parameters
    ----------
    a, b : array_like, shape (n,)
    X, Y : array_like, shape (d, d)
        Their symmetric parts are used.
    factor : float
        alpha of ``X <= alpha Y``; by default the smallest for which it holds, where Y is positive definite.
    R : float, optional

    Raises
    ------
    ValueError
        On input that is not finite or of the wrong shape; the message names argument and index.
    """

    a: Any
    b: Any
    X: Any
    Y: Any
    factor: float | None = None
    R: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "a", as_array(self.a, "a", (None,)))
        put(self, "b", as_array(self.b, "b", self.a.shape))
        put(self, "X", as_array(self.X, "X", (None, None)))
        d = len(self.X)
        put(self, "X", as_array(self.X, "X", (d, d)))
        put(self, "Y", as_array(self.Y, "Y", (d, d)))
        as_number(self.factor, "factor", positive=False)
        as_number(self.R, "R")

    @cached_property
    def symmetric(self) -> tuple[Array, Array]:
        """The symmetric parts of X and Y."""
        return 0.5 * (self.X + self.X.T), 0.5 * (self.Y + self.Y.T)

    @cached_property
    def alpha(self) -> float:
        """The factor of ``X <= alpha Y``."""
        if self.factor is not None:
            return self.factor
        X, Y = self.symmetric
        values, vectors = np.linalg.eigh(Y)
        if values[0] <= 1e-12 * max(abs(values[-1]), np.finfo(float).tiny):
            return 1.0
        root = vectors / np.sqrt(values)
        return max(0.0, float(np.linalg.eigvalsh(root.T @ X @ root)[-1]))

"""Spectra of matrices of order n that are a diagonal plus a few outer products: none of them is formed for
large n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

Array = NDArray[np.float64]

# Up to this order a dense symmetric matrix costs less than Lanczos vectors.
DENSE = 200
LANCZOS_TOLERANCE = 1e-5
LANCZOS = 50
# Products that estimate the norm.
POWERS = 4


def factored_norm(left: Array, right: Array) -> Array:
    """Return the spectral norm of ``left right^T``, factors of shape (..., n, k) with few columns."""
    R_left, R_right = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (left, right))
    return np.asarray(np.linalg.norm(R_left @ np.swapaxes(R_right, -1, -2), 2, axis=(-2, -1)))


def factored_eigenvalues(factor: Array, core: Array) -> tuple[Array, Array]:
    """Return the extreme eigenvalues of ``factor core factor^T`` of order n, zero among them where the
    rank is below n; factor of shape (..., n, k), core symmetric.
    """
    R = np.asarray(np.linalg.qr(factor, mode="r"))
    values = np.linalg.eigvalsh(R @ core @ np.swapaxes(R, -1, -2))
    low, high = values[..., 0], values[..., -1]
    if factor.shape[-2] > R.shape[-2]:
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    return low, high


def extreme_eigenvalues(diagonal: Array, factor: Array, core: Array) -> tuple[float, float]:
    """Return the smallest and the largest eigenvalue of ``diag(diagonal) + factor core factor^T``.

    Parameters
    ----------
    diagonal : ndarray, shape (n,)
    factor : ndarray, shape (n, k)
    core : ndarray, shape (k, k)
        Symmetric.
    """
    outer = factor @ core
    if len(diagonal) <= DENSE:
        values = np.linalg.eigvalsh(np.diag(diagonal) + outer @ factor.T)
        return float(values[0]), float(values[-1])
    middle = Symmetric(lambda v: diagonal * v + outer @ (factor.T @ v), len(diagonal), np.abs(diagonal))
    return middle.lowest(), middle.highest()


@dataclass(frozen=True)
class Symmetric:
    """A symmetric operator of order n, given by its products.

    Small ones are formed; of large ones Lanczos from a fixed start finds the ends of the spectrum, from
    inside, to a thousandth of a per cent of the norm.

    Attributes
    ----------
    apply : callable
    n : int
    hint : ndarray, shape (n,), optional
        Magnitudes that the leading eigenvectors are expected to have.
    """

    apply: Callable[[Array], Array]
    n: int
    hint: Array | None = None

    @cached_property
    def _eigenvalues(self) -> Array:
        dense = np.stack([self.apply(column) for column in np.eye(self.n)])
        return np.asarray(np.linalg.eigvalsh(0.5 * (dense + dense.T)))

    @cached_property
    def _start(self) -> Array:
        start = np.random.default_rng(0).standard_normal(self.n)
        if self.hint is None:
            return start
        return np.asarray(start * (1e-3 + self.hint / max(float(self.hint.max()), np.finfo(float).tiny)))

    @cached_property
    def _size(self) -> float:
        """A few powers' estimate of the norm, from below."""
        vector, size = self._start / np.linalg.norm(self._start), 0.0
        for _ in range(POWERS):
            image = self.apply(vector)
            size = float(np.linalg.norm(image))
            if size == 0.0:
                break
            vector = image / size
        return size

    def norm(self) -> float:
        """Return the spectral norm."""
        if self.n <= DENSE:
            return float(np.abs(self._eigenvalues).max())
        return abs(self._largest(0.0, 1.0, "LM")) * self._size

    def highest(self) -> float:
        """Return the largest eigenvalue."""
        if self.n <= DENSE:
            return float(self._eigenvalues[-1])
        # Shifted, the wanted end is the largest in magnitude and converges even where it is zero.
        return (self._largest(1.0, 1.0, "LA") - 1.0) * self._size

    def lowest(self) -> float:
        """Return the smallest eigenvalue."""
        if self.n <= DENSE:
            return float(self._eigenvalues[0])
        return (1.0 - self._largest(1.0, -1.0, "LA")) * self._size

    def _largest(self, shift: float, sign: float, which: str) -> float:
        """Return the largest eigenvalue of ``shift + sign * apply / size``."""
        if self._size == 0.0:
            return shift
        factor = sign / self._size

        def product(v: Array) -> Array:
            image = factor * self.apply(v.reshape(-1))
            return image + shift * v.reshape(-1) if shift else image

        operator = LinearOperator((self.n, self.n), matvec=product, dtype=np.float64)
        for tolerance in (LANCZOS_TOLERANCE, 1e-2):
            try:
                values = eigsh(
                    operator, k=1, which=which, v0=self._start, ncv=12, tol=tolerance,
                    return_eigenvectors=False, maxiter=LANCZOS,
                )  # fmt: skip
            except ArpackError:
                continue
            return float(values[0])
        # A cluster of nearly equal values fills the end: any vector of it will do.
        vector = self._start / np.linalg.norm(self._start)
        for _ in range(LANCZOS):
            image = product(vector)
            length = float(np.linalg.norm(image))
            if length == 0.0:
                return 0.0
            vector = image / length
        return float(vector @ product(vector))

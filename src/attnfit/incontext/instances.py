"""Many small softmax regressions at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

Array = NDArray[np.float64]

# Deviation of the logits of random targets, and of x.
SPREAD = 1.0


@dataclass(frozen=True)
class Batch:
    """Instances of ``0.5 |softmax(A x) - b|^2``, each at a point x.

    Attributes
    ----------
    A : ndarray, shape (count, n, d)
    b : ndarray, shape (count, n)
    x : ndarray, shape (count, d)
    z : ndarray, shape (count, n)
        Logits: ``A x``, and what moves have made of them.
    """

    A: Array
    b: Array
    x: Array
    z: Array

    def moved(self, dz: Array) -> Batch:
        """Return the instances after a move of their logits."""
        return Batch(self.A, self.b, self.x, self.z + dz)

    @cached_property
    def f(self) -> Array:
        """Their softmax."""
        return np.asarray(softmax(self.z, axis=1))

    @cached_property
    def slope(self) -> Array:
        """Derivative of the loss in the logits, ``s = f o (c - <f, c>)`` with ``c = f - b``."""
        c = self.f - self.b
        return np.asarray(self.f * (c - np.sum(self.f * c, axis=1, keepdims=True)))

    @cached_property
    def descent(self) -> Array:
        """Move of the logits of a unit gradient step on x, ``-A A^T s``."""
        return -np.asarray(np.einsum("cnd,cmd,cm->cn", self.A, self.A, self.slope, optimize=True))

    @cached_property
    def data_descent(self) -> Array:
        """Move of the logits of a unit gradient step on A, ``-|x|^2 s``."""
        return np.asarray(-np.sum(self.x**2, axis=1)[:, None] * self.slope)

    def shift(self, dz: Array) -> Array:
        """Return ``softmax(z + dz) - softmax(z)``, accurate for small moves."""
        dh = log_softmax(self.z + dz, axis=1) - log_softmax(self.z, axis=1)
        small = dz - np.log1p(np.sum(self.f * np.expm1(np.clip(dz, -1.0, 1.0)), axis=1, keepdims=True))
        dh = np.where(np.abs(dz).max(axis=1, keepdims=True) < 1.0, small, dh)
        return np.asarray(self.f * np.expm1(dh))

    def loss(self, dz: Array | float = 0.0) -> Array:
        """Return the loss of each instance after a move of the logits."""
        return np.asarray(0.5 * np.sum((softmax(self.z + dz, axis=1) - self.b) ** 2, axis=1))

    def best_step(self, direction: Array, sizes: Array) -> Array:
        """Return the step size of least loss on a grid for each instance, shape (count,)."""
        return np.asarray(sizes[np.argmin([self.loss(size * direction) for size in sizes], axis=0)])


def draw(count: int, n: int, d: int, planted: bool, rng: np.random.Generator) -> Batch:
    """Draw instances: rows of A from N(0, I/d), x from N(0, I), b the softmax of noise or, planted, of
    ``A x_true``.
    """
    A = rng.standard_normal((count, n, d)) / np.sqrt(d)
    x = SPREAD * rng.standard_normal((count, d))
    logits = SPREAD * rng.standard_normal((count, n))
    if planted:
        logits = np.einsum("cnd,cd->cn", A, SPREAD * rng.standard_normal((count, d)))
    return Batch(A, np.asarray(softmax(logits, axis=1)), x, np.einsum("cnd,cd->cn", A, x))

"""The Hessian of a single residual of an attention layer, by the papers' five cases: for study."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.inverse_layer import HeadState, Pass

Array = NDArray[np.float64]


def residual_hessian(at: Pass, i0: int, j0: int) -> Array:
    """Return the second derivatives of ``output[i0, j0]`` in the tokens, shape (n, n, d, d): block (i1, i2)
    is that of tokens i1 and i2.

    Notes
    -----
    "Unmasking Transformers: A Theoretical Approach to Data Recovery via Attention Weights", its five cases
    (see `case_number`) with the errors of the printed ones corrected. The dictionary to its symbols is in
    `Symbols`. All n m of them summed with the residuals as weights would give the Hessian of the loss too, at
    some n m times the cost of `attnfit.objectives.inverse_curvature.layer_curvature`.
    """
    n, d = at.T.shape
    blocks = np.zeros((n, n, d, d))
    for state in at.heads:
        symbols = Symbols.of(state, i0, j0)
        for i1 in range(n):
            for i2 in range(n):
                blocks[i1, i2] += symbols.block(i1, i2)
    return blocks


def case_number(i0: int, i1: int, i2: int) -> int:
    """Return which of the five cases the block (i1, i2) of residual (i0, .) is.

    1: ``i0 = i1 = i2``; 2: ``i0 = i1 != i2``; 3: ``i0 = i2 != i1``; 4: ``i1 = i2 != i0``; 5: all different.
    """
    if i1 == i2:
        return 1 if i0 == i1 else 4
    return 2 if i0 == i1 else 3 if i0 == i2 else 5


@dataclass(frozen=True)
class Symbols:
    """The papers' symbols for one residual and one head; M is W, or W^T in the papers' vector notation.

    Attributes
    ----------
    i0 : int
    f : ndarray, shape (n,)
        ``f(X)_i0``: the row of the attention.
    h : ndarray, shape (n,)
        ``h(X)_j0``: the column of the (centred) values.
    s : float
        ``<f, h>``.
    w, z, g, v : ndarray, shape (d,)
        ``W x_i0``, ``W^T X f``, ``W^T X (f o h)`` and column j0 of V.
    y : ndarray, shape (n, d)
        Rows ``W^T x_k``.
    M : ndarray, shape (d, d)
    """

    i0: int
    f: Array
    h: Array
    s: float
    w: Array
    z: Array
    g: Array
    v: Array
    y: Array
    M: Array

    @classmethod
    def of(cls, state: HeadState, i0: int, j0: int) -> Symbols:
        """Read them off a forward pass."""
        f, h, y = state.P[i0], state.H[:, j0], state.Q
        return cls(
            i0, f, h, float(f @ h), state.R[i0], f @ y, (f * h) @ y, state.head.V[:, j0], y, state.head.M
        )

    def block(self, i1: int, i2: int) -> Array:
        """Return the block of tokens i1 and i2, shape (d, d)."""
        case = case_number(self.i0, i1, i2)
        if case == 1:
            return self._same()
        if case == 2:
            return self._query_and_key(i2)
        if case == 3:
            return self._query_and_key(i1).T
        if case == 4:
            return self._one_key(i1)
        return self._two_keys(i1, i2)

    def _same(self) -> Array:
        """Case 1."""
        w, z, g, v, y, M, s = self.w, self.z, self.g, self.v, self.y, self.M, self.s
        f0, h0, y0 = float(self.f[self.i0]), float(self.h[self.i0]), y[self.i0]
        ww, zz = np.outer(w, w), np.outer(z, z)
        return np.asarray(
            (2 * s * f0**2 - 2 * f0**2 * h0 - s * f0 + f0 * h0) * ww
            + (2 * s * f0 - f0 * h0) * _both(w, z)
            - f0 * _both(g, w)
            + (f0 - f0**2) * _both(w, v)
            + f0 * (h0 - s) * (_both(w, y0) + M + M.T)
            + 2 * s * zz
            - _both(z, g)
            - f0 * _both(z, v)
            + f0 * _both(y0, v)
            + y.T @ ((self.f * (self.h - s))[:, None] * y)
        )

    def _query_and_key(self, i2: int) -> Array:
        """Case 2; transposed, case 3."""
        w, z, g, v, s = self.w, self.z, self.g, self.v, self.s
        f0, h0, f2, h2, y2 = self.f[self.i0], self.h[self.i0], self.f[i2], self.h[i2], self.y[i2]
        return np.asarray(
            f2 * f0 * (2 * s - h2 - h0) * np.outer(w, w)
            - f2 * f0 * _both(w, v)
            + f2 * (2 * s - h2) * np.outer(z, w)
            - f2 * np.outer(z, v)
            + f2 * (h2 - s) * (np.outer(y2, w) + self.M)
            - f2 * np.outer(g, w)
            + f2 * np.outer(y2, v)
        )

    def _one_key(self, i1: int) -> Array:
        """Case 4."""
        f1, h1, s = self.f[i1], self.h[i1], self.s
        both = (f1 - f1**2) * _both(self.w, self.v)
        return np.asarray((2 * f1**2 - f1) * (s - h1) * np.outer(self.w, self.w) + both)

    def _two_keys(self, i1: int, i2: int) -> Array:
        """Case 5."""
        f, h, w = self.f, self.h, self.w
        weight = 2 * self.s - h[i1] - h[i2]
        return np.asarray(f[i1] * f[i2] * (weight * np.outer(w, w) - _both(w, self.v)))


def _both(a: Array, b: Array) -> Array:
    """Return ``a b^T + b a^T``."""
    outer = np.outer(a, b)
    return outer + outer.T

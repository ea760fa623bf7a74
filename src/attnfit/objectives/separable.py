"""Variable projection of attention outputs at several points at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.projected import REFINEMENTS, ProjectedAttention, Text, softmax

Array = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class Points:
    """What is known at S points; each array has one of them a row.

    Attributes
    ----------
    X : ndarray, shape (S, heads, d1, d2)
    values : ndarray, shape (S,)
        phi(X); infinite where it overflows.
    squares : ndarray, shape (S,)
        Weighted squared residuals.
    Y : ndarray, shape (S, heads v, m)
    C : ndarray, shape (S, n, m)
        Residuals times the root of their weights.
    Q : ndarray, shape (S, n, heads v)
        Basis of Z times the root of the weights.
    """

    X: Array
    values: Array
    squares: Array
    Y: Array
    C: Array
    Q: Array

    def take(self, which: Index) -> Points:
        """Return some of them."""
        return Points(*(part[which] for part in self._parts()))

    def put(self, which: Index, other: Points) -> None:
        """Replace some of them."""
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine[which] = theirs

    def _parts(self) -> tuple[Array, ...]:
        return self.X, self.values, self.squares, self.Y, self.C, self.Q


class Separable:
    """``phi(X) = min_Y L(X, Y)`` with Kaufman's normal equations, at several points at once.

    With ``first_order`` the maps are ``U o (1 + z - sum_k U z)``, U uniform over the keys that a query sees
    and z the logits: outputs are then bilinear in (X, Y). Their derivative is that of a softmax with U in
    place of P.

    Parameters
    ----------
    problem : ProjectedAttention
    first_order : bool
    """

    def __init__(self, problem: ProjectedAttention, *, first_order: bool = False) -> None:
        self.problem, self.full, self.first_order = problem, problem.full, first_order
        self.root = np.sqrt(self.full.weights)[:, None]
        self.B = self.root * self.full.B
        self.ridge = np.broadcast_to(problem.ridge, (problem.n_unknowns,))
        self.value_ridge = float(np.max(self.full.ridge))
        # An offset alone may make attention uneven: it belongs to U.
        nothing = np.zeros((self.full.n_heads, *self.full.sizes[:2]))
        self.uniform = [softmax(text.logits(nothing, slice(None))) for text in self.full.texts]

    @property
    def numbers(self) -> int:
        """Largest number of entries that one point takes at a time."""
        d1, d2, v, m = self.full.sizes
        heads, n = self.full.n_heads, len(self.B)
        size = heads * d1 * d2
        maps = heads * max(len(t.A1) * len(t.A2) for t in self.full.texts)
        return 3 * maps + heads * n * d2 * (m + 1) + n * (heads * d2) ** 2 + 3 * size**2 + n * d1 * heads * v

    def evaluate(self, X: Array) -> Points:
        """Return what is known at X, shape (S, heads, d1, d2)."""
        full = self.full
        with np.errstate(over="ignore", invalid="ignore"):
            Z = np.concatenate([self._values(text, X, s) for s, text in enumerate(full.texts)], axis=1)
            Z *= self.root
            width = Z.shape[2]
            finite = np.isfinite(Z).all(axis=(1, 2))
            Z[~finite] = 0.0
            floor = np.broadcast_to(np.sqrt(self.problem.value_ridge) * np.eye(width), (len(Z), width, width))
            Q, R = np.linalg.qr(np.concatenate([Z, floor], axis=1))
            Q = Q[:, : len(self.B)]
            Y = np.zeros((len(Z), width, self.B.shape[1]))
            Zt, Rt = np.swapaxes(Z, 1, 2), np.swapaxes(R, 1, 2)
            for _ in range(1 + REFINEMENTS):
                back = Zt @ (self.B - Z @ Y) - self.value_ridge * Y
                Y += np.linalg.solve(R, np.linalg.solve(Rt, back))
            C = Z @ Y - self.B
            squares = np.sum(C * C, axis=(1, 2))
            flat = X.reshape(len(X), -1)
            values = (
                squares + self.value_ridge * np.sum(Y * Y, axis=(1, 2)) + np.sum(self.ridge * flat**2, axis=1)
            )
        values = np.where(finite & np.isfinite(values), 0.5 * values, np.inf)
        return Points(X.copy(), values, squares, Y, C, Q)

    def normal(self, at: Points) -> tuple[Array, Array]:
        """Return the gradients of phi, shape (S, n_unknowns), and Kaufman's ``J^T J + ridge``."""
        full = self.full
        (S, heads, d1, d2), (_, v, m) = at.X.shape, full.sizes[1:]
        size = heads * d1 * d2
        gradient, K = np.zeros((S, d1, heads * d2)), np.zeros((S, d1, d1, heads * d2, heads * d2))
        crossed = np.zeros((S, heads * v, d1, m, heads * d2))
        for s, text in enumerate(full.texts):
            rows = slice(text.first, text.first + len(text.A1))
            T = self._slopes(text, at, s) * self.root[rows, :, None]
            gradient += text.A1.T @ np.einsum("sijl,sij->sil", T, at.C[:, rows])
            inner = np.swapaxes(T, 2, 3) @ T
            pairs = (text.A1[:, :, None] * text.A1[:, None, :]).reshape(len(text.A1), -1)
            K += (pairs.T @ inner.reshape(S, len(pairs), -1)).reshape(K.shape)
            seen = at.Q[:, rows, :, None] * text.A1[:, None, :]
            seen = np.swapaxes(seen.reshape(S, len(text.A1), -1), 1, 2)
            crossed += (seen @ T.reshape(S, len(text.A1), -1)).reshape(crossed.shape)
        # From (d1, heads d2) to the order of X: heads, d1, d2.
        g = gradient.reshape(S, d1, heads, d2).swapaxes(1, 2).reshape(S, size)
        J = crossed.reshape(S, heads * v, d1, m, heads, d2).transpose(0, 1, 3, 4, 2, 5).reshape(S, -1, size)
        H = K.reshape(S, d1, d1, heads, d2, heads, d2).transpose(0, 3, 1, 4, 5, 2, 6).reshape(S, size, size)
        H = H - np.swapaxes(J, 1, 2) @ J
        own = np.arange(size)
        H[:, own, own] += self.ridge
        return g + self.ridge * at.X.reshape(S, size), H

    def spread(self, X: Array) -> Array:
        """Return the standard deviation of the logits of each head less the mean of a query, (S, heads)."""
        total = np.zeros(X.shape[:2])
        for s, text in enumerate(self.full.texts):
            z = (text.A1 @ X) @ text.A2.T
            U = self.uniform[s]
            z = z - np.sum(U * z, axis=3, keepdims=True)
            total += np.sum(U * z * z, axis=(2, 3))
        return np.sqrt(total / len(self.B))

    def _maps(self, text: Text, X: Array, s: int) -> Array:
        """Return what stands for the maps, shape (S, heads, n, k)."""
        self.full.count_read(X[:, 0, 0, 0].size * self.full.n_heads * len(text.A1) * len(text.A2))
        if not self.first_order:
            return softmax(text.logits(X, slice(None)))
        U, z = self.uniform[s], (text.A1 @ X) @ text.A2.T
        return np.asarray(U * (1.0 + z - np.sum(U * z, axis=3, keepdims=True)))

    def _values(self, text: Text, X: Array, s: int) -> Array:
        """Return ``[P_1 A3 ... P_H A3]``, shape (S, n, heads v)."""
        values = self._maps(text, X, s) @ text.A3
        return np.swapaxes(values, 1, 2).reshape(len(X), len(text.A1), -1)

    def _slopes(self, text: Text, at: Points, s: int) -> Array:
        """Return ``sum_k P_ik (W_kj - (P W)_ij) A2_kl`` with ``W_h = A3 Y_h``, shape (S, n, m, heads d2)."""
        S, heads, _, d2 = at.X.shape
        m = at.Y.shape[2]
        P = (
            np.broadcast_to(self.uniform[s], (S, *self.uniform[s].shape))
            if self.first_order
            else self._maps(text, at.X, s)
        )
        W = text.A3 @ at.Y.reshape(S, heads, -1, m)
        both = (W[..., :, None] * text.A2[:, None, :]).reshape(S, heads, len(text.A2), m * d2)
        T = (P @ both).reshape(S, heads, len(text.A1), m, d2)
        T -= (P @ W)[..., :, None] * (P @ text.A2)[..., None, :]
        return np.moveaxis(T, 1, 3).reshape(S, len(text.A1), m, heads * d2)

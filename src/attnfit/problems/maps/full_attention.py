"""Regression of attention outputs: the bilinear form and the value matrix together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.kronecker import BLOCK_PAIRS, KroneckerDesign
from attnfit.problems.base import Problem, Reduction, majorant
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.inputs import as_point, as_ridge, as_vector
from attnfit.problems.maps.pairs import read_factor, read_pairs
from attnfit.problems.maps.projected import ProjectedAttention
from attnfit.problems.maps.whitening import Whitening

Array = NDArray[np.float64]

# Maps of this many entries are kept for the products with the Hessian; larger ones are made anew.
KEPT_PAIRS = 1 << 24


class FullAttention(Problem):
    """Fit (X, Y) so that attention outputs are given: ``0.5 sum_i w_i |(P A3 Y - B)_i|^2 + ridge``.

    ``P = softmax(A1 X A2^T + offset)`` row by row over unmasked keys; the ridge is ``0.5 ridge (||X||_F^2 +
    ||Y||_F^2)``. The source prints the loss without the 0.5.

    Parameters
    ----------
    A1 : array_like, shape (n, d1)
        Queries.
    A2 : array_like, shape (k, d2)
        Keys.
    A3 : array_like, shape (k, v)
        What values are made of.
    B : array_like, shape (n, m)
        Outputs.
    mask : "causal" or array_like of bool, shape (n, k), optional
    weights : array_like, shape (n,), optional
    offset : array_like, shape (n, k), optional
    ridge : float
        Needed where A3 has dependent columns, or more columns than there are outputs: Y is then not
        determined.

    Raises
    ------
    ValueError
        If anything is not finite or of the wrong shape, or Z = P A3 is singular for every X and ridge is
        zero.

    Notes
    -----
    The unknown is the vector (X, Y), each in C order: see `split`. With ``Z = P A3``, ``C = Z Y - B``,
    ``G = w C`` and ``S = P o (G Y^T A3^T - rowsum)``: ``dL/dX = A1^T S A2``, ``dL/dY = Z^T G``. Y is linear
    in the model, so `minimize` eliminates it (`projected`). Source: "Local Convergence of Approximate Newton
    Method for Two Layer Nonlinear Regression", attention optimisation problem, with exact derivatives; Golub
    and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
    separate" (1973).
    """

    linear = False
    best_hessian = "matrix_free"

    def __init__(
        self,
        A1: Any,
        A2: Any,
        A3: Any,
        B: Any,
        *,
        mask: Any = None,
        weights: Any = None,
        offset: Any = None,
        ridge: float = 0.0,
    ) -> None:
        pairs = read_pairs(A1, A2, None, mask, None, offset, None, 0.0)
        self.design = pairs.design
        if len(self.design.sequences) > 1:
            raise ValueError("A1 must be one matrix: outputs of several sequences are not fitted together")
        block = self.design.sequences[0]
        n, k = len(block.queries), len(block.keys)
        self.A1, self.A2, self.mask = block.queries, block.keys, block.mask
        self.offset = None if offset is None else np.asarray(offset, dtype=np.float64)
        self.A3, self.B = read_factor(A3, "A3"), read_factor(B, "B")
        for name, rows, other, expected in (("A3", len(self.A3), "A2", k), ("B", len(self.B), "A1", n)):
            if rows != expected:
                raise ValueError(f"{name} has {rows} rows but {other} has {expected}; they must agree")
        self.weights = np.ones(n)
        if weights is not None:
            self.weights = as_vector(weights, n, "weights", non_negative=True, rows_of="A1")
        self.ridge: float | Array = as_ridge(ridge)
        self._require_regular()
        self._pairs_read = 0

    def _require_regular(self) -> None:
        v = self.A3.shape[1]
        rank = int(np.linalg.matrix_rank(self.A3))
        if self.ridge == 0.0 and min(rank, len(self.A1)) < v:
            what = f"A3 has rank {rank}" if rank < v else f"there are only {len(self.A1)} outputs"
            raise ValueError(
                f"Z = softmax(A1 X A2^T) A3 is singular for every X: {what} but A3 has {v} columns, so Y "
                "is not determined; pass ridge > 0, or drop columns of A3"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(d1 d2 + v m,): X, then Y."""
        d1, d2, v, m = self._sizes
        return (d1 * d2 + v * m,)

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return self.A1.shape[1], self.A2.shape[1], self.A3.shape[1], self.B.shape[1]

    @property
    def n_passes(self) -> float:
        """Reads of the maps since the problem was made."""
        return self._pairs_read / (len(self.A1) * len(self.A2))

    def split(self, x: Any) -> tuple[Array, Array]:
        """Return X, shape (d1, d2), and Y, shape (v, m)."""
        d1, d2, v, m = self._sizes
        flat = as_point(x, self.shape)
        return flat[: d1 * d2].reshape(d1, d2), flat[d1 * d2 :].reshape(v, m)

    def join(self, X: Array, Y: Array) -> Array:
        """Return the unknown made of X and Y."""
        return np.concatenate([np.reshape(X, -1), np.reshape(Y, -1)])

    def predict(self, x: Any) -> Array:
        """Return the fitted outputs ``P A3 Y``, shape (n, m)."""
        X, Y = self.split(x)
        return np.concatenate([(P @ self.A3) @ Y for _, P in self.maps(X)])

    def maps(self, X: Array) -> Iterator[tuple[slice, Array]]:
        """Yield the maps P by blocks of queries: (rows, array of shape (rows, k))."""
        step = max(8, BLOCK_PAIRS // len(self.A2))
        for first in range(0, len(self.A1), step):
            rows = slice(first, min(first + step, len(self.A1)))
            z = (self.A1[rows] @ X) @ self.A2.T
            if self.offset is not None:
                z += self.offset[rows]
            if self.mask is not None:
                z[~self.mask[rows]] = -np.inf
            z -= z.max(axis=1, keepdims=True)
            np.exp(z, out=z)
            z /= z.sum(axis=1, keepdims=True)
            self._pairs_read += z.size
            yield rows, z

    def kept_maps(self, X: Array) -> Callable[[], Iterable[tuple[slice, Array]]]:
        """Return a function that gives the maps again, from memory where they are small."""
        if len(self.A1) * len(self.A2) > KEPT_PAIRS:
            return lambda: self.maps(X)
        kept = list(self.maps(X))
        return lambda: kept

    def initial_point(self, random_state: Any = None) -> Array:
        """Return a small random X and the best Y for it."""
        projected = self.projected()
        X = projected.initial_point(random_state)
        return self.join(X, projected.values(X))

    def projected(self) -> ProjectedAttention:
        """Return the problem in X alone, Y being the best for each X."""
        return ProjectedAttention(self)

    def reduction(self) -> Reduction:
        """Return the projected problem over whitened queries and keys."""
        whitening = Whitening.of(self.design, centred=True)
        projected = ProjectedAttention(self.with_design(whitening.design))
        projected.ridge = self.ridge * whitening.ridge

        def lift(y: Array) -> Array:
            return np.concatenate([whitening.lift(y), projected.values(y).reshape(-1)])

        size = self.A1.shape[1] * self.A2.shape[1]
        note = "Y eliminated" + (f"; {whitening.note}" if whitening.note else "")
        return Reduction(projected, lift, lambda x: whitening.restrict(x[:size]), note)

    def with_design(self, design: KroneckerDesign) -> FullAttention:
        """Return the problem with other queries and keys of the same pairs."""
        block = design.sequences[0]
        return FullAttention(
            block.queries, block.keys, self.A3, self.B,
            mask=block.mask, weights=self.weights, offset=self.offset, ridge=float(np.max(self.ridge)),
        )  # fmt: skip

    # ---- for the solvers

    def slope(self, P: Array, G: Array, Y: Array) -> Array:
        """Return ``P o (G Y^T A3^T - rowsum)``: the gradient in the logits."""
        back = (G @ Y.T) @ self.A3.T
        return np.asarray(P * (back - np.sum(P * back, axis=1, keepdims=True)))

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        origin: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value and gradient at x."""
        X, Y = self.split(x)
        value, by_x, by_y = 0.0, np.zeros_like(X), np.zeros_like(Y)
        for rows, P in self.maps(X):
            Z = P @ self.A3
            C = Z @ Y - self.B[rows]
            G = self.weights[rows, None] * C
            value += 0.5 * float(np.sum(G * C))
            by_y += Z.T @ G
            by_x += self.A1[rows].T @ (self.slope(P, G, Y) @ self.A2)
        value += 0.5 * float(np.sum(self.ridge * x * x))
        gradient = self.join(by_x, by_y) + self.ridge * x
        start = self.evaluate(np.zeros_like(x)).gradient if origin else None
        return Evaluation(x, value, gradient, origin_gradient=start)

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return (dX, dY) -> H (dX, dY)."""
        X, Y = self.split(at.x)
        maps = self.kept_maps(X)

        def product(direction: Array) -> Array:
            dX, dY = self.split(direction)
            by_x, by_y = np.zeros_like(X), np.zeros_like(Y)
            for rows, P in maps():
                part = self.second(rows, P, Y, dX, dY)
                by_x += part[0]
                by_y += part[1]
            return np.asarray(self.join(by_x, by_y) + self.ridge * direction)

        return product

    def moved(self, rows: slice, P: Array, dX: Array) -> Array:
        """Return the change of the maps, ``J(P)(A1 dX A2^T)``."""
        u = (self.A1[rows] @ dX) @ self.A2.T
        return np.asarray(P * (u - np.sum(P * u, axis=1, keepdims=True)))

    def second(self, rows: slice, P: Array, Y: Array, dX: Array, dY: Array) -> tuple[Array, Array]:
        """Return the part of a block of queries in the product of the Hessian with (dX, dY)."""
        w = self.weights[rows, None]
        Z = P @ self.A3
        G = w * (Z @ Y - self.B[rows])
        dP = self.moved(rows, P, dX)
        dZ = dP @ self.A3
        dG = w * (dZ @ Y + Z @ dY)
        back = (G @ Y.T) @ self.A3.T
        dback = (dG @ Y.T + G @ dY.T) @ self.A3.T
        mean = np.sum(P * back, axis=1, keepdims=True)
        dmean = np.sum(dP * back + P * dback, axis=1, keepdims=True)
        dS = dP * (back - mean) + P * (dback - dmean)
        return self.A1[rows].T @ (dS @ self.A2), dZ.T @ G + Z.T @ dG

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian from its blocks in X and Y; an array of shape (n, m d2 + v d2) is formed by
        blocks.

        With ``absolute`` all eigenvalues are taken by absolute value.
        """
        X, Y = self.split(at.x)
        (d1, d2), (v, m) = X.shape, Y.shape
        W = self.A3 @ Y
        keys = self.A2 - self.A2.mean(axis=0)
        xx, xy = np.zeros((d1, d1, d2, d2)), np.zeros((d1, d2, v, m))
        yy = np.zeros((v, v))
        for rows, P in self.maps(X):
            A1, w = self.A1[rows], self.weights[rows]
            Z, mu = P @ self.A3, P @ keys
            G = w[:, None] * (Z @ Y - self.B[rows])
            S = self.slope(P, G, Y)
            outputs = _cross(P, W, keys) - (P @ W)[:, :, None] * mu[:, None, :]
            values = _cross(P, self.A3, keys) - Z[:, :, None] * mu[:, None, :]
            g = S @ keys
            inner = np.einsum("i,ijl,ijq->ilq", w, outputs, outputs, optimize=True) + _cross(S, keys, keys)
            inner -= g[:, :, None] * mu[:, None, :] + mu[:, :, None] * g[:, None, :]
            xx += np.einsum("ip,iq,ilr->pqlr", A1, A1, inner, optimize=True)
            xy += np.einsum("ip,i,ijl,iu->pluj", A1, w, outputs, Z, optimize=True)
            xy += np.einsum("ip,ij,iul->pluj", A1, G, values, optimize=True)
            yy += Z.T @ (w[:, None] * Z)
        size = d1 * d2
        H = np.empty((size + v * m,) * 2)
        H[:size, :size] = xx.transpose(0, 2, 1, 3).reshape(size, size)
        H[:size, size:] = xy.reshape(size, v * m)
        H[size:, :size] = H[:size, size:].T
        H[size:, size:] = np.kron(yy, np.eye(m))
        H[np.diag_indices(len(H))] += self.ridge
        return majorant(H) if absolute else H

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return one number for X and one for each row of Y: the mean curvature and that of Z."""
        X, Y = self.split(at.x)
        by_y = np.zeros(self.A3.shape[1])
        for rows, P in self.maps(X):
            by_y += np.einsum("i,iu,iu->u", self.weights[rows], P @ self.A3, P @ self.A3)
        by_x = self.projected().diagonal_at(Evaluation(X.reshape(-1), at.value, at.gradient))
        return np.asarray(np.concatenate([by_x, np.repeat(by_y, Y.shape[1])]) + self.ridge)


def _cross(P: Array, left: Array, right: Array) -> Array:
    """Return ``sum_k P_ik left_kj right_kl``, shape (n, j, l)."""
    rows = left[:, :, None] * right[:, None, :]
    return (P @ rows.reshape(len(left), -1)).reshape(len(P), left.shape[1], right.shape[1])

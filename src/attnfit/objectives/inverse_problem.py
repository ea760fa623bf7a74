"""A given output of an attention layer as a function of the unknown tokens: what solvers work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.gram import majorant
from attnfit.data.inputs import as_point
from attnfit.objectives.inverse_curvature import gauss_newton_diagonal, layer_curvature, symmetric
from attnfit.objectives.inverse_layer import AttentionLayer, Pass, merged_heads
from attnfit.objectives.objective import Evaluation, Offer, Problem

Array = NDArray[np.float64]

# Singular values of the value maps below this share of the largest are zero.
RANK_TOLERANCE = 1e-10


@dataclass(frozen=True)
class LayerEvaluation(Evaluation):
    """An `Evaluation` with the forward pass and the residuals ``output - B``."""

    forward: Pass = field(kw_only=True, repr=False)
    residuals: Array = field(kw_only=True, repr=False)


@dataclass(frozen=True)
class Points:
    """Several points evaluated at once: each array has one of them a row.

    Attributes
    ----------
    x, gradients : ndarray, shape (k, n_unknowns)
    values : ndarray, shape (k,)
        Infinite where the loss overflows.
    squares : ndarray, shape (k,)
        ``||output - B||_F^2``.
    forward : Pass
    """

    x: Array
    values: Array
    gradients: Array
    squares: Array
    forward: Pass


class LayerProblem(Problem):
    """``0.5 ||layer(T) - B||_F^2 + 0.5 gamma ||x||^2`` over the unknown rows of T; x is flat here.

    Parameters
    ----------
    layer : AttentionLayer
    B : ndarray, shape (n, m)
    known : ndarray, shape (d, n)
        Tokens as columns, NaN where unknown.
    gamma : float
    """

    offers = frozenset({Offer.RESIDUALS})

    linear = False
    best_hessian = "kept"

    def __init__(self, layer: AttentionLayer, B: Array, known: Array, gamma: float) -> None:
        self.layer, self.B, self.known, self.gamma = layer, B, known, gamma
        self.d, self.n = known.shape
        self.m = B.shape[1]
        self.unknown = np.flatnonzero(np.isnan(known[0]))
        self._n_evaluated = 0.0
        self._latest: tuple[Array, Pass, Array] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(d, number of unknown tokens)."""
        return (self.d, len(self.unknown))

    @property
    def n_passes(self) -> float:
        """Forward passes of the layer since the problem was made."""
        return self._n_evaluated

    @cached_property
    def row_space(self) -> Array:
        """Orthonormal rows that span what the value maps produce, shape (r, m).

        Every row of an output is ``sum_h (P_h T)_i V_h``: a combination of the rows of all V_h below one
        another. Output columns that are zero, repeated or dependent on others leave r as it is.
        """
        values = np.vstack([head.V for head in merged_heads(self.layer.heads)])
        _, s, rows = np.linalg.svd(values, full_matrices=False)
        return np.asarray(rows[s > RANK_TOLERANCE * max(float(s[0]), np.finfo(float).tiny)])

    def token_rows(self, x: Array) -> Array:
        """Return all tokens as rows, shape (..., n, d), of flat points (..., n_unknowns)."""
        T = np.empty((*x.shape[:-1], self.n, self.d))
        T[...] = self.known.T
        T[..., self.unknown, :] = np.swapaxes(x.reshape(*x.shape[:-1], *self.shape), -1, -2)
        return T

    def rows_with(self, tokens: Array) -> Array:
        """Return all tokens as rows, shape (n, d), of the unknown ones as rows."""
        T = np.ascontiguousarray(self.known.T)
        T[self.unknown] = tokens
        return T

    def columns(self, T: Array) -> Array:
        """Return the unknown tokens of rows (..., n, d) as columns, shape (..., d, n_unknown)."""
        return np.ascontiguousarray(np.swapaxes(T[..., self.unknown, :], -1, -2))

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> LayerEvaluation:
        """Return value and gradient at x."""
        with np.errstate(over="ignore", invalid="ignore"):
            forward, C = self._passed(x)
            value = 0.5 * float(np.sum(C * C) + self.gamma * (x @ x))
            gradient = self.columns(self.layer.pull_back(forward, C)).reshape(-1)
            gradient += self.gamma * x
        value = value if np.isfinite(value) else np.inf
        start = self.evaluate(np.zeros_like(x)).gradient if at_zero else None
        return LayerEvaluation(x, value, gradient, gradient_at_zero=start, forward=forward, residuals=C)

    def hvp(self, x: Any, v: Any) -> Array:
        """Return the product of the Hessian at x with v, in the natural shape; the gradient is not formed."""
        point, direction = as_point(x, self.shape), as_point(v, self.shape, "v")
        with np.errstate(over="ignore", invalid="ignore"):
            forward, C = self._passed(point)
            at = LayerEvaluation(point, np.nan, point, forward=forward, residuals=C)
            return self._finite(self.hvp_at(at, direction), at).reshape(self.shape)

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian; with ``absolute`` all eigenvalues are taken by absolute value."""
        H = self._curvature(at, second=True)
        return majorant(H) if absolute else H

    def gauss_newton_at(self, at: Evaluation) -> Array:
        """Return ``J^T J + gamma`` at an evaluated point."""
        return self._curvature(at, second=False)

    def jacobian_at(self, at: Evaluation) -> Array:
        """Return the Jacobian of the residuals at an evaluated point, shape (n m, n_unknowns)."""
        return self.layer.jacobian(self._known(at)[0], self.unknown)

    def residual_curvature_at(self, at: Evaluation) -> Array:
        """Return ``sum_ij residual_ij Hessian of residual_ij + gamma`` at an evaluated point."""
        forward, C = self._known(at)
        H = np.zeros((self.n_unknowns, self.n_unknowns))
        for head in forward.heads:
            H += symmetric(layer_curvature(head, C, self.unknown, gauss=False, second=True))
        H[np.diag_indices(len(H))] += self.gamma
        return H

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> H v."""
        forward, C = self._known(at)
        product = self.layer.second_product(forward, C)
        return lambda v: self.columns(product(self._direction(v))).reshape(-1) + self.gamma * v

    def gauss_newton_operator(self, at: Evaluation) -> Callable[[Array], Array]:
        """Return v -> (J^T J + gamma) v."""
        forward, _ = self._known(at)

        def product(v: Array) -> Array:
            pushed = self.layer.push_forward(forward, self._direction(v))
            return self.columns(self.layer.pull_back(forward, pushed)).reshape(-1) + self.gamma * v

        return product

    def evaluate_many(self, x: Array) -> Points:
        """Return values and gradients at several points at once, x of shape (k, n_unknowns)."""
        self._n_evaluated += len(x)
        with np.errstate(over="ignore", invalid="ignore"):
            forward = self.layer.forward(self.token_rows(x))
            C = forward.output - self.B
            squares = np.sum(C * C, axis=(1, 2))
            values = 0.5 * (squares + self.gamma * np.sum(x * x, axis=1))
            gradients = self.columns(self.layer.pull_back(forward, C)).reshape(x.shape) + self.gamma * x
        values = np.where(np.isfinite(values), values, np.inf)
        return Points(x, values, gradients, squares, forward)

    def gauss_newton_many(self, points: Points, which: NDArray[np.intp]) -> Array:
        """Return ``J^T J + gamma`` at some of these points, shape (len(which), n_unknowns, n_unknowns)."""
        if len(which) == 1:
            k = int(which[0])
            forward = points.forward.take(k)
            at = LayerEvaluation(
                points.x[k], points.values[k], points.gradients[k],
                forward=forward, residuals=forward.output - self.B,
            )  # fmt: skip
            return self.gauss_newton_at(at)[None]
        J = self.layer.jacobian(points.forward.take(which), self.unknown)
        H = np.swapaxes(J, -1, -2) @ J
        own = np.arange(self.n_unknowns)
        H[:, own, own] += self.gamma
        return np.asarray(H)

    def bend(self, forward: Pass, p: Array) -> Array:
        """Return ``J^T`` times the second derivative of the residuals along p, flat."""
        second = self.layer.second_push(forward, self._direction(p))
        return self.columns(self.layer.pull_back(forward, second)).reshape(-1)

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the number of heads times the sum of their ``diag(J_h^T J_h)``, plus gamma."""
        forward, _ = self._known(at)
        total = np.sum([gauss_newton_diagonal(s, self.unknown) for s in forward.heads], axis=0)
        return np.asarray(len(forward.heads) * total.reshape(-1) + self.gamma)

    def _curvature(self, at: Evaluation, *, second: bool) -> Array:
        """Return ``J^T J + gamma``, on request with the residuals' own curvature."""
        forward, C = self._known(at)
        if len(forward.heads) > 1:
            # Heads meet in J^T J: one Jacobian costs less than all pairs of them.
            J = self.jacobian_at(at)
            own = self.residual_curvature_at(at) if second else self.gamma * np.eye(J.shape[1])
            return np.asarray(J.T @ J + own)
        H = symmetric(layer_curvature(forward.heads[0], C, self.unknown, gauss=True, second=second))
        H[np.diag_indices(len(H))] += self.gamma
        return H

    def _known(self, at: Evaluation) -> tuple[Pass, Array]:
        """Return the forward pass and the residuals of an evaluated point."""
        return (at.forward, at.residuals) if isinstance(at, LayerEvaluation) else self._passed(at.x)

    def _passed(self, x: Array) -> tuple[Pass, Array]:
        """Return the forward pass and the residuals at x. The last one is kept: asking for value, Hessian and
        products at one point costs one pass.
        """
        if self._latest is None or not np.array_equal(self._latest[0], x):
            self._n_evaluated += 1.0
            forward = self.layer.forward(self.token_rows(x))
            self._latest = x.copy(), forward, forward.output - self.B
        return self._latest[1:]

    def _forward(self, x: Any) -> Pass:
        return self._passed(as_point(x, self.shape))[0]

    def _direction(self, v: Array) -> Array:
        """Return a direction as rows, zero on known tokens."""
        D = np.zeros((self.n, self.d))
        D[self.unknown] = v.reshape(self.shape).T
        return D

"""A given output of a map of tokens as a function of the unknown ones: what solvers work with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnfit.data.gram import majorant
from attnfit.data.inputs import as_point
from attnfit.objectives.objective import Evaluation, Offer, Problem

Array = NDArray[np.float64]


class TokenLayer(Protocol):
    """A map of tokens as rows; leading axes are independent inputs, `at` is a pass of its own."""

    @property
    def mask(self) -> Any:
        """Which tokens each output row depends on, shape (n, n); None where on all."""

    def forward(self, T: Array) -> Any:
        """Return a pass: T, the tokens; output, shape (..., n, m); take, the pass of some of several."""

    def push_forward(self, at: Any, D: Array) -> Array:
        """Return ``J D``, shape (..., n, m)."""

    def pull_back(self, at: Any, G: Array) -> Array:
        """Return ``J^T G``, shape (..., n, d)."""

    def jacobian(self, at: Any, unknown: NDArray[np.intp]) -> Array:
        """Return the Jacobian in some tokens, shape (..., n m, d u)."""

    def second_push(self, at: Any, D: Array) -> Array:
        """Return the second derivative of the output along D, shape (..., n, m)."""

    def second_product(self, at: Any, G: Array) -> Callable[[Array], Array]:
        """Return ``D -> (J^T J + sum_ij G_ij Hessian of output_ij) D``."""

    def row_outputs(self, T: Array, rows: Array, i: int) -> Array:
        """Return row i of the output, shape (k, m), with each of some rows as token i after the tokens T."""


# Numbers held at once.
BLOCK = 1 << 22
# What an evaluation keeps of long groups: tokens form none.
NONE = np.zeros((0, 0))


@dataclass(frozen=True)
class TokenEvaluation(Evaluation):
    """An `Evaluation` with the forward pass and the residuals ``output - B``."""

    forward: Any = field(kw_only=True, repr=False)
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
    forward : pass of the layer
    """

    x: Array
    values: Array
    gradients: Array
    squares: Array
    forward: Any


class TokenProblem(Problem):
    """``0.5 ||layer(T) - B||_F^2 + 0.5 gamma ||x||^2`` over the unknown rows of T; x is flat here.

    Parameters
    ----------
    layer : TokenLayer
    B : ndarray, shape (n, m)
    known : ndarray, shape (d, n)
        Tokens as columns, NaN where unknown.
    gamma : float
    """

    offers = frozenset({Offer.RESIDUALS})

    linear = False
    best_hessian = "kept"
    n_unknowns: int = 0

    def __init__(self, layer: TokenLayer, B: Array, known: Array, gamma: float) -> None:
        self.layer, self.B, self.known, self.gamma = layer, B, known, gamma
        self.d, self.n = known.shape
        self.m = B.shape[1]
        self.unknown = np.flatnonzero(np.isnan(known[0]))
        self.n_unknowns = self.d * len(self.unknown)
        self._n_evaluated = 0.0
        self._latest: tuple[Array, Any, Array] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(d, number of unknown tokens)."""
        return (self.d, len(self.unknown))

    @property
    def n_passes(self) -> float:
        """Forward passes of the layer since the problem was made."""
        return self._n_evaluated

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

    def squares_with(self, T: Array, positions: NDArray[np.intp], rows: Array) -> Array:
        """Return the squared residuals, shape (p,), of tokens T, shape (n, d), with those at some positions,
        shape (p, k), replaced by rows, shape (p, k, d).
        """
        size, squares = max(1, BLOCK // (8 * T.size)), [np.zeros(0)]
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            several = np.tile(T, (len(rows[part]), 1, 1))
            several[np.arange(len(several))[:, None], positions[part]] = rows[part]
            squares.append(np.sum((self.layer.forward(several).output - self.B) ** 2, axis=(1, 2)))
        return np.concatenate(squares)

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
    ) -> TokenEvaluation:
        """Return value and gradient at x."""
        with np.errstate(over="ignore", invalid="ignore"):
            forward, C = self._passed(x)
            value = 0.5 * float(np.sum(C * C) + self.gamma * (x @ x))
            gradient = self.columns(self.layer.pull_back(forward, C)).reshape(-1)
            gradient += self.gamma * x
        value = value if np.isfinite(value) else np.inf
        start = self.evaluate(np.zeros_like(x)).gradient if at_zero else None
        return TokenEvaluation(x, value, gradient, NONE, NONE, start, forward=forward, residuals=C)

    def tokens(self, x: Any) -> Array:
        """Return all tokens, the known ones in their places, shape (d, n)."""
        return np.ascontiguousarray(self.token_rows(as_point(x, self.shape)).T)

    def output(self, x: Any) -> Array:
        """Return the output, shape (n, m)."""
        return np.asarray(self._forward(x).output)

    # ---- residuals and their first derivatives, for least-squares solvers and for study

    def residuals(self, x: Any) -> Array:
        """Return ``output - B``, shape (n, m)."""
        return np.asarray(self.output(x) - self.B)

    def jacobian(self, x: Any) -> Array:
        """Return the Jacobian of the residuals, shape (n m, n_unknowns), both in C order."""
        return self.layer.jacobian(self._forward(x), self.unknown)

    def jacobian_product(self, x: Any, v: Any) -> Array:
        """Return the Jacobian times v (of the natural shape), shape (n, m)."""
        at = self._forward(x)
        return self.layer.push_forward(at, self._direction(as_point(v, self.shape, "v")))

    def jacobian_transpose_product(self, x: Any, u: Any) -> Array:
        """Return the transposed Jacobian times u (of shape (n, m)), in the natural shape."""
        at = self._forward(x)
        return self.columns(self.layer.pull_back(at, as_point(u, self.B.shape, "u").reshape(self.B.shape)))

    def gauss_newton(self, x: Any) -> Array:
        """Return ``J^T J + gamma``, shape (n_unknowns, n_unknowns)."""
        return self.gauss_newton_at(self._evaluate_checked(x))

    def gauss_newton_product(self, x: Any, v: Any) -> Array:
        """Return ``(J^T J + gamma) v`` in the natural shape."""
        product = self.gauss_newton_operator(self._evaluate_checked(x))
        return product(as_point(v, self.shape, "v")).reshape(self.shape)

    def hvp(self, x: Any, v: Any) -> Array:
        """Return the product of the Hessian at x with v, in the natural shape; the gradient is not formed."""
        point, direction = as_point(x, self.shape), as_point(v, self.shape, "v")
        with np.errstate(over="ignore", invalid="ignore"):
            forward, C = self._passed(point)
            at = TokenEvaluation(point, np.nan, point, forward=forward, residuals=C)
            return self._finite(self.hvp_at(at, direction), at).reshape(self.shape)

    @property
    @abstractmethod
    def rank(self) -> int:
        """Independent numbers in a row of the output."""

    @property
    def value_rank(self) -> int:
        """Directions of a token that its output row shows by itself."""
        return self.rank

    @abstractmethod
    def _curvature(self, at: Evaluation, *, second: bool) -> Array:
        """Return ``J^T J + gamma``, on request with the residuals' own curvature."""

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
            at = TokenEvaluation(
                points.x[k], points.values[k], points.gradients[k],
                forward=forward, residuals=forward.output - self.B,
            )  # fmt: skip
            return self.gauss_newton_at(at)[None]
        J = self.layer.jacobian(points.forward.take(which), self.unknown)
        H = np.swapaxes(J, -1, -2) @ J
        own = np.arange(self.n_unknowns)
        H[:, own, own] += self.gamma
        return np.asarray(H)

    def bend(self, forward: Any, p: Array) -> Array:
        """Return ``J^T`` times the second derivative of the residuals along p, flat."""
        second = self.layer.second_push(forward, self._direction(p))
        return self.columns(self.layer.pull_back(forward, second)).reshape(-1)

    def _known(self, at: Evaluation) -> tuple[Any, Array]:
        """Return the forward pass and the residuals of an evaluated point."""
        return (at.forward, at.residuals) if isinstance(at, TokenEvaluation) else self._passed(at.x)

    def _passed(self, x: Array) -> tuple[Any, Array]:
        """Return the forward pass and the residuals at x. The last one is kept: asking for value, Hessian and
        products at one point costs one pass.
        """
        if self._latest is None or not np.array_equal(self._latest[0], x):
            self._n_evaluated += 1.0
            forward = self.layer.forward(self.token_rows(x))
            self._latest = x.copy(), forward, forward.output - self.B
        return self._latest[1:]

    def _forward(self, x: Any) -> Any:
        return self._passed(as_point(x, self.shape))[0]

    def _direction(self, v: Array) -> Array:
        """Return a direction as rows, zero on known tokens."""
        D = np.zeros((self.n, self.d))
        D[self.unknown] = v.reshape(self.shape).T
        return D

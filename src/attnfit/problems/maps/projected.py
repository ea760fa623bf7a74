"""Variable projection: attention outputs as a function of the bilinear form alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.problems.base import Problem, majorant
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.inputs import as_point

if TYPE_CHECKING:
    from attnfit.problems.maps.full_attention import FullAttention

Array = NDArray[np.float64]

# Where all queries attend alike, Z has rank one: this share of its size keeps the equations for Y regular.
FLOOR = 1e-13
# Starts of `minimize`: logits of this size, drawn anew each.
START_SIZE, N_STARTS = 0.5, 5


class ProjectedAttention(Problem):
    """``phi(X) = min_Y L(X, Y)`` of a `FullAttention` problem, over X of shape (d1, d2).

    ``Y(X) = (Z^T W Z + ridge)^-1 Z^T W B``. The gradient of phi is that of L in X at Y(X); the Hessian is
    ``H_XX - H_XY H_YY^-1 H_YX``.
    """

    linear = False
    best_hessian = "matrix_free"

    def __init__(self, full: FullAttention) -> None:
        self.full = full
        self.ridge: float | Array = full.ridge
        size = float(np.mean(np.sum(full.A3**2, axis=1))) * float(full.weights.sum()) / full.A3.shape[1]
        self.value_ridge = float(np.max(full.ridge)) + FLOOR * size

    @property
    def shape(self) -> tuple[int, ...]:
        """(d1, d2)."""
        return self.full.A1.shape[1], self.full.A2.shape[1]

    @property
    def n_passes(self) -> float:
        """Reads of the maps since the problem was made."""
        return self.full.n_passes

    def initial_point(self, random_state: Any = None) -> Array:
        """Return a small random X: at zero all queries attend alike, which Y cannot tell apart."""
        X = np.random.default_rng(random_state).standard_normal(self.shape)
        spread = float(np.std((self.full.A1 @ X) @ self.full.A2[:1000].T))
        return np.asarray(X * (START_SIZE / (spread or 1.0)))

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return a few small random points: the problem is not convex."""
        return {f"small {i + 1}": self.initial_point(rng).reshape(-1) for i in range(N_STARTS)}

    def values(self, x: Any) -> Array:
        """Return Y(X), shape (v, m)."""
        X = as_point(x, self.shape).reshape(self.shape)
        return self._project(self.full.maps(X))[2]

    def _project(self, maps: Any) -> tuple[Array, Array, Array]:
        """Return Z, shape (n, v), the factor of its normal matrix, and Y."""
        full = self.full
        Z = np.concatenate([P @ full.A3 for _, P in maps])
        weighted = full.weights[:, None] * Z
        gram = Z.T @ weighted
        gram[np.diag_indices(len(gram))] += self.value_ridge
        factor = linalg.cholesky(gram, lower=True)
        return Z, factor, _solve(factor, weighted.T @ full.B)

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        origin: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return phi and its gradient at x."""
        full = self.full
        X = x.reshape(self.shape)
        maps = full.kept_maps(X)
        Z, _, Y = self._project(maps())
        C = Z @ Y - full.B
        G = full.weights[:, None] * C
        gradient = np.zeros_like(X)
        for rows, P in maps():
            gradient += full.A1[rows].T @ (full.slope(P, G[rows], Y) @ full.A2)
        value = 0.5 * float(np.sum(G * C) + self.value_ridge * np.sum(Y * Y) + np.sum(self.ridge * x * x))
        start = self.evaluate(np.zeros_like(x)).gradient if origin else None
        return Evaluation(x, value, gradient.reshape(-1) + self.ridge * x, origin_gradient=start)

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return dX -> (H_XX - H_XY H_YY^-1 H_YX) dX, exactly."""
        full = self.full
        X = at.x.reshape(self.shape)
        maps = full.kept_maps(X)
        Z, factor, Y = self._project(maps())
        G = full.weights[:, None] * (Z @ Y - full.B)

        def product(v: Array) -> Array:
            dX = v.reshape(self.shape)
            dZ = np.concatenate([full.moved(rows, P, dX) @ full.A3 for rows, P in maps()])
            dY = -_solve(factor, dZ.T @ G + Z.T @ (full.weights[:, None] * (dZ @ Y)))
            out = np.zeros_like(dX)
            for rows, P in maps():
                out += full.second(rows, P, Y, dX, dY)[0]
            return np.asarray(out.reshape(-1) + self.ridge * v)

        return product

    def gauss_newton_operator(self, at: Evaluation) -> Callable[[Array], Array]:
        """Return dX -> J^T J dX with Kaufman's Jacobian ``(1 - Z (Z^T W Z)^-1 Z^T W) dZ Y`` of the residual.

        Kaufman, "A variable projection method for solving separable nonlinear least squares problems" (1975):
        the gradient is exact, the product positive semidefinite.
        """
        full = self.full
        maps = full.kept_maps(at.x.reshape(self.shape))
        Z, factor, Y = self._project(maps())
        w = full.weights[:, None]

        def product(v: Array) -> Array:
            dX = v.reshape(self.shape)
            change = np.concatenate([full.moved(rows, P, dX) @ full.A3 for rows, P in maps()]) @ Y
            change -= Z @ _solve(factor, Z.T @ (w * change))
            out = np.zeros_like(dX)
            for rows, P in maps():
                out += full.A1[rows].T @ (full.slope(P, (w * change)[rows], Y) @ full.A2)
            return np.asarray(out.reshape(-1) + self.ridge * v)

        return product

    def gauss_newton_product(self, x: Any, v: Any) -> Array:
        """Return the product of Kaufman's Gauss-Newton matrix at x with v, shape (d1, d2)."""
        at = self._evaluate_checked(x)
        return self.gauss_newton_operator(at)(as_point(v, self.shape, "v")).reshape(self.shape)

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Schur complement of the joint Hessian; with ``absolute`` by the eigenvalues' absolute
        values.
        """
        product = self.hessian_operator(at)
        H = np.column_stack([product(column) for column in np.eye(self.n_unknowns)])
        H = 0.5 * (H + H.T)
        return majorant(H) if absolute else H

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the mean curvature of the Gauss-Newton matrix along random directions for every unknown.

        Whitened queries and keys have no preferred directions.
        """
        product = self.gauss_newton_operator(at)
        probes = np.random.default_rng(0).choice([-1.0, 1.0], (4, self.n_unknowns))
        mean = np.mean([float(v @ product(v)) for v in probes]) / self.n_unknowns
        return np.full(self.n_unknowns, max(float(mean), 1e-300))


def _solve(factor: Array, right: Array) -> Array:
    return np.asarray(linalg.cho_solve((factor, True), right))

"""Squared losses with absorbed effects: exponential and softmax. They are not convex, so that coefficients
and effects move together in a trust region.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.effects import kernels
from attnfit.effects.newton import AT_FLOOR, ConvexFit, Curvature, Descent, Ending, Listener, Point
from attnfit.effects.rows import Moments, SortedRows, eliminated
from attnfit.effects.schur import DIAGONAL_ITERATIONS, Preconditioner, Schur, SoftmaxSchur, jacobi

Array = NDArray[np.float64]
# Relative residual of the inner solves, which shrinks with the gradient, and the least.
RESIDUAL, TIGHTEST, MAX_PRODUCTS = 1e-4, 1e-7, 500
# A step that keeps more of its promise than the second widens the region, one that keeps less than the first
# shrinks it.
POOR, GOOD, TAKEN = 0.25, 0.75, 1e-4
# Outputs of a level below this share of those of the largest have gone to zero.
GONE = 1e-12
# Below this share of the loss its changes are rounding; a step that moves no logit by more than STAY is then
# taken on the word of the gradient.
NOISE, STAY, MAX_REJECTIONS = 1e-12, 1e-5, 40
# The convex fit that a descent starts from: how far it goes.
START_TOL, START_STEPS = 1e-3, 30
# Curvature below this share of what it is a sum of is rounding.
LEVEL = 1e-10


@dataclass
class SquaredRows(SortedRows):
    """Rows of a squared loss, ``0.5 sum w (output - b)^2``.

    Attributes
    ----------
    w : ndarray, shape (n,)
    """

    w: Array

    def convex(self) -> SortedRows:
        """Return the rows with the likelihood whose fit is the start; negative targets become zero."""
        target = np.maximum(self.target, 0.0)
        return SortedRows(self.features, self.cells, self.measure, target, self.offset)

    def _logits(self, beta: Array, a: Array) -> Array:
        cells = self.cells
        effects = a[cells.rest].sum(axis=1)
        return np.asarray(self.logits(beta) + np.repeat(effects, np.diff(cells.row_starts)))

    @property
    def bounds(self) -> NDArray[np.intp]:
        """First row of each level of set 0."""
        return np.asarray(self.cells.row_starts[self.cells.level_starts[:-1]])

    def by_cell(self, values: Array) -> Array:
        """Return the sum over the rows of each cell."""
        return np.add.reduceat(values, self.cells.row_starts[:-1])

    def by_level(self, values: Array) -> Array:
        """Return the sum over the rows of each level of set 0."""
        return np.add.reduceat(values, self.bounds)

    def products(self, e: Array, *weights: Array) -> tuple[Array, list[tuple[Array, Array, Array]]]:
        """Return ``X'e`` and, for each t, ``X'diag(t)X, D_0'diag(t)X, R'diag(t)X``: one read."""
        K, cells = self.features.K, self.cells
        slope = np.zeros(K)
        found = [
            (np.zeros((K, K)), np.zeros((cells.n_first, K)), np.zeros((cells.n_rest, K))) for _ in weights
        ]
        if not K:
            return slope, found
        first, rest = self.codes_by_row()
        everywhere, add = np.arange(self.n), kernels.add_scattered()
        for where, X in self.features.blocks(self.cuts):
            slope += e[where] @ X
            for t, (H, B_first, B_rest) in zip(weights, found, strict=True):
                WX = np.empty_like(X)
                add(X, t, everywhere[where], first, rest, WX, B_first, B_rest)
                H += X.T @ WX
        return slope, found


@dataclass
class SquaredExponentialRows(SquaredRows):
    """Rows of ``0.5 sum w (u - b)^2`` with ``u = exp(eta)``."""

    def moments(self, beta: Array, a: Array) -> Moments:
        """Return what two reads add up.

        With ``m = exp(eta)`` but for set 0, its effects have a closed form: ``exp(a_0) = sum w m b / sum w
        m^2``, zero where that is negative. There ``D_0't = sum w u^2 > 0`` for ``t = w (2 u^2 - b u)``, so
        that eliminating set 0 never loses definiteness.
        """
        z = self._logits(beta, a)
        level = np.repeat(np.arange(self.cells.n_first), np.diff(self.bounds, append=self.n))
        top = np.maximum.reduceat(z, self.bounds)
        m = np.exp(z - top[level])
        ratio = np.maximum(self.by_level(self.target * m) / self.by_level(self.w * m * m), 0.0)
        u = ratio[level] * m
        e, t = u * (self.w * u - self.target), u * (2.0 * self.w * u - self.target)
        value = 0.5 * float(np.sum(self.w * (u - self.target / self.w) ** 2))
        square = self.w * u * u
        d = self.by_level(square)
        curvature = Schur(self.cells, self.by_cell(t), d)
        slope, ((H, B_first, B_rest),) = self.products(e, t)
        within, B, first_columns = eliminated(curvature, H, B_first, B_rest)
        with np.errstate(divide="ignore"):
            first = np.log(ratio) - top
        return Moments(
            value, slope, self.by_rest(self.by_cell(e)), np.abs(np.diag(H)), within, B, first_columns,
            curvature, Schur(self.cells, self.by_cell(square), d), first, u, e,
        )  # fmt: skip


@dataclass
class SquaredSoftmaxRows(SquaredRows):
    """Rows of ``0.5 sum w (f - b)^2`` with f the softmax of a group, which is set 0."""

    def moments(self, beta: Array, a: Array) -> Moments:
        """Return what two reads add up.

        With ``p = w (f - b)`` and ``t = w f^2 + p f - (p.f) f`` the Hessian of a group in its logits is
        ``diag(t) - t f' - f t' + (sum t) f f'``.
        """
        z = self._logits(beta, a)
        level = np.repeat(np.arange(self.cells.n_first), np.diff(self.bounds, append=self.n))
        top = np.maximum.reduceat(z, self.bounds)
        f = np.exp(z - top[level])
        total = self.by_level(f)
        f /= total[level]
        p = self.w * f - self.target
        mean = self.by_level(p * f)
        t = self.w * f * f + p * f - mean[level] * f
        e = f * (p - mean[level])
        b = np.where(self.w > 0.0, self.target / np.where(self.w > 0.0, self.w, 1.0), 0.0)
        value = 0.5 * float(np.sum(self.w * (f - b) ** 2))
        tau = self.by_level(t)
        f_cells, t_cells = self.by_cell(f), self.by_cell(t)
        curvature = SoftmaxSchur(self.cells, t_cells, np.ones(self.cells.n_first), f_cells, tau)
        slope, ((_, xf, _), (H, xt, B_rest)) = self.products(e, f, t)
        within = H - xf.T @ xt - xt.T @ xf + xf.T @ (tau[:, None] * xf)
        B = curvature.minus(xt - tau[:, None] * xf, f_cells, curvature.minus(xf, t_cells, B_rest))
        squares = self.by_cell(self.w * f * f)
        metric = Schur(self.cells, squares, self.by_level(self.w * f * f))
        return Moments(
            value, slope, self.by_rest(self.by_cell(e)), np.abs(np.diag(within)), within, B, xf,
            curvature, metric, -np.log(total) - top, f, p * f,
        )  # fmt: skip


@dataclass
class SquaredFit(ConvexFit):
    """A descent of a squared loss in a trust region, in the norm of the preconditioner."""

    def start(self) -> tuple[Array, Array]:
        """Return the fit of the likelihood with the same effects."""
        assert isinstance(self.rows, SquaredRows)
        fit = ConvexFit(self.rows.convex(), self.ridge, START_TOL)
        end = fit.descend(fit.at(*fit.start()), START_STEPS, _silent, watch_stride=False)
        return end.point.beta, end.point.a

    def descend(
        self, point: Point, max_iter: int, listener: Listener, *, watch_stride: bool = True
    ) -> Descent:
        """Descend until the next Newton step moves no logit by more than the tolerance and the curvature is
        positive definite.
        """
        radius, first = np.inf, 0.0
        n_rejected, last = 0, np.inf
        for n_iter in range(max_iter + 1):
            gradient = point.moments.gradient + self.ridge * point.beta
            step = self._solve(point, gradient, radius, first)
            first = first or step.size
            if np.isinf(radius):
                radius = 2.0 * float(np.sqrt(max(step.decrement, 0.0)))
                step = self._solve(point, gradient, radius, first)
            here = self._curvature_of(point, step)
            listener(n_iter, point, here, True)
            if not np.isfinite(here.move):
                return Descent(point, here, Ending.OVERFLOW, n_iter)
            if here.move <= self.tol and not step.bounded:
                return self._judged(point, n_iter, Ending.CONVERGED)
            if here.move <= AT_FLOOR and 0.5 * last < here.move and last <= AT_FLOOR:
                return self._judged(point, n_iter, Ending.AT_FLOOR)
            last = here.move
            if n_iter == max_iter:
                break
            while True:
                trial = self.at(point.beta + step.d_beta, point.a + step.d_a)
                gain, promise = point.value - trial.value, max(step.promise, np.finfo(float).tiny)
                quiet = here.move <= STAY and abs(gain) <= NOISE * abs(point.value)
                agreement = 1.0 if quiet else gain / promise
                if not np.isfinite(agreement) or agreement < POOR:
                    radius = 0.25 * min(radius, step.length)
                elif agreement > GOOD and step.bounded:
                    radius *= 2.0
                if agreement > TAKEN:
                    point, n_rejected = trial, 0
                    break
                n_rejected += 1
                if n_rejected > MAX_REJECTIONS:
                    return Descent(point, here, Ending.PRECISION, n_iter)
                listener(n_iter + 1, trial, here, False)
                step = self._solve(point, gradient, radius, first)
                here = self._curvature_of(point, step)
        return Descent(point, here, Ending.MAX_ITER, max_iter)

    def _judged(self, point: Point, n_iter: int, ending: Ending) -> Descent:
        """Return the end: a saddle where the curvature is not positive definite; no minimum where the step
        that is left is one of levels without outputs, which no curvature holds.
        """
        here = self.curvature(point, None, 1e-8)
        lowest = np.linalg.eigvalsh(here.G)[0] if len(here.G) else 0.0
        definite = lowest >= -1e-10 * float(np.abs(here.G).max(initial=0.0)) and not self.factors.bent
        if not definite:
            return Descent(point, here, Ending.SADDLE, n_iter)
        enough = max(self.tol, AT_FLOOR)
        if not here.move <= enough:
            ending = Ending.ENDLESS if self._move_of_outputs(point, here) <= enough else Ending.PRECISION
        return Descent(point, here, ending, n_iter)

    def _move_of_outputs(self, point: Point, here: Curvature) -> float:
        """Return the move of a step without the levels whose outputs have gone to zero."""
        rows, moments = self.rows, point.moments
        assert isinstance(rows, SquaredRows)
        outputs = rows.by_rest(rows.by_cell(moments.mu))
        gone = outputs <= GONE * outputs.max(initial=0.0)
        d_a, unsolved = np.where(gone, 0.0, here.d_a), here.unsolved[~gone].max(initial=0.0)
        d_first = -moments.first_columns @ here.d_beta - moments.curvature.average(d_a[:, None])[:, 0]
        d_first[~np.isfinite(moments.first)] = 0.0
        moved = kernels.largest_move()(d_a, d_first, rows.cells.level_starts, rows.cells.rest)
        return float(moved + unsolved + np.abs(here.d_beta) @ rows.features.largest)

    def _curvature_of(self, point: Point, step: Step) -> Curvature:
        """Return the step as others see it."""
        moments, rows = point.moments, self.rows
        K, M = rows.features.K, rows.cells.n_rest
        schur = moments.curvature
        d_first = -moments.first_columns @ step.d_beta - schur.average(step.d_a[:, None])[:, 0]
        d_first[~np.isfinite(moments.first)] = 0.0
        moved = kernels.largest_move()(step.d_a, d_first, rows.cells.level_starts, rows.cells.rest)
        move = float(moved + 2.0 * np.abs(step.d_beta) @ rows.features.largest)
        return Curvature(
            moments.H, np.zeros((M, K)), moments.first_columns, np.zeros((K, 0)),
            np.where(moments.sizes > 0.0, moments.sizes, 1.0), step.d_beta, step.d_a, d_first,
            step.decrement, move,
        )  # fmt: skip

    def _solve(self, point: Point, gradient: Array, radius: float, first: float) -> Step:
        """Return the step of Steihaug and Toint: conjugate gradients, cut where they leave the region or meet
        negative curvature.
        """
        moments = point.moments
        metric, kept = moments.metric, self.factors.kept
        precondition: Preconditioner = jacobi(metric.diagonal) if kept is None else kept
        diagonal = np.maximum(np.abs(np.diag(moments.H)) + self.ridge, np.finfo(float).tiny)
        H = moments.H + np.diag(self.ridge)
        rest = self.rows.consistent(moments.gradient_rest[:, None])[:, 0]
        g = np.concatenate([gradient, rest])
        K = len(gradient)

        def product(v: Array) -> Array:
            A = moments.curvature.product(v[K:, None])[:, 0] if len(v) > K else v[K:]
            return np.concatenate([H @ v[:K] + moments.B.T @ v[K:], moments.B @ v[:K] + A])

        def solve(r: Array) -> Array:
            rest = precondition.solve(r[K:, None])[:, 0] if len(r) > K else r[K:]
            return np.concatenate([r[:K] / diagonal, rest])

        found = steihaug(product, solve, g, radius, first)
        if found.n_products > DIAGONAL_ITERATIONS and kept is None and len(g) > K:
            self.factors.better(metric)
        return Step(found.p[:K], found.p[K:], -float(g @ found.p), found.promise, found.length, found.bounded,
                    found.size)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A step of coefficients and effects: ``decrement`` is ``-g.p``, ``promise`` the fall of the model."""

    d_beta: Array
    d_a: Array
    decrement: float
    promise: float
    length: float
    bounded: bool
    size: float


@dataclass(frozen=True)
class Path:
    """The end of conjugate gradients: ``size`` is the gradient's in the norm of the preconditioner."""

    p: Array
    promise: float
    length: float
    bounded: bool
    size: float
    n_products: int


Map = Callable[[Array], Array]


def steihaug(product: Map, solve: Map, g: Array, radius: float, first: float) -> Path:
    """Minimise ``g.p + 0.5 p.Hp`` within a radius in the norm of the preconditioner.

    Source: Steihaug, "The conjugate gradient method and trust regions in large scale optimization" (1983),
    doi:10.1137/0720042.
    """
    p, r = np.zeros_like(g), g.copy()
    z = solve(r)
    rho = float(r @ z)
    size = float(np.sqrt(max(rho, 0.0)))
    rtol = max(RESIDUAL * min(1.0, size / first if first > 0.0 else 1.0), TIGHTEST)
    goal = rtol**2 * rho
    d, length2, along, d2, n = -z, 0.0, 0.0, rho, 0
    Hp = np.zeros_like(g)
    bounded = False
    while rho > goal and n < MAX_PRODUCTS:
        Hd = product(d)
        n += 1
        bend, terms = float(d @ Hd), float(np.abs(d * Hd).sum())
        if abs(bend) <= LEVEL * terms:
            # Constants of a component change nothing: what is left along them is rounding.
            break
        alpha = rho / bend if bend > 0.0 else np.inf
        ahead = length2 + 2.0 * alpha * along + alpha**2 * d2 if np.isfinite(alpha) else np.inf
        if ahead >= radius**2:
            if np.isinf(radius):
                # Negative curvature before any radius: the step so far, or the gradient's.
                p, Hp = (p, Hp) if n > 1 else (d, Hd)
                bounded = True
                break
            alpha = (-along + np.sqrt(along**2 + d2 * (radius**2 - length2))) / d2
            p, Hp, length2, bounded = p + alpha * d, Hp + alpha * Hd, radius**2, True
            break
        p, Hp, r = p + alpha * d, Hp + alpha * Hd, r + alpha * Hd
        z = solve(r)
        new = float(r @ z)
        ratio = new / rho
        # Norms follow from recurrences: the preconditioner is known by its inverse alone.
        length2, along, d2 = ahead, ratio * (along + alpha * d2), new + ratio**2 * d2
        d, rho = -z + ratio * d, new
    return Path(p, -float(g @ p + 0.5 * p @ Hp), float(np.sqrt(max(length2, 0.0))), bounded, size, n)


def _silent(n_iter: int, point: Point, here: Curvature, accepted: bool) -> None:
    """Hear nothing."""

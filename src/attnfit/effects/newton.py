"""Newton's method for losses that are convex in the logits, effects eliminated: Poisson, cross entropy, KL.

With the effects of set 0 at their optimum the Newton step in the others and in beta solves

    A [C | q] = [B | -g_R],   G = X'WX - B_0'd^-1 B_0 - C'B - B'C + C'AC,
    d beta = -G^-1 (g_beta + B'q),   d a_R = q - C d beta,

with A the Schur complement of `attnfit.effects.schur` and B what is left of ``R'WX`` there. G is the beta
block of the inverse of the inverse of the whole information matrix (Frisch and Waugh in the metric W); errors
of C enter it squared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.effects import kernels
from attnfit.effects.rows import Moments, SortedRows
from attnfit.effects.schur import Factors

Array = NDArray[np.float64]
# Rounding of a sum over the rows of a level, as a share of what is added up.
EPS = 8.0 * float(np.finfo(np.float64).eps)
# Relative residuals of the inner solves: of the first steps, and of later ones, where the last step moved a
# logit by m, at most FORCING m.
FIRST_STEPS, EARLY, LATE, FORCING, TIGHTEST = 2, 1e-2, 1e-3, 1e-2, 1e-9
# Squared residual of C, in units of diag(X'WX), below which a step does not need it better; at rounding.
FLOOR_C, ROUNDING_C = 1e-12, 1e-26
# An effect that is wrong by this share of the tolerance does not matter.
NEGLIGIBLE = 0.1
# An effect moves by no more than this in one step: a level that is all but empty may promise anything.
LARGEST_STEP = 2.0
# A step is halved while the loss falls by less than this share of the decrement, rounding aside.
SUFFICIENT, NOISE, MAX_HALVINGS = 1e-4, 1e-12, 30
# A column keeps less than this share of its square once effects are taken out: they explain it.
COLLINEAR, OPEN = 1e-10, 1e-5
# Rows that change by a larger share of their terms, along a direction with as little curvature, see it: what
# effects do explain leaves 3e-10 of them at most, columns alike but for 1e-8 leave 5e-9.
SEEN = 2e-9
# From this share on C is solved for more precisely before it is judged.
SUSPECT, PRECISE = 1e-2, 1e-7
# A fit that keeps its stride: the decrement falls by about 1/e, and a logit moves by about one, three times.
STRIDE_RATIO, STRIDE_MOVE, N_STRIDES = (0.2, 0.6), 0.5, 3
# Moves at which steps that stop shrinking are the rounding of the data.
AT_FLOOR = 2e-7


class Ending(Enum):
    """How a descent ended."""

    CONVERGED = auto()
    AT_FLOOR = auto()
    STRIDING = auto()
    MAX_ITER = auto()
    PRECISION = auto()
    OVERFLOW = auto()
    SADDLE = auto()
    # A direction has too little curvature for a step, although the rows see it.
    FLAT = auto()
    # Effects of some levels fall without end; all else is at its optimum.
    ENDLESS = auto()


@dataclass(frozen=True)
class Point:
    """A point of a descent, in standard units.

    Attributes
    ----------
    beta, a : ndarray, shapes (K,) and (M,)
        Coefficients and the effects of all sets but the first.
    moments : Moments
    value : float
        The loss with the ridge.
    """

    beta: Array
    a: Array
    moments: Moments
    value: float


@dataclass(frozen=True)
class Curvature:
    """The information on beta at a point, and the step from there.

    Attributes
    ----------
    G : ndarray, shape (K, K)
        Information on beta with all effects eliminated, ridge included.
    C, C_first : ndarray, shapes (M, K) and (L_0, K)
        Regressions of the columns on the effects, in the metric W.
    open : ndarray, shape (K, k)
        Orthonormal basis, in units where ``X'WX`` has ones on its diagonal, of what the effects explain.
    d_beta, d_a, d_first : ndarray
        The step.
    decrement : float
        ``-g . step``.
    move : float
        Bound of the largest change of a logit along the step.
    unsolved : ndarray, shape (M,)
        Of that, by how much each level may move for what is left of the residual.
    """

    G: Array
    C: Array
    C_first: Array
    open: Array
    sizes: Array
    d_beta: Array
    d_a: Array
    d_first: Array
    decrement: float
    move: float
    unsolved: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def unknown(self) -> NDArray[np.bool_]:
        """Which coefficients the effects explain, shape (K,)."""
        return np.asarray(np.linalg.norm(self.open, axis=1) > OPEN)


@dataclass
class Descent:
    """The end of a descent and the way there."""

    point: Point
    curvature: Curvature
    ending: Ending
    n_iter: int


Listener = Callable[[int, Point, Curvature, bool], None]


@dataclass
class ConvexFit:
    """A descent of a convex loss.

    Parameters
    ----------
    rows : SortedRows
    ridge : ndarray, shape (K,)
        Of beta, in standard units.
    tol : float
        The largest change of a logit that the next Newton step may still make.
    """

    rows: SortedRows
    ridge: Array
    tol: float = 1e-8
    factors: Factors = field(default_factory=Factors)

    def start(self) -> tuple[Array, Array]:
        """Return beta = 0 and the effects after two sweeps of proportional fitting, which need no columns."""
        rows = self.rows
        beta, a = np.zeros(rows.features.K), np.zeros(rows.cells.n_rest)
        return beta, self.sweep(beta, a, 2)

    def sweep(self, beta: Array, a: Array, n_sweeps: int) -> Array:
        """Return effects after sweeps ``a_s += log(Y_s / mu_s) / (S - 1)``."""
        rows, n_sets = self.rows, self.rows.cells.rest.shape[1]
        if not n_sets:
            return a
        logits = rows.logits(beta)
        for _ in range(n_sweeps):
            W = rows.expected(logits.copy(), a)[1:3][1]
            expected = rows.by_rest(W)
            usable = (expected > 0.0) & (rows.target_rest > 0.0)
            ratio = np.where(usable, rows.target_rest, 1.0) / np.where(usable, expected, 1.0)
            a = a + np.log(ratio) / n_sets
        return a

    def at(self, beta: Array, a: Array) -> Point:
        """Return the point with what one read adds up there."""
        moments = self.rows.moments(beta, a)
        return Point(beta, a, moments, moments.value + 0.5 * float(np.sum(self.ridge * beta**2)))

    def curvature(
        self, point: Point, before: Curvature | None, rtol: float, floor_c: float = FLOOR_C
    ) -> Curvature:
        """Return the information on beta and the Newton step, solved for to ``rtol``."""
        rows, moments = self.rows, point.moments
        K, M = rows.features.K, rows.cells.n_rest
        schur, B, within = moments.curvature, moments.B, moments.H
        gradient = moments.gradient + self.ridge * point.beta
        sizes = np.where(moments.sizes > 0.0, moments.sizes, 1.0)
        C, q, left = np.zeros((M, K)), np.zeros(M), np.zeros((M, K + 1))
        if M:
            right = np.column_stack([B, -moments.gradient_rest])
            x0 = None if before is None or not K else np.column_stack([before.C, np.zeros(M)])
            diagonal = schur.diagonal
            seen = diagonal > 0.0
            lightest = float(diagonal[seen].min()) if seen.any() else 0.0
            rounding = float(np.sum((EPS * schur.mass[seen]) ** 2 / diagonal[seen]))
            floor = np.append(floor_c * sizes, max(lightest * (NEGLIGIBLE * self.tol) ** 2, rounding))
            right = rows.consistent(right)
            rtols = np.append(np.full(K, rtol if floor_c < FLOOR_C else max(rtol, LATE)), rtol)
            solved = self.factors.solve(schur, right, x0, rtols, floor)
            # Constants of components change no logit, but would be clipped.
            found = rows.consistent(solved.x)
            C, q, left = found[:, :K], found[:, K], solved.residual

        def information() -> Array:
            # C'AC = C'(B - residual).
            found = within - C.T @ B - B.T @ C + C.T @ (B - left[:, :K])
            return np.asarray(0.5 * (found + found.T))

        G = information()
        if M and K and _suspect(G, sizes):
            solved = self.factors.solve(
                schur, rows.consistent(B), C, np.full(K, min(rtol, PRECISE)), 1e-4 * floor_c * sizes
            )
            C, left = solved.x, np.column_stack([solved.residual, left[:, K]])
            G = information()
        open_ = explained(G, sizes)
        total = G + np.diag(self.ridge)
        solve = restricted_inverse(total, sizes, open_ if not self.ridge.any() else open_[:, :0])
        # The residual of q is charged to C, so that only products of two errors remain.
        d_beta = -solve @ (gradient + B.T @ q + C.T @ left[:, K])
        d_a = q - C @ d_beta
        d_first = -moments.first_columns @ d_beta - schur.average(d_a[:, None])[:, 0]
        decrement = -float(gradient @ d_beta + moments.gradient_rest @ d_a)
        # What is left of the residual counts too, level by level.
        unsolved = np.zeros(M)
        if M:
            unsolved[seen] = np.abs(left[seen, K]) / diagonal[seen]
        moved = kernels.largest_move()(d_a, d_first, rows.cells.level_starts, rows.cells.rest)
        moved += unsolved.max(initial=0.0)
        move = float(moved + np.abs(d_beta) @ rows.features.largest)
        C_first = moments.first_columns - schur.average(C)
        return Curvature(G, C, C_first, open_, sizes, d_beta, d_a, d_first, decrement, move, unsolved)

    def descend(
        self,
        point: Point,
        max_iter: int,
        listener: Listener,
        *,
        watch_stride: bool = True,
    ) -> Descent:
        """Descend from a point until the next Newton step moves no logit by more than ``tol``."""
        tol = self.tol
        before: Curvature | None = None
        n_strides, last = 0, (np.inf, np.inf)
        for n_iter in range(max_iter + 1):
            rtol = EARLY if n_iter < FIRST_STEPS else LATE
            if before is not None:
                rtol = max(min(rtol, FORCING * before.move), TIGHTEST)
            here = self.curvature(point, before, rtol)
            listener(n_iter, point, here, True)
            if not np.isfinite(here.move):
                return Descent(point, here, Ending.OVERFLOW, n_iter)
            if here.move <= tol:
                if rtol > LATE:
                    # An effect of little weight may hide behind a loose residual.
                    here = self.curvature(point, here, LATE)
                if here.move <= tol:
                    return Descent(point, here, Ending.CONVERGED, n_iter)
            if here.move <= AT_FLOOR and here.move > 0.5 * last[1] and last[1] <= AT_FLOOR:
                return Descent(point, here, Ending.AT_FLOOR, n_iter)
            ratio = here.decrement / last[0] if last[0] > 0.0 else 1.0
            striding = STRIDE_RATIO[0] <= ratio <= STRIDE_RATIO[1] and here.move >= STRIDE_MOVE
            n_strides = n_strides + 1 if striding else 0
            if watch_stride and n_strides >= N_STRIDES:
                return Descent(point, here, Ending.STRIDING, n_iter)
            if n_iter == max_iter:
                break
            last = here.decrement, here.move
            found = self._step(point, here, n_iter, listener)
            if found is None:
                return Descent(point, here, Ending.PRECISION, n_iter)
            point, before = found, here
        return Descent(point, here, Ending.MAX_ITER, max_iter)

    def _step(self, point: Point, here: Curvature, n_iter: int, listener: Listener) -> Point | None:
        """Return the point after the step, halved until the loss falls; None where it never does."""
        share = 1.0
        d_a = here.d_a
        if here.move > LARGEST_STEP:
            # Not otherwise: what one set holds of another may be large, and cancels in every logit.
            d_a = np.clip(d_a, -LARGEST_STEP, LARGEST_STEP)
        for _ in range(MAX_HALVINGS):
            trial = self.at(point.beta + share * here.d_beta, point.a + share * d_a)
            allowed = point.value - SUFFICIENT * share * max(here.decrement, 0.0) + NOISE * abs(point.value)
            if trial.value <= allowed:
                return trial
            listener(n_iter + 1, trial, here, False)
            share *= 0.5
        return None


def _suspect(G: Array, sizes: Array) -> bool:
    """Return whether some direction keeps little once the effects are taken out."""
    if not np.isfinite(G).all():
        return False
    scale = np.sqrt(sizes)
    return bool(linalg.eigvalsh(G / scale / scale[:, None])[0] < SUSPECT)


def explained(G: Array, sizes: Array) -> Array:
    """Return an orthonormal basis, in units of ``sizes``, of the directions that the effects explain."""
    K = len(G)
    if not K or not np.isfinite(G).all():
        return np.zeros((K, 0))
    scale = np.sqrt(sizes)
    values, vectors = linalg.eigh(G / scale / scale[:, None])
    return np.asarray(vectors[:, values <= COLLINEAR])


def restricted_inverse(G: Array, sizes: Array, open_: Array) -> Array:
    """Return the inverse of G on the directions that are not open, in the units of ``sizes``."""
    if not len(G):
        return G
    scale = np.sqrt(sizes)
    values, vectors = linalg.eigh(G / scale / scale[:, None])
    n_open = open_.shape[1]
    half = vectors[:, n_open:] / scale[:, None]
    return np.asarray((half / np.maximum(values[n_open:], np.finfo(float).tiny)) @ half.T)

"""The curvature of the effects of all sets but the first, with those of the first eliminated: products,
preconditioners, and conjugate gradients for several right-hand sides at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from attnfit.effects import kernels
from attnfit.effects.laplacian import factorise, factorise_blocks
from attnfit.effects.levels import Cells

Array = NDArray[np.float64]
# Levels up to which a dense factor is made where the diagonal does not serve, and multiply-adds that forming
# it may take.
DENSE_LEVELS, DENSE_WORK = 4_000, 4e9
# Iterations with the diagonal before a better preconditioner is made: random graphs take two to seven.
DIAGONAL_ITERATIONS = 25
# A factor of an earlier step is made anew once a solve takes more than this.
STALE_ITERATIONS = 6
MAX_ITERATIONS = 2_000
# Curvature below minus this share of what it is a sum of is negative, not rounding.
BENT = 1e-8
# A level that keeps less than this share of its curvature keeps rounding.
ALONE = 1e-12
# A level that keeps less than this share of its curvature once others are fitted follows from them.
DEPENDENT = 1e-10


class Preconditioner(Protocol):
    """An approximate inverse."""

    def solve(self, R: Array) -> Array:
        """Return ``P^-1 R``, shape (M, m)."""


@dataclass(frozen=True)
class Jacobi:
    """The inverse of the diagonal; levels without weight stay where they are."""

    inverse: Array

    def solve(self, R: Array) -> Array:
        """Return ``diag^-1 R``."""
        return np.asarray(self.inverse[:, None] * R)


class Unconditioned:
    """The identity."""

    def solve(self, R: Array) -> Array:
        """Return R."""
        return R


@dataclass(frozen=True)
class DenseFactor:
    """A Cholesky factor of A in units of its diagonal, of the levels that do not follow from others.

    Attributes
    ----------
    factor : ndarray, shape (r, r)
        Lower triangle.
    kept : ndarray of int, shape (r,)
        Its levels, r being the rank of A.
    scale : ndarray, shape (r,)
    """

    factor: Array
    kept: NDArray[np.intp]
    scale: Array

    def solve(self, R: Array) -> Array:
        """Return the solution that is zero on all other levels: what they hold of these would be noise."""
        out = np.zeros_like(R)
        right = R[self.kept] / self.scale[:, None]
        found = linalg.cho_solve((self.factor, True), right, check_finite=False)
        out[self.kept] = found / self.scale[:, None]
        return out


@dataclass
class Schur:
    """``A = R'WR - R'W D_0 d^-1 D_0'WR`` on cells; A is never formed.

    Attributes
    ----------
    cells : Cells
    W : ndarray, shape (n_cells,)
        Curvature of each cell.
    d : ndarray, shape (L_0,)
        Curvature of each level of set 0, ``D_0'W1``.
    """

    cells: Cells
    W: Array
    d: Array

    def product(self, V: Array) -> Array:
        """Return ``A V``, shape (M, m)."""
        out = np.zeros_like(V)
        cells = self.cells
        if cells.rest.shape[1] == 1:
            kernels.apply_schur_of_two()(V, self.W, self.d, cells.level_starts, cells.rest[:, 0], out)
        else:
            kernels.apply_schur()(V, self.W, self.d, cells.level_starts, cells.rest, out)
        return out

    def eliminate(self, B_first: Array, B_rest: Array) -> Array:
        """Return ``B_R - R'W D_0 d^-1 B_0``, shape (M, m)."""
        out = B_rest.copy()
        kernels.eliminate_first()(B_first, self.W, self.d, self.cells.level_starts, self.cells.rest, out)
        return out

    def average(self, V: Array) -> Array:
        """Return ``d^-1 D_0'W R V``, shape (L_0, m)."""
        out = np.zeros((self.cells.n_first, V.shape[1]))
        kernels.average_first()(V, self.W, self.d, self.cells.level_starts, self.cells.rest, out)
        return out

    @cached_property
    def diagonal(self) -> Array:
        """The diagonal of A, shape (M,); zero, not rounding, for a level that is tied to levels of set 0
        which have no other.
        """
        seen, out = np.zeros(self.cells.n_rest), np.zeros(self.cells.n_rest)
        kernels.schur_diagonal()(self.W, self.d, self.cells.level_starts, self.cells.rest, seen, out)
        return np.where(out > ALONE * self.mass, out, 0.0)

    @cached_property
    def mass(self) -> Array:
        """The curvature of each level before elimination, ``R'W1``, shape (M,)."""
        out = np.zeros(self.cells.n_rest)
        kernels.sum_by_rest()(self.W, self.cells.rest, out)
        return out

    def incidence(self) -> sparse.csr_array:
        """Return R by cell, shape (n_cells, M)."""
        cells = self.cells
        n_sets = cells.rest.shape[1]
        ends = np.arange(cells.n_cells + 1) * n_sets
        ones = np.ones(cells.rest.size)
        return sparse.csr_array((ones, cells.rest.ravel(), ends), shape=(cells.n_cells, cells.n_rest))

    def dense(self) -> Array:
        """Return A, shape (M, M)."""
        R = self.incidence()
        weighted = sparse.diags_array(self.W) @ R
        out = np.asarray((R.T @ weighted).toarray())
        starts = self.cells.level_starts
        n = self.cells.n_cells
        levels = sparse.csr_array((np.ones(n), np.arange(n), starts), shape=(self.cells.n_first, n))
        scale = np.where(self.d > 0.0, 1.0 / np.sqrt(np.where(self.d > 0.0, self.d, 1.0)), 0.0)
        half = sparse.diags_array(scale) @ (levels @ weighted)
        return np.asarray(out - (half.T @ half).toarray())

    @property
    def dense_work(self) -> float:
        """Multiply-adds that it takes to form A."""
        sizes = np.diff(self.cells.level_starts).astype(np.float64) * self.cells.rest.shape[1]
        return float(np.sum(sizes**2))


@dataclass
class SoftmaxSchur(Schur):
    """The curvature of a squared loss of a softmax: ``R'(diag(t) - t f' - f t' + tau f f')R`` by group.

    Attributes
    ----------
    f : ndarray, shape (n_cells,)
        Shares; W holds t.
    tau : ndarray, shape (L_0,)
        The sum of t over each group.
    """

    f: Array
    tau: Array

    def product(self, V: Array) -> Array:
        """Return ``A V``, shape (M, m)."""
        out = np.zeros_like(V)
        cells = self.cells
        kernels.apply_softmax()(V, self.W, self.f, self.tau, cells.level_starts, cells.rest, out)
        return out

    def average(self, V: Array) -> Array:
        """Return the mean of ``R V`` over each group, weighted by shares."""
        return Schur(self.cells, self.f, self.d).average(V)

    def minus(self, Y: Array, weights: Array, B: Array) -> Array:
        """Return ``B - R' diag(weights) D_0 Y``."""
        out = B.copy()
        ones = np.ones(self.cells.n_first)
        kernels.eliminate_first()(Y, weights, ones, self.cells.level_starts, self.cells.rest, out)
        return out

    @cached_property
    def diagonal(self) -> Array:
        """The diagonal of A where no group has a level twice, shape (M,); what is negative is left out."""
        owner = np.repeat(np.arange(self.cells.n_first), np.diff(self.cells.level_starts))
        each = self.W - 2.0 * self.f * self.W + self.tau[owner] * self.f**2
        out = np.zeros(self.cells.n_rest)
        kernels.sum_by_rest()(each, self.cells.rest, out)
        return np.maximum(out, 0.0)


def jacobi(diagonal: Array) -> Jacobi:
    """Return the diagonal as a preconditioner; what is rounding of zero stays out."""
    floor = 1e-14 * max(float(diagonal.max(initial=0.0)), np.finfo(float).tiny)
    return Jacobi(np.where(diagonal > floor, 1.0 / np.where(diagonal > floor, diagonal, 1.0), 0.0))


def dense_factor(schur: Schur) -> DenseFactor | None:
    """Return a dense factor with pivots, None for a matrix of zeros."""
    A = schur.dense()
    seen = schur.diagonal > 0.0
    scale = np.sqrt(np.where(seen, schur.diagonal, 1.0))
    A /= scale
    A /= scale[:, None]
    A[~seen] = 0.0
    A[:, ~seen] = 0.0
    L, order, rank, _ = linalg.lapack.dpstrf(A, tol=DEPENDENT, lower=1, overwrite_a=1)
    if not rank:
        return None
    kept = order[:rank].astype(np.intp) - 1
    return DenseFactor(np.asfortranarray(np.tril(L[:rank, :rank])), kept, scale[kept])


@dataclass
class Solved:
    """Solutions of ``A X = B`` with their residuals, shape (M, m)."""

    x: Array
    residual: Array
    n_iter: int
    arrived: bool
    bent: bool = False


def conjugate_gradients(
    schur: Schur,
    precondition: Preconditioner,
    B: Array,
    x0: Array | None,
    rtol: Array | float,
    floor: Array,
    max_iter: int = MAX_ITERATIONS,
) -> Solved:
    """Solve ``A X = B`` column by column in lockstep, until the residual in the norm of the preconditioner
    has shrunk to ``rtol`` of the right-hand side's, or its square to ``floor``, shape (m,).

    A is singular, but right-hand sides are consistent: no direction in the null space is ever entered, and
    the floor keeps rounding from being reduced for ever.
    """
    X = np.zeros_like(B) if x0 is None else x0.copy()
    R = B.copy() if x0 is None else B - schur.product(X)
    Z = precondition.solve(R)
    rho = np.einsum("jk,jk->k", R, Z)
    whole = rho if x0 is None else np.einsum("jk,jk->k", B, precondition.solve(B))
    goal = np.maximum(rtol**2 * whole, floor)
    live, n_iter, bent = np.flatnonzero(rho > goal), 0, False
    rho, P, x, r = rho[live], Z[:, live], X[:, live], R[:, live]
    while len(live) and n_iter < max_iter:
        Q = schur.product(P)
        bend = np.einsum("jk,jk->k", P, Q)
        # A column without curvature along its direction is at its end: what is left is rounding.
        bends = bend > 0.0
        bent = bent or bool((bend < -BENT * np.abs(P * Q).sum(axis=0)).any())
        alpha = np.where(bends, rho / np.where(bends, bend, 1.0), 0.0)
        x += alpha * P
        r -= alpha * Q
        Z = precondition.solve(r)
        new = np.einsum("jk,jk->k", r, Z)
        n_iter += 1
        going = bends & (new > goal[live])
        P = Z + new / rho * P
        rho = new
        if not going.all():
            X[:, live], R[:, live] = x, r
            live, rho = live[going], rho[going]
            P, x, r = (np.ascontiguousarray(v[:, going]) for v in (P, x, r))
    X[:, live], R[:, live] = x, r
    return Solved(X, R, n_iter, not len(live), bent)


@dataclass
class Factors:
    """The preconditioner of a fit: the diagonal while that serves, then a factor that is kept over steps.

    Attributes
    ----------
    kind : str
        "diagonal", "dense" or "Laplacian".
    n_iter : list of int
        Iterations of each solve.
    bent : bool
        Whether the last solve met negative curvature.
    kept : Preconditioner or None
        The factor, if one was made.
    """

    kind: str = "diagonal"
    n_iter: list[int] = field(default_factory=list)
    bent: bool = False
    kept: Preconditioner | None = None
    _refused: bool = False

    def solve(self, schur: Schur, B: Array, x0: Array | None, rtol: Array, floor: Array) -> Solved:
        """Return the solutions of ``A X = B``; see `conjugate_gradients`."""
        fresh = self.kept is None
        first: Preconditioner = self.kept or jacobi(schur.diagonal)
        patience = DIAGONAL_ITERATIONS if fresh else 2 * DIAGONAL_ITERATIONS
        limit = MAX_ITERATIONS if self._refused else patience
        found = conjugate_gradients(schur, first, B, x0, rtol, floor, limit)
        n_iter = found.n_iter
        if not found.arrived or (not fresh and n_iter > STALE_ITERATIONS):
            # What such a solve takes would have paid for a factor of its own.
            self._make(schur)
        if not found.arrived:
            better: Preconditioner = self.kept or jacobi(schur.diagonal)
            found = conjugate_gradients(schur, better, B, found.x, rtol, floor)
            n_iter += found.n_iter
        self.n_iter.append(n_iter)
        self.bent = found.bent
        return found

    def better(self, schur: Schur) -> None:
        """Make a factor: the diagonal does not serve."""
        self._make(schur)

    def _make(self, schur: Schur) -> None:
        """Make a factor of the curvature here, as the size allows."""
        kept: Preconditioner | None = None
        if schur.cells.n_rest <= DENSE_LEVELS and schur.dense_work <= DENSE_WORK:
            kept, self.kind = dense_factor(schur), "dense"
        if kept is None:
            make = factorise if schur.cells.rest.shape[1] == 1 else factorise_blocks
            kept, self.kind = make(schur.cells, schur.W, schur.d), "Laplacian"
        if kept is None:
            self._refused, self.kind = True, "diagonal"
        self.kept = kept

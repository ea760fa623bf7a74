"""Preconditioned conjugate gradients for problems that are one linear system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.objective import Offer
from attnfit.solvers.loop import Descent, Outcome, Solver, StopFit, Tracker
from attnfit.solvers.verdicts import Status, Verdict

Array = NDArray[np.float64]

# A residual that is formed anew and is no smaller than this share of the last one is as small as it gets.
STALLED = 0.5
# The recurrence knows nothing of a residual that is smaller than this share of the right side.
DRIFT = 1e-18
# Outputs may be off by so many times the tolerance, relative to the largest target: their error is bounded in
# the norm of all residuals, which ordinary ones do not come near.
OUTPUTS = 1e3


@dataclass(frozen=True)
class ConjugateGradients(Solver):
    """Preconditioned conjugate gradients on the linear system of a `attnfit.problems.KernelRegression`.

    All right sides share each product with the kernel. ``tol`` bounds the residual of each, relative to its
    right side, and the residual is formed anew at the end: what the recurrence of the method says of it is
    not what is reported. An end is called converged if besides no output can be off by more than ``1e3 tol``
    of the largest target, which asks for more where rows of A are long: ``result.move`` is that bound, and
    where float64 does not reach it the status is "precision". ``max_iter`` bounds the products with the
    system's matrix.

    Parameters
    ----------
    rank : int, optional
        Columns of the partial Cholesky factor that the preconditioner is made of; by default ``max(50, 2
        sqrt(n))``; zero for none. More cost n numbers each, and pay where eigenvalues decay fast: then as
        many as lie above the ridge, which the message tells, make a few products do.

    Raises
    ------
    ValueError
        If it is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> from attnfit.solvers import ConjugateGradients
    >>> A = 0.3 * np.random.default_rng(0).standard_normal((400, 4))
    >>> problem = problems.KernelRegression(A, A[:, 0], ridge=1e-3)
    >>> plain = minimize(problem, solver=ConjugateGradients(rank=0), max_iter=1000)
    >>> helped = minimize(problem, solver=ConjugateGradients(rank=100))
    >>> helped.n_iter < plain.n_iter / 3
    True
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"rank must not be negative, not {self.rank!r}")

    def run(
        self,
        problem: Any,
        start: Any,
        x0: Array | None,
        tol: float,
        max_iter: int,
        tracker: Tracker,
        rng: np.random.Generator,
    ) -> Outcome:
        """Minimise; `attnfit.minimize` documents the arguments.

        Raises
        ------
        ValueError
            If the problem is no linear system.
        """
        if Offer.LINEAR_SYSTEM not in problem.offers:
            raise ValueError(
                "ConjugateGradients solves KernelRegression; leave solver out for other problems"
            )
        right = problem.right_sides
        Y = np.zeros_like(right) if x0 is None else x0.reshape(right.shape).copy()
        system = System(problem, right, tol, tracker)
        status, n_iter, note = Status.MAX_ITER, 0, ""
        try:
            with tracker.timed("model"):
                inverse = problem.preconditioner(self.rank, rng)
            least = "at least " if 0 < inverse.rank == inverse.effective_rank else ""
            note = f"preconditioner of rank {inverse.rank}, effective rank {least}{inverse.effective_rank}"
            status, n_iter = system.solve(Y, inverse, max_iter, warm=x0 is not None)
        except (KeyboardInterrupt, StopFit):
            status, n_iter = Status.INTERRUPTED, system.n_iter
        with tracker.timed("evaluate"):
            at = problem.evaluate(Y.reshape(-1))
            if status is Status.INTERRUPTED:
                system.look(Y, right - problem.operator(Y))
        verdict = Verdict(status, move=system.off)
        best = Descent(at, system.reference, status, n_iter, verdict=verdict)
        return Outcome(
            best,
            {"zero": at.value} if status is Status.CONVERGED else {},
            n_iter,
            f"conjugate gradients, {note}" if note else "conjugate gradients",
            _message(status, system, n_iter, note),
        )


def _message(status: Status, system: System, n_iter: int, note: str) -> str:
    reached = (
        f"relative residual {system.worst:.1e}, tol {system.tol:.0e}, after {n_iter} products; outputs are "
        f"off by at most {system.off:.1e} of the largest target; {note}"
    )
    match status:
        case Status.CONVERGED:
            return f"converged: {reached}"
        case Status.MAX_ITER:
            return f"not converged: {reached}; raise max_iter, the rank of the preconditioner, or ridge"
        case Status.PRECISION:
            return (
                f"no smaller residual is possible in float64: {reached}; raise ridge, loosen tol, or scale A "
                "where its rows are long"
            )
        case _:
            return f"interrupted; x is the best point so far: {reached}"


class System:
    """A linear system with several right sides, each with a recurrence of its own.

    Parameters
    ----------
    problem : Problem
        That offers LINEAR_SYSTEM.
    right : ndarray, shape (n, k)
    tol : float
    tracker : Tracker

    Attributes
    ----------
    worst : float
        The largest relative residual when it was last formed anew.
    off : float
        The bound of the error of an output then.
    """

    def __init__(self, problem: Any, right: Array, tol: float, tracker: Tracker) -> None:
        self.problem, self.right, self.tol, self.tracker = problem, right, tol, tracker
        self.sizes = np.linalg.norm(right, axis=0)
        self.reference = right.reshape(-1)
        self.n_iter = 0
        self.worst = self.off = np.inf

    def relative(self, R: Array) -> Array:
        """Return the size of residuals relative to their right sides, shape (k,)."""
        return np.asarray(np.linalg.norm(R, axis=0) / np.where(self.sizes > 0.0, self.sizes, 1.0))

    def short(self, R: Array) -> Array:
        """Return residuals as shares of what they may be, shape (k,)."""
        outputs = self.problem.output_errors(np.linalg.norm(R, axis=0))
        return np.asarray(np.maximum(self.relative(R), outputs / OUTPUTS) / self.tol)

    def look(self, Y: Array, R: Array) -> None:
        """Note how far residuals that were formed anew are off."""
        self.worst = float(self.relative(R).max())
        sizes = np.linalg.norm(R, axis=0) + self.problem.residual_rounding(Y)
        self.off = float(self.problem.output_errors(sizes).max())

    def solve(self, Y: Array, inverse: Any, max_iter: int, *, warm: bool) -> tuple[Status, int]:
        """Solve in place, from Y; return the status and the number of products."""
        R = self.right - self.problem.operator(Y) if warm else self.right.copy()
        before = np.inf
        while True:
            self.look(Y, R)
            self._record(Y, R, self.worst)
            share = float(self.short(R).max())
            if share <= 1.0:
                known = self.off <= 2.0 * OUTPUTS * self.tol
                return Status.CONVERGED if known else Status.PRECISION, self.n_iter
            if self.n_iter >= max_iter:
                return Status.MAX_ITER, self.n_iter
            if not share <= STALLED * before:
                return Status.PRECISION, self.n_iter
            before = share
            self._descend(Y, R, inverse, max_iter)
            # The recurrence drifts: only a residual formed anew is believed.
            R = self.right - self.problem.operator(Y)

    def _descend(self, Y: Array, R: Array, inverse: Any, max_iter: int) -> None:
        """Run the recurrence until it promises the tolerance."""
        Z = inverse(R)
        P, rho = Z.copy(), np.sum(R * Z, axis=0)
        while self.n_iter < max_iter:
            # A right side that has arrived stays where it is.
            active = (self.short(R) > 1.0) & (self.relative(R) > DRIFT) & (rho > 0.0)
            if not active.any():
                return
            with self.tracker.timed("step"):
                Q = self.problem.operator(P)
            curvature = np.sum(P * Q, axis=0)
            active &= curvature > 0.0
            alpha = np.where(active, rho / np.where(active, curvature, 1.0), 0.0)
            Y += alpha * P
            R -= alpha * Q
            self.n_iter += 1
            self._record(Y, R, float(self.relative(R).max()))
            if not active.any():
                return
            Z = inverse(R)
            fresh = np.sum(R * Z, axis=0)
            P = Z + np.where(active, fresh / np.where(rho > 0.0, rho, 1.0), 0.0) * P
            rho = np.where(active, fresh, rho)

    def _record(self, Y: Array, R: Array, worst: float) -> None:
        value = self.problem.value_of(Y, R, self.right)
        self.tracker.record("conjugate gradients", self.n_iter, value, worst)

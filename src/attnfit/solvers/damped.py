"""Levenberg-Marquardt from several points at once, for residuals that can vanish: the inversion of attention
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.objectives.inverse import LayerInversion
from attnfit.objectives.objective import MAX_DENSE, Evaluation, Offer
from attnfit.objectives.token_problem import Points, TokenProblem
from attnfit.solvers.loop import MAX_REJECTIONS, NOISE, Descent, Outcome, Solver, StopFit, Tracker
from attnfit.solvers.verdicts import Status, Verdict

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Damping of the first step relative to the largest diagonal entry, and how it follows the gain ratio.
FIRST_DAMPING = 1e-2
STRONGER = 4.0
WEAKER = 0.2
GOOD_GAIN = 0.75
LEAST_GAIN = 1e-4
# A second-order correction longer than this share of the step is not trusted.
MAX_BEND = 0.375
# A residual is zero where its square is at most this share of ||B||^2.
ZERO = 1e-18
# From there the steps go on while they reduce the square by half, at most this many times.
MAX_POLISH = 30


Solve = Callable[[Array], Array]
# Starts that are descended from together: as many as keep their Jacobians in cache.
BATCH_ENTRIES = 1 << 21
# Steps with each gamma of a continuation.
STEPS = 20


class Normal(Protocol):
    """``J^T J + gamma`` at one point."""

    def damped(self, damping: float) -> Solve | None:
        """Return ``r -> (J^T J + gamma + damping)^-1 r``; None if that is singular."""
        ...


@dataclass(frozen=True)
class DenseNormal:
    """``J^T J + gamma`` as a matrix, by Cholesky."""

    matrix: Array

    def damped(self, damping: float) -> Solve | None:
        """Return the solution by the factors."""
        damped = self.matrix.copy()
        damped.reshape(-1)[:: len(damped) + 1] += damping
        factor, info = linalg.lapack.dpotrf(damped, overwrite_a=True)
        return None if info != 0 else lambda r: np.asarray(linalg.lapack.dpotrs(factor, r)[0])


@dataclass(frozen=True)
class KrylovNormal:
    """``J^T J + gamma`` as a product, by conjugate gradients with its diagonal as preconditioner."""

    product: Callable[[Array], Array]
    diagonal: Array
    max_products: int = 300

    def damped(self, damping: float) -> Solve | None:
        """Return the solution to a relative residual of 1e-3."""
        return lambda r: self._solve(r, damping)

    def _solve(self, r: Array, damping: float) -> Array:
        inverse = 1.0 / (self.diagonal + damping)
        p, z = np.zeros_like(r), inverse * r
        direction, square = z, float(r @ z)
        target = 1e-6 * square
        for _ in range(self.max_products):
            if square <= target:
                break
            Hd = self.product(direction) + damping * direction
            alpha = square / float(direction @ Hd)
            p, r = p + alpha * direction, r - alpha * Hd
            z = inverse * r
            fresh = float(r @ z)
            direction, square = z + (fresh / square) * direction, fresh
        return p


@dataclass(frozen=True)
class Bent:
    """Steps at one point that follow the curve of the residuals to second order.

    ``bend`` takes p to ``J^T r''(p, p)``: two passes of the layer and one more solution with the same matrix.
    """

    normal: Normal
    bend: Callable[[Array], Array]

    def step(self, g: Array, damping: float) -> tuple[Array, float] | None:
        """Return the step and the decrease that the quadratic model promises; None without one."""
        solve = self.normal.damped(damping)
        if solve is None:
            return None
        p = -solve(g)
        # Exact for the exact solution and for every iterate of conjugate gradients.
        promised = 0.5 * float(p @ (damping * p - g))
        correction = -0.5 * solve(self.bend(p))
        if np.linalg.norm(correction) <= MAX_BEND * np.linalg.norm(p):
            p = p + correction
        return p, promised


@dataclass
class DampedFits:
    """Levenberg-Marquardt descents from several points, each with a damping of its own.

    Attributes
    ----------
    x : ndarray, shape (k, n_unknowns)
        Where they stand.
    status : ndarray of str, shape (k,)
    zero : float
        A residual whose square is at most this share of that of B is zero.
    """

    problem: TokenProblem
    x: Array
    tol: float
    goal: float
    max_iter: int
    tracker: Tracker
    phase: str
    zero: float = ZERO
    status: NDArray[Any] = field(init=False)
    n_iter: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        k = len(self.x)
        with self.tracker.timed("evaluate"):
            points = self.problem.evaluate_many(self.x)
        self.values, self.gradients, self.squares = points.values, points.gradients, points.squares
        self.status = np.where(np.isfinite(self.values), "max_iter", "overflow").astype("<U11")
        squares = float(np.sum(self.problem.evaluate(np.zeros(self.x.shape[1])).residuals ** 2))
        self._value_at_zero = max(0.5 * squares, np.finfo(float).tiny)
        self._zero = self.zero * float(np.sum(self.problem.B**2)) if self.problem.gamma == 0.0 else -1.0
        self._damping, self._rejections = np.full(k, np.nan), np.zeros(k, dtype=int)
        self._models: list[Bent | None] = [None] * k
        self._model(points, np.flatnonzero(np.isfinite(self.values)))

    @property
    def solved(self) -> Index:
        """Which points have a zero residual."""
        return np.flatnonzero(self.squares <= self._zero)

    def descend(self) -> bool:
        """Descend until one residual is zero or every point is done; return whether a callback ended it."""
        try:
            self._record()
            while not len(self.solved):
                live = self._live()
                if not len(live) or self.n_iter >= self.max_iter:
                    return False
                self._step(live)
            self.status[self.solved] = "converged"
            self._polish(int(self.solved[0]))
            return False
        except (KeyboardInterrupt, StopFit):
            self.status[self.status == "max_iter"] = "interrupted"
            return True

    def _live(self) -> Index:
        """Settle the points that are done; return the others."""
        open_ = self.status == "max_iter"
        # A gradient is small relative to its residual, or the way to a zero residual would end half-way.
        share = np.sqrt(np.minimum(self.values / self._value_at_zero, 1.0))
        small = np.linalg.norm(self.gradients, axis=1) <= self.tol * self.goal * share
        self.status[open_ & small] = "converged"
        self.status[open_ & ~small & (self._rejections > MAX_REJECTIONS)] = "precision"
        return np.flatnonzero(self.status == "max_iter")

    def _polish(self, k: int) -> None:
        """Go on from a zero residual while that reduces it: convergence is quadratic, and each step counts
        where the Jacobian is ill-conditioned.
        """
        for _ in range(MAX_POLISH):
            before = float(self.squares[k])
            self._step(np.array([k]))
            if not 0.0 < self.squares[k] <= 0.5 * before:
                return

    def _step(self, live: Index) -> None:
        """Try a step of every live point."""
        with self.tracker.timed("step"):
            moves, promised = np.zeros((len(live), self.x.shape[1])), np.zeros(len(live))
            for row, k in enumerate(live):
                model = self._models[k]
                assert model is not None
                found = model.step(self.gradients[k], float(self._damping[k]))
                if found is not None:
                    moves[row], promised[row] = found
        with self.tracker.timed("evaluate"):
            trial = self.problem.evaluate_many(self.x[live] + moves)
        gain = np.full(len(live), -1.0)
        sound = (promised > 0.0) & np.isfinite(trial.values)
        gain[sound] = self._decrease(live, trial)[sound] / promised[sound]
        accepted = gain > LEAST_GAIN
        self._damping[live[gain > GOOD_GAIN]] *= WEAKER
        self._damping[live[~accepted]] *= STRONGER
        taken = live[accepted]
        self._rejections[taken] = 0
        self._rejections[live[~accepted]] += 1
        self.x[taken], self.values[taken] = trial.x[accepted], trial.values[accepted]
        self.gradients[taken], self.squares[taken] = trial.gradients[accepted], trial.squares[accepted]
        with self.tracker.timed("model"):
            self._model(trial, np.flatnonzero(accepted), live)
        self.n_iter += 1
        self._record(float(np.linalg.norm(moves, axis=1).max()), bool(accepted.any()))

    def _decrease(self, live: Index, trial: Points) -> Array:
        """Return by how much the values fall; where that is rounding, the gradients at both ends tell."""
        with np.errstate(invalid="ignore", over="ignore"):
            actual = self.values[live] - trial.values
            slopes = 0.5 * np.sum((self.gradients[live] + trial.gradients) * (self.x[live] - trial.x), axis=1)
        return np.where(np.abs(actual) <= NOISE * self.values[live], slopes, actual)

    def _model(self, points: Points, which: Index, live: Index | None = None) -> None:
        """Form the normal equations at some of the points just evaluated, numbered by live."""
        if not len(which):
            return
        normals: list[Normal]
        if self.problem.n_unknowns > MAX_DENSE:
            ats = [self.problem.evaluate(points.x[k]) for k in which]
            diagonals = [self.problem.diagonal_at(at) for at in ats]
            normals = [
                KrylovNormal(self.problem.gauss_newton_operator(at), diagonal)
                for at, diagonal in zip(ats, diagonals, strict=True)
            ]
        else:
            matrices = self.problem.gauss_newton_many(points, which)
            diagonals, normals = [np.diag(H) for H in matrices], [DenseNormal(H) for H in matrices]
        for i, diagonal, normal in zip(which, diagonals, normals, strict=True):
            k = int(i if live is None else live[i])
            self._models[k] = Bent(normal, partial(self.problem.bend, points.forward.take(i)))
            if np.isnan(self._damping[k]):
                self._damping[k] = FIRST_DAMPING * max(float(diagonal.max()), np.finfo(float).tiny)

    def _record(self, step_norm: float = 0.0, accepted: bool = True) -> None:
        best = int(np.argmin(self.values))
        norm = float(np.linalg.norm(self.gradients[best]))
        relative = norm / self.goal if self.goal > 0 else 0.0
        left = int(np.sum(self.status == "max_iter"))
        phase = self.phase if len(self.x) == 1 else f"{self.phase}, {left} left"
        value = float(self.values[best])
        self.tracker.record(phase, self.n_iter, value, relative, step_norm=step_norm, accepted=accepted)


@dataclass(frozen=True)
class LevenbergMarquardt(Solver):
    """Damped Gauss-Newton: ``(J^T J + gamma + damping) p = -gradient``.

    The damping falls while the quadratic model predicts the decrease and grows where a step is rejected. At a
    zero residual the neglected curvature vanishes and convergence is quadratic. Each step is corrected to
    second order with the same matrix: in the curved valleys of attention that saves more than half of the
    steps, and finds zeros that are missed without. Cholesky up to 3,000 unknowns; beyond, conjugate gradients
    on products, with no matrix formed.

    Without ``x0`` it starts from ``B V^+``, from the moments of the output, and then from Gaussian tokens,
    several at once with batched linear algebra, and stops at the first zero residual (square at most 1e-18 of
    that of B). Such a point need not be the input sought: `attnfit.problems.LayerInversion` may have several.

    Parameters
    ----------
    n_restarts : int
        Largest number of Gaussian starts.
    continuation : sequence of float
        Values of gamma that every start first descends with, one after the other, 20 steps each: ``(1, 0.1,
        ..., 1e-8)`` helps where half of the tokens are known, and misleads where none is.

    Raises
    ------
    ValueError
        If n_restarts or a gamma is negative, or the problem is no LayerInversion.

    Notes
    -----
    Marquardt, "An algorithm for least-squares estimation of nonlinear parameters" (1963); Transtrum and
    Sethna, "Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares minimization"
    (2012). The problem is that of "Unmasking Transformers: A Theoretical Approach to Data Recovery via
    Attention Weights", whose gamma, large enough to make the loss convex, draws X to zero.
    """

    n_restarts: int = 8
    continuation: Sequence[float] = ()

    def __post_init__(self) -> None:
        for k, gamma in enumerate(self.continuation):
            if not (np.isfinite(gamma) and gamma >= 0.0):
                raise ValueError(f"continuation[{k}] is {gamma!r}; every gamma must be finite and >= 0")
        if not isinstance(self.n_restarts, int | np.integer) or self.n_restarts < 0:
            raise ValueError(f"n_restarts must be an integer >= 0, not {self.n_restarts!r}")

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
        """Minimise; `attnfit.minimize` documents the arguments. ``max_iter`` bounds the steps a start."""
        if Offer.INVERSION not in problem.offers:
            raise ValueError(
                f"LevenbergMarquardt takes LayerInversion, not {type(problem).__name__}; leave solver out"
            )
        reference = problem.evaluate(np.zeros(problem.n_unknowns)).gradient
        goal = float(np.linalg.norm(reference))
        ends: dict[str, Descent] = {}
        n_iter = 0
        for names, points in self._batches(problem, x0, rng):
            phase = f"fit: {names[0]}" if len(names) == 1 else f"fit: {names[0]} to {names[-1].split()[-1]}"
            steps = [(problem.with_gamma(gamma), STEPS) for gamma in self.continuation]
            for one, most in [*steps, (problem, max_iter)]:
                fits = DampedFits(one, points, tol, goal, most, tracker, phase)
                stopped = fits.descend()
                points, n_iter = fits.x, n_iter + fits.n_iter
                if stopped:
                    break
            for k, name in enumerate(names):
                at = Evaluation(fits.x[k], float(fits.values[k]), fits.gradients[k])
                status = Status(str(fits.status[k]))
                ends[name] = Descent(at, reference, status, verdict=Verdict(status))
            if stopped or len(fits.solved):
                break
        best = min(ends, key=lambda name: ends[name].at.value)
        if not np.isfinite(ends[best].at.value):
            problem.value(ends[best].at.x)
        values = {name: end.at.value for name, end in ends.items()}
        method = "Cholesky" if problem.n_unknowns <= MAX_DENSE else "conjugate gradients"
        return Outcome(
            ends[best],
            dict(sorted(values.items(), key=lambda item: item[1])),
            n_iter,
            f"Levenberg-Marquardt, {method}, {len(ends)} start{'s'[: len(ends) > 1]}",
            self._message(problem, ends, best, len(fits.solved) > 0),
        )

    def _batches(
        self, problem: LayerInversion, x0: Array | None, rng: np.random.Generator
    ) -> Iterator[tuple[list[str], Array]]:
        """Yield names and points of the starts that are descended from together."""
        if x0 is not None:
            yield ["x0"], x0[None].copy()
            return
        for name, point in problem.starts(rng).items():
            yield [name], point[None].copy()
        size = problem.n_unknowns
        entries = (problem.B.size + size) * size
        together = max(1, BATCH_ENTRIES // entries)
        points = problem.gaussian_starts(self.n_restarts, rng)
        for first in range(0, self.n_restarts, together):
            part = points[first : first + together]
            yield [f"Gaussian {first + k + 1}" for k in range(len(part))], part.copy()

    def _message(self, problem: LayerInversion, ends: dict[str, Descent], best: str, solved: bool) -> str:
        """Return what a zero residual, or the lack of one, means; nothing where gamma hides it."""
        end = ends[best]
        share = np.sqrt(2.0 * end.at.value) / max(float(np.linalg.norm(problem.B)), np.finfo(float).tiny)
        if solved:
            return f"converged: zero residual (relative {share:.1e}) from the start {best}"
        if problem.gamma > 0.0 or end.status not in ("converged", "max_iter"):
            return ""
        if end.status == "max_iter":
            return (
                f"not converged: no zero residual after max_iter steps from each of {len(ends)} starts, the "
                f"least relative residual is {share:.1e}; raise max_iter or n_restarts"
            )
        return (
            f"converged to a local minimum: relative residual {share:.1e} is not zero; try more restarts, or "
            "no input gives this output"
        )

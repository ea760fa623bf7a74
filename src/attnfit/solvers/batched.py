"""Newton's method for many right-hand sides at once, each with a trust region and a status of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.layer_curvature import LayeredEvaluation
from attnfit.objectives.layered import CHUNK_ENTRIES, LayeredProblem
from attnfit.objectives.objective import Offer
from attnfit.objectives.saturation import false_optima
from attnfit.solvers.loop import (
    MAX_REJECTIONS,
    NOISE,
    SADDLE_STEP,
    Descent,
    Outcome,
    Solver,
    StopFit,
    Tracker,
)
from attnfit.solvers.subproblem import RANK_TOLERANCE
from attnfit.solvers.verdicts import ACCEPTED_FLOOR, FLOOR, Status, Verdict

Array = NDArray[np.float64]
# The worst comes first: it is the status of the whole.
RANKING = ("interrupted", "overflow", "false_optimum", "max_iter", "precision", "converged")
REMEDIES = {
    "interrupted": "the fit was interrupted, x is the best point so far",
    "overflow": "the loss overflows; scale the data",
    "false_optimum": "a softmax output has underflowed and its gradient with it, but the loss falls "
    "where it is raised; pass another x0, or add ridge",
    "max_iter": "raise max_iter, or loosen tol",
    "precision": "no further decrease is possible in float64; loosen tol, or add ridge",
}
# How often a fit goes on from a false optimum.
MAX_ESCAPES = 5
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]


def overall(status: NDArray[Any]) -> str:
    """Return the worst status."""
    present = set(status.tolist())
    return next(name for name in RANKING if name in present)


def describe(status: NDArray[Any], reached: str, remedies: dict[str, str] = REMEDIES) -> str:
    """Return how many right-hand sides did not converge, the first of them and the remedy."""
    k = len(status)
    every = "the right-hand side" if k == 1 else f"all {k:,} right-hand sides"
    bad = np.flatnonzero(status != "converged")
    if not len(bad):
        return f"converged: {every} ({reached})"
    if k == 1:
        return f"not converged: {remedies[str(status[0])]} ({reached})"
    counts = Counter(status[bad].tolist())
    listed = ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
    first = str(status[bad[0]])
    return (
        f"{len(bad):,} of {k:,} right-hand sides did not converge ({listed}), the first at index {bad[0]}: "
        f"{remedies[first]} ({reached})"
    )


@dataclass(frozen=True)
class Steps:
    """Steps, shape (k, d), the decreases their models promise, and which of them a radius bounded, (k,)."""

    p: Array
    predicted: Array
    bounded: Mask


class Eigenmodels:
    """Quadratic models of k problems in their eigenbases; `MoreSorensen` is the same for one.

    Parameters
    ----------
    hessians : ndarray, shape (k, d, d)
    """

    def __init__(self, hessians: Array) -> None:
        self.values, self.vectors = np.linalg.eigh(hessians)
        self.size = np.maximum(np.abs(self.values).max(axis=1), np.finfo(float).tiny)

    @property
    def negative(self) -> Mask:
        """Which models have negative curvature beyond rounding, shape (k,)."""
        return np.asarray(self.values[:, 0] < -1e-9 * self.size)

    def solve(self, g: Array, radius: Array) -> Steps:
        """Return the minimiser of each model within its radius, least norm where it is singular.

        Parameters
        ----------
        g : ndarray, shape (k, d)
        radius : ndarray, shape (k,)
            Infinite where none is known.
        """
        along = np.matmul(self.vectors.transpose(0, 2, 1), g[:, :, None])[:, :, 0]
        floor = RANK_TOLERANCE * self.size[:, None]
        flat = np.abs(self.values) <= floor
        lengths = np.linalg.norm(along, axis=1, keepdims=True)
        along = np.where(flat & (np.abs(along) <= 1e-3 * lengths), 0.0, along)
        idle = along == 0.0
        # Curvature that is negative by rounding counts by its size.
        q = np.where(idle, 0.0, -along / np.where(flat, 1.0, np.abs(self.values)))
        newton = ~self.negative & ~(flat & ~idle).any(axis=1)
        newton &= np.linalg.norm(q, axis=1) <= radius
        other = np.flatnonzero(~newton)
        if len(other):
            q[other] = _to_boundary(self.values[other], along[other], radius[other], floor[other])
        predicted = -np.sum(along * q + 0.5 * self.values * q * q, axis=1)
        return Steps(np.matmul(self.vectors, q[:, :, None])[:, :, 0], predicted, ~newton)

    def approach(self, g: Array) -> Array:
        """Return the Newton steps with the curvature taken by absolute value, off flat directions, shape
        (k, d): how far a stationary point is, whatever its kind.
        """
        along = np.matmul(self.vectors.transpose(0, 2, 1), g[:, :, None])[:, :, 0]
        size = np.where(
            np.abs(self.values) > RANK_TOLERANCE * self.size[:, None], np.abs(self.values), np.inf
        )
        return np.asarray(np.matmul(self.vectors, (-along / size)[:, :, None])[:, :, 0])


def _to_boundary(values: Array, along: Array, radius: Array, floor: Array) -> Array:
    """Solve ``||(H + shift)^-1 g|| = radius`` for shifts that make H + shift positive, by safeguarded
    Newton.
    """
    lengths = np.linalg.norm(along, axis=1)
    usual = np.linalg.norm(along / np.maximum(np.abs(values), floor), axis=1)
    radius = np.where(np.isfinite(radius), radius, np.sqrt(usual * lengths))
    radius = np.maximum(radius, np.finfo(float).tiny)
    # A gradient without a part along negative curvature (a saddle, the hard case) gets one that is
    # negligible.
    nudge = 1e-8 * np.maximum(lengths, np.abs(values[:, 0]) * radius)
    small = (values[:, 0] < -floor[:, 0]) & (np.abs(along[:, 0]) < nudge)
    along = along.copy()
    along[small, 0] = np.where(along[small, 0] < 0.0, -1.0, 1.0) * nudge[small]
    lowest = np.maximum(0.0, -values[:, 0])
    low, high = lowest, lowest + np.linalg.norm(along, axis=1) / radius + floor[:, 0]
    shift = 0.5 * (low + high)
    # Where the gradient vanishes no Newton step for the shift is known: the interval is halved.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for _ in range(100):
            denominators = values + shift[:, None]
            norm = np.linalg.norm(along / denominators, axis=1)
            if (np.abs(norm - radius) <= 1e-6 * radius).all():
                break
            low, high = np.where(norm > radius, shift, low), np.where(norm > radius, high, shift)
            slope = np.sum(along**2 / denominators**3, axis=1) / norm**2
            step = shift + (norm - radius) / (radius * slope)
            shift = np.where((low < step) & (step < high), step, 0.5 * (low + high))
        return np.asarray(np.where(along == 0.0, 0.0, -along / (values + shift[:, None])))


@dataclass(frozen=True)
class BatchedNewton(Solver):
    """Trust-region Newton on all right-hand sides at once.

    The columns of the unknown are independent problems with the same matrices: values, gradients and
    Hessians of all of them come from the same matrix products, steps from eigenvectors of their small
    Hessians. Columns that have converged are left out of what follows. The fit converges if every column
    does; ``column_status`` tells which did.
    """

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
            If the problem does not consist of independent columns.
        """
        if Offer.COLUMNS not in problem.offers:
            raise ValueError(
                "BatchedNewton takes problems with independent right-hand sides, not "
                f"{type(problem).__name__}; leave solver out"
            )
        d, k = problem.logit_map.shape[1], problem.n_columns
        X = np.array((problem.initial_point(rng) if x0 is None else x0).reshape(d, k))
        scale = np.asarray(start.scale()).reshape(d, k)
        gradient, values, moves = np.zeros((d, k)), np.zeros(k), np.full(k, np.nan)
        status, n_iter = np.full(k, Status.INTERRUPTED, dtype="<U13"), 0
        reference = problem.evaluate(np.zeros(d * k)).gradient
        chunks = list(problem.chunks(max(1, CHUNK_ENTRIES // d)))
        for run in chunks:
            part = problem.columns(run)
            fit = _Fit(part, X[:, run].copy(), scale[:, run], tol, max_iter, tracker)
            name = "fit" if len(chunks) == 1 else f"fit: columns {run.start} to {run.stop - 1}"
            stopped = fit.descend(name)
            X[:, run], gradient[:, run], values[run] = fit.X, fit.gradient, fit.values
            moves[run], status[run], n_iter = fit.moves, fit.status, max(n_iter, fit.n_iter)
            if stopped:
                rest = slice(run.stop, k)
                at = problem.columns(rest).evaluate(X[:, rest].reshape(-1)) if run.stop < k else None
                if at is not None:
                    values[rest], gradient[:, rest] = at.column_values, at.gradient.reshape(d, -1)
                break
        at = LayeredEvaluation(X.reshape(-1), float(values.sum()), gradient.reshape(-1), column_values=values)
        worst = float(moves[np.isfinite(moves)].max(initial=0.0))
        verdict = Verdict(Status(overall(status)), move=worst)
        best = Descent(at, reference, verdict.status, n_iter, verdict=verdict)
        reached = f"the next step moves a logit by {worst:.1e} at most, tol {tol:.0e}"
        return Outcome(
            best,
            {"zero" if x0 is None else "x0": at.value},
            n_iter,
            f"batched Newton, {k:,} right-hand sides",
            describe(status, reached),
            status,
        )


@dataclass
class _Fit:
    """The state of all columns of a chunk."""

    problem: LayeredProblem
    X: Array
    scale: Array
    tol: float
    max_iter: int
    tracker: Tracker
    values: Array = field(init=False)
    gradient: Array = field(init=False)
    moves: Array = field(init=False)
    status: NDArray[Any] = field(init=False)
    n_iter: int = 0

    def __post_init__(self) -> None:
        at = self.problem.evaluate(self.X.reshape(-1))
        d, k = self.X.shape
        self.values, self.gradient = at.column_values.copy(), at.gradient.reshape(d, k).copy()
        self.status = np.full(k, Status.MAX_ITER, dtype="<U13")
        self.moves = np.full(k, np.nan)
        self._first = np.maximum(self._norms(np.arange(k)), np.finfo(float).tiny)
        self._last_full = np.full(k, np.inf)
        self._radius = np.full(k, np.inf)
        self._rejections = np.zeros(k, dtype=int)
        self._hessians = np.zeros((k, d, d))

    def descend(self, phase: str) -> bool:
        """Fit every column; return whether the fit was interrupted."""
        live = np.arange(self.X.shape[1])
        overflowing = ~np.isfinite(self.values)
        self.status[overflowing] = Status.OVERFLOW
        live = fresh = live[~overflowing]
        escapes = 0
        try:
            self._record(phase, live)
            while True:
                with self.tracker.timed("model"):
                    self._model(fresh)
                with self.tracker.timed("step"):
                    live, steps = self._judge(live)
                if not len(live) or self.n_iter >= self.max_iter:
                    live = fresh = self._leave_false_optima(retry=escapes < MAX_ESCAPES)
                    escapes += 1
                    if not len(live):
                        return False
                    continue
                fresh = self._step(live, steps)
                self.n_iter += 1
                self._record(phase, live)
        except (KeyboardInterrupt, StopFit):
            self.status[self.status == Status.MAX_ITER] = Status.INTERRUPTED
            return True

    def _norms(self, columns: Index) -> Array:
        return np.asarray(np.linalg.norm(self.gradient[:, columns] / self.scale[:, columns], axis=0))

    def _record(self, phase: str, live: Index) -> None:
        relative = self._norms(np.arange(len(self._first))) / self._first
        value = float(self.values[np.isfinite(self.values)].sum())
        self.tracker.record(
            f"{phase}, {len(live)} left", self.n_iter, value, float(relative.max(initial=0.0))
        )

    def _judge(self, live: Index) -> tuple[Index, Steps]:
        """Settle the columns that are done; return those left and their next steps."""
        scale = self.scale[:, live].T
        g = self.gradient[:, live].T / scale
        models = Eigenmodels(self._hessians[live])
        steps = models.solve(g, self._radius[live])
        part = self.problem.columns(live)
        moves = part.column_moves(self.X[:, live], (steps.p / scale).T)
        near = part.column_moves(self.X[:, live], (models.approach(g) / scale).T)
        full = ~steps.bounded
        before = self._last_full[live]
        stalled = full & (moves >= 0.5 * before) & (np.maximum(moves, before) <= FLOOR)
        self._last_full[live] = np.where(full, moves, np.inf)
        done = full & ((moves <= self.tol) | (stalled & (moves <= ACCEPTED_FLOOR)))
        self.moves[live] = near
        self.status[live[done]] = Status.CONVERGED
        stuck = ~done & (stalled | (self._rejections[live] > MAX_REJECTIONS))
        self.status[live[stuck]] = Status.PRECISION
        # Off a saddle, along its negative curvature; a radius that was too large has been cut since.
        saddle = models.negative & (near <= max(self.tol, ACCEPTED_FLOOR)) & ~stuck
        saddle &= self._rejections[live] == 0
        if saddle.any():
            sizes = np.linalg.norm(self.scale[:, live] * self.X[:, live], axis=0)
            self._radius[live[saddle]] = SADDLE_STEP * np.maximum(1.0, sizes[saddle])
            steps = models.solve(g, self._radius[live])
        left = ~done & ~stuck
        return live[left], Steps(steps.p[left], steps.predicted[left], steps.bounded[left])

    def _model(self, columns: Index) -> None:
        """Form the Hessians of these columns, scaled."""
        if not len(columns):
            return
        part = self.problem.columns(columns)
        hessians = part.column_hessians(part.evaluate(self.X[:, columns].reshape(-1)))
        scale = self.scale[:, columns].T
        self._hessians[columns] = hessians / (scale[:, :, None] * scale[:, None, :])

    def _step(self, live: Index, steps: Steps) -> Index:
        """Try a step of every column; return those that took it."""
        scale = self.scale[:, live]
        g = self.gradient[:, live]
        move = steps.p.T / scale
        sizes = np.linalg.norm(steps.p, axis=1)
        with self.tracker.timed("evaluate"):
            at = self.problem.columns(live).evaluate((self.X[:, live] + move).reshape(-1))
        gradient, values = at.gradient.reshape(g.shape), at.column_values
        with np.errstate(over="ignore", invalid="ignore"):
            actual = self.values[live] - values
            noise = NOISE * np.abs(self.values[live])
            by_gradient = -0.5 * np.sum((g + gradient) * move, axis=0)
            actual = np.where((np.abs(actual) <= noise) | (steps.predicted <= noise), by_gradient, actual)
            agreement = actual / np.maximum(steps.predicted, np.finfo(float).tiny)
        agreement[~np.isfinite(values) | (steps.predicted <= 0.0) | np.isnan(agreement)] = -1.0
        accepted = agreement > 1e-4
        wider = np.where((agreement > 0.75) & steps.bounded, 2.0 * sizes, self._radius[live])
        self._radius[live] = np.where(~accepted | (agreement < 0.25), 0.25 * sizes, wider)
        self._rejections[live] = np.where(accepted, 0, self._rejections[live] + 1)
        # A step lost in the rounding of x will not be followed by a better one.
        lost = sizes <= 1e-15 * np.linalg.norm(scale * self.X[:, live], axis=0)
        self._rejections[live[lost]] = MAX_REJECTIONS + 1
        taken = live[accepted]
        self.X[:, taken] += move[:, accepted]
        self.values[taken], self.gradient[:, taken] = values[accepted], gradient[:, accepted]
        return taken

    def _leave_false_optima(self, *, retry: bool) -> Index:
        """Move columns off false optima and return them; without a retry, they keep that status."""
        done = np.flatnonzero(self.status == Status.CONVERGED)
        if not len(done):
            return done
        part = self.problem.columns(done)
        found = false_optima(part, self.X[:, done], self.values[done], part.layers_at(self.X[:, done]))
        columns = done[list(found)]
        if not retry or self.n_iter >= self.max_iter:
            self.status[columns] = Status.FALSE_OPTIMUM
            return columns[:0]
        if len(columns):
            self.X[:, columns] = np.stack([escape.x for escape in found.values()], axis=1)
            at = self.problem.columns(columns).evaluate(self.X[:, columns].reshape(-1))
            self.values[columns] = at.column_values
            self.gradient[:, columns] = at.gradient.reshape(len(self.X), -1)
            self.status[columns], self._radius[columns] = Status.MAX_ITER, np.inf
            self._rejections[columns], self._last_full[columns] = 0, np.inf
        return columns

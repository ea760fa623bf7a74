"""Newton's method for many right-hand sides at once, each with a trust region of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.layers.evaluation import LayeredEvaluation
from attnfit.problems.layers.layered import CHUNK_ENTRIES, LayeredProblem
from attnfit.problems.layers.saturation import false_optima
from attnfit.solvers.batched_steps import Eigenmodels, Steps
from attnfit.solvers.columns import describe, overall
from attnfit.solvers.descent import MAX_REJECTIONS, NOISE, SADDLE_STEP, Descent
from attnfit.solvers.newton import Outcome
from attnfit.solvers.tracking import StopFit, Tracker
from attnfit.solvers.verdicts import ACCEPTED_FLOOR, FLOOR, Status, Verdict

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# How often a fit goes on from a false optimum.
MAX_ESCAPES = 5


@dataclass(frozen=True)
class BatchedNewton:
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
        if not isinstance(problem, LayeredProblem):
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

"""Gradient descent: the papers' baseline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.objective import Problem
from attnfit.solvers.loop import Descent, Outcome, Solver, StopFit, Tracker
from attnfit.solvers.starts import Start, probe_of
from attnfit.solvers.verdicts import ACCEPTED_FLOOR, Status, assess

Array = NDArray[np.float64]

SUFFICIENT = 1e-4
# The verdict is asked for again once the gradient has shrunk by this.
LOOK = 0.1


@dataclass(frozen=True)
class GradientDescent(Solver):
    """``x <- x - step_size * gradient(x)`` from zero (or ``x0``).

    The update of "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression", Section
    5.1, with its sign corrected. It is a baseline: on data of conditioning 1e2 it needs thousands of reads
    where `Newton` needs five.

    Parameters
    ----------
    step_size : float, optional
        A fixed step. By default each step starts at twice the last one and is halved until the value falls by
        at least 1e-4 of what the gradient promises (Armijo).

    Raises
    ------
    ValueError
        If step_size is not positive.
    """

    step_size: float | None = None
    records_points = True

    def __post_init__(self) -> None:
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(
                f"step_size must be positive, not {self.step_size!r}; leave it out for a line search"
            )

    def run(
        self,
        problem: Problem,
        start: Start,
        x0: Array | None,
        tol: float,
        max_iter: int,
        tracker: Tracker,
        rng: np.random.Generator,
    ) -> Outcome:
        """Minimise; `attnfit.minimize` documents the arguments."""
        scale = start.scale()
        x = problem.initial_point(rng).reshape(-1) if x0 is None else x0
        at = problem.evaluate(x, start.transfer(x), at_zero=True)
        run = Descent.begin(at)
        probe = probe_of(start.pilot.problem)
        # The first step moves the scaled unknowns by one over their number: small, and free of the user's
        # units.
        gradient_size = float(np.linalg.norm(at.gradient / scale))
        step = self.step_size or (1.0 / (float(scale.max()) ** 2) if gradient_size > 0 else 1.0)
        least = np.inf
        try:
            tracker.record("fit: gradient descent", 0, at.value, run.relative(at.gradient), x=at.x)
            while run.n_iter < max_iter:
                size = float(np.linalg.norm(run.at.gradient / scale))
                if size <= LOOK * least:
                    # A look costs two reads: no second one before the gradient is much smaller.
                    least = size
                    run.verdict = assess(problem, run.at, tol, probe)
                    if run.verdict.status is not Status.MAX_ITER:
                        run.status = run.verdict.status
                        break
                step, accepted = self._step(problem, run, step, tracker)
                if not accepted:
                    run.status = Status.OVERFLOW
                    if self.step_size is None:
                        # Values that differ by rounding tell no better point: the curvature may.
                        run.verdict = assess(problem, run.at, max(tol, ACCEPTED_FLOOR), probe)
                        done = run.verdict.status is Status.CONVERGED
                        run.status = Status.CONVERGED if done else Status.PRECISION
                    break
                run.n_iter += 1
                tracker.record(
                    "fit: gradient descent",
                    run.n_iter,
                    run.at.value,
                    run.relative(run.at.gradient),
                    x=run.at.x,
                )
        except (KeyboardInterrupt, StopFit):
            run.status = Status.INTERRUPTED
        if run.status != (None if run.verdict is None else run.verdict.status):
            run.verdict = None
        return Outcome.of(problem, {"zero" if x0 is None else "x0": run}, "gradient descent")

    def _step(self, problem: Problem, run: Descent, step: float, tracker: Tracker) -> tuple[float, bool]:
        """Take one step; return the next step size to try and whether the step was taken."""
        at = run.at
        square = float(at.gradient @ at.gradient)
        for _ in range(60):
            with tracker.timed("evaluate"):
                trial = problem.evaluate(at.x - step * at.gradient, at)
            if self.step_size is not None:
                run.at = trial if np.isfinite(trial.value) else at
                return step, bool(np.isfinite(trial.value))
            if trial.value <= at.value - SUFFICIENT * step * square and trial.value < at.value:
                run.at = trial
                return 2.0 * step, True
            step *= 0.5
        return step, False

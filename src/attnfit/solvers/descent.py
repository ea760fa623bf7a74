"""One descent: evaluate, model the curvature, take the trust-region step, record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.base import MAX_DENSE, Problem
from attnfit.problems.evaluation import Evaluation
from attnfit.solvers.curvature import Model, Strategy, dense_model
from attnfit.solvers.tracking import StopFit, Tracker

Array = NDArray[np.float64]

# Differences of the value below this share of it are rounding; the gradients at both ends then tell the
# decrease.
NOISE = 1e-13
MAX_REJECTIONS = 40
MAX_IDLE = 10
# A scaled gradient of this size relative to the residuals is zero but for rounding.
ROUNDING = 2e-15
# Off a saddle the first step is this share of x in scaled variables.
SADDLE_STEP = 0.1


@dataclass
class Descent:
    """Where a descent stands.

    Attributes
    ----------
    at : Evaluation
        The best point so far.
    goal_norm : float
        What gradients are compared with: the scaled norm at zero, or the largest seen.
    model : Model, optional
        The curvature last used.
    last_step : ndarray, optional
        The last accepted step, in the user's units.
    """

    at: Evaluation
    goal_norm: float
    status: str = "max_iter"
    n_iter: int = 0
    model: Model | None = None
    last_step: Array | None = None

    def relative(self, norm: float) -> float:
        """Return a scaled gradient norm relative to the goal norm."""
        return norm / self.goal_norm if self.goal_norm > 0 else 0.0


def reference_norm(at: Evaluation, scale: Array) -> float:
    """Return the scaled norm of the gradient at zero, or of the one at hand where zero is stationary."""
    here = float(np.linalg.norm(at.gradient / scale))
    if at.origin_gradient is None:
        return here
    origin = float(np.linalg.norm(at.origin_gradient / scale))
    return origin if origin > 1e-10 * here else here


def descend(
    problem: Problem,
    at: Evaluation,
    strategy: Strategy,
    scale: Array,
    tracker: Tracker,
    *,
    phase: str,
    tol: float,
    max_iter: int,
    trust_region: bool = True,
) -> Descent:
    """Minimise from an evaluated point, which holds what the strategy requests, in the variables
    ``scale * x``.

    With ``trust_region=False`` every model step is taken: for sampled curvature this is Algorithm 1 of "An
    Iterative Algorithm for Rescaled Hyperbolic Functions Regression" with its sign corrected and the low-rank
    part kept.
    """
    run = Descent(at, reference_norm(at, scale))
    radius, rejections, contraction = np.inf, 0, None
    fresh = True
    norm = least = float(np.linalg.norm(at.gradient / scale))
    idle = 0
    try:
        tracker.record(phase, 0, at.value, run.relative(norm))
        while True:
            rounding = ROUNDING * np.sqrt(2.0 * abs(run.at.value) * len(scale))
            # Where the gradient at zero is rounding itself, nothing can be small relative to it.
            if norm <= tol * run.goal_norm or max(norm, run.goal_norm) <= rounding:
                if not _at_saddle(problem, run, scale):
                    run.goal_norm = max(run.goal_norm, min(norm, rounding) / tol)
                    run.status = "converged"
                    return run
                fresh = False
                # A radius that proved too large at this saddle has been cut since.
                if rejections == 0:
                    radius = SADDLE_STEP * max(1.0, float(np.linalg.norm(scale * run.at.x)))
            if run.n_iter >= max_iter or rejections > MAX_REJECTIONS or idle > MAX_IDLE:
                run.status = "max_iter" if run.n_iter >= max_iter else "precision"
                return run
            if fresh:
                with tracker.timed("model"):
                    run.model = strategy.model(problem, run.at, scale, run.model)
                fresh = False
            assert run.model is not None
            with tracker.timed("step"):
                step = run.model.solve(run.at.gradient / scale, radius if trust_region else np.inf)
            size = float(np.linalg.norm(step.p))
            if size <= 1e-15 * float(np.linalg.norm(scale * run.at.x)) or not np.isfinite(size):
                run.status = "precision"
                return run
            with tracker.timed("evaluate"):
                trial = _attempt(problem, run.at, step.p / scale, strategy.request(contraction))
            run.n_iter += 1
            # A trial may overflow: it is rejected then, not reported.
            with np.errstate(over="ignore", invalid="ignore"):
                trial_norm = float(np.linalg.norm(trial.gradient / scale))
                agreement = _agreement(run.at, trial, step.p / scale, step.predicted)
            accepted = agreement > 1e-4 or (not trust_region and np.isfinite(trial.value))
            at_start = (problem.zero_is_stationary or run.goal_norm == 0.0) and accepted
            run.goal_norm = max(run.goal_norm, trial_norm) if at_start else run.goal_norm
            tried, radius = radius, _next_radius(radius, size, agreement, accepted, step.bounded)
            if accepted:
                # A step that the radius cut short says nothing about the model.
                contraction = None if step.bounded or norm == 0.0 else trial_norm / norm
                run.at, run.last_step, fresh, norm = trial, step.p / scale, True, trial_norm
            rejections = 0 if accepted else rejections + 1
            # Steps among rounding errors: they promise nothing, and the gradient becomes no smaller.
            hopeless = step.predicted <= NOISE * abs(run.at.value) and trial_norm >= least
            idle, least = idle + 1 if hopeless else 0, min(least, trial_norm)
            tracker.record(
                phase,
                run.n_iter,
                trial.value,
                run.relative(trial_norm),
                step_norm=size,
                radius=tried,
                accepted=accepted,
            )
    except (KeyboardInterrupt, StopFit):
        run.status = "interrupted"
        return run


def _attempt(problem: Problem, at: Evaluation, step: Array, request: dict[str, Any]) -> Evaluation:
    """Evaluate a step ahead; a point beyond the range of float64 has an infinite value, and is rejected."""
    try:
        return problem.evaluate(at.x + step, at, **request)
    except OverflowError:
        return replace(at, value=np.inf)


def _at_saddle(problem: Problem, run: Descent, scale: Array) -> bool:
    """Whether a point without gradient has negative curvature; asks for a read only if the last model, or
    none, suggests it.
    """
    if len(scale) > MAX_DENSE or problem.best_hessian == "matrix_free":
        return False
    if not (run.model is None or run.model.negative):
        return False
    run.model = dense_model(problem.hessian_at(run.at), scale)
    return run.model.negative


def _next_radius(radius: float, size: float, agreement: float, accepted: bool, bounded: bool) -> float:
    """Return the radius after a step of this size."""
    if not accepted or agreement < 0.25:
        return 0.25 * size
    return 2.0 * size if agreement > 0.75 and bounded else radius


def _agreement(at: Evaluation, trial: Evaluation, p: Array, predicted: float) -> float:
    """Return actual over predicted decrease."""
    if not np.isfinite(trial.value) or predicted <= 0.0:
        return -1.0
    actual = at.value - trial.value
    if not np.isfinite(actual):
        return -1.0
    if abs(actual) <= NOISE * abs(at.value) or predicted <= NOISE * abs(at.value):
        actual = -0.5 * float((at.gradient + trial.gradient) @ p)
    return actual / predicted

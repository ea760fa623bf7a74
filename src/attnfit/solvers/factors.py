"""Levenberg-Marquardt by conjugate gradients for two factors that enter one product, as in a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.objective import Evaluation, Offer
from attnfit.solvers.loop import Descent, Outcome, Solver, StopFit, Tracker
from attnfit.solvers.verdicts import ACCEPTED_FLOOR, STAY, Status, Verdict, assess

Array = NDArray[np.float64]

# A value below this share of the one at zero is that of an exact fit: residuals of 1e-11 of the logarithms.
EXACT = 1e-22
# Two starts that end this close, relatively, are in one minimum.
SAME = 1e-3
# Steps from each start before the best goes on; where unknowns are few, starts are followed until they tell
# the minima apart: their values then differ by 1e4 and more.
STEPS, STEPS_FEW = 5, 25
# Damping at first, as a share of the curvature, and its least; of the first factor a share of it, since it is
# solved for again.
DAMPING, LEAST_DAMPING, OF_FIRST = 1e-1, 1e-12, 0.01
# The damping changes by 1 - (2 gain - 1)^3 within these factors, and by the last after a refused step; it
# does not fall at the first step after one, where the next would be refused again.
FELL, RAISED, REFUSED = 1.0 / 3.0, 4.0, 4.0
# Steps of conjugate gradients: at most, those that solve for the first factor again, and the residual at
# which they stop: while damping decides how far a step goes, more digits of it are worth nothing.
MOST_PRODUCTS, AGAIN, LOOSE = 250, 25, 1e-2
# Damping, at least, once changes of basis are solved for: before, conjugate gradients damped them.
DAMPING_FINE = 3e-4
# Residuals from which on products are formed in single precision.
SINGLE = 1e-4
# A fit that is refused so many steps in a row, which take the least damping to one, or gains less than a
# share of its value in as many, ends.
REJECTIONS, IDLE, IDLE_STEPS = 20, 1e-12, 5
# Up to so many unknowns starts are followed that far, and the exact Hessian, column by column, says whether
# the end is a minimum.
FEW = 600
# Values that differ by less than this share are equal but for rounding.
ROUNDING = 1e-12
TINY = float(np.finfo(np.float64).tiny)
DESCRIPTION = "Levenberg-Marquardt by conjugate gradients, first factor projected"


@dataclass(frozen=True)
class FactorLevenbergMarquardt(Solver):
    """Levenberg-Marquardt on both factors, the first of which is solved for again after each step.

    A joint Gauss-Newton step comes from conjugate gradients, preconditioned by the mean curvature of each
    factor; damping is a share of that curvature, small on the first factor. Solving for the first factor
    again makes most of what is gained: a plain joint step needs twice the passes for five times the error.
    Rotary heads have changes of basis that their maps hardly show: once a step runs out of products or is
    refused, these are a second level of the preconditioner, and steps follow them by their exponential.

    Parameters
    ----------
    n_starts : int, optional
        Random starts, 4 by default; each takes a few steps, and the best goes on.

    Notes
    -----
    In the manner of variable projection: Golub and Pereyra, "The differentiation of pseudo-inverses and
    nonlinear least squares problems whose variables separate" (1973). Damping: Nielsen, "Damping parameter in
    Marquardt's method" (1999): a rule without thresholds, as thresholds made it swing between steps refused
    and steps too short (1.6 times the passes to the same value on a real head). Two levels, added: Tang,
    Nabben, Vuik and Erlangga, "Comparison of two-level preconditioners derived from deflation, domain
    decomposition and multigrid methods" (2009).
    """

    n_starts: int | None = None

    def __post_init__(self) -> None:
        n = self.n_starts
        if n is not None and (isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1):
            raise ValueError(f"n_starts must be an integer >= 1, not {n!r}")

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
            If the problem has no two factors.
        """
        # Of outputs an exact fit needs a count of equations, which their own solver makes.
        if Offer.FACTORS not in problem.offers or Offer.PROJECTION in problem.offers:
            raise ValueError(
                f"FactorLevenbergMarquardt takes Attention with rotary, softcap, sink or qk_norm, not "
                f"{type(problem).__name__}; leave solver out"
            )
        points = {"x0": x0} if x0 is not None else problem.starts(rng)
        while x0 is None and len(points) < (self.n_starts or 0):
            points[f"random {len(points) + 1}"] = problem.initial_point(rng).reshape(-1)
        if self.n_starts is not None:
            points = dict(list(points.items())[: self.n_starts])
        fit = Fit(problem, tracker, tol, problem.value_at_zero())
        ends: dict[str, Point] = {}
        first = (STEPS_FEW if problem.n_unknowns <= FEW else STEPS) if len(points) > 1 else 0
        try:
            for name, x in points.items():
                ends[name] = fit.begin(x)
                fit.descend(ends[name], min(first, max_iter), name)
                if fit.is_exact(ends[name].at):
                    # No other minimum can be lower.
                    break
            best = min(ends, key=lambda name: ends[name].at.value)
            fit.descend(ends[best], max_iter, best)
        except (KeyboardInterrupt, StopFit):
            best = min(ends, key=lambda name: ends[name].at.value)
            ends[best].status = Status.INTERRUPTED
        point = ends[best]
        run = Descent(point.at, fit.reference)
        run.verdict = fit.verdict(point)
        run.status, run.n_iter = run.verdict.status, point.n_iter
        values = {name: ends[name].at.value for name in sorted(ends, key=lambda name: ends[name].at.value)}
        message = (
            ""
            if point.status is Status.INTERRUPTED
            else fit.message(run.verdict, point.at, list(values.values()), max_iter)
        )
        n_iter = sum(end.n_iter for end in ends.values())
        return Outcome(run, values, n_iter, DESCRIPTION, message, n_starts=len(ends))


@dataclass
class Point:
    """Where a descent from one start stands."""

    at: Evaluation
    damping: float = DAMPING
    n_iter: int = 0
    n_rejected: int = 0
    n_idle: int = 0
    move: float = float("nan")
    status: Status = Status.MAX_ITER
    # Whether the preconditioner solves for changes of basis, and what a step from here is made of.
    fine: bool = False
    model: Any = None


class Fit:
    """Descents of one problem.

    Parameters
    ----------
    exact : float, optional
        Value at which nothing but rounding is left of the loss.
    """

    def __init__(
        self, problem: Any, tracker: Tracker, tol: float, at_zero: float, exact: float | None = None
    ) -> None:
        self.problem, self.tracker, self.tol = problem, tracker, tol
        self.at_zero = max(at_zero, TINY)
        self.exact = EXACT * self.at_zero if exact is None else exact
        self.first = problem.first_factor
        # The gradient where the first descent begins: others are told relative to it.
        self.reference: Array = np.zeros(0)

    def begin(self, x: Array) -> Point:
        """Return a descent that begins here."""
        with self.tracker.timed("evaluate"):
            at = self.problem.evaluate(x)
        if not len(self.reference):
            self.reference = at.gradient
        return Point(at)

    def descend(self, point: Point, steps: int, name: str) -> None:
        """Take so many steps in all, unless there is an end before."""
        while point.n_iter < steps and point.status is Status.MAX_ITER:
            self._step(point, name)

    def _step(self, point: Point, name: str) -> None:
        problem, tracker, at = self.problem, self.tracker, point.at
        point.n_iter += 1
        # Six digits are enough for residuals that are left larger, but not to show a minimum.
        single = at.value >= SINGLE**2 * self.at_zero and problem.n_unknowns > FEW
        with tracker.timed("model"):
            if point.model is None:
                metric = problem.metric(at, fine=point.fine)
                point.model = metric, problem.gauss_newton_operator(at, single=single)
            metric, product = point.model
        lam = point.damping

        def damped(v: Array) -> Array:
            return np.asarray(product(v) + metric.damped(v, OF_FIRST * lam, lam))

        with tracker.timed("step"):
            most = min(MOST_PRODUCTS, problem.n_unknowns)
            precondition = metric.preconditioner(OF_FIRST * lam, lam)
            p, predicted, was_cut = solve(damped, precondition, at.gradient, LOOSE, most)
        with tracker.timed("evaluate"):
            trial = problem.evaluate(problem.followed(at.x, p))
        if np.isfinite(trial.value):
            again = self._again(trial, metric, single)
            trial = again if again.value < trial.value else trial
        # What a step is worth shows only after the first factor has followed.
        gain = (at.value - trial.value) / predicted if predicted > 0 and np.isfinite(trial.value) else -1.0
        point.move = float(problem.moves(at, p[:, None]).largest[0])
        accepted = bool(trial.value < at.value)
        if point.move <= STAY:
            # The value no longer tells which point is better.
            accepted = bool(trial.value <= at.value * (1.0 + ROUNDING))
        change = min(max(1.0 - (2.0 * gain - 1.0) ** 3, 1.0 if point.n_rejected else FELL), RAISED)
        point.damping = max(lam * (change if accepted else REFUSED), LEAST_DAMPING)
        if not point.fine and (was_cut or not accepted):
            point.fine, point.model, point.damping = True, None, max(point.damping, DAMPING_FINE)
        point.n_rejected = 0 if accepted else point.n_rejected + 1
        if accepted:
            gained = at.value - trial.value > IDLE * at.value
            point.n_idle = 0 if gained else point.n_idle + 1
            point.at, point.model = trial, None
        norm = Descent(point.at, self.reference).relative(point.at.gradient)
        size = float(np.linalg.norm(p))
        tracker.record(f"fit: {name}", point.n_iter, point.at.value, norm, step_norm=size, accepted=accepted)
        point.status = self._status(point, lam)

    def _again(self, at: Evaluation, metric: Any, single: bool) -> Evaluation:
        """Return the point with the first factor solved for again, preconditioned as the step to it."""
        problem, first = self.problem, self.first
        with self.tracker.timed("model"):
            product = problem.gauss_newton_operator(at, single=single)
        with self.tracker.timed("step"):
            p, *_ = solve(
                lambda v: np.where(first, product(v), 0.0),
                lambda v: np.where(first, metric.solve(v), 0.0),
                np.where(first, at.gradient, 0.0),
                0.0,
                AGAIN,
            )
        with self.tracker.timed("evaluate"):
            found: Evaluation = problem.evaluate(at.x + p)
        return found if np.isfinite(found.value) else at

    def is_exact(self, at: Evaluation) -> bool:
        """Whether nothing but rounding is left of the loss."""
        return at.value <= self.exact

    def _status(self, point: Point, damping: float) -> Status:
        """Return how a descent ends, `MAX_ITER` where it goes on."""
        # A step that damping cut short says nothing.
        if self.is_exact(point.at) or (point.move <= self.tol and damping <= OF_FIRST):
            return Status.CONVERGED
        if point.n_rejected >= REJECTIONS or point.n_idle >= IDLE_STEPS:
            return Status.CONVERGED if point.move <= ACCEPTED_FLOOR else Status.PRECISION
        return Status.MAX_ITER

    def verdict(self, point: Point) -> Verdict:
        """Return the verdict on the end of the best descent."""
        found = Verdict(point.status, move=point.move)
        if self.is_exact(point.at) or point.status is not Status.CONVERGED:
            return found
        if self.problem.n_unknowns > FEW:
            # Small damped steps alone do not show that this is a minimum.
            return Verdict(Status.PRECISION, move=point.move, undecided=True)
        return assess(self.problem, point.at, self.tol)

    def message(self, verdict: Verdict, at: Evaluation, values: list[float], max_iter: int) -> str:
        """Return the end in a sentence: how much is left, and whether starts agree."""
        left = f"{at.value / self.at_zero:.1e} of the loss at zero is left"
        moved = f"the next step moves a logit by {verdict.move:.1e}"
        if self.is_exact(at):
            said = f"exact fit: {left}"
        elif verdict.status is Status.CONVERGED:
            said = f"converged: {moved}; {left}"
        elif verdict.undecided:
            said = (
                f"the fit has come to rest: {moved}, {left}; with more than {FEW} unknowns it is not "
                "decided whether this is a minimum, judge it by maps that were held out"
            )
        elif verdict.status is Status.MAX_ITER:
            said = f"not converged after max_iter={max_iter} steps: {moved}, {left}; raise max_iter"
        else:
            said = f"no further step succeeds: {moved}, {left}"
        if len(values) < 2:
            return said
        if values[1] <= values[0] * (1.0 + SAME):
            return f"{said}; the two best of {len(values)} starts end alike"
        return (
            f"{said}; the best of {len(values)} starts, of which the next stood at "
            f"{values[1] / self.at_zero:.1e}: others exist"
        )


def solve(
    product: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    gradient: Array,
    residual: float,
    most: int,
) -> tuple[Array, float, bool]:
    """Return p with ``H p = -gradient`` by preconditioned conjugate gradients, the fall it promises, and
    whether the number of products ended it.
    """
    p, r = np.zeros_like(gradient), -gradient
    z = precondition(r)
    d, rz = z, float(r @ z)
    goal = residual**2 * rz
    for _ in range(most):
        if not rz > max(goal, TINY):
            break
        Hd = product(d)
        curvature = float(d @ Hd)
        if not curvature > 0.0:
            break
        step = rz / curvature
        p = p + step * d
        r = r - step * Hd
        z = precondition(r)
        before, rz = rz, float(r @ z)
        d = z + (rz / before) * d
    # With r the residual, H p = -gradient - r.
    return p, float(-0.5 * p @ (gradient - r)), bool(rz > max(goal, TINY))

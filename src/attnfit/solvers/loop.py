"""One descent: evaluate, model the curvature, take the trust-region step, judge, record. What a solver is,
what it returns, and the clock and history of a running fit.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.moves import Probe
from attnfit.objectives.objective import Evaluation, Problem
from attnfit.solvers.curvature import Model, Strategy
from attnfit.solvers.result import History, Record
from attnfit.solvers.subproblem import Step, length
from attnfit.solvers.verdicts import STAY, Judge, Next, Status, Verdict

Callback = Callable[[Record], Any]
# Differences of the value below this share of it are rounding; the gradients at both ends then tell the
# decrease.
NOISE = 1e-13
MAX_REJECTIONS = 40
# The move of the first step off a saddle.
SADDLE_STEP = 0.1
# Without a radius yet no step moves a logit further than this: beyond, an exponential is another one.
FIRST_MOVE = 4.0
# A step that the model predicted worse than this tells that its curvature does not serve.
POOR = 0.25
# Ends whose logits differ by more than this are different minima.
DISTINCT = 1e-3
# Ends that are on their way.
UNFINISHED = (Status.MAX_ITER, Status.PRECISION)
TINY = float(np.finfo(np.float64).tiny)
Array = NDArray[np.float64]


class StopFit(Exception):
    """Raised by a callback to end the fit: the best point so far is returned with status "interrupted"."""


class Interrupted(Exception):
    """Carries the best point out of the search for a start."""

    def __init__(self, x: Any) -> None:
        super().__init__("interrupted while searching for a start")
        self.x = x


class Tracker:
    """Record what happens; tell the callback.

    Parameters
    ----------
    n_passes : callable
        Reads of the data so far.
    callback : callable, optional
        Called with each record. A true return value ends the fit.
    clock : callable
        The time in seconds.
    keep_points : bool
        Whether the history keeps the points that a solver records.
    """

    def __init__(
        self,
        n_passes: Callable[[], float],
        callback: Callback | None = None,
        clock: Callable[[], float] = time.perf_counter,
        *,
        keep_points: bool = False,
    ) -> None:
        self.n_passes = n_passes
        self.keep_points = keep_points
        self.history = History()
        self.clock = clock
        self.began = clock()
        self._callback = callback
        self._seconds = {"model": 0.0, "step": 0.0, "evaluate": 0.0}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time spent inside to one part of the next record."""
        began = self.clock()
        try:
            yield
        finally:
            self._seconds[part] += self.clock() - began

    def record(
        self,
        phase: str,
        iteration: int,
        value: float,
        gradient_norm: float,
        *,
        step_norm: float = 0.0,
        radius: float = float("inf"),
        accepted: bool = True,
        x: Array | None = None,
    ) -> None:
        """Append a record; x is the point evaluated, flat, of a solver that `Solver.records_points`.

        Raises
        ------
        StopFit
            If the callback asks for it.
        """
        # In the order of the record's fields.
        seconds = tuple(self._seconds.values())
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        record = Record(
            phase, iteration, value, gradient_norm, step_norm, radius, accepted, self.n_passes(), *seconds
        )
        self.history.append(record, x if self.keep_points else None)
        if self._callback is not None and self._callback(record):
            raise StopFit


@dataclass
class Descent:
    """Where a descent stands.

    Attributes
    ----------
    at : Evaluation
        The best point so far.
    reference : ndarray, shape (d,)
        The gradient that others are compared with in reports: at zero, or where the descent began.
    status : Status
    n_iter : int
    model : Model, optional
        The curvature last used.
    verdict : Verdict, optional
        None where the solver has no judge: `minimize` then asks for it.
    radius : float
        Of the trust region, in the variables of the model.
    n_rejected : int
        Steps rejected since the last one that was taken.
    contraction : float or None
        Ratio of gradient norms of the last step, where that says something about the model.
    last_step : ndarray or None
    learn : bool
        Whether the last step was long enough for its gradient difference to be more than rounding.
    """

    at: Evaluation
    reference: Array
    status: str = Status.MAX_ITER
    n_iter: int = 0
    model: Model | None = None
    verdict: Verdict | None = None
    radius: float = np.inf
    n_rejected: int = 0
    contraction: float | None = None
    last_step: Array | None = None
    learn: bool = True

    @classmethod
    def begin(cls, at: Evaluation) -> Descent:
        """Return a descent that begins here."""
        zero = at.gradient_at_zero
        usable = zero is not None and np.linalg.norm(zero) > 1e-10 * np.linalg.norm(at.gradient)
        return cls(at, zero if usable and zero is not None else at.gradient)

    def relative(self, gradient: Array) -> float:
        """Return the size of a gradient relative to the reference, in the variables of the last model."""
        scale = 1.0 if self.model is None else self.model.scale
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            size, goal = length(gradient / scale), length(self.reference / scale)
            return size / goal if goal > 0.0 else 0.0

    def remodel(self, problem: Problem, strategy: Strategy, tracker: Tracker) -> Model:
        """Model the curvature where the descent stands; the radius stays the same in the new variables."""
        before = self.model
        with tracker.timed("model"):
            model = self.model = strategy.model(problem, self.at, before, learn=self.learn)
        if before is not None and self.last_step is not None and np.isfinite(self.radius):
            self.radius *= model.norm(self.last_step) / max(before.norm(self.last_step), TINY)
        return model

    def propose(self, judge: Judge, model: Model, *, trust_region: bool) -> tuple[Step, float]:
        """Return the next step and its move on the rows at hand."""
        step = judge.step(self.at, model, self.radius if trust_region else np.inf)
        move = judge.guess(self.at, model, step.p)
        if trust_region and np.isinf(self.radius) and move > FIRST_MOVE:
            self.radius = step.size * FIRST_MOVE / move
            step = judge.step(self.at, model, self.radius)
            move = judge.guess(self.at, model, step.p)
        return step, move

    def off_saddle(self, judge: Judge, model: Model) -> Step:
        """Return a step along negative curvature that moves a logit by a tenth."""
        unit = model.solve(self.at.gradient, 1.0)
        self.radius = SADDLE_STEP / max(judge.guess(self.at, model, unit.p), TINY)
        return model.solve(self.at.gradient, self.radius)

    def weigh(self, trial: Evaluation, model: Model, step: Step, move: float, *, trust_region: bool) -> bool:
        """Take a step if it keeps its promise, and learn from it; return whether it was taken."""
        agreement, noise = -1.0, NOISE * abs(self.at.value)
        # A trial may overflow: it is rejected then, not reported.
        with np.errstate(over="ignore", invalid="ignore"):
            actual = self.at.value - trial.value
            if np.isfinite(trial.value) and np.isfinite(actual) and not step.predicted <= 0.0:
                if abs(actual) <= noise or step.predicted <= noise:
                    actual = -0.5 * float((self.at.gradient + trial.gradient) @ step.p)
                agreement = actual / step.predicted
        anyway = not trust_region or (move <= STAY and not step.bounded)
        accepted = agreement > 1e-4 or (anyway and bool(np.isfinite(trial.value)))
        if not accepted or agreement < POOR:
            self.radius = 0.25 * step.size
        elif agreement > 0.75 and step.bounded:
            self.radius = 2.0 * step.size
        self.n_rejected = 0 if accepted else self.n_rejected + 1
        if accepted:
            # A step that the radius cut short says nothing about the model, unless it was a poor one.
            norm = model.dual_norm(self.at.gradient)
            self.contraction = model.dual_norm(trial.gradient) / norm if norm > 0.0 else None
            self.contraction = self.contraction if not step.bounded else None
            self.at, self.last_step, self.learn = trial, step.p, move > STAY
        if agreement < POOR and not (accepted and move <= STAY):
            self.contraction = 1.0
        return accepted


def descend(
    problem: Problem,
    at: Evaluation,
    strategy: Strategy,
    judge: Judge,
    tracker: Tracker,
    *,
    phase: str,
    max_iter: int,
    trust_region: bool = True,
) -> Descent:
    """Minimise from an evaluated point, which holds what the strategy requests.

    Model the curvature, solve for the step, judge, evaluate, weigh, record. With ``trust_region=False`` every
    model step is taken: for sampled curvature this is Algorithm 1 of "An Iterative Algorithm for Rescaled
    Hyperbolic Functions Regression" with its sign corrected and the low-rank part kept.
    """
    run = Descent.begin(at)
    modelled_at: Array | None = None
    try:
        model = run.remodel(problem, strategy, tracker)
        tracker.record(phase, 0, at.value, run.relative(at.gradient), x=at.x)
        while True:
            with tracker.timed("step"):
                step, move = run.propose(judge, model, trust_region=trust_region)
            if not np.isfinite(step.size):
                run.status = Status.PRECISION
                break
            with tracker.timed("model"):
                found = judge.look(run.at, model, step, move)
            if isinstance(found, Status):
                run.status = found
                break
            if found is Next.CURVATURE_HERE:
                strategy.request(None, exact=True)
                model = run.remodel(problem, strategy, tracker)
                if model.exact_at is not run.at.x or modelled_at is run.at.x:
                    # Numbers that are not finite can be judged by no curvature.
                    run.status = Status.PRECISION
                    break
                modelled_at = run.at.x
                continue
            shorten = found is Next.SHORTEN
            if found is Next.LEAVE_SADDLE and run.n_rejected == 0:
                step = run.off_saddle(judge, model)
            if not shorten and (run.n_iter >= max_iter or run.n_rejected > MAX_REJECTIONS):
                ended = Status.MAX_ITER if run.n_iter >= max_iter else Status.PRECISION
                run.status = Status.SADDLE if found is Next.LEAVE_SADDLE else ended
                break
            exact = shorten or found is Next.STEP_FOR_CURVATURE
            request = strategy.request(None if shorten else run.contraction, exact=exact)
            x = judge.shorter if shorten else run.at.x + step.p
            with tracker.timed("evaluate"):
                try:
                    trial = problem.evaluate(x, run.at, **request)
                except OverflowError:
                    # Beyond the range of float64: a value that is rejected.
                    trial = replace(run.at, value=np.inf)
            if shorten:
                # The same logits but for rounding.
                if np.isfinite(trial.value):
                    run.at, run.last_step, phase = trial, None, "least norm"
                    model = run.remodel(problem, strategy, tracker)
                    tracker.record(phase, run.n_iter, trial.value, run.relative(trial.gradient), x=trial.x)
                continue
            run.n_iter += 1
            radius = run.radius
            accepted = run.weigh(trial, model, step, move, trust_region=trust_region)
            tracker.record(
                phase,
                run.n_iter,
                trial.value,
                run.relative(trial.gradient),
                step_norm=step.size,
                radius=radius,
                accepted=accepted,
                x=trial.x,
            )
            if accepted:
                model = run.remodel(problem, strategy, tracker)
    except (KeyboardInterrupt, StopFit):
        run.status = Status.INTERRUPTED
    run.verdict = replace(judge.verdict, status=Status(run.status))
    return run


def distance(problem: Problem, one: Evaluation, other: Evaluation, probe: Probe | None = None) -> float:
    """Return by how much a fitted logit differs between two points at most; where there are no logits, the
    points' own distance, relative to their size.
    """
    step = (one.x - other.x)[:, None]
    moved = probe.moves(one, step) if probe is not None and probe.exact else problem.moves(one, step)
    if moved is not None:
        return float(moved.largest[0])
    return float(np.linalg.norm(step) / max(np.linalg.norm(one.x), np.finfo(float).tiny))


@dataclass(frozen=True)
class Outcome:
    """What a solver hands to `minimize`; ``message`` replaces the usual one, ``column_status`` is one a
    right-hand side.

    ``local_values`` lists distinct minima that were accepted, ``n_starts`` counts the descents. ``absorbed``
    is the end of a fit with absorbed effects, ``sampling`` what a published run drew.
    """

    best: Descent
    local_values: dict[str, float]
    n_iter: int
    description: str
    message: str = ""
    column_status: NDArray[Any] | None = None
    n_starts: int = 1
    absorbed: Any = None
    sampling: Any = None

    @classmethod
    def of(
        cls, problem: Problem, ends: dict[str, Descent], description: str, probe: Probe | None = None
    ) -> Outcome:
        """Choose the lowest end; of ends that differ by rounding, one that is accepted."""
        values = {}
        for name, end in ends.items():
            values[name] = end.at.value
        ranked = sorted(values, key=values.__getitem__)
        best, accepted, local_values = ends[ranked[0]], list[Descent](), {}
        for name in ranked:
            end = ends[name]
            if end.status != Status.CONVERGED:
                continue
            for other in accepted:
                if distance(problem, end.at, other.at, probe) <= DISTINCT:
                    break
            else:
                accepted.append(end)
                local_values[name] = end.at.value
        if best.status in UNFINISHED and accepted:
            lowest = accepted[0]
            if lowest.at.value - best.at.value <= 1e-9 * abs(best.at.value):
                best = lowest
        return cls(best, local_values, best.n_iter, description, n_starts=len(ends))


class Solver(ABC):
    """What `minimize` asks of a solver; `attnfit.solvers.check_solver` tests one.

    Attributes
    ----------
    records_points : bool
        Whether ``run`` records its points, as ``x`` of ``tracker.record``: ``history="points"`` is refused
        otherwise.
    """

    records_points: ClassVar[bool] = False

    @abstractmethod
    def run(
        self,
        problem: Problem,
        start: Any,
        x0: Array | None,
        tol: float,
        max_iter: int,
        tracker: Tracker,
        rng: np.random.Generator,
    ) -> Outcome:
        """Minimise a problem.

        Parameters
        ----------
        problem : Problem
            In its better variables; points are flat, shape (n_unknowns,).
        start : Start
            Samples of the rows, and ``start.points(tracker, rng)``: points to begin from, by name.
        x0 : ndarray or None
            Begin here only.
        tol, max_iter
            As in `attnfit.minimize`.
        tracker : Tracker
            Hears of every evaluation by ``record``, which raises `StopFit` where the callback ends the fit.
            Of its points by ``record(..., x=x)``, if they are recorded.
        rng : numpy.random.Generator
            The only source of random numbers.

        Returns
        -------
        Outcome
            An end without a verdict is judged by `minimize`, in two passes.
        """

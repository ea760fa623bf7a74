"""Clock, reads and history of a running fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.objective import Evaluation, Problem
from attnfit.solvers.curvature import Model, Strategy
from attnfit.solvers.result import History, Record
from attnfit.solvers.subproblem import Step
from attnfit.solvers.verdicts import STAY, Judge, Next, Status, Verdict

Callback = Callable[[Record], Any]


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
    """

    def __init__(
        self,
        n_passes: Callable[[], float],
        callback: Callback | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.n_passes = n_passes
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
    ) -> None:
        """Append a record.

        Raises
        ------
        StopFit
            If the callback asks for it.
        """
        seconds = {f"seconds_{part}": value for part, value in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        record = Record(
            phase, iteration, value, gradient_norm, step_norm, radius, accepted, self.n_passes(), **seconds
        )
        self.history.append(record)
        if self._callback is not None and self._callback(record):
            raise StopFit

    def seconds(self) -> float:
        """Return the time since the fit began."""
        return self.clock() - self.began


Array = NDArray[np.float64]

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
TINY = float(np.finfo(np.float64).tiny)


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
    """

    at: Evaluation
    reference: Array
    status: str = Status.MAX_ITER
    n_iter: int = 0
    model: Model | None = None
    verdict: Verdict | None = None

    @classmethod
    def begin(cls, at: Evaluation) -> Descent:
        """Return a descent that begins here."""
        here = at.gradient
        if at.gradient_at_zero is None or not np.linalg.norm(at.gradient_at_zero) > 1e-10 * np.linalg.norm(
            here
        ):
            return cls(at, here)
        return cls(at, at.gradient_at_zero)

    def relative(self, gradient: Array) -> float:
        """Return the size of a gradient relative to the reference, in the variables of the last model."""
        scale = 1.0 if self.model is None else self.model.scale
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            size, goal = np.linalg.norm(gradient / scale), np.linalg.norm(self.reference / scale)
            return float(size / goal) if goal > 0.0 else 0.0


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

    With ``trust_region=False`` every model step is taken: for sampled curvature this is Algorithm 1 of "An
    Iterative Algorithm for Rescaled Hyperbolic Functions Regression" with its sign corrected and the low-rank
    part kept.
    """
    run = Descent.begin(at)
    path = _Path(problem, run, strategy, judge, tracker, phase, trust_region)
    try:
        run.status = path.follow(max_iter)
    except (KeyboardInterrupt, StopFit):
        run.status = Status.INTERRUPTED
    run.verdict = replace(judge.verdict, status=Status(run.status))
    return run


@dataclass
class _Path:
    """A descent under way: the radius, and what the last steps taught."""

    problem: Problem
    run: Descent
    strategy: Strategy
    judge: Judge
    tracker: Tracker
    phase: str
    trust_region: bool
    radius: float = np.inf
    rejections: int = 0
    contraction: float | None = None
    last_step: Array | None = None
    learn: bool = True
    _looked_at: Array | None = None

    def follow(self, max_iter: int) -> Status:
        """Descend to an end."""
        run, judge = self.run, self.judge
        self._model()
        self._record(run.at, 0)
        while True:
            model = run.model
            assert model is not None
            with self.tracker.timed("step"):
                step, move = self._step(model)
            if not np.isfinite(step.size):
                return Status.PRECISION
            with self.tracker.timed("model"):
                found = judge.look(run.at, model, step, move)
            if isinstance(found, Status):
                return found
            if found is Next.CURVATURE_HERE:
                self.strategy.request(None, exact=True)
                self._model()
                if run.model is None or run.model.exact_at is not run.at.x or self._looked_at is run.at.x:
                    # Numbers that are not finite can be judged by no curvature.
                    return Status.PRECISION
                self._looked_at = run.at.x
                continue
            if found is Next.SHORTEN:
                self._shorten()
                continue
            if found is Next.LEAVE_SADDLE and self.rejections == 0:
                step = self._off_saddle(model)
            if run.n_iter >= max_iter or self.rejections > MAX_REJECTIONS:
                if found is Next.LEAVE_SADDLE:
                    return Status.SADDLE
                return Status.MAX_ITER if run.n_iter >= max_iter else Status.PRECISION
            self._try(model, step, move, exact=found is Next.STEP_FOR_CURVATURE)

    def _model(self) -> None:
        """Model the curvature where the descent stands; the radius stays the same in the new variables."""
        run, before = self.run, self.run.model
        with self.tracker.timed("model"):
            run.model = self.strategy.model(self.problem, run.at, before, learn=self.learn)
        if before is not None and self.last_step is not None and np.isfinite(self.radius):
            self.radius *= run.model.norm(self.last_step) / max(before.norm(self.last_step), TINY)

    def _step(self, model: Model) -> tuple[Step, float]:
        """Return the next step and its move on the rows at hand."""
        run, judge = self.run, self.judge
        step = judge.step(run.at, model, self.radius if self.trust_region else np.inf)
        move = judge.guess(run.at, model, step.p)
        if self.trust_region and np.isinf(self.radius) and move > FIRST_MOVE:
            self.radius = step.size * FIRST_MOVE / move
            step = judge.step(run.at, model, self.radius)
            move = judge.guess(run.at, model, step.p)
        return step, move

    def _off_saddle(self, model: Model) -> Step:
        """Return a step along negative curvature that moves a logit by a tenth."""
        run = self.run
        unit = model.solve(run.at.gradient, 1.0)
        self.radius = SADDLE_STEP / max(self.judge.guess(run.at, model, unit.p), TINY)
        return model.solve(run.at.gradient, self.radius)

    def _shorten(self) -> None:
        """Go to the point of least norm: it has the same logits but for rounding."""
        run = self.run
        with self.tracker.timed("evaluate"):
            shorter = _attempt(
                self.problem, run.at, self.judge.shorter, self.strategy.request(None, exact=True)
            )
        if np.isfinite(shorter.value):
            run.at, self.last_step = shorter, None
            self.phase = "least norm"
            self._model()
            self._record(run.at, run.n_iter)

    def _try(self, model: Model, step: Step, move: float, *, exact: bool) -> None:
        """Evaluate a step, and take it if it keeps its promise."""
        run = self.run
        request = self.strategy.request(self.contraction, exact=exact)
        with self.tracker.timed("evaluate"):
            trial = _attempt(self.problem, run.at, run.at.x + step.p, request)
        run.n_iter += 1
        # A trial may overflow: it is rejected then, not reported.
        with np.errstate(over="ignore", invalid="ignore"):
            agreement = _agreement(run.at, trial, step.p, step.predicted)
        anyway = not self.trust_region or (move <= STAY and not step.bounded)
        accepted = agreement > 1e-4 or (anyway and bool(np.isfinite(trial.value)))
        tried, norm = self.radius, model.dual_norm(run.at.gradient)
        self.radius = _next_radius(self.radius, step.size, agreement, accepted, step.bounded)
        self.rejections = 0 if accepted else self.rejections + 1
        if accepted:
            # A step that the radius cut short says nothing about the model, unless it was a poor one.
            self.contraction = model.dual_norm(trial.gradient) / norm if norm > 0.0 else None
            self.contraction = self.contraction if not step.bounded else None
            run.at, self.last_step, self.learn = trial, step.p, move > STAY
        if agreement < POOR and not (accepted and move <= STAY):
            self.contraction = 1.0
        self._record(trial, run.n_iter, step_norm=step.size, radius=tried, accepted=accepted)
        if accepted:
            self._model()

    def _record(self, at: Evaluation, iteration: int, **step: Any) -> None:
        relative = self.run.relative(at.gradient)
        self.tracker.record(self.phase, iteration, at.value, relative, **step)


def _attempt(problem: Problem, at: Evaluation, x: Array, request: dict[str, Any]) -> Evaluation:
    """Evaluate a point; one beyond the range of float64 has an infinite value, and is rejected."""
    try:
        return problem.evaluate(x, at, **request)
    except OverflowError:
        return replace(at, value=np.inf)


def _next_radius(radius: float, size: float, agreement: float, accepted: bool, bounded: bool) -> float:
    """Return the radius after a step of this size."""
    if not accepted or agreement < POOR:
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

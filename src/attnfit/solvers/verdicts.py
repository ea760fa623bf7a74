"""The verdict on a fit: when an answer is one, and what is said where it is not.

`tol` is the largest change of a fitted logit (see `attnfit.objectives.moves`) that the next Newton step
may still make. A point is accepted if the step is a full one with the curvature of all the data, formed at
most a quarter of a logit away, if that curvature has no negative direction and none that is flat although
the data see it, and if the step, measured on every row, moves no logit by more. With such a curvature the
next step moves logits by about the square: Bach, "Self-concordant analysis for logistic regression" (2010),
doi:10.1214/09-EJS521.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum, auto
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.objective import MAX_DENSE, Evaluation, Problem
from attnfit.solvers.curvature import MatrixFree, Model, dense_model, natural_scale
from attnfit.solvers.subproblem import Step

if TYPE_CHECKING:
    from attnfit.solvers.evidence import Evidence
    from attnfit.solvers.separation import Separation

Array = NDArray[np.float64]

# A logit that may still change by more than this is not known.
MAX_TOL = 1e-2
# How far, in logits, the curvature may have been formed from the point that it accepts.
TRUSTED = 0.25
# From this move on the curvature of all the data is asked for: it needs one or two steps more.
ASK = 1e-3
# A step this small is not worth taking for the sake of the curvature that comes with it.
STAY = 1e-7
# Steps of a trusted model that stop shrinking below this move are at the rounding of the data, which is
# accepted up to the second: of 23 such ends among 2,002 problems the true step was up to 3 times as long, and
# 50 times at 7e-7.
FLOOR, ACCEPTED_FLOOR = 1e-4, 2e-7
# A direction with less curvature than this share of the largest is tried out: the gradients at two points so
# far apart, in logits, must differ by what the Hessian says, up to an error in the step of less than the
# last. Of 1,853 accepted ends 181 are weak; one of these was wrong by more than 2e-7, by 8e-6: it is refused
# with an error of 3e-5 by this measure, of which none of the others has more than 3e-6.
WEAK, NUDGE, NOISE = 1e-12, 1e-4, 5e-6
# The rounding of the value, taken for that of the slope along a step, must not be worth more, in logits. Of
# 3,700 accepted ends two are refused, of which one was wrong by 9e-6.
COARSE = 1e-5
# A fit that keeps its stride, in logits and as a share of the step before, may have no minimum.
STRIDE, KEPT_STRIDE = 0.1, 0.7
# A step that promises to lower the loss by less than this share of it promises nothing.
IDLE = 1e-12
# An output below this share of the largest of its group may be on its way to zero.
VANISHED = 1e-12
# Evaluations before the first look for a direction without a minimum, and between two looks; their number.
FIRST_LOOK, NEXT_LOOK, MAX_LOOKS = 6, 10, 5


class Status(StrEnum):
    """How a fit ended; ``converged`` is the only good end."""

    CONVERGED = "converged"
    SEPARABLE = "separable"
    NO_MINIMUM = "no_minimum"
    FLAT = "flat"
    SADDLE = "saddle"
    PRECISION = "precision"
    MAX_ITER = "max_iter"
    OVERFLOW = "overflow"
    INTERRUPTED = "interrupted"
    FALSE_OPTIMUM = "false_optimum"
    INDEFINITE = "indefinite"

    def __repr__(self) -> str:
        return repr(str(self))


class Next(Enum):
    """What a descent does next, where it is not at its end."""

    STEP = auto()
    # Take the step, and have the curvature of all the data brought along.
    STEP_FOR_CURVATURE = auto()
    # Form the curvature of all the data here.
    CURVATURE_HERE = auto()
    LEAVE_SADDLE = auto()
    # Go to the point of least norm that differs along directions which no row sees.
    SHORTEN = auto()


@dataclass(frozen=True)
class Verdict:
    """What is known of the end of a fit.

    Attributes
    ----------
    status : Status
    move : float
        The largest change of a logit that the next Newton step would make; NaN where it is not known.
    decrement : float
        ``g^T H^-1 g``: twice the fall of the loss that this step promises.
    flat : ndarray, shape (d, k), optional
        Orthonormal directions without curvature; None where the solver keeps no matrix.
    separation : Separation, optional
    at_floor : bool
        Whether the steps are at the rounding of the data.
    sampled : bool
        Whether the curvature is that of a sample, for which there is evidence.
    undecided : bool
        Whether an output has all but vanished, and nobody knows whether a finite minimum exists.
    """

    status: Status = Status.MAX_ITER
    move: float = float("nan")
    decrement: float = float("nan")
    flat: Array | None = None
    separation: Separation | None = None
    at_floor: bool = False
    sampled: bool = False
    undecided: bool = False


@dataclass(eq=False, repr=False)
class Judge:
    """Looks at every step of a descent.

    Parameters
    ----------
    problem : Problem
    tol : float
    probe : Probe, optional
        Rows of the problem that are at hand.
    final : bool
        False for a descent on a sample, whose end is a start: it need not be a minimum.
    evidence : Evidence, optional
        May accept a point on the curvature of a sample.
    """

    problem: Problem
    tol: float
    probe: Any = None
    final: bool = field(default=True, kw_only=True)
    evidence: Evidence | None = field(default=None, kw_only=True)
    verdict: Verdict = field(default_factory=Verdict, init=False)
    # The point of least norm, once the descent is asked to go there.
    shorter: Array = field(init=False)
    _shortened: bool = field(default=False, init=False)
    _structure: Array | None = field(default=None, init=False)
    _least: float = field(default=np.inf, init=False)
    _last_full: float = field(default=np.inf, init=False)
    _last_is_fresh: bool = field(default=False, init=False)
    _strides: list[float] = field(default_factory=list, init=False)
    _n_looks: int = field(default=0, init=False)
    _out_of_time: bool = field(default=False, init=False)

    # ---- moves

    def guess(self, at: Evaluation, model: Model, p: Array) -> float:
        """Return the move of a step, or a lower bound from the rows at hand."""
        if not np.isfinite(p).all():
            return float("inf")
        if self.probe is not None:
            return float(self.probe.moves(at, p[:, None]).largest[0])
        return float(self._measure(at, model, p)[0])

    def _measure(self, at: Evaluation, model: Model, *steps: Array) -> Array:
        """Return the moves of steps over all rows."""
        matrix = np.stack(steps, axis=1)
        exact = self.probe is not None and self.probe.exact
        found = self.probe.moves(at, matrix) if exact else self.problem.moves(at, matrix)
        if found is not None:
            self._least = found.least
            return np.asarray(found.largest)
        # Unknowns that are no logits' coefficients: a share of the point.
        size = max(model.norm(at.x), np.finfo(float).tiny)
        return np.array([model.norm(p) / size for p in steps])

    # ---- directions that no row sees

    def structural(self, at: Evaluation) -> Array:
        """Return an orthonormal basis, in the user's units, of the directions that no row sees."""
        if self._structure is None:
            self._structure = self.problem.unseen_directions(at)
        return self._structure

    def step(self, at: Evaluation, model: Model, radius: float) -> Step:
        """Return the model's step; it stays off directions that are flat because no row sees them."""
        step = model.solve(at.gradient, radius)
        if not step.bounded or model.base is None or not model.base.n_flat or not self.problem.has_logits:
            return step
        steep = model.solve(at.gradient, radius, steep_only=True)
        if model.base.n_flat <= self.structural(at).shape[1]:
            return steep
        # A gradient along flat directions that promises nothing is rounding.
        return steep if step.predicted <= 1e-13 * abs(at.value) else step

    # ---- the rule

    def look(self, at: Evaluation, model: Model, step: Step, move: float) -> Next | Status:
        """Return what to do at a point, given the next step and its move or a lower bound of it."""
        self._strides.append(np.inf if step.bounded else move)
        if self.evidence is not None:
            self.evidence.follow(at, full=not step.bounded)
        if step.bounded and model.negative:
            self._last_full = move = np.inf
            p = model.approach(at.gradient)
            if p is not None and self.guess(at, model, p) <= max(self.tol, ACCEPTED_FLOOR):
                # A stationary point is here.
                return Next.LEAVE_SADDLE
        elif step.bounded:
            # A radius cut by rounding, or a slope of rounding along a flat direction, must not hide that
            # there is nowhere left to go.
            idle = step.predicted <= IDLE * abs(at.value)
            step = model.solve(at.gradient, np.inf, steep_only=True) if idle else self.step(at, model, np.inf)
            move = np.inf if step.bounded else self.guess(at, model, step.p)
        if not move <= ASK:
            self._last_full = move
            # A fit that keeps its stride may have no minimum: now and then that is looked for.
            n, recent = len(self._strides), self._strides[-2:]
            keeps = n >= FIRST_LOOK and min(recent) >= STRIDE and not recent[1] < KEPT_STRIDE * recent[0]
            due = self._n_looks < MAX_LOOKS and n >= FIRST_LOOK + NEXT_LOOK * self._n_looks
            return (self._separated(at) if keeps and due else None) or Next.STEP
        if model.exact_at is None and self.final:
            if self.evidence is not None:
                found = self._on_sample(at, model, step, move)
                if found is not None:
                    return found
            return Next.CURVATURE_HERE if move <= STAY else Next.STEP_FOR_CURVATURE
        before = self._last_full, self._last_is_fresh
        self._last_full, self._last_is_fresh = move, model.exact_at is at.x
        if not move <= self.tol and not _stalled(move, before[0]):
            return Next.STEP
        if not self.final:
            return Status.CONVERGED
        return self._candidate(at, model, step, *before)

    def _on_sample(self, at: Evaluation, model: Model, step: Step, move: float) -> Next | Status | None:
        """Judge a point by the curvature of a sample; None once that of all the data is needed."""
        assert self.evidence is not None
        if self.evidence.is_close(move):
            self.evidence = None
            return None
        if not move <= self.tol:
            return Next.STEP
        holds = self.evidence.holds(at, model, step, self.tol)
        if holds and self.evidence.least <= VANISHED:
            # Whether a minimum exists is proven by all the curvature only.
            holds = None
        if holds:
            self.verdict = replace(
                self.verdict,
                move=self.evidence.move,
                decrement=-float(at.gradient @ step.p),
                sampled=True,
            )
            return Status.CONVERGED
        if holds is None:
            self.evidence = None
            return None
        return Next.STEP

    def _candidate(
        self, at: Evaluation, model: Model, step: Step, before: float, before_is_fresh: bool
    ) -> Next | Status:
        """Judge a point whose next step, on the rows at hand, is small enough or has stopped shrinking."""
        if model.base is not None:
            # The curvature of the matrix alone, without what steps taught.
            model = replace(model, quadratic=model.base)
            step = model.solve(at.gradient, np.inf, steep_only=True)
        assert model.exact_at is not None
        move, distance = self._measure(at, model, step.p, at.x - model.exact_at)
        if not distance <= TRUSTED:
            return Next.CURVATURE_HERE
        if not move <= self.tol:
            if not _stalled(move, before):
                return Next.STEP
            if model.exact_at is not at.x:
                # An old curvature may shrink steps no faster; only two new ones tell that it is rounding.
                self._last_full, self._last_is_fresh = before, before_is_fresh
                return Next.CURVATURE_HERE
            if not before_is_fresh:
                return Next.STEP
        self.verdict = replace(
            self.verdict,
            move=float(move),
            decrement=-float(at.gradient @ step.p),
            at_floor=not move <= self.tol,
        )
        if not move <= max(self.tol, ACCEPTED_FLOOR):
            return Status.PRECISION
        return self._accept(at, model, step.p)

    def _accept(self, at: Evaluation, model: Model, p: Array) -> Next | Status:
        """Accept a point with the step p ahead unless it is flat where the data are not, longer than it need
        be, or known to rounding only; or a row has all but vanished that the loss lets fall for ever, and
        nothing proves that a minimum is here all the same.
        """
        flat, whole = model.flat, False
        self.verdict = replace(self.verdict, flat=flat)
        if flat is not None and self.problem.has_logits:
            whole = flat.shape[1] == 0
            if not whole:
                unseen = self.structural(at)
                if flat.shape[1] > unseen.shape[1]:
                    return self._separated(at) or Status.FLAT
                self.verdict = replace(self.verdict, flat=unseen)
                excess = unseen @ (unseen.T @ at.x)
                if not self._shortened and np.linalg.norm(excess) > 1e-14 * np.linalg.norm(at.x):
                    self._shortened, self.shorter = True, at.x - excess
                    return Next.SHORTEN
            noise = self._noise(at, model, p)
            if not noise <= NOISE:
                self.verdict = replace(self.verdict, move=noise)
                return Status.PRECISION
        if not self._least <= VANISHED:
            return Status.CONVERGED
        from attnfit.solvers.separation import minimum_is_proven

        if whole and minimum_is_proven(self.problem, at, model.matrix(), self.verdict.decrement):
            return Status.CONVERGED
        found = self._separated(at)
        # Too many unknowns to look for a direction without a minimum, or none found in time.
        if found is None and (self.problem.n_unknowns > MAX_DENSE or self._out_of_time):
            self.verdict = replace(self.verdict, undecided=True)
            return Status.PRECISION
        return found or Status.CONVERGED

    def _noise(self, at: Evaluation, model: Model, p: Array) -> float:
        """Return the error, in logits, that rounding may make of the next step p where that is too much."""
        move, curvature = self.verdict.move, -float(at.gradient @ p)
        coarse = float(np.finfo(np.float64).eps) * abs(at.value) * move * move
        if coarse > COARSE * curvature > 0.0:
            return coarse / curvature
        assert model.base is not None
        weak = [] if model.base.is_firm(WEAK) else [model.weakest()]
        if self.probe is not None:
            # The unknown with the least curvature a logit, if others have far more: scaled variables hide
            # that the slopes of the others may round its own away.
            squares, sizes = model.scale**2, self.probe.column_sizes()
            each = squares / np.where(sizes > 0.0, sizes, np.inf) ** 2
            each[each == 0.0] = np.inf
            j = int(np.argmin(each))
            if np.isfinite(each[j]):
                largest = float(each[np.isfinite(each)].max())
                weak.append((np.eye(1, len(each), j)[0], float(squares[j]), float(each[j]) / largest))
        noise = 0.0
        for v, curvature, share in weak:
            move = float(self._measure(at, model, v)[0]) if share <= WEAK else 0.0
            if move > 0.0:
                nudge = NUDGE / move
                change = float(v @ (self.problem.evaluate(at.x + nudge * v).gradient - at.gradient))
                noise = max(noise, abs(change / (nudge * curvature) - 1.0) * NUDGE)
        return noise

    # ---- no minimum

    def _separated(self, at: Evaluation) -> Status | None:
        """Look for a direction without a minimum."""
        if not self.final:
            # Further on the same way another start learns nothing.
            return Status.MAX_ITER if len(self._strides) >= FIRST_LOOK + NEXT_LOOK else None
        from attnfit.solvers.separation import Undecided, find_separation

        self._n_looks += 1
        self._out_of_time, found = False, None
        try:
            found = find_separation(self.problem, at)
        except Undecided:
            self._out_of_time = True
        if found is None:
            return None
        self.verdict = replace(self.verdict, separation=found)
        return Status.SEPARABLE if found.exact else Status.NO_MINIMUM


def _stalled(move: float, before: float) -> bool:
    """Whether steps have stopped shrinking, among rounding."""
    return move >= 0.5 * before and max(move, before) <= FLOOR


def assess(problem: Problem, at: Evaluation, tol: float, probe: Any = None) -> Verdict:
    """Return the verdict on a point that a solver without a judge of its own arrived at: two reads."""
    judge = Judge(problem, tol, probe)
    if problem.n_unknowns <= MAX_DENSE:
        model = dense_model(problem, at)
    else:
        model = MatrixFree(natural_scale(problem, at)).model(problem, at, None)
    step = judge.step(at, model, np.inf)
    found = judge.look(at, model, step, judge.guess(at, model, step.p))
    # A point that is longer than it need be is one nevertheless.
    status = Status.CONVERGED if found is Next.SHORTEN else found
    if found is Next.LEAVE_SADDLE:
        status = Status.SADDLE
    verdict = judge.verdict
    if np.isnan(verdict.move) and not step.bounded:
        move = float(judge._measure(at, model, step.p)[0])
        verdict = replace(verdict, move=move, decrement=-float(at.gradient @ step.p))
    return replace(verdict, status=status if isinstance(status, Status) else Status.MAX_ITER)

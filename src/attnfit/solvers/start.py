"""Where a fit begins: scales, starts and curvature metric from samples of the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.base import Problem
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.rows.grouped import GroupedProblem
from attnfit.problems.rows.sample_sizes import sample_sizes
from attnfit.problems.rows.thinning import draw_rows
from attnfit.solvers.curvature import MEDIUM, Exact, MatrixFree, natural_scale
from attnfit.solvers.descent import Descent, descend
from attnfit.solvers.tracking import Interrupted, Tracker

Array = NDArray[np.float64]

SAMPLE_TOL = 1e-3


@dataclass(frozen=True)
class Sample:
    """A small problem that stands for the full one, and its convex neighbour; the full problem itself where
    that is small.

    Attributes
    ----------
    share : float
        Its rows over those of the full problem.
    is_full : bool
        Whether it is the full problem itself.
    """

    problem: Any
    convex: Any
    share: float
    is_full: bool = True

    @property
    def n_passes(self) -> float:
        """Reads of the full data that the work on the sample amounts to, beyond the fetch of its rows."""
        if self.is_full:
            return 0.0
        return float(
            self.share * (self.problem.n_passes + (0.0 if self.convex is None else self.convex.n_passes))
        )


def whole(problem: Problem) -> Sample:
    """Return the problem itself with its convex neighbour."""
    return Sample(problem, None if problem.convex else problem.convex_neighbour(), 1.0)


def draw_sample(problem: GroupedProblem, n_rows: int, rng: np.random.Generator) -> Sample:
    """Return an importance-weighted sample of about ``n_rows`` rows of a problem and its convex neighbour."""
    small_enough = problem.n_rows <= n_rows and problem.is_whole
    draw = None if small_enough else draw_rows(problem, n_rows, rng)
    if draw is None:
        return whole(problem)
    small = draw.problem(problem.loss, problem.ridge)
    convex = None if problem.convex else draw.convex_neighbour(problem.loss, problem.ridge)
    return Sample(small, convex, small.n_rows / problem.n_rows, is_full=False)


def draw_scout(sample: Sample, n_rows: int, rng: np.random.Generator) -> Sample:
    """Return a sample of a sample: the same rows of both its problems."""
    problem, convex = sample.problem, sample.convex
    draw = draw_rows(problem, n_rows, rng) if problem.n_rows > n_rows else None
    if draw is None:
        return sample
    small = draw.problem(problem.loss, problem.ridge)
    if convex is not None:
        beside = draw.with_targets(*(v[draw.rows] for v in (convex.b, convex.weights, convex.offset)))
        convex = beside.problem(convex.loss, convex.ridge)
    return Sample(small, convex, sample.share * small.n_rows / problem.n_rows, is_full=False)


@dataclass(frozen=True)
class Start:
    """The samples from which a fit takes its scale, its starts and its first curvature."""

    full: Any
    scout: Sample
    sample: Sample

    @classmethod
    def draw(cls, problem: Problem, rng: np.random.Generator) -> Start:
        """Draw both samples; large problems whose rows can be drawn only."""
        if not isinstance(problem, GroupedProblem) or not problem.rows_can_be_drawn:
            itself = whole(problem)
            return cls(problem, itself, itself)
        scout_rows, n_rows = sample_sizes(problem.n_rows, problem.n_unknowns)
        sample = draw_sample(problem, n_rows, rng)
        if sample.is_full or n_rows == scout_rows:
            return cls(problem, sample, sample)
        return cls(problem, draw_scout(sample, scout_rows, rng), sample)

    @property
    def n_passes(self) -> float:
        """Reads of the full data that the work on both samples amounts to."""
        return self.sample.n_passes + (0.0 if self.scout is self.sample else self.scout.n_passes)

    def scale(self) -> Array:
        """Return the square root of each unknown's curvature at zero, shape (d,): the fit works in
        ``scale * x``.
        """
        problem = self.sample.problem
        return natural_scale(problem, problem.evaluate(np.zeros(problem.n_unknowns)))

    def points(self, scale: Array, tracker: Tracker, rng: np.random.Generator) -> dict[str, Array]:
        """Return the points to descend from, by name; the best first.

        A convex problem has one. Otherwise the convex neighbour (cross entropy for losses of a softmax) is
        solved first, and both its answer and zero are descended from. Where rows can be sampled this happens
        on the scout; ends in one minimum count once and are polished on the larger sample.
        """

        def run(problem: Problem, x: Array, phase: str, scale: Array = scale) -> Descent:
            strategy = Exact() if problem.n_unknowns <= MEDIUM else MatrixFree()
            at = problem.evaluate(x, origin=True, **strategy.request(None))
            found = descend(problem, at, strategy, scale, tracker, phase=phase, tol=SAMPLE_TOL, max_iter=50)
            if found.status == "interrupted":
                raise Interrupted(found.at.x)
            return found

        points: dict[str, Array] = self.scout.problem.starts(rng)
        if self.scout.convex is not None:
            neighbour = self.scout.convex
            zero = np.zeros(neighbour.n_unknowns)
            own = scale if len(zero) == len(scale) else natural_scale(neighbour, neighbour.evaluate(zero))
            convex = self.full.adopt(run(neighbour, zero, "convex neighbour", own).at.x)
            points = {"convex": convex} if self.full.zero_is_trivial else {"convex": convex, **points}
        if self.sample.is_full:
            return points
        ends = {name: run(self.scout.problem, x, f"scout: {name}") for name, x in points.items()}
        # Ends on the scout stop at one per mille of the gradient: one minimum shows as two points apart.
        distinct = _distinct(ends, scale, 0.05)
        if self.sample is not self.scout:
            distinct = _distinct(
                {
                    name: run(self.sample.problem, end.at.x, f"sample: {name}")
                    for name, end in distinct.items()
                },
                scale,
                0.01,
            )
        return {name: end.at.x for name, end in distinct.items()}

    def transfer(self, x: Array) -> Evaluation | None:
        """Predict the states of the full problem's long groups at x from the sample."""
        if self.sample.is_full or not self.full.n_long:
            return None
        small = self.sample.problem
        # The sample's groups carry the full problem's labels, in increasing order.
        labels = self.full.long_labels
        numbers = np.searchsorted(small.groups.labels, labels)
        if numbers.max() >= small.n_groups or (small.groups.labels[numbers] != labels).any():
            return None
        at = small.evaluate(x)
        states, centres = zip(*(small.group_summary(int(g), at) for g in numbers), strict=True)
        return Evaluation(x, at.value, at.gradient, np.array(states).T, np.array(centres))


def same_minimum(one: Evaluation, other: Evaluation, scale: Array, closeness: float = 1e-3) -> bool:
    """Whether two ends are one minimum: equal in value to rounding, or close in scaled variables."""
    gap = abs(one.value - other.value)
    size = max(abs(one.value), abs(other.value))
    distance = float(np.linalg.norm(scale * (one.x - other.x)))
    return gap <= 1e-9 * size or distance <= closeness * float(np.linalg.norm(scale * one.x))


def _distinct(ends: dict[str, Descent], scale: Array, closeness: float) -> dict[str, Descent]:
    """Return the finite ends that are different minima, the best of each, in order of their values.

    An end that ran out of steps above one that converged is no minimum: the full data would be read many
    times on its way down.
    """
    kept: dict[str, Descent] = {}
    for name in sorted(ends, key=lambda name: ends[name].at.value):
        end = ends[name]
        astray = end.status == "max_iter" and any(other.status == "converged" for other in kept.values())
        if not astray and not any(same_minimum(end.at, k.at, scale, closeness) for k in kept.values()):
            kept[name] = end
    finite = {name: end for name, end in kept.items() if np.isfinite(end.at.value)}
    return finite or ends

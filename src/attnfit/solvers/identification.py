"""What the data leave open: flat directions of the curvature, and directions along which cross entropy has no
minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.softmax import CrossEntropy
from attnfit.problems.base import Problem
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.rows.grouped import GroupedProblem
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.stored import StoredProblem
from attnfit.solvers.curvature import Exact, Model
from attnfit.solvers.descent import Descent, descend
from attnfit.solvers.tracking import Tracker
from attnfit.solvers.trust_region import CholeskyModel, Eigenmodel, SecantModel

Array = NDArray[np.float64]


def unidentified_directions(model: Model | None, scale: Array) -> Array | None:
    """Return an orthonormal basis, in the user's units, of the directions without curvature, shape (d, k);
    None if unknown.
    """
    if isinstance(model, SecantModel):
        model = model.base
    if isinstance(model, CholeskyModel):
        model = model.eigen_if_needed
        if model is None:
            return np.zeros((len(scale), 0))
    if not isinstance(model, Eigenmodel):
        return None
    flat = model.unidentified / scale[:, None]
    return np.linalg.qr(flat)[0] if flat.shape[1] else flat


def structural_directions(problem: Problem, scale: Array) -> Array:
    """Return an orthonormal basis of the directions that no row of the data sees, shape (d, k).

    Taken at zero, where all outputs are alike: at the answer small curvatures blur the line between flat and
    not.
    """
    zero = problem.evaluate(np.zeros(problem.n_unknowns))
    model = Eigenmodel(problem.hessian_at(zero, absolute=True) / np.multiply.outer(scale, scale))
    return np.asarray(np.linalg.qr(model.unidentified / scale[:, None])[0])


def least_norm(problem: Problem, best: Descent, scale: Array, tracker: Tracker, tol: float) -> Evaluation:
    """Return the point of least norm that differs along structural directions, polished by Newton steps,
    which avoid them.

    The point itself where that raises the loss.
    """
    at = best.at
    slack = 1e-9 * abs(at.value) + (tol * best.goal_norm) ** 2
    flat = structural_directions(problem, scale)
    strategy = Exact()
    shorter = problem.evaluate(at.x - flat @ (flat.T @ at.x), at, **strategy.request(None))
    if not shorter.value <= at.value + 1e3 * slack:
        return at
    # Two fits of the same data from different starts shall agree to rounding, not to tol divided by a small
    # curvature.
    polished = descend(
        problem, shorter, strategy, scale, tracker, phase="least norm", tol=1e-3 * tol, max_iter=4
    )
    return polished.at if polished.at.value <= at.value + slack else at


def recession_direction(problem: Problem, candidates: list[Array]) -> Array | None:
    """Return a direction along which cross entropy falls for ever, or None if no candidate is one.

    Along v the loss never rises if, in every group, all rows with a positive target attain the largest
    ``A v`` of the group; it falls if some group is not constant. Then there is no finite minimiser: the data
    are separable.
    """
    if not (
        isinstance(problem, GroupedProblem) and problem.convex and isinstance(problem.loss, CrossEntropy)
    ):
        return None
    if np.any(problem.ridge) or problem.penalty is not None:
        return None
    directions = np.stack(candidates, axis=1)
    extents: _Extents = problem.reduce(_extents_of, directions)
    spread, slack = extents.close(problem.long_constants)
    for k in range(directions.shape[1]):
        if spread[k] > 0 and slack[k] <= 1e-6 * spread[k]:
            return directions[:, k]
    return None


@dataclass
class _Extents:
    """The widest group along each direction, and how far a positive target is from its top at most.

    ``long`` holds, by number, the top, the bottom and the lowest positive target of groups seen in part.
    """

    spread: Array
    slack: Array
    long: dict[int, Array]

    def merge(self, other: _Extents) -> _Extents:
        """Return the extents over both parts of the data."""
        long = dict(self.long)
        for number, found in other.long.items():
            long[number] = _join(long[number], found) if number in long else found
        return _Extents(np.maximum(self.spread, other.spread), np.maximum(self.slack, other.slack), long)

    def close(self, constants: Array) -> tuple[Array, Array]:
        """Return spread and slack over all groups that have a target."""
        spread, slack = self.spread, self.slack
        for number, (top, bottom, positive) in self.long.items():
            if constants[number] > 0:
                spread = np.maximum(spread, top - bottom)
                slack = np.maximum(slack, top - positive)
        return spread, slack


def _join(one: Array, other: Array) -> Array:
    return np.stack([np.maximum(one[0], other[0]), *np.minimum(one[1:], other[1:])])


def _extents_of(part: StoredProblem, chunks: list[Chunk], directions: Array) -> _Extents:
    zero = np.zeros(directions.shape[1])
    extents = _Extents(zero, zero, {})
    for chunk in part.ahead(chunks):
        along = part.fetch(chunk) @ directions
        b, w, constants = part.targets(chunk)
        starts = chunk.segments.starts
        positive = np.where((w * b > 0)[:, None], along, np.inf)
        top = np.maximum.reduceat(along, starts)
        bottoms = np.minimum.reduceat(along, starts), np.minimum.reduceat(positive, starts)
        if chunk.long >= 0:
            found = _Extents(zero, zero, {chunk.long: np.stack([top, *bottoms])[:, 0]})
        else:
            with_target = constants > 0
            spread, slack = ((top - bottom)[with_target] for bottom in bottoms)
            found = _Extents(spread.max(axis=0, initial=0.0), slack.max(axis=0, initial=0.0), {})
        extents = extents.merge(found)
    return extents

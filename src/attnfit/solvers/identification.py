"""What the data leave open: flat directions of the curvature, and directions along which cross entropy has no
minimum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.softmax import CrossEntropy
from attnfit.problems.base import Problem
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.rows.grouped import GroupedProblem
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
    top = np.full((len(problem.groups), directions.shape[1]), -np.inf)
    bottom_positive = np.full_like(top, np.inf)
    bottom = np.full_like(top, np.inf)
    for chunk in problem.chunks:
        along = problem.design.block(chunk.index) @ directions
        b, w, _ = problem.targets(chunk)
        starts = chunk.segments.starts
        positive = np.where((w * b > 0)[:, None], along, np.inf)
        groups = chunk.groups
        top[groups] = np.maximum(top[groups], np.maximum.reduceat(along, starts))
        bottom[groups] = np.minimum(bottom[groups], np.minimum.reduceat(along, starts))
        bottom_positive[groups] = np.minimum(bottom_positive[groups], np.minimum.reduceat(positive, starts))
    spread = np.where(problem.constants[:, None] > 0, top - bottom, 0.0)
    slack = np.where(problem.constants[:, None] > 0, top - bottom_positive, 0.0)
    for k in range(directions.shape[1]):
        widest = float(spread[:, k].max())
        if widest > 0 and float(slack[:, k].max()) <= 1e-6 * widest:
            return directions[:, k]
    return None

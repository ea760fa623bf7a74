"""The convex neighbour of a problem: the same data under a loss whose minimiser is a good start."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from attnfit.losses.exponential import LeastSquares, PoissonDeviance, SquaredExponential
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import LOSSES, Entropy, SoftmaxLoss
from attnfit.problems.rows.stored import StoredProblem

T = TypeVar("T", bound=StoredProblem)


def convex_neighbour(problem: T) -> T | None:
    """Return a convex problem on the same data whose minimiser is a good start; None where there is none.

    Cross entropy for losses of a softmax with a target, the Poisson likelihood for exp, least squares on the
    inverse function of the target for sinh and cosh (rescaled: of the target times the size of the group).
    """
    loss, b, w = problem.loss, problem.b, problem.weights
    exponential = isinstance(loss, SquaredRescaled) and loss.function == "exp"
    if exponential or (isinstance(loss, SoftmaxLoss) and not isinstance(loss, Entropy)):
        b = np.maximum(b, 0.0)
        if w is not None:
            # Weights that differ within a group would move the minimiser of cross entropy away from f = b.
            starts = problem.groups.starts
            mass = np.add.reduceat(b, starts)
            mean = np.add.reduceat(w * b, starts) / np.where(mass > 0, mass, 1.0)
            w = np.repeat(mean, np.diff(starts, append=problem.n_rows))
        return problem.with_loss(LOSSES["cross_entropy"], b, w) if b.any() else None
    if isinstance(loss, SquaredExponential) and loss.function == "exp":
        return problem.with_loss(PoissonDeviance(), np.maximum(b, 0.0), w)
    if not isinstance(loss, SquaredExponential | SquaredRescaled):
        return None
    unit = np.ones(len(b)) if w is None else w
    if isinstance(loss, SquaredRescaled):
        sizes = np.diff(problem.groups.starts, append=problem.n_rows)
        b = b * np.repeat(sizes, sizes)
    # Near the fit an error dz in the logit costs w v^2 dz^2, with v = cosh(z) for sinh and sinh(z) for cosh.
    if loss.function == "sinh":
        return problem.with_loss(LeastSquares(), np.arcsinh(b), unit * (1.0 + b * b))
    return problem.with_loss(
        LeastSquares(), np.arccosh(np.maximum(b, 1.0)), unit * np.maximum(b * b - 1.0, 1e-3)
    )

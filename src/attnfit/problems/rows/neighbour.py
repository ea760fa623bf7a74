"""The convex neighbour of a problem: the same data under a loss whose minimiser is a good start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from attnfit.designs.column import Column, pieces
from attnfit.losses.base import Loss
from attnfit.losses.exponential import LeastSquares, PoissonDeviance, SquaredExponential
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.segments import Array, Index, Segments
from attnfit.losses.softmax import LOSSES, SoftmaxLoss
from attnfit.problems.rows.stored import StoredProblem

T = TypeVar("T", bound=StoredProblem)


def convex_neighbour(problem: T) -> T | None:
    """Return a convex problem on the same data whose minimiser is a good start; None where there is none."""
    segments = Segments(problem.groups.starts, problem.n_rows)
    sizes = np.repeat(segments.sizes, segments.sizes)
    found = neighbouring_targets(problem.loss, problem.b, problem.weights, segments, sizes)
    return problem.with_loss(*found) if found is not None and has_weight(found[2]) else None


def has_weight(w: Any) -> bool:
    """Whether any row has a weight: none is left where targets are positive only at weights of zero."""
    return w is None or any(v.any() for _, v in pieces(w))


def neighbouring_targets(
    loss: Loss, b: Any, w: Any, segments: Segments, sizes: Array | Index, multiplicity: Array | float = 1.0
) -> tuple[Loss, Any, Any] | None:
    """Return loss, target and weights of the convex neighbour.

    Cross entropy for losses of a softmax with a target, the Poisson likelihood for exp, least squares on the
    inverse function of the target for sinh and cosh (rescaled: of the target times the size of the group).

    Parameters
    ----------
    loss : Loss
    b, w : ndarray or Column, shape (n,)
        Target and weights; these may be None.
    segments : Segments
        The groups of these rows.
    sizes : ndarray, shape (n,)
        The size of each row's whole group.
    multiplicity : ndarray, shape (n,)
        How many rows each one stands for.
    """
    exponential = isinstance(loss, SquaredRescaled) and loss.function == "exp"
    if exponential or (isinstance(loss, SoftmaxLoss) and loss.has_target):
        b = _mapped(_positive_part, b)
        if w is not None:
            # Weights that differ within a group would move the minimiser of cross entropy away from f = b.
            mass = segments.sum(multiplicity * np.asarray(b))
            mean = segments.sum(multiplicity * np.asarray(w) * np.asarray(b)) / np.where(mass > 0, mass, 1.0)
            w = segments.spread(mean) + np.zeros(segments.n_rows)
        return (LOSSES["cross_entropy"], b, w) if any(v.any() for _, v in pieces(b)) else None
    if isinstance(loss, SquaredExponential) and loss.function == "exp":
        return PoissonDeviance(), _mapped(_positive_part, b), w
    if not isinstance(loss, SquaredExponential | SquaredRescaled):
        return None
    b = np.asarray(b)
    unit = np.ones(len(b)) if w is None else np.asarray(w)
    if isinstance(loss, SquaredRescaled):
        b = b * sizes
    # Near the fit an error dz in the logit costs w v^2 dz^2, with v = cosh(z) for sinh and sinh(z) for cosh.
    if loss.function == "sinh":
        return LeastSquares(), np.arcsinh(b), unit * (1.0 + b * b)
    return LeastSquares(), np.arccosh(np.maximum(b, 1.0)), unit * np.maximum(b * b - 1.0, 1e-3)


def _positive_part(b: Array) -> Array:
    return np.maximum(b, 0.0)


def _mapped(function: Callable[[Array], Array], values: Any) -> Any:
    return values.mapped(function) if isinstance(values, Column) else function(values)

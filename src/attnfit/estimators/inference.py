"""Covariance of the coefficients from the curvature and the scores at the fit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.softmax import CrossEntropy
from attnfit.objectives.rows import RowProblem
from attnfit.solvers import Result
from attnfit.solvers.curvature import natural_scale
from attnfit.solvers.subproblem import MoreSorensen

Array = NDArray[np.float64]


def covariance(problem: RowProblem, x: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return the covariance, shape (d, d), and which coefficients the data identify, shape (d,).

    Cross entropy and KL: ``H^+``, the inverse of the observed information. Other losses: the sandwich ``H^+ S
    H^+`` with S the sum of outer products of scores, one a group where there are several groups, else one a
    row.

    Where H is singular the pseudo-inverse (in scaled units) serves: a linear combination of coefficients that
    is constant along the flat directions has the right variance, a single coefficient that is not has none.

    Notes
    -----
    Sources: Efron and Hinkley (1978), Biometrika 65, 457-482 (observed information); Huber (1967) and White
    (1982), Econometrica 50, 1-25 (sandwich). There is no correction for small samples.
    """
    at = problem.evaluate(x)
    scale = natural_scale(problem, at)
    model = MoreSorensen(problem.hessian_at(at) / np.multiply.outer(scale, scale))
    steep = model.values > model.floor
    identified = np.linalg.norm(model.vectors[:, ~steep], axis=1) < 1e-5
    half = model.vectors[:, steep] / scale[:, None]
    inverse = (half / model.values[steep]) @ half.T
    if isinstance(problem.loss, CrossEntropy):
        return inverse, identified
    return inverse @ problem.score_gram(x) @ inverse, identified


def covariance_of(result: Result, problem: RowProblem) -> tuple[Array, NDArray[np.bool_]]:
    """Return `covariance` at the end of a fit; where there is no finite minimum that of the remaining rows,
    NaN for coefficients without a finite value.
    """
    separation = result.separation
    if separation is None:
        reduction = problem.reduction()
        if reduction is None:
            return covariance(problem, result.x)
        inner: Any = reduction.problem
        found, identified = covariance(inner, reduction.restrict(result.x))
        unit = reduction.lift(np.ones(len(found)))
        return found * unit * unit[:, None], identified
    finite = np.isfinite(result.x)
    if not separation.has_rest:
        return np.full((len(finite), len(finite)), np.nan), np.zeros_like(finite)
    found, identified = covariance(separation.problem, np.asarray(separation.rest.x))
    found = found * separation.unit * separation.unit[:, None]
    return np.where(finite & finite[:, None], found, np.nan), identified & finite


def standard_errors(covariance: Array, identified: NDArray[np.bool_]) -> Array:
    """Return the roots of the diagonal, NaN where a coefficient is not identified."""
    return np.where(identified, np.sqrt(np.maximum(np.diag(covariance), 0.0)), np.nan)


def loss_without_penalties(problem: RowProblem, x: Array, value: float) -> float:
    """Return the loss at x given the objective; reads the data only where there is a row penalty."""
    if problem.penalty is None and not np.any(problem.ridge):
        return value
    if problem.penalty is None:
        return value - 0.5 * float(np.sum(problem.ridge * x * x))
    return problem.without_penalties().value(x)

"""The affine-scaled Newton-Kantorovich ball around a computed point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates.ball import Rows
from attnfit.certificates.lipschitz import lipschitz_constant
from attnfit.problems.grouped import GroupedProblem
from attnfit.problems.inputs import as_point
from attnfit.solvers.curvature import natural_scale
from attnfit.solvers.trust_region import Eigenmodel

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Certificate:
    """What is proven about the stationary point x* next to x.

    Attributes
    ----------
    valid : bool
    radius : float
        ``||x - x*||_2 <= radius`` (infinite where not valid), in the user's units; x* is unique in that ball
        and a strict local minimiser. Where some
        directions are not identified, the statement is about the identified ones.
    scaled_radius : float
        ``||H^(1/2) (x - x*)||_2 <= scaled_radius``.
    value_gap : float
        ``L(x) - L(x*) <= value_gap``.
    reason : str
        Why the certificate holds, or why not and what to do.
    eta : float
        ``sqrt(g^T H^-1 g)`` plus a bound of the rounding in g: the length of the Newton step in the norm of
        the Hessian.
    lipschitz : float
        Lipschitz constant M of the Hessian in the scaled variables on the ball of radius ``2 eta``.
    lambda_min : float
        Smallest identified eigenvalue of H, in the user's units.
    n_unidentified : int
        Number of directions without curvature.
    """

    valid: bool
    radius: float
    scaled_radius: float
    value_gap: float
    reason: str
    eta: float
    lipschitz: float
    lambda_min: float
    n_unidentified: int


def certify(problem: GroupedProblem, x: Any) -> Certificate:
    """Certify x: find a ball around it that contains exactly one stationary point.

    With ``eta = sqrt(g^T H^-1 g)`` and M a Lipschitz constant of ``H^(-1/2) Hessian H^(-1/2)`` on the ball of
    radius ``2 eta`` in the norm of H: if ``h = M eta <= 1/2``, then
    ``||H^(1/2)(x - x*)|| <= rho = 2 eta / (1 + sqrt(1 - 2 h))``. It takes about six reads of the data, d^2
    numbers,
    and some ten numbers a row.

    Parameters
    ----------
    problem : Softmax, Exponential or Rescaled
    x : array_like, shape (d,)

    Returns
    -------
    Certificate

    Notes
    -----
    Newton-Kantorovich theorem, see Deuflhard, "Newton Methods for Nonlinear Problems" (2011), Theorem 2.1,
    with the local constants of `attnfit.certificates.lipschitz`, which replace the papers'
    ``n^4 exp(20 R^2)``.
    """
    at = problem.evaluate(as_point(x, problem.shape))
    if not np.isfinite(at.value):
        return _refused("the loss overflows at x; scale the columns of A", np.inf, np.inf, np.nan, 0)
    hessian = problem.hessian_at(at)
    scale = natural_scale(problem, at)
    model = Eigenmodel(hessian / np.multiply.outer(scale, scale))
    values, vectors, floor = model.values, model.vectors, model.floor
    flat = model.unidentified.shape[1]
    if values[0] < -floor:
        worst = vectors[:, 0] / scale
        along = int(np.argmax(np.abs(worst)))
        return _refused(
            f"x is not a minimum: the curvature is negative along a direction dominated by column {along}; "
            f"fit again from another x0",
            np.inf, np.inf, float(values[0]), flat,
        )  # fmt: skip
    if flat == len(values):
        return _refused("the loss has no curvature at x: nothing is identified", np.inf, np.inf, 0.0, flat)
    keep = values > floor
    whitener = vectors[:, keep] / np.sqrt(values[keep]) / scale[:, None]
    spread = float(np.linalg.norm(whitener, 2))
    rows = Rows(problem, at, whitener)
    eta = float(np.linalg.norm(whitener.T @ at.gradient)) + _rounding(rows)
    constant = lipschitz_constant(rows, 2.0 * eta)
    h = constant * eta
    where = "" if flat == 0 else f" in the {int(keep.sum())} identified directions ({flat} are not)"
    if not h <= 0.5:
        return _refused(
            f"the Newton step is too long for the curvature to be constant: M eta = {h:.3g} exceeds "
            f"1/2{where}; tighten tol or add ridge",
            eta, constant, 1.0 / spread**2, flat,
        )  # fmt: skip
    rho = 2.0 * eta / (1.0 + np.sqrt(1.0 - 2.0 * h))
    return Certificate(
        valid=True,
        radius=float(rho * spread),
        scaled_radius=float(rho),
        value_gap=float(0.5 * rho**2 * (1.0 + constant * rho)),
        reason=f"Newton-Kantorovich: M eta = {h:.3g} <= 1/2{where}",
        eta=eta,
        lipschitz=constant,
        lambda_min=1.0 / spread**2,
        n_unidentified=flat,
    )


def _refused(reason: str, eta: float, constant: float, lambda_min: float, flat: int) -> Certificate:
    return Certificate(False, np.inf, np.inf, np.inf, reason, eta, constant, lambda_min, flat)


def _rounding(rows: Rows) -> float:
    """Bound the effect of rounding in A x and in the sums on the whitened gradient, to first order."""
    problem, at = rows.problem, rows.at
    norms = rows.norms(centred=False)
    total = 0.0
    for chunk in problem.chunks:
        z = rows.z[chunk.rows]
        b, w, _ = problem.targets(chunk)
        state = problem.row_state(chunk, z, at)
        slope = np.abs(problem.loss.slope(z, b, w, state))
        curvature = problem.loss.importance(z, b, w, state)
        total += float(np.sum((slope + curvature * (1.0 + np.abs(z))) * norms[chunk.rows]))
    return 4.0 * float(np.finfo(np.float64).eps) * total

"""The affine-scaled Newton-Kantorovich ball around a computed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.base import Problem
from attnfit.problems.evaluation import Evaluation
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
        ``||x - x*||_2 <= radius`` (infinite where not valid), in the user's units; x* is a strict local
        minimiser. Where some directions are not identified, the statement is about the identified ones.
    scaled_radius : float
        ``||H^(1/2) (x - x*)||_2 <= scaled_radius``, and x* is the only stationary point in that ellipsoid.
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


class Ball(Protocol):
    """What is known of a problem on balls around a point, in whitened variables."""

    def rounding(self) -> float:
        """Bound the effect of rounding on the whitened gradient, to first order."""
        ...

    def obstacle(self, radius: float) -> str | None:
        """Return why the Hessian is not Lipschitz on the ball of this radius, None if it is."""
        ...

    def lipschitz(self, radius: float) -> float:
        """Return a Lipschitz constant of the whitened Hessian on the ball of this radius."""
        ...


def newton_kantorovich(problem: Problem, at: Evaluation, ball: Callable[[Array], Ball]) -> Certificate:
    """Return the certificate of an evaluated point.

    Parameters
    ----------
    problem : Problem
    at : Evaluation
    ball : callable
        Takes a whitener T, shape (d, k), with ``T^T H T = 1``, to what is known of balls ``x + T y``.
    """
    if not np.isfinite(at.value):
        return refused("the loss overflows at x; scale the columns of A")
    with np.errstate(over="ignore", invalid="ignore"):
        hessian = problem.hessian_at(at)
    if not np.isfinite(hessian).all():
        return refused("the Hessian overflows at x; scale the columns of A")
    scale = natural_scale(problem, at)
    model = Eigenmodel(hessian / np.multiply.outer(scale, scale))
    values, vectors, floor = model.values, model.vectors, model.floor
    flat = model.unidentified.shape[1]
    if values[0] < -floor:
        worst = vectors[:, 0] / scale
        along = int(np.argmax(np.abs(worst)))
        return refused(
            f"x is not a minimum: the curvature is negative along a direction dominated by column {along}; "
            f"fit again from another x0",
            lambda_min=float(np.linalg.eigvalsh(hessian)[0]), n_unidentified=flat,
        )  # fmt: skip
    if flat == len(values):
        return refused(
            "the loss has no curvature at x: nothing is identified", lambda_min=0.0, n_unidentified=flat
        )
    keep = values > floor
    whitener = vectors[:, keep] / np.sqrt(values[keep]) / scale[:, None]
    spread = float(np.linalg.norm(whitener, 2))
    around = ball(whitener)
    eta = float(np.linalg.norm(whitener.T @ at.gradient)) + around.rounding()
    where = "" if flat == 0 else f" in the {int(keep.sum())} identified directions ({flat} are not)"
    obstacle = around.obstacle(2.0 * eta)
    if obstacle is not None:
        return refused(obstacle, eta=eta, lambda_min=1.0 / spread**2, n_unidentified=flat)
    constant = around.lipschitz(2.0 * eta)
    h = constant * eta
    if not h <= 0.5:
        return refused(
            f"the Newton step is too long for the curvature to be constant: M eta = {h:.3g} exceeds "
            f"1/2{where}; tighten tol or add ridge",
            eta=eta, constant=constant, lambda_min=1.0 / spread**2, n_unidentified=flat,
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


def refused(
    reason: str,
    *,
    eta: float = np.inf,
    constant: float = np.inf,
    lambda_min: float = np.nan,
    n_unidentified: int = 0,
) -> Certificate:
    """Return a certificate that is not valid, with the reason."""
    return Certificate(False, np.inf, np.inf, np.inf, reason, eta, constant, lambda_min, n_unidentified)

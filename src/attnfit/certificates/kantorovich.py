"""The affine-scaled Newton-Kantorovich ball around a computed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates.ball import ChunkRows, Stages, sums_on_ball
from attnfit.certificates.lipschitz import lipschitz_constant
from attnfit.problems.base import Problem
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.inputs import as_point
from attnfit.problems.inversion.layer_problem import LayerProblem
from attnfit.problems.layers.layered import LayeredProblem
from attnfit.problems.maps.attention import Attention
from attnfit.problems.rows.grouped import GroupedProblem
from attnfit.solvers.curvature import natural_scale
from attnfit.solvers.trust_region import Eigenmodel

Array = NDArray[np.float64]

# Attention problems are certified up to this many entries of the matrix that is otherwise never formed.
DENSE_ENTRIES = 1 << 27


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


def certify(problem: Any, x: Any) -> Certificate:
    """Certify x: find a ball around it that contains exactly one stationary point.

    With ``eta = sqrt(g^T H^-1 g)`` and M a Lipschitz constant of ``H^(-1/2) Hessian H^(-1/2)`` on the ball of
    radius ``2 eta`` in the norm of H: if ``h = M eta <= 1/2``, then
    ``||H^(1/2)(x - x*)|| <= rho = 2 eta / (1 + sqrt(1 - 2 h))``. It takes five reads of the data, wherever
    they are, up to five more where groups are longer than a block, and d^2 numbers. A mixture is certified
    by its duality gap instead.

    Parameters
    ----------
    problem : Softmax, Exponential, Rescaled, Attention, TwoLayer, ReluSoftmax, ThreeLayer or LayerInversion
    x : array_like, in the problem's natural shape
        Of several right-hand sides all are certified, and the worst is reported.

    Returns
    -------
    Certificate or MixtureCertificate

    Raises
    ------
    ValueError
        If there is no certificate for this kind of problem.

    Notes
    -----
    Newton-Kantorovich theorem, see Deuflhard, "Newton Methods for Nonlinear Problems" (2011), Theorem 2.1,
    with the local constants of `attnfit.certificates.lipschitz` and `attnfit.certificates.two_layer`, which
    replace the papers' ``n^4 exp(20 R^2)``.
    """
    if isinstance(problem, LayeredProblem):
        from attnfit.certificates.mixture import certify_mixture
        from attnfit.certificates.two_layer import certify_layers

        return certify_mixture(problem, x) if problem.is_mixture else certify_layers(problem, x)
    if isinstance(problem, LayerProblem):
        from attnfit.certificates.layer import certify_layer

        return certify_layer(problem, x)
    if isinstance(problem, Attention):
        if problem.n_rows * problem.n_unknowns > DENSE_ENTRIES:
            return refused(
                f"a proof takes the {problem.n_rows:,} x {problem.n_unknowns:,} matrix of all pairs, more "
                f"than {DENSE_ENTRIES:,} numbers; judge the fit on held-out maps"
            )
        x, problem = as_point(x, problem.shape), problem.dense()
    if not isinstance(problem, GroupedProblem):
        return refused(
            f"none is known for {type(problem).__name__}, whose factors are not unique; compare "
            "result.local_values of several starts"
        )
    grouped: GroupedProblem = problem
    at = grouped.evaluate(as_point(x, grouped.shape))
    return newton_kantorovich(grouped, at, partial(RowBall, grouped, at))


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


@dataclass(frozen=True)
class RowBall:
    """The `Ball` of a loss of the rows of one matrix."""

    problem: GroupedProblem
    at: Evaluation
    whitener: Array

    def lipschitz(self, radius: float) -> float:
        """Return the constant of `attnfit.certificates.lipschitz`."""
        return lipschitz_constant(self.problem, self.at, self.whitener, radius)

    def obstacle(self, radius: float) -> str | None:
        """Return None: these losses are smooth."""
        return None

    def rounding(self) -> float:
        """Bound the effect of rounding in A x and in the sums on the whitened gradient, to first order."""
        problem = self.problem
        sums = sums_on_ball(problem, self.at, self.whitener, _rounding, 0.0)
        ridge = np.linalg.norm(np.abs(self.whitener).T @ np.abs(problem.ridge * self.at.x))
        return 4.0 * float(np.finfo(np.float64).eps) * float(sums["rounding"] + ridge)


def _rounding(rows: ChunkRows, radius: float) -> Stages:
    """Bound ``sum |s| |T^T a|`` and, with ``dz`` the errors of the logits, the change of the gradient
    ``sum t (r a - q mu) (r dz - q m.dz)`` by the terms of the Hessian and ``mu = A^T m``.

    The errors are ``1 + sqrt(d) |A| |x|`` in units of the rounding, with the constant of Higham and Mary, "A
    New Approach to Probabilistic Rounding Error Analysis" (2019), doi:10.1137/18M1226312.
    """
    part, point = rows.part, (rows.z, rows.b, rows.w, rows.state)
    own, along = rows.norms(centred=False), np.abs(rows.at.x)
    dz = 1.0 + np.sqrt(len(along)) * np.asarray(abs(rows.block) @ along) + np.abs(part.shift(rows.chunk))
    terms, m = part.loss.gram_terms(*point)
    centre, mean = np.zeros_like(dz), np.zeros_like(dz)
    if m is not None:
        sums = yield rows.sum(np.abs(m) * own), rows.sum(np.abs(m) * dz)
        centre, mean = map(rows.spread, sums)
    rows.add("rounding", np.abs(part.loss.slope(*point)) * own)
    penalty = part.row_penalties(rows.chunk)
    if penalty is not None:
        rows.add("rounding", penalty * dz * own)
    for t, r, q in terms:
        size, beside = (np.abs(1.0 if v is None else v) for v in (r, 0.0 if q is None else q))
        rows.add("rounding", np.abs(t) * (size * own + beside * centre) * (size * dz + beside * mean))

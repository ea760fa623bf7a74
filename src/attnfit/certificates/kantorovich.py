"""The affine-scaled Newton-Kantorovich ball around a computed point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.objective import Evaluation, Problem
from attnfit.solvers.subproblem import MoreSorensen

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
# Covers the rounding of a radius itself.
OUTWARD = 1.0 + 1e-10
# A certificate whose radius exceeds this share of ``|x| + 1`` says little about x.
LOOSE = 1e-2
# A direction that moves every logit by less than this share of what its terms could is seen by no row.
UNSEEN = 1e-9
# Larger components of a null vector are not blamed on rounding.
NOISE = 1e-6
# A guess at the rounding of a whitened gradient, relative to ``sqrt(|L| d)``, for a look at a ball before it
# is known. Up to this M eta a cheap M makes the radius longer by half a percent at most.
ROUNDING, NEAR = 1e-9, 1e-2
# Columns listed in a message.
LISTED = 6
FIRST_ORDER = "rounding bounded to first order with a probabilistic constant"
RIGOROUS = "proven, given IEEE double arithmetic and exp to 2 units"


@dataclass(frozen=True)
class Identified:
    """What is known of x although some directions are open.

    x* is here the stationary point among the points that differ from x in identified directions only, the
    open ones held: where no row sees those (`Certificate.valid_for_predictions`) it is a stationary point
    of the loss, and all others have the same predictions.

    Attributes
    ----------
    basis : ndarray, shape (d, k)
        Orthonormal columns, the combinations of unknowns that do not change along an open direction.
    radius : float
        ``||basis^T (x - x*)||_2 <= radius``.
    coefficient_radius : ndarray, shape (d,)
        ``|x_j - x*_j| <= coefficient_radius[j]``; infinite where an open direction has a component along j.
    """

    basis: Array
    radius: float
    coefficient_radius: Array


@dataclass(frozen=True)
class Certificate:
    """What is known about the stationary point x* next to x.

    A statement about exact arithmetic: x* is the exact stationary point of the data as stored, and rounding
    in the computed gradient is bounded to first order with a probabilistic constant (errors taken as
    independent, sqrt(d) in place of d); with `rigorous` it is proven, given IEEE double arithmetic and exp
    to 2 units.

    Attributes
    ----------
    valid : bool
        Whether x* exists, is a strict local minimiser and lies within `radius` of x: never where a direction
        is open.
    radius : float
        ``||x - x*||_2 <= radius`` (infinite where not valid), in the user's units; over all right-hand sides.
    scaled_radius : float
        ``||H^(1/2) (x - x*)||_2 <= scaled_radius``, and x* is the only stationary point in that ellipsoid;
        over all right-hand sides. Finite without `valid` where `valid_for_predictions` holds.
    value_gap : float
        ``L(x) - L(x*) <= value_gap``, summed over the right-hand sides.
    reason : str
        Why the certificate holds, or why not and what to do.
    eta : float
        ``sqrt(g^T H^-1 g)`` plus a bound of the rounding in g: the length of the Newton step in the norm of
        the Hessian. The largest of all right-hand sides, like `lipschitz`.
    lipschitz : float
        Lipschitz constant M of the Hessian in the scaled variables on the ball of radius ``2 eta``.
    lambda_min : float
        Smallest identified eigenvalue of H, in the user's units.
    n_unidentified : int
        Number of directions without curvature: the open ones.
    valid_for_predictions : bool
        Whether `scaled_radius`, `value_gap` and `identified` hold of a stationary point: `valid`, or the open
        directions are seen by no row of the data, to rounding, so that no prediction depends on them.
    identified : Identified or None
        What is known although directions are open; None where there is no ball at all, or several
        right-hand sides.
    coefficient_radius : ndarray, in the shape of x
        ``|x_j - x*_j| <= coefficient_radius[j]``, infinite where nothing is known.
    radii, scaled_radii, value_gaps : ndarray, shape (k,)
        Those of each right-hand side.
    rigorous : bool
        Whether rounding is bounded without assumptions on its errors.
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
    valid_for_predictions: bool = False
    identified: Identified | None = field(default=None, repr=False)
    coefficient_radius: Array = field(default_factory=lambda: np.full(0, np.inf), repr=False)
    radii: Array = field(default_factory=lambda: np.full(1, np.inf), repr=False)
    scaled_radii: Array = field(default_factory=lambda: np.full(1, np.inf), repr=False)
    value_gaps: Array = field(default_factory=lambda: np.full(1, np.inf), repr=False)
    rigorous: bool = False

    def describe(self, x: Array) -> str:
        """Return the certificate of x in a sentence: what is certified, and what is not and why.

        A radius larger than 1e-2 of ``|x| + 1`` is called loose.
        """
        words = RIGOROUS if self.rigorous else FIRST_ORDER
        if self.valid:
            return within(self.radius, x, words)
        if not self.valid_for_predictions:
            return f"none: {self.reason}"
        known = np.isfinite(self.coefficient_radius)
        told = f"predictions are certified, {words}"
        if known.any():
            largest = float(self.coefficient_radius[known].max())
            told += f", and {int(known.sum())} of {known.size} coefficients, each within {largest:.2e}"
        return f"{told}; x is not: {self.reason}"


def within(radius: float, x: Array, words: str = FIRST_ORDER) -> str:
    """Return in words how near x is to a stationary point, and that this is loose where it says little."""
    loose = " (loose)" if radius > LOOSE * (float(np.linalg.norm(x)) + 1.0) else ""
    return f"within {radius:.2e} of the exact stationary point{loose}, {words}"


class Ball(Protocol):
    """What is known of a problem on balls around a point, in whitened variables."""

    def rounding(self) -> float:
        """Bound the effect of rounding on the whitened gradient, to first order."""
        ...

    def glance(self, radius: float) -> tuple[float, float]:
        """Return what `rounding` does and a cheap Lipschitz constant, infinite where there is none."""
        ...

    def obstacle(self, radius: float) -> str | None:
        """Return why the Hessian is not Lipschitz on the ball of this radius, None if it is."""
        ...

    def lipschitz(self, radius: float) -> float:
        """Return a Lipschitz constant of the whitened Hessian on the ball of this radius."""
        ...

    def seen(self, directions: Array) -> float:
        """Return how much rows see of directions, shape (d, k): the largest change of a logit along one of
        them, relative to that of its terms without regard to sign. Infinite where that is not known.
        """
        ...


@dataclass(frozen=True)
class Whitening:
    """The Hessian's eigenbasis in the variables ``scale * x``: identified directions and open ones.

    Attributes
    ----------
    T : ndarray, shape (d, k)
        With ``T^T H T = 1``: the identified directions.
    open : ndarray, shape (d, d - k)
        Orthonormal in scaled variables.
    scale : ndarray, shape (d,)
    noise : float
        Size of the components that rounding gives the open directions.
    """

    T: Array
    open: Array
    scale: Array
    noise: float

    @property
    def spread(self) -> float:
        """``||T||_2``, the most that a unit of the whitened variables moves x."""
        return float(np.linalg.norm(self.T, 2))


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
        hessian = problem.hessian_at(at) if at.hessian is None else at.hessian
    if not np.isfinite(hessian).all():
        return refused("the Hessian overflows at x; scale the columns of A")
    diagonal = np.abs(np.diag(hessian))
    scale = np.sqrt(np.where(diagonal > 0.0, diagonal, 1.0))
    model = MoreSorensen(hessian / np.multiply.outer(scale, scale))
    values, vectors, floor = model.values, model.vectors, model.floor
    flat = model.n_flat
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
    # Davis and Kahan: rounding of the Hessian turns a null vector by its size over the gap.
    noise = min(NOISE, 32.0 * len(values) * EPS * float(values[-1] / values[keep].min()))
    white = Whitening(
        vectors[:, keep] / np.sqrt(values[keep]) / scale[:, None], vectors[:, ~keep], scale, noise
    )
    # Rounding of the Hessian: T^T H T is 1 only up to it, which tells in the directions of least curvature.
    lost = 4.0 * len(values) * EPS * float(values[-1] / values[keep].min())
    if not lost <= 0.5:
        return refused(
            f"the Hessian is known to {1 / lost:.1g} of its least curvature only; centre or rescale nearly "
            "dependent columns, or add ridge",
            lambda_min=1.0 / white.spread**2, n_unidentified=flat,
        )  # fmt: skip
    around = ball(white.T)
    slope = float(np.linalg.norm(white.T.T @ at.gradient))
    reach = 4.0 * slope + ROUNDING * np.sqrt(abs(at.value) * len(values))
    rounding, cheap = around.glance(reach)
    eta = (slope + rounding) / (1.0 - lost)
    known: dict[str, Any] = {"eta": eta, "lambda_min": 1.0 / white.spread**2, "n_unidentified": flat}
    obstacle = around.obstacle(2.0 * eta)
    if obstacle is not None:
        return refused(obstacle, **known)
    constant = cheap / (1.0 - lost)
    if not (2.0 * eta <= reach and constant * eta <= NEAR):
        constant = around.lipschitz(2.0 * eta) / (1.0 - lost)
    h = constant * eta
    if not h <= 0.5:
        where = "" if flat == 0 else f" in the {int(keep.sum())} identified directions ({flat} are not)"
        return refused(
            f"the Newton step is too long for the curvature to be constant: M eta = {h:.3g} exceeds "
            f"1/2{where}; tighten tol or add ridge",
            constant=constant, **known,
        )  # fmt: skip
    rho = 2.0 * eta / (1.0 + np.sqrt(1.0 - 2.0 * h))
    # At a distance s the loss is at most eta s - s^2 / 2 + M s^3 / 6 lower, which grows up to s = rho.
    gap = 0.5 * rho**2 * (1.0 - constant * rho / 1.5)
    reason = f"Newton-Kantorovich: M eta = {h:.3g} <= 1/2"
    found = certified(white, rho, gap, reason, constant=constant, **known)
    if flat == 0:
        return found
    pure = np.where(np.abs(white.open) > noise, white.open, 0.0) / scale[:, None]
    return _open(found, white, around.seen(pure) <= min(noise, UNSEEN))


def certified(
    white: Whitening,
    rho: float,
    value_gap: float,
    reason: str,
    *,
    constant: float,
    eta: float,
    lambda_min: float,
    n_unidentified: int = 0,
    scaled: float | None = None,
    rigorous: bool = False,
) -> Certificate:
    """Return the certificate of a ball of radius rho in the whitened variables; ``scaled`` is the radius in
    the norm of H with all its rounding, rho itself where ``T^T H T = 1``.
    """
    # The rounding of the radius itself.
    rho = rho * OUTWARD
    scaled = rho if scaled is None else scaled
    radius = float(rho * white.spread)
    basis = np.linalg.qr(white.T * white.scale[:, None] ** 2)[0]
    is_open = np.linalg.norm(white.open, axis=1) > white.noise
    each = np.where(is_open, np.inf, rho * np.linalg.norm(white.T, axis=1))
    return Certificate(
        valid=True,
        radius=radius,
        scaled_radius=float(scaled),
        value_gap=float(value_gap),
        reason=reason,
        eta=eta,
        lipschitz=constant,
        lambda_min=lambda_min,
        n_unidentified=n_unidentified,
        valid_for_predictions=True,
        identified=Identified(basis, rho * float(np.linalg.norm(basis.T @ white.T, 2)), each),
        coefficient_radius=each,
        radii=np.array([radius]),
        scaled_radii=np.array([scaled]),
        value_gaps=np.array([value_gap]),
        rigorous=rigorous,
    )


def _open(found: Certificate, white: Whitening, unseen: bool) -> Certificate:
    """Return what is left of a certificate where directions are open."""
    # The unknowns that an open direction has a component along.
    columns = np.flatnonzero(np.linalg.norm(white.open, axis=1) > white.noise)
    listed = ", ".join(f"column {j}" for j in columns[:LISTED]) or "a combination of all columns"
    if len(columns) > LISTED:
        listed += f" and {len(columns) - LISTED} more"
    n = white.open.shape[1]
    many = f"{n} direction{'s are' if n > 1 else ' is'} open"
    nothing = np.full(1, np.inf)
    if unseen:
        reason = (
            f"{many}, seen by no row of the data: {listed}; drop columns or add ridge. "
            f"certificate.identified holds in the others ({found.reason})"
        )
        return replace(found, valid=False, radius=np.inf, radii=nothing, reason=reason)
    reason = (
        f"{many}, without curvature in float64 although the data see {'them' if n > 1 else 'it'}: {listed}; "
        f"centre or rescale columns, or add ridge. certificate.identified holds while those are held "
        f"({found.reason})"
    )
    return replace(
        found,
        valid=False,
        radius=np.inf,
        scaled_radius=np.inf,
        value_gap=np.inf,
        reason=reason,
        valid_for_predictions=False,
        radii=nothing,
        scaled_radii=nothing,
        value_gaps=nothing,
    )


def shaped(found: Certificate, shape: tuple[int, ...]) -> Certificate:
    """Return a certificate with coefficient radii in the shape of x, infinite where there are none."""
    each = found.coefficient_radius
    each = each.reshape(shape) if each.size == math.prod(shape) else np.full(shape, np.inf)
    return replace(found, coefficient_radius=each)


def combined(proofs: Sequence[Certificate]) -> Certificate:
    """Return the certificate of independent right-hand sides from theirs: of all of x, shape (d, k).

    Radii add up as the norms of columns do, ``radius = sqrt(sum radius_j^2)``, gaps as values do.
    """
    if len(proofs) == 1:
        return proofs[0]
    radii, scaled, gaps = (
        np.array([getattr(p, name) for p in proofs]) for name in ("radius", "scaled_radius", "value_gap")
    )
    n_valid = sum(p.valid for p in proofs)
    worst = max(range(len(proofs)), key=lambda j: (not proofs[j].valid, proofs[j].radius))
    d = max(len(p.coefficient_radius) for p in proofs)
    each = [p.coefficient_radius if len(p.coefficient_radius) else np.full(d, np.inf) for p in proofs]
    return Certificate(
        valid=n_valid == len(proofs),
        radius=float(np.sqrt(np.sum(radii**2))),
        scaled_radius=float(np.sqrt(np.sum(scaled**2))),
        value_gap=float(np.sum(gaps)),
        reason=f"{n_valid} of {len(proofs)} right-hand sides certified, the worst is {worst}: "
        f"{proofs[worst].reason}",
        eta=max(p.eta for p in proofs),
        lipschitz=max(p.lipschitz for p in proofs),
        lambda_min=float(np.min([p.lambda_min for p in proofs])),
        n_unidentified=sum(p.n_unidentified for p in proofs),
        valid_for_predictions=all(p.valid_for_predictions for p in proofs),
        coefficient_radius=np.stack(each, axis=1),
        radii=radii,
        scaled_radii=scaled,
        value_gaps=gaps,
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

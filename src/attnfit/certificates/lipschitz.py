"""Local Lipschitz constants of the Hessian on a ball, one formula a family.

The constants bound the third derivative on ``{x + T y : |y| <= r}`` in the variables y. Row penalty and ridge
are quadratic and drop out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates.ball import Interval, Rows
from attnfit.losses.exponential import SquaredExponential, Total
from attnfit.losses.log_ratio import LogRatio
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import CrossEntropy, SoftmaxLoss

Array = NDArray[np.float64]


def lipschitz_constant(rows: Rows, radius: float) -> float:
    """Return M with ``|H(y) - H(y')| <= M |y - y'|`` on the ball of this radius, infinite where nothing
    finite is known.
    """
    loss = rows.problem.loss
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(loss, SoftmaxLoss):
            constant = _softmax(rows, loss, radius)
        elif isinstance(loss, SquaredExponential):
            constant = _exponential(rows, loss, radius)
        elif isinstance(loss, SquaredRescaled):
            constant = _rescaled(rows, loss, radius)
        elif isinstance(loss, LogRatio):
            # Quadratic.
            constant = 0.0
        elif isinstance(loss, Total):
            norms = rows.norms(centred=False)
            weights = rows.w * np.exp(rows.z + radius * norms)
            constant = rows.largest_eigenvalue(weights * norms, centred=False)
        else:
            raise TypeError(f"no Lipschitz constant is known for {type(loss).__name__}")
    return constant if np.isfinite(constant) else np.inf


def _exponential(rows: Rows, loss: SquaredExponential, radius: float) -> float:
    """Bound ``sum w v (4 u - b) p q^2`` row by row: the weight t = w (v^2 + (u - b) u) has
    ``dt/dz = w v (4 u - b)``.
    """
    norms = rows.norms(centred=False)
    u, v = _outputs(loss.function, rows.z, radius * norms)
    slope = rows.w * v.magnitude * np.maximum(np.abs(4 * u.low - rows.b), np.abs(4 * u.high - rows.b))
    return rows.largest_eigenvalue(slope * norms, centred=False)


def _softmax(rows: Rows, loss: SoftmaxLoss, radius: float) -> float:
    """Bound the third derivative of any loss Phi of a softmax.

    With centred rows c, ``pt = c.h``, ``qt = c.k``, ``e = C^T t``:

        D^3 L[h, k, k] = sum f (g3 - gamma) pt qt^2 - 2 (e.k) <f, pt qt> - (e.h) <f, qt^2>   per group,

    which for the squared loss is the formula of the papers' case. On the ball the rows' centre moves by at
    most ``shift``.
    """
    segments, b, w = rows.segments, rows.b, rows.w
    spread = segments.spread
    norms = rows.norms(centred=True)
    state_reference = loss.reference(rows.z, segments)
    h = rows.z - spread(state_reference)
    f = np.exp(h)
    reach = radius * norms
    inflated = f * np.exp(reach)
    f_ball = Interval(f * np.exp(-reach) / spread(segments.sum(inflated)), np.minimum(1.0, inflated))
    h_ball = Interval(h - reach - np.log(spread(segments.sum(inflated))), np.minimum(0.0, h + reach))
    shift = radius * spread(segments.sum(f_ball.high * norms**2)) + 0.0 * f
    if isinstance(loss, CrossEntropy):
        sigma = spread(rows.problem.constants)
        return _shifted(rows, sigma * f_ball.high * (norms + shift), shift)

    def ball(formula) -> Interval:  # type: ignore[no-untyped-def]
        # p, g2 and g3 are monotone in f (in h = log f for entropy): the ends of f give the ends of the
        # formula.
        one = formula(f_ball.low, h_ball.low, b, w) + 0.0 * f
        other = formula(f_ball.high, h_ball.high, b, w) + 0.0 * f
        return Interval(np.minimum(one, other), np.maximum(one, other))

    gamma = (f_ball * ball(loss.p)).sum(segments)
    omega = f_ball.high * (ball(loss.g3) - gamma).magnitude
    g2 = loss.g2(f, h, b, w) + 0.0 * f
    tau = f * (g2 - spread(segments.sum(f * g2)))
    g2_ball = ball(loss.g2)
    tau_ball = f_ball * (g2_ball - (f_ball * g2_ball).sum(segments))
    drift = segments.sum(tau_ball.deviation(tau) * norms)
    e = rows.group_norms(tau) + spread(drift)
    return _shifted(rows, omega * (norms + shift), shift) + 3.0 * _shifted(rows, e * f_ball.high, shift)


def _shifted(rows: Rows, weights: Array, shift: Array) -> float:
    """Bound the largest eigenvalue of the Gram whose centres may have moved by ``shift``."""
    root = np.sqrt(rows.largest_eigenvalue(weights, centred=True))
    return float((root + np.sqrt(np.sum(weights * shift**2))) ** 2)


def _rescaled(rows: Rows, loss: SquaredRescaled, radius: float) -> float:
    """Bound ``<Q u, v p q^2> + 2 <P(u p q), P(v q)> + <P(u q^2), P(v p)>`` with ``P = 1 - b 1^T`` in each
    group.

    Groups are added by the Cauchy-Schwarz inequality.
    """
    segments, b, w = rows.segments, rows.b, rows.w
    norms = rows.norms(centred=False)
    u, v = _outputs(loss.function, rows.z, radius * norms)
    u_mid, u_rad = 0.5 * (u.low + u.high), 0.5 * (u.high - u.low)
    v_mid, v_rad = 0.5 * (v.low + v.high), 0.5 * (v.high - v.low)

    def total(values: Array) -> Array:
        return segments.spread(segments.sum(values)) + np.zeros(len(values))

    bb = total(w * b * b)
    q_mid = w * (u_mid - b * total(u_mid)) - total(w * b * u_mid) + bb * total(u_mid)
    q_rad = w * u_rad + (w * np.abs(b) + bb) * total(u_rad) + total(w * np.abs(b) * u_rad)
    first = rows.largest_eigenvalue(v.magnitude * (np.abs(q_mid) + q_rad) * norms, centred=False)
    u_top = u.magnitude
    group_bb = segments.sum(w * b * b)
    # The trace bounds the largest eigenvalue of a group's Gram; for one group the eigenvalue itself is as
    # cheap.
    if len(segments) == 1:
        own = np.array([rows.largest_eigenvalue(u_top, centred=False)])
    else:
        own = segments.sum(u_top * norms**2)
    pu = np.sqrt(rows.largest_eigenvalue(w * (u_top * norms) ** 2, centred=False))
    pu += np.sqrt(np.sum(group_bb * own**2))
    if len(segments) == 1:
        moved = np.array([rows.largest_eigenvalue(v_rad**2 * w, centred=False)])
    else:
        moved = segments.sum(v_rad**2 * w * norms**2)
    exact = rows.deflated_norm(v_mid)
    pv = exact + np.sqrt(np.sum(moved)) + np.sqrt(np.sum(group_bb * segments.sum(v_rad * norms) ** 2))
    return float(first + 3.0 * pu * pv)


def _outputs(function: str, z: Array, reach: Array) -> tuple[Interval, Interval]:
    """Return the ranges of u and u' on ``z +- reach``."""
    low, high = z - reach, z + reach
    if function == "exp":
        u = Interval(np.exp(low), np.exp(high))
        return u, u
    sinh = Interval(np.sinh(low), np.sinh(high))
    closest = np.where((low < 0) & (high > 0), 0.0, np.minimum(np.abs(low), np.abs(high)))
    cosh = Interval(np.cosh(closest), np.cosh(np.maximum(np.abs(low), np.abs(high))))
    return (cosh, sinh) if function == "cosh" else (sinh, cosh)

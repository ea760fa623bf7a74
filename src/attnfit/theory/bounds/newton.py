"""Approximate Newton near a minimum, and gradient descent: contraction."""

from __future__ import annotations

import numpy as np

from attnfit.theory.bound import Bound, Condition, Sharp, below
from attnfit.theory.instances.step import Step
from attnfit.theory.logs import Array, log, product


def _start(i: Step, R: float) -> str | None:
    value = i.M * i.r
    return None if value <= 0.1 * i.l * (1 + 1e-9) else f"M r = {value:.6g} exceeds 0.1 l = {0.1 * i.l:.6g}"


def _history(i: Step, R: float) -> str | None:
    if i.previous is None or i.r <= 0.4 * i.previous * (1 + 1e-9):
        return None
    return f"r = {i.r:.6g} exceeds 0.4 times the distance before, {i.previous:.6g}"


def _descent(i: Step, R: float) -> str | None:
    limit = 2.0 / float(i.spectrum[0] + i.spectrum[-1])
    return None if i.descent_step < limit else f"t = {i.descent_step:.6g} is not below {limit:.6g}"


GOOD: Condition[Step] = Condition("M r <= 0.1 l", _start)
ACCURATE: Condition[Step] = below("eps0", lambda i: i.eps, 0.1, strict=True)
PERCENT: Condition[Step] = below("eps0", lambda i: i.eps, 0.01)
HISTORY: Condition[Step] = Condition("r <= 0.4 of the distance before the last step", _history)


def _printed_rate(i: Step) -> Array:
    gap = i.l - i.M * i.r
    return product(2, i.eps + (i.M * i.r / gap if gap > 0 else np.inf), i.r)


def _theta(i: Step) -> float:
    return float(i.M * i.length(i.e, i.H) / i.l**1.5)


def _energy_rate(i: Step) -> Array:
    """``(eps0 + theta + eps0 theta + theta/2)/((1 - eps0)(1 - theta)) |e|_*``."""
    theta, eps = _theta(i), i.eps
    if theta >= 1.0 or eps >= 1.0:
        return np.asarray(np.inf)
    rate = (eps + theta + eps * theta + 0.5 * theta) / ((1.0 - eps) * (1.0 - theta))
    return product(rate, i.length(i.e, i.H))


def _local_rate(i: Step) -> Array:
    """``eps0/(1 - eps0) |e|_H + M r^2/(2 (1 - eps0) sqrt(l - M r))``, H at e."""
    gap = i.l - i.M * i.r
    if gap <= 0.0 or i.eps >= 1.0:
        return np.asarray(np.inf)
    return log(i.eps / (1 - i.eps) * i.length(i.e, i.here) + i.M * i.r**2 / (2 * (1 - i.eps) * np.sqrt(gap)))


STAR = Sharp[Step](
    "|e+|_* <= (eps0 + theta + eps0 theta + theta/2)/((1 - eps0)(1 - theta)) |e|_*, |e|_* = |H*^(1/2) e|, "
    "theta = M |e|_* / l^1.5",
    lambda i, R: _energy_rate(i),
    lambda i: log(i.length(i.after, i.H)),
)
LOCAL = Sharp[Step](
    "|e+|_H <= eps0/(1 - eps0) |e|_H + M r^2/(2 (1 - eps0) sqrt(l - M r))",
    lambda i, R: _local_rate(i),
    lambda i: log(i.length(i.after, i.here)),
)
# At eps0 = 0.01 and theta = 0.1 the corrected factor is 0.18.
RATE = Sharp[Step](
    "|e+|_* <= 0.4 |e|_* where eps0 <= 0.01 and theta <= 0.1",
    lambda i, R: (
        product(0.4, i.length(i.e, i.H)) if i.eps <= 0.01 and _theta(i) <= 0.1 else np.asarray(np.inf)
    ),
    lambda i: log(i.length(i.after, i.H)),
)


def ill_conditioned() -> Step:
    """Return a quadratic of condition number 1e6 with a 1 % accurate Hessian.

    The step before, from (0, 1) with the Hessian 1.01 H, left a hundredth of the error.
    """
    before = 1.0
    return Step(np.diag([1.0, 1e6]), [0.0, before / 101.0], [[0.0, 0.01], [0.01, 0.0]], previous=before)


def _contraction(id: str, sharp: Sharp[Step]) -> Bound[Step]:
    return Bound(
        id, "error after a step with a Hessian of spectral accuracy eps0",
        "r_{t+1} <= 2 (eps0 + M r/(l - M r)) r", Step, lambda i: log(np.linalg.norm(i.after)),
        lambda i, R: _printed_rate(i), (GOOD, ACCURATE), status="fails",
        worst="500, like the root of the condition number",
        sharp=sharp, remark="false in the Euclidean norm", counterexample=ill_conditioned,
    )  # fmt: skip


def _shrinking(id: str) -> Bound[Step]:
    return Bound(
        id, "error after a step with eps0 = 0.01", "r_{t+1} <= 0.4 r", Step,
        lambda i: log(np.linalg.norm(i.after)), lambda i, R: product(0.4, i.r), (GOOD, PERCENT, HISTORY),
        status="fails", worst="25, like the root of the condition number", sharp=RATE,
        remark="true in the norm of the Hessian at the minimum", counterexample=ill_conditioned,
    )  # fmt: skip


BOUNDS: list[Bound[Step]] = [
    _contraction("RH-5.5", STAR),
    _shrinking("RH-5.6"),
    _contraction("TL-6.6", LOCAL),
    _shrinking("TL-6.7"),
    Bound(
        "NEW-TL-7", "error after a step with a Hessian of spectral accuracy eps0, in the norm of that there",
        LOCAL.formula, Step, lambda i: log(i.length(i.after, i.here)), lambda i, R: _local_rate(i), (GOOD,),
        worst="0.98",
    ),
    Bound(
        "UT-I.1", "distance after k steps of gradient descent, m I <= H <= L I",
        "|x_k - x*| <= (1 - m/L)^{k/2} |x_0 - x*|^2 for t < 2/(m + L)", Step, lambda i: log(i.descended),
        lambda i, R: 0.5 * i.k * log(1.0 - 1.0 / i.cond) + 2 * log(i.r) if i.k else 2 * log(i.r),
        (Condition("t < 2/(m + L)", _descent),), status="fails", worst="unbounded",
        sharp=Sharp(
            "|x_k - x*| <= (1 - t m)^k |x_0 - x*|",
            lambda i, R: log(i.r) + (i.k * log(max(1.0 - i.descent_step * i.l, 0.0)) if i.k else 0.0),
        ),
        remark="the distance is squared, and the step t does not enter",
        counterexample=lambda: Step(np.diag([1.0, 2.0]), [0.1, 0.0], t=0.5),
    ),
]  # fmt: skip

"""The iterates of a finished fit, measured: how far each is from the minimum, and with what Hessian each step
could have been made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.certificates.certification import certify
from attnfit.certificates.good_start import Condition, conditions
from attnfit.data.inputs import as_point
from attnfit.objectives.objective import Evaluation

Array = NDArray[np.float64]

# x_ref is polished until the decrement is below this share of its first value, or no longer falls.
DECREMENT, POLISH = 1e-14, 20
# Distances below so many radii of the certificate of x_ref are not resolved.
RESOLVED = 10.0
# Without a certificate the Newton step at x_ref must be this short to be called zero.
STATIONARY = 1e-12
# Steps of gradient descent agree with ``t g`` to this.
PARALLEL = 1e-8
# Points of each segment to x*, and iterates, at which the extreme curvature is sampled.
ON_SEGMENT, SAMPLED_ITERATES = 10, 12


@dataclass(frozen=True)
class Reference:
    """The point that distances are measured from.

    Attributes
    ----------
    at : Evaluation
    hessian : ndarray, shape (d, d)
        H*.
    radius : float
        ``|x_ref - x*|`` at most, for a stationary point x*; infinite where H* is not positive definite.
    scaled_radius : float
        The same in the norm of H*.
    certified : bool
        Whether a certificate proves it; else it is twice the length of the next Newton step.
    step : float
        Length of that step.
    """

    at: Evaluation
    hessian: Array
    radius: float
    scaled_radius: float
    certified: bool
    step: float

    @cached_property
    def spectrum(self) -> tuple[Array, Array]:
        """Eigenvalues of H*, ascending, and eigenvectors."""
        values, vectors = np.linalg.eigh(self.hessian)
        return values, vectors

    @property
    def lowest(self) -> float:
        """The smallest eigenvalue l of H*."""
        return float(self.spectrum[0][0])

    @property
    def cond(self) -> float:
        """The largest eigenvalue of H* over the smallest."""
        values = self.spectrum[0]
        return float(values[-1] / values[0]) if values[0] > 0.0 else np.inf

    def scaled(self, e: Array) -> Array:
        """Return ``|H*^(1/2) e|`` of errors, shape (k, d)."""
        return np.asarray(np.sqrt(np.einsum("ki,ij,kj->k", e, self.hessian, e).clip(0.0)))


def polished(problem: Any, x: Array) -> Reference:
    """Return the stationary point next to x, by exact Newton steps while they shrink."""
    at = problem.evaluate(x.reshape(-1).copy())
    step, decrement, hessian = _newton(problem, at)
    first = decrement
    for _ in range(POLISH):
        if step is None or decrement <= DECREMENT * first:
            break
        with np.errstate(over="ignore", invalid="ignore"):
            trial = problem.evaluate(at.x + step)
        following = _newton(problem, trial)
        if following[0] is None or not following[1] < decrement:
            break
        at, (step, decrement, hessian) = trial, following
    length = np.inf if step is None else float(np.linalg.norm(step))
    if step is None:
        return Reference(at, hessian, np.inf, np.inf, certified=False, step=length)
    certificate = certify(problem, at.x.reshape(problem.shape))
    if getattr(certificate, "valid", False):
        return Reference(
            at, hessian, certificate.radius, certificate.scaled_radius, certified=True, step=length
        )
    return Reference(at, hessian, 2.0 * length, 2.0 * float(np.sqrt(decrement)), certified=False, step=length)


def _newton(problem: Any, at: Evaluation) -> tuple[Array | None, float, Array]:
    """Return the Newton step and its decrement, None where the Hessian is not positive definite; the
    Hessian.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        hessian = np.asarray(problem.hessian_at(at))
    if not (np.isfinite(hessian).all() and np.isfinite(at.value)):
        return None, np.inf, np.full_like(hessian, np.nan)
    try:
        factor = linalg.cho_factor(hessian, lower=True, check_finite=False)
    except linalg.LinAlgError:
        return None, np.inf, hessian
    step = -linalg.cho_solve(factor, at.gradient, check_finite=False)
    return step, float(-at.gradient @ step), hessian


@dataclass(frozen=True)
class Trajectory:
    """A descent, and the point that it led to.

    Attributes
    ----------
    problem : Problem
    points : ndarray, shape (T + 1, d)
    reference : Reference
    epsilon0 : float or None
        As given by the caller.
    """

    problem: Any
    points: Array
    reference: Reference
    epsilon0: float | None = None

    @classmethod
    def of(cls, result: Any, x_ref: Any, epsilon0: float | None) -> Trajectory:
        """Return the trajectory of a result.

        Raises
        ------
        ValueError
            If the fit has several right-hand sides, or ended before its first evaluation.
        """
        problem, points = result.problem, result.points
        if getattr(problem, "n_columns", 1) > 1:
            raise ValueError(
                f"the theorems speak of one right-hand side, not {problem.n_columns}; fit one column of b"
            )
        if not len(points):
            raise ValueError("result.points is empty: the fit ended before its first evaluation; fit again")
        x = result.x if x_ref is None else as_point(x_ref, problem.shape, "x_ref")
        return cls(problem, points.reshape(len(points), -1), polished(problem, np.asarray(x)), epsilon0)

    # ---- distances

    @cached_property
    def errors(self) -> Array:
        """``x_t - x*``, shape (T + 1, d)."""
        return np.asarray(self.points - self.reference.at.x)

    @cached_property
    def r(self) -> Array:
        """``|x_t - x*|``, shape (T + 1,)."""
        return np.asarray(np.linalg.norm(self.errors, axis=1))

    @cached_property
    def scaled(self) -> Array:
        """``|H*^(1/2)(x_t - x*)|``, shape (T + 1,)."""
        return self.reference.scaled(self.errors)

    @cached_property
    def resolved(self) -> NDArray[np.bool_]:
        """Which distances the reference resolves."""
        return np.asarray(self.r >= RESOLVED * self.reference.radius)

    @property
    def n_steps(self) -> int:
        """Number of steps from a point that is resolved."""
        return int(self.resolved[:-1].sum())

    @property
    def stationary(self) -> tuple[str, float, float, bool]:
        """Whether an exact stationary point is next to x_ref: name, value, limit, met."""
        found = self.reference
        if found.certified:
            return "a stationary point within rho of x_ref (certified)", found.radius, self.r[0], True
        limit = STATIONARY * max(float(np.linalg.norm(found.at.x)), float(self.r[0]))
        return "grad(x*) = 0: |H^-1 grad| at x_ref", found.step, limit, bool(found.step <= limit)

    # ---- Hessians

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Value and gradient at each point."""
        return [self.problem.evaluate(x.copy()) for x in self.points]

    @cached_property
    def accuracy(self) -> Array:
        """The least spectral accuracy eps0 of a Hessian that makes each step, shape (T,); NaN where it is not
        resolved, infinite where none does.

        With ``s`` the step, ``g`` the gradient and ``H`` the Hessian at its start: some H~ with
        ``(1 - eps0) H <= H~ <= (1 + eps0) H`` has ``H~ s = -g`` if and only if
        ``|H^(1/2) s + H^(-1/2) g| <= eps0 |H^(1/2) s|`` (a symmetric matrix of norm ``|v|/|u|`` takes u to
        v). What the reference does not resolve is not held against the step.
        """
        out = np.full(len(self.points) - 1, np.nan)
        for t in np.flatnonzero(self.resolved[:-1]):
            at, s = self.evaluations[t], self.points[t + 1] - self.points[t]
            newton, _, hessian = _newton(self.problem, at)
            length = float(np.sqrt(max(s @ hessian @ s, 0.0))) if newton is not None else 0.0
            if newton is None or length == 0.0:
                out[t] = np.inf
                continue
            off = s - newton
            missed = float(np.sqrt(max(off @ hessian @ off, 0.0))) - self.reference.scaled_radius
            out[t] = max(missed, 0.0) / length
        return out

    @cached_property
    def constant_step(self) -> float | None:
        """The t of ``x_{k+1} = x_k - t grad(x_k)`` where all steps are of that kind, else None."""
        steps = []
        for k in np.flatnonzero(self.resolved[:-1]):
            g, s = self.evaluations[k].gradient, self.points[k] - self.points[k + 1]
            t = float(s @ g) / max(float(g @ g), np.finfo(float).tiny)
            rounding = np.finfo(float).eps * float(np.abs(self.points[k]).max())
            if np.linalg.norm(s - t * g) > PARALLEL * np.linalg.norm(s) + 4.0 * rounding * len(s) ** 0.5:
                return None
            steps.append(t)
        if not steps or max(steps) - min(steps) > 1e-6 * max(steps) or not min(steps) > 0.0:
            return None
        return float(np.median(steps))

    @cached_property
    def curvature(self) -> tuple[float, float]:
        """The extreme eigenvalues m and L of the Hessian at x*, at iterates and on the segments between."""
        kept = np.flatnonzero(self.resolved)
        chosen = kept[np.unique(np.linspace(0, len(kept) - 1, SAMPLED_ITERATES).astype(int))]
        values = [self.reference.spectrum[0]]
        for k in chosen:
            for share in np.arange(1, ON_SEGMENT + 1) / ON_SEGMENT:
                at = self.problem.evaluate(self.reference.at.x + share * self.errors[k])
                values.append(np.linalg.eigvalsh(self.problem.hessian_at(at)))
        return float(min(v[0] for v in values)), float(max(v[-1] for v in values))

    # ---- constants

    @cached_property
    def condition(self) -> Condition:
        """What the papers' conditions on a start are made of.

        Raises
        ------
        ValueError
            If the papers have none for this problem.
        """
        shape = self.problem.shape
        start, end = self.points[0].reshape(shape), self.reference.at.x.reshape(shape)
        return next(iter(conditions(self.problem, start, end)))

    @cached_property
    def lipschitz(self) -> float:
        """A Lipschitz constant M of the Hessian on the ball around x* that holds all iterates."""
        return self.condition.lipschitz(np.eye(self.points.shape[1]), self._reach(self.r))

    @cached_property
    def scaled_lipschitz(self) -> float:
        """The same in the variables ``H*^(1/2) x``, for the iterates' distances there."""
        if not self.reference.lowest > 0.0:
            return np.inf
        values, vectors = self.reference.spectrum
        return self.condition.lipschitz(vectors / np.sqrt(values), self._reach(self.scaled))

    def _reach(self, distances: Array) -> float:
        return float(distances[self.resolved].max(initial=0.0))

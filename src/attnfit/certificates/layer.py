"""The Newton-Kantorovich ball of the inversion of an attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.certificates.kantorovich import Certificate, newton_kantorovich, refused
from attnfit.problems.base import MAX_DENSE
from attnfit.problems.inputs import as_point
from attnfit.problems.inversion.layer import HeadState
from attnfit.problems.inversion.layer_problem import LayerEvaluation, LayerProblem

Array = NDArray[np.float64]


def certify_layer(problem: LayerProblem, x: Any) -> Certificate:
    """Certify an inverted layer: find a ball around x with exactly one stationary point.

    An input that gives B exactly is a stationary point: if it lies in the ball, it is the one.
    """
    if problem.n_unknowns > MAX_DENSE:
        return refused(
            f"a certificate takes all eigenvalues of a matrix of {problem.n_unknowns:,} unknowns, more than "
            f"{MAX_DENSE:,}; give known tokens"
        )
    at = problem.evaluate(as_point(x, problem.shape).copy())
    return newton_kantorovich(problem, at, lambda whitener: LayerBall(problem, at, whitener))


@dataclass(frozen=True)
class Bounds:
    """Bounds for one head at the centre, over unit whitened directions.

    Attributes
    ----------
    logits : ndarray, shape (n, n)
        Of the derivative of logit (i, k) less its mean under the attention of query i.
    bend : ndarray, shape (n, n)
        Of half the second derivative of logit (i, k).
    values : ndarray, shape (n,)
        Of the derivative of the value of key k.
    gaps : ndarray, shape (n, n)
        ``||v_k - o_i||``.
    """

    logits: Array
    bend: Array
    values: Array
    gaps: Array


class LayerBall:
    """What is known on balls ``x + whitener y``, ``||y|| <= radius``.

    With residuals r, ``D^3 L(u, u, u) = 3 <r', r''> + <r, r'''>`` along u, and a symmetric trilinear form is
    largest where its arguments agree. Along u, attention p with logit rates z (less their mean) has
    ``p' = p z``, ``p'' = p (z^2 - E z^2 + s'' - E s'')`` and
    ``p''' = p (z^3 - 3 z E z^2 - E z^3 + 3 (z (s'' - E s'') - E z s''))``; each factor is bounded for every
    query and key, at the centre exactly and on the ball by its own rate. See `attnfit.certificates.ball` for
    the same with rows.
    """

    def __init__(self, problem: LayerProblem, at: LayerEvaluation, whitener: Array) -> None:
        self.problem, self.at = problem, at
        d, u = problem.shape
        self.W = np.zeros((problem.n, d, whitener.shape[1]))
        self.W[problem.unknown] = whitener.reshape(d, u, -1).swapaxes(0, 1)
        self.moves = np.linalg.norm(self.W, ord=2, axis=(1, 2))
        self.bounds = [self._bounds(s) for s in at.forward.heads]
        J = problem.layer.jacobian(at.forward, problem.unknown)
        self.slope = float(np.linalg.norm(J @ whitener, 2))
        self.residual = float(np.linalg.norm(at.residuals))
        self.spread = float(np.linalg.norm(whitener, 2))

    def obstacle(self, radius: float) -> str | None:
        """Return None: attention is smooth."""
        return None

    def seen(self, directions: Array) -> float:
        """Return inf: what attention does not see of an open direction is not known."""
        return np.inf

    def lipschitz(self, radius: float) -> float:
        """Return a Lipschitz constant of the whitened Hessian on a ball."""
        if not np.isfinite(radius):
            return np.inf
        with np.errstate(over="ignore", invalid="ignore"):
            second, third = self._rates(radius)
            slope = self.slope + second * radius
            residual = self.residual + slope * radius
            constant = 3.0 * slope * second + residual * third
        return float(constant) if np.isfinite(constant) else np.inf

    def rounding(self) -> float:
        """Bound the effect of rounding in the forward pass on the whitened gradient, to first order."""
        eps = float(np.finfo(np.float64).eps)
        at, problem = self.at, self.problem
        errors = np.abs(problem.B)
        for s in at.forward.heads:
            logits = np.abs(s.R) @ np.abs(at.forward.Tc).T
            size = np.abs(at.forward.Tc) @ np.abs(s.head.V)
            spread = np.where(s.P > 0.0, s.P * logits, 0.0)
            errors = errors + (s.P + 2.0 * spread) @ (size + np.abs(s.O).max(axis=0))
        forward = 4.0 * eps * np.sqrt(problem.d) * float(np.linalg.norm(errors))
        x = float(np.linalg.norm(at.x))
        backward = 8.0 * eps * (problem.n * self.slope * self.residual + problem.gamma * x * self.spread)
        return float(forward * self.slope + backward)

    def _bounds(self, s: HeadState) -> Bounds:
        """Return the bounds at the centre."""
        n = self.problem.n
        logits = np.empty((n, n))
        for i in range(n):
            # Query i moves its logits through its own row, keys through theirs.
            own = np.einsum("kl,lw->kw", s.Q, self.W[i])
            rates = own + np.einsum("l,klw->kw", s.R[i], self.W)
            rates -= s.P[i] @ rates
            logits[i] = np.linalg.norm(rates, axis=1)
        form = np.linalg.norm(s.head.M, 2)
        bend = form * np.multiply.outer(self.moves, self.moves)
        values = np.linalg.norm(np.einsum("lj,klw->kjw", s.head.V, self.W), ord=2, axis=(1, 2))
        gaps = np.linalg.norm(s.H[None] - s.O[:, None], axis=2)
        return Bounds(np.where(s.P > 0.0, logits, 0.0), bend, values, gaps)

    def _rates(self, radius: float) -> tuple[float, float]:
        """Bound the second and third derivative of the residuals along unit directions on a ball."""
        rows = np.zeros((2, self.problem.n))
        for s, b in zip(self.at.forward.heads, self.bounds, strict=True):
            P = s.P
            # Rates of logits on the ball, against the mean under the attention of the centre.
            rate = b.logits + 2.0 * radius * (b.bend + np.sum(P * b.bend, axis=1, keepdims=True))
            drift = radius * rate.max(axis=1, keepdims=True, where=P > 0.0, initial=0.0)
            factor = np.exp(2.0 * drift)
            p = P * factor
            # The mean moves with the attention: by at most (factor - 1) of the mean bound.
            z = rate + np.sum((factor - 1.0) * P * rate, axis=1, keepdims=True)
            change = radius * (b.values + np.sum(p * b.values, axis=1, keepdims=True))
            gap = b.gaps + change + np.sum((factor - 1.0) * P * b.gaps, axis=1, keepdims=True)
            s2 = 2.0 * (b.bend + np.sum(p * b.bend, axis=1, keepdims=True))
            var = np.sum(p * z**2, axis=1, keepdims=True)
            cube = np.sum(p * z**3, axis=1, keepdims=True)
            cross = np.sum(p * z * s2, axis=1, keepdims=True)
            z2 = z**2 + var + s2
            z3 = z**3 + 3.0 * z * var + cube + 3.0 * (z * s2 + cross)
            rows[0] += np.sum(p * (z2 * gap + 2.0 * z * b.values), axis=1)
            rows[1] += np.sum(p * (z3 * gap + 3.0 * z2 * b.values), axis=1)
        second, third = np.linalg.norm(rows, axis=1)
        return float(second), float(third)

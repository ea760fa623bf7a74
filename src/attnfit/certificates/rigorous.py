"""A ball around x that is proven, given IEEE double arithmetic and exp to 2 units in the last place.

Everything is an `Enclosure`, an array known to within a radius, rounding included: every operation encloses
the exact result for all numbers within the operands' radii, provided that sums and products round to nearest,
in any order of summation and with or without fused multiplication. Rump, "Fast and parallel interval
arithmetic" (1999), doi:10.1023/A:1022374804152; Higham, "Accuracy and Stability of Numerical Algorithms"
(2002), Section 3.1 for ``gamma_n = n u / (1 - n u)``.

Enclosed are the rows less the first of their group, logits, outputs, gradient and the whitened Hessian. With
any T, here an approximate whitener, let ``eta >= |T^T grad|`` and ``beta >= ||1 - T^T H T||_F``: if ``beta <
1/2`` then H is positive definite, ``eta' = eta / (1 - beta)`` bounds the Newton step, and with M a Lipschitz
constant of ``T^T H(x + T y) T`` on ``|y| <= 2 eta'`` and ``h = M eta' / (1 - beta) <= 1/2`` the stationary
point is within ``2 eta' / (1 + sqrt(1 - 2 h)) ||T||``. No eigenvalue is trusted. Rump, "Verification methods"
(2010), doi:10.1017/S096249291000005X.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnfit.certificates.kantorovich import Certificate, Whitening, certified, refused
from attnfit.certificates.lipschitz import Interval
from attnfit.data.matrix import DenseDesign
from attnfit.losses.elementwise import SquaredExponential
from attnfit.losses.softmax import LOSSES, CrossEntropy, Entropy, SoftmaxLoss, Squared
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.rows import RowProblem
from attnfit.segments import Array, Segments
from attnfit.solvers.curvature import natural_scale
from attnfit.solvers.subproblem import MoreSorensen

U = 2.0**-53
# Radii are sums of non-negative terms: their own rounding, of so many terms, is less than this.
OUTWARD = 1.0 + 1e-8
MOST_TERMS = 10_000_000
# Roots of squares that underflow.
UNDERFLOW = 1e-153
# Covers what underflows.
TINY = float(np.finfo(np.float64).tiny)


def gamma(n: int) -> float:
    """Return ``n u / (1 - n u)``, the relative error of a product of n roundings."""
    return n * U / (1.0 - n * U)


@dataclass(frozen=True)
class Enclosure:
    """Numbers within ``rad`` of ``mid``, entrywise."""

    mid: Array
    rad: Array

    @classmethod
    def exact(cls, values: Array) -> Enclosure:
        """Return numbers known exactly."""
        return cls(values, np.zeros_like(values))

    @classmethod
    def rounded(cls, mid: Array, rad: Array, units: float = 1.0) -> Enclosure:
        """Return a computed midpoint; the radius grows by its rounding."""
        return cls(mid, (rad + units * U * np.abs(mid)) * OUTWARD + TINY)

    @property
    def size(self) -> Array:
        """Largest absolute value."""
        return (np.abs(self.mid) + self.rad) * OUTWARD

    def __getitem__(self, index: Any) -> Enclosure:
        return Enclosure(self.mid[index], self.rad[index])

    def __add__(self, other: Enclosure) -> Enclosure:
        return self.rounded(self.mid + other.mid, self.rad + other.rad)

    def __neg__(self) -> Enclosure:
        return Enclosure(-self.mid, self.rad)

    def __sub__(self, other: Enclosure) -> Enclosure:
        return self + -other

    def __mul__(self, other: Enclosure) -> Enclosure:
        rad = np.abs(self.mid) * other.rad + self.rad * other.size
        return self.rounded(self.mid * other.mid, rad)

    def __matmul__(self, other: Enclosure) -> Enclosure:
        n = self.mid.shape[-1]
        sizes = np.abs(self.mid)
        rad = sizes @ (other.rad + gamma(n) * np.abs(other.mid)) + self.rad @ other.size
        return self.rounded(self.mid @ other.mid, rad + n * TINY)

    @property
    def T(self) -> Enclosure:
        """The transpose."""
        return Enclosure(self.mid.T, self.rad.T)

    def scaled(self, factor: float) -> Enclosure:
        """Return the product with a power of two: it does not round."""
        return Enclosure(factor * self.mid, abs(factor) * self.rad)

    def reciprocal(self) -> Enclosure:
        """Return one over positive numbers; the radius is infinite where they may not be positive."""
        least = self.mid - self.rad
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rad = np.where(least > 0.0, self.rad / (self.mid * least), np.inf)
            return self.rounded(1.0 / self.mid, rad, 2.0)

    def exp(self) -> Enclosure:
        """Return the exponential, to 2 units in the last place: four roundings."""
        value = np.exp(self.mid)
        # expm1(r) <= r e^r, and the exponential in it is rounded too.
        return self.rounded(value, value * self.rad * np.exp(self.rad) * OUTWARD, 4.0)

    def log(self) -> Enclosure:
        """Return the logarithm of positive numbers, checked by the exponential of what is computed."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found = np.log(self.mid)
            ratio = self * Enclosure.exact(-found).exp()
            off = np.abs(ratio.mid - 1.0) + ratio.rad + U
            return Enclosure(found, np.where(off < 0.5, off / (1.0 - off) * OUTWARD, np.inf))

    def sums(self, segments: Segments) -> Enclosure:
        """Return the sum over each run of rows."""
        longest = int(segments.sizes.max())
        rad = segments.sum(self.rad) + gamma(longest) * segments.sum(np.abs(self.mid))
        return self.rounded(segments.sum(self.mid), rad)

    def spread(self, segments: Segments) -> Enclosure:
        """Repeat one value a run on its rows."""
        return Enclosure(np.repeat(self.mid, segments.sizes), np.repeat(self.rad, segments.sizes))

    def norm(self) -> float:
        """Return an upper bound of the Euclidean (Frobenius) norm."""
        return float(np.linalg.norm(self.size) * OUTWARD + np.sqrt(self.size.size) * UNDERFLOW)

    def row_norms(self) -> Array:
        """Return an upper bound of the norm of each row."""
        return np.asarray(
            np.linalg.norm(self.size, axis=1) * OUTWARD + np.sqrt(self.size.shape[1]) * UNDERFLOW
        )


# Ranges over the ball are widened by this share of their terms.
WIDEN = 1e-8
KNOWN = {SquaredExponential, *map(type, LOSSES.values())}


def certify_rigorously(problem: RowProblem, x: Array, centred: RowProblem) -> Certificate:
    """Certify x with every rounding error bounded; ``centred`` rows propose the whitener."""
    obstacle = _unsupported(problem)
    if obstacle is not None:
        return refused(
            f"no rigorous certificate is known for {obstacle}; call certificate() without rigorous"
        )
    at = centred.evaluate(x)
    white = _whitening(centred, at) if np.isfinite(at.value) else None
    if white is None:
        return refused(
            "x is no strict minimum in float64: a direction is open or has negative curvature; certificate() "
            "says which"
        )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        rows = _rows_of(problem, x)
        return _ball(rows, Enclosure.exact(white.T), white)


def _unsupported(problem: RowProblem) -> str | None:
    """Return what of the problem has no enclosure here."""
    loss = problem.loss
    if type(loss) not in KNOWN:
        return f"the loss {type(loss).__name__}"
    if not problem.rows.is_whole or type(problem.design) is not DenseDesign:
        return "rows that are not a dense matrix in memory"
    if problem.n_rows + problem.n_unknowns > MOST_TERMS:
        return f"more than {MOST_TERMS:,} rows"
    return "a row_penalty" if problem.penalty is not None else None


def _whitening(problem: RowProblem, at: Evaluation) -> Whitening | None:
    """Return an approximate whitener of all directions, None where there is none."""
    hessian, scale = problem.hessian_at(at), natural_scale(problem, at)
    if not np.isfinite(hessian).all():
        return None
    model = MoreSorensen(hessian / np.multiply.outer(scale, scale))
    if model.values[0] <= model.floor:
        return None
    T = model.vectors / np.sqrt(model.values) / scale[:, None]
    return Whitening(T, np.zeros((len(scale), 0)), scale, 0.0)


@dataclass(frozen=True)
class _Rows:
    """The problem at x in enclosures: rows (n, d), gradient in the logits and curvature of every row.

    ``f`` are the outputs; ``constants`` and the groups' ``gamma`` are those of a softmax, None otherwise.
    """

    loss: SoftmaxLoss | SquaredExponential
    segments: Segments
    A: Enclosure
    z: Enclosure
    f: Enclosure
    slope: Enclosure
    weight: Enclosure
    b: Array
    w: Array
    constants: Array | None
    g2: Enclosure | None
    x: Array
    ridge: Array

    @property
    def centred(self) -> Enclosure:
        """The rows less their mean under the softmax; the rows themselves where they are not coupled."""
        if self.constants is None:
            return self.A
        means = [
            (self.f * self.A[:, j]).sums(self.segments).spread(self.segments) for j in range(len(self.x))
        ]
        columns = [self.A[:, j] - mean for j, mean in enumerate(means)]
        return Enclosure(
            np.stack([c.mid for c in columns], axis=1), np.stack([c.rad for c in columns], axis=1)
        )


def _rows_of(problem: RowProblem, x: Array) -> _Rows:
    order, starts, loss = problem.groups.order, problem.groups.starts, problem.loss
    stored = np.asarray(problem.design.array, dtype=np.float64)
    A = stored if order is None else stored[order]
    n = len(A)
    segments = Segments(starts if loss.coupled else np.zeros(1, dtype=np.intp), n)
    rows = Enclosure.exact(A)
    if loss.coupled:
        rows = rows - Enclosure.exact(np.repeat(A[starts], segments.sizes, axis=0))
    z = rows @ Enclosure.exact(x[:, None])
    z = z[:, 0] if problem.offset is None else z[:, 0] + Enclosure.exact(np.asarray(problem.offset))
    b = np.asarray(problem.b) + np.zeros(n)
    w = np.ones(n) if problem.weights is None else np.asarray(problem.weights) + np.zeros(n)
    ridge = np.asarray(problem.ridge) + np.zeros(len(x))
    B, W = Enclosure.exact(b), Enclosure.exact(w)
    if isinstance(loss, SquaredExponential):
        u, v = _outputs(loss.function, z)
        slope, weight = W * (u - B) * v, W * (v * v + (u - B) * u)
        return _Rows(loss, segments, rows, z, u, slope, weight, b, w, None, None, x, ridge)
    assert isinstance(loss, SoftmaxLoss)
    e = (z - Enclosure.exact(segments.spread(segments.max(z.mid)) + np.zeros(n))).exp()
    f = e * e.sums(segments).reciprocal().spread(segments)
    constants = (W * B).sums(segments)
    if isinstance(loss, CrossEntropy):
        total = constants.spread(segments) * f
        return _Rows(loss, segments, rows, z, f, total - W * B, total, b, w, constants.size, None, x, ridge)
    p, g2 = _parts(loss, f, B, W)
    gamma = (p * f).sums(segments).spread(segments)
    slope, weight = f * (p - gamma), f * (g2 - gamma)
    return _Rows(loss, segments, rows, z, f, slope, weight, b, w, constants.size, g2, x, ridge)


def _outputs(function: str, z: Enclosure) -> tuple[Enclosure, Enclosure]:
    """Return u and u' of an exponential loss, by exponentials alone."""
    if function == "exp":
        return z.exp(), z.exp()
    up, down = z.exp().scaled(0.5), (-z).exp().scaled(0.5)
    cosh, sinh = up + down, up - down
    return (cosh, sinh) if function == "cosh" else (sinh, cosh)


def _parts(loss: SoftmaxLoss, f: Enclosure, B: Enclosure, W: Enclosure) -> tuple[Enclosure, Enclosure]:
    """Return p and g2 of `attnfit.losses.softmax` for the losses that are not cross entropy."""
    if isinstance(loss, Entropy):
        one, h = Enclosure.exact(np.ones_like(f.mid)), f.log()
        return -W * (h + one), -W * (h + one.scaled(2.0))
    if isinstance(loss, Squared):
        return W * (f - B), W * (f.scaled(2.0) - B)
    return -W * B, -W * B


def _ball(rows: _Rows, T: Enclosure, white: Whitening) -> Certificate:
    d = len(rows.x)
    shrink = Enclosure.exact(rows.ridge)
    gradient = (rows.A.T @ rows.slope) + shrink * Enclosure.exact(rows.x)
    eta = (T.T @ gradient).norm()
    centred = rows.centred
    Q = centred @ T
    weighted = Enclosure(rows.weight.mid[:, None], rows.weight.rad[:, None]) * Q
    K = (Q.T @ weighted) + (T.T @ (Enclosure(shrink.mid[:, None], shrink.rad[:, None]) * T))
    beta = (K - Enclosure.exact(np.eye(d))).norm()
    if not beta < 0.5:
        return refused(
            f"the Hessian is not proven to be positive definite: ||1 - T^T H T|| is bounded by {beta:.3g}, "
            "which is not below 1/2; rescale columns or add ridge",
            eta=eta,
        )
    length = eta / (1.0 - beta) * OUTWARD
    constant = _lipschitz(rows, Q, 2.0 * length * OUTWARD)
    h = constant * length / (1.0 - beta) * OUTWARD
    lambda_min = 1.0 / white.spread**2
    if not h <= 0.5:
        return refused(
            f"the Newton step is too long for the curvature to be constant: M eta = {h:.3g} exceeds 1/2; "
            "tighten tol or add ridge",
            eta=length,
            constant=constant,
            lambda_min=lambda_min,
        )
    rho = 2.0 * length / (1.0 + np.sqrt(1.0 - 2.0 * h)) * OUTWARD
    # In y the quadratic part of the loss is at most (1 + beta) / 2, and x* is the minimum of the ball.
    gap = 0.5 * rho**2 * (1.0 + beta + constant * rho) * OUTWARD
    # The scaled radius is in the norm of H itself: |H^(1/2) T y| <= sqrt(1 + beta) |y|.
    reason = f"Newton-Kantorovich in interval arithmetic: M eta = {h:.3g} <= 1/2"
    scaled = float(rho * np.sqrt(1.0 + beta) * OUTWARD)
    return certified(
        white, rho * OUTWARD, gap, reason, constant=constant, eta=length, lambda_min=lambda_min,
        scaled=scaled, rigorous=True,
    )  # fmt: skip


def _lipschitz(rows: _Rows, Q: Enclosure, radius: float) -> float:
    """Bound the third derivative on the ball by the formulas of `attnfit.certificates.lipschitz`.

    Ranges are widened by 1e-8 of the size of their terms, far more than their rounding.
    """
    if not np.isfinite(radius):
        return np.inf
    q = Q.row_norms()
    reach = radius * q * OUTWARD
    if isinstance(rows.loss, SquaredExponential):
        third = _third_of_exponential(rows.loss.function, rows.z, reach, rows.b)
        return _gram_norm(Q, rows.w * third * q * OUTWARD)
    segments = rows.segments

    def spread(values: Array) -> Array:
        return np.repeat(values, segments.sizes)

    high = np.minimum(1.0, rows.f.size * np.exp(reach) * OUTWARD)
    total = spread(segments.sum(rows.f.size * np.exp(reach)) * OUTWARD)
    shift = radius * spread(segments.sum(high * q**2)) * OUTWARD
    if rows.g2 is None:
        assert rows.constants is not None
        return _shifted(Q, spread(rows.constants) * high * (q + shift) * OUTWARD, shift)
    low = np.maximum(rows.f.mid - rows.f.rad, 0.0) * np.exp(-reach) / total / OUTWARD
    # The normaliser of centred rows grows, by no more than ``total``.
    logs = rows.f.log() if isinstance(rows.loss, Entropy) else Enclosure.exact(np.zeros_like(high))
    bottom, top = logs.mid - logs.rad - reach - (total - 1.0), np.minimum(0.0, logs.mid + logs.rad + reach)
    f, logits = Interval(low, high), Interval(bottom, top)

    def over(formula: Callable[..., Array]) -> Interval:
        return _range(formula, f, logits, rows.b, rows.w)

    def mean(values: Interval) -> Interval:
        found = _sums(f * values, segments)
        return Interval(spread(found.low), spread(found.high))

    g2 = over(rows.loss.g2)
    omega = high * (over(rows.loss.g3) - mean(over(rows.loss.p))).magnitude
    tau = (f * (g2 - mean(g2))).magnitude
    e = spread(segments.sum(tau * q)) * OUTWARD
    return _shifted(Q, omega * (q + shift) * OUTWARD, shift) + 3.0 * _shifted(Q, e * high * OUTWARD, shift)


def _range(formula: Callable[..., Array], f: Interval, h: Interval, b: Array, w: Array) -> Interval:
    """Return the range of a formula that is monotone in f, and in ``h = log f``: its ends are those of f."""
    one, other = formula(f.low, h.low, b, w), formula(f.high, h.high, b, w)
    slack = WIDEN * w * (8.0 + np.abs(b) + np.abs(h.low))
    return Interval(np.minimum(one, other) - slack, np.maximum(one, other) + slack)


def _sums(values: Interval, segments: Segments) -> Interval:
    """Return the range of the sum over each run of rows."""
    wide = WIDEN * segments.sum(values.magnitude)
    return Interval(segments.sum(values.low) - wide, segments.sum(values.high) + wide)


def _third_of_exponential(function: str, z: Enclosure, reach: Array, b: Array) -> Array:
    """Bound ``|u' (4 u - b)|`` for logits within reach."""
    if function == "exp":
        # The ends are rounded as the logits are.
        wide = z.rad + reach + WIDEN * (1.0 + np.abs(z.mid))
        low, high = np.exp(z.mid - wide), np.exp(z.mid + wide)
        return np.asarray(high * np.maximum(b - 4.0 * low, 4.0 * high - b) * OUTWARD)
    largest = np.exp((z.size + reach) * OUTWARD) * OUTWARD
    return np.asarray(largest * (4.0 * largest + np.abs(b)))


def _shifted(Q: Enclosure, weights: Array, shift: Array) -> float:
    """Bound a Gram whose centres may have moved by ``shift``."""
    moved = float(np.sum(weights * shift**2)) * OUTWARD
    return float((np.sqrt(_gram_norm(Q, weights)) + np.sqrt(moved)) ** 2 * OUTWARD)


def _gram_norm(Q: Enclosure, weights: Array) -> float:
    """Bound the largest eigenvalue of ``Q^T diag(weights) Q`` for non-negative weights."""
    weighted = Enclosure.exact(weights[:, None]) * Q
    return (Q.T @ weighted).norm()

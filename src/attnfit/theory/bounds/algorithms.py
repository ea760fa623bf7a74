"""The published algorithms run on data as they are printed: how far from the minimum they end.

Whatever the base of the logarithm in ``T = log(r0/eps)``, they do not arrive: the step is added with the
wrong sign (RH), the gradient is that of no loss (TL), and errors shrink in another norm than the one stated.
Hessians are exact here, which ``(1 - eps0) H <= H~ <= (1 + eps0) H`` allows, and steps are taken in
``Q^T A x``, A = Q S, where they do not lose digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from attnfit.theory.bound import Bound, Condition, Sharp
from attnfit.theory.bounds import rescaled_hessian, two_layer
from attnfit.theory.bounds.assumptions import EXP, A, B
from attnfit.theory.bounds.two_layer_changes import log_printed_lipschitz
from attnfit.theory.instances.regression import Regression
from attnfit.theory.instances.two_layer import Layers, TwoLayer
from attnfit.theory.logs import Array, log, product

# The start is this far from the minimum at most, so that no step leaves the range of exp; the accuracy asked
# for is that much smaller.
FARTHEST, SHRINKAGE = 1e-6, 1e-6
NEWTON = 60
# Readings of T = log(r0/eps): base e and base 2, and the loop's one step more. For T = O(log(r0/eps)): any
# number up to four times as many as the natural logarithm.
READINGS = tuple(int(np.ceil(base(1 / SHRINKAGE))) + more for base in (np.log, np.log2) for more in (0, 1))
MOST = int(4 * np.ceil(np.log(1 / SHRINKAGE)))


@dataclass(frozen=True)
class Logits:
    """A loss of the logits ``z = A x`` with the regulariser ``w^2/2 |z|^2``, in coordinates ``y = Q^T z``.

    Attributes
    ----------
    Q, S : ndarray
        ``A = Q S``.
    w2 : float
    slopes : callable
        z to the gradient in the logits, without the regulariser, and ``Q^T B Q``.
    """

    Q: Array
    S: Array
    w2: float
    slopes: Callable[[Array], tuple[Array, Array]]

    def newton(self, y: Array, gradient: Callable[[Array], Array] | None = None) -> Array:
        """Return the full Newton step at y, subtracted; of another gradient in the logits if one is given."""
        slope, curvature = self.slopes(self.Q @ y)
        H = curvature + self.w2 * np.eye(len(y))
        g = self.Q.T @ slope + self.w2 * y if gradient is None else self.Q.T @ gradient(self.Q @ y)
        return np.asarray(np.linalg.solve(H, g))

    def minimum(self) -> Array:
        """Return the minimiser, from zero: the regulariser makes the loss all but quadratic."""
        y = np.zeros(len(self.S))
        for _ in range(NEWTON):
            step = self.newton(y)
            y = y - step
            if np.linalg.norm(step) <= 1e-15 * np.linalg.norm(y):
                break
        return y

    def distance(self, y: Array, star: Array) -> float:
        """Return ``|x - x*|``."""
        if not np.isfinite(y).all():
            return np.inf
        return float(np.linalg.norm(scipy.linalg.solve_triangular(self.S, y - star)))

    def distances(self, step: Callable[[Array], Array], start: Array, count: int) -> list[float]:
        """Return the distances from the minimum after 0 to `count` steps ``y + step(y)``."""
        star = self.minimum()
        y = star + self.S @ start
        out = [self.distance(y, star)]
        for _ in range(count):
            y = y + step(y) if np.isfinite(y).all() else y
            out.append(self.distance(y, star))
        return out

    def repaired(self, start: Array) -> float:
        """Return the distance after ``ceil((ln(r0/eps) + ln(cond H)/2)/ln 2.5)`` steps of the right sign."""
        _, curvature = self.slopes(self.Q @ self.minimum())
        H = self.S.T @ (curvature + self.w2 * np.eye(len(curvature))) @ self.S
        # Scaled by its largest entry first: the squares of entries near e^300 are not representable.
        T = (np.log(1 / SHRINKAGE) + 0.5 * np.log(np.linalg.cond(H / np.abs(H).max()))) / np.log(2.5)
        return self.distances(lambda y: -self.newton(y), start, int(np.ceil(T)))[-1]


def _offset(x: Array, y: Array) -> Array:
    """Return ``x0 - x*``: towards the instance's second point."""
    move = y - x
    length = float(np.linalg.norm(move))
    return np.asarray(move * min(1.0, FARTHEST / length) if length > 0.0 else move)


# ---- rescaled regression

FUNCTIONS = {"exp": (np.exp, np.exp), "cosh": (np.cosh, np.sinh), "sinh": (np.sinh, np.cosh)}


def _log_lipschitz(i: Regression, R: float) -> Array:
    """Return ``log M``, ``M = n^4 e^{20R^2}`` of Lemma 9.1, for each group."""
    return product(i.lengths**4, exponent=20 * R * R)


def _representable(i: Regression, R: float) -> str | None:
    M = float(_log_lipschitz(i, R).max())
    return None if M < 600.0 else f"M = e^{M:.4g} leaves double precision"


def _runs(i: Regression, R: float) -> bool:
    """Return whether the algorithm can be run: with a minimum, and in double precision."""
    return _representable(i, R) is None and rescaled_hessian.FULL_RANK.violation(i, R) is None


def _small_answer(i: Regression, R: float) -> str | None:
    if not _runs(i, R):
        return None
    for g, loss in enumerate(_losses(i, R, 100.0, 0.0)):
        length = loss.distance(loss.minimum(), np.zeros(len(loss.S)))
        if length > R:
            return f"|x*| = {length:.6g} of group {g} exceeds R = {R:.6g}"
    return None


def _losses(i: Regression, R: float, constant: float, times: float) -> list[Logits]:
    """Return the groups' losses with ``w^2 = constant + times M + l/sigma_min^2``, ``l = 10 M r0``."""
    u_of, v_of = FUNCTIONS[i.function]
    M = np.exp(_log_lipschitz(i, R))
    r0 = float(np.linalg.norm(_offset(i.x, i.y)))
    out = []
    for g in range(i.n_groups):
        kept = slice(None) if i.mask is None else i.mask[g]
        Q, S = np.linalg.qr(i.A[g][kept])
        b = i.b[g][kept]
        w2 = constant + times * M[g] + max(i.l, 10 * M[g] * r0) / np.linalg.svd(S, compute_uv=False)[-1] ** 2

        def slopes(z: Array, Q: Array = Q, b: Array = b) -> tuple[Array, Array]:
            u, v = u_of(z), v_of(z)
            c = u - u.sum() * b
            diagonal, a, e = v**2 + u * (c - c @ b), Q.T @ v, Q.T @ (v * b)
            low = -np.outer(e, a) - np.outer(a, e) + (b @ b) * np.outer(a, a)
            return v * (c - c @ b), Q.T @ (diagonal[:, None] * Q) + low

        out.append(Logits(Q, S, float(w2), slopes))
    return out


def _rescaled(id: str, constant: float, times: float, penalty: str, extra: tuple = ()) -> Bound[Regression]:  # type: ignore[type-arg]
    def distances(i: Regression, of: Callable[[Logits, Array], float]) -> Array:
        R = bound.radius(i)
        if not _runs(i, R):
            return np.full(i.n_groups, np.nan)
        start = _offset(i.x, i.y)
        return log([of(loss, start) for loss in _losses(i, R, constant, times)])

    def printed(loss: Logits, start: Array) -> float:
        away = loss.distances(loss.newton, start, max(READINGS))
        return min(away[T] for T in READINGS)

    def accuracy(i: Regression) -> Array:
        return product(SHRINKAGE, np.linalg.norm(_offset(i.x, i.y)))

    bound = Bound(
        id,
        f"Algorithm 1 with {penalty}, M = n^4 e^{{20R^2}}, l = 10 M r0, eps = 1e-6 r0: the smallest distance "
        "after T = log(r0/eps) steps to base e or 2, or one more",
        "|x_T - x*| <= eps", Regression, lambda i: distances(i, printed), lambda i, R: accuracy(i),
        (A, B, rescaled_hessian.FULL_RANK, Condition("|x*| <= R", _small_answer),
         Condition("M in double precision", _representable), *extra),
        status="fails", worst="2^14 r0/eps: each step doubles the distance", floor=4.0,
        sharp=Sharp(
            "T = ceil((ln(r0/eps) + ln(cond H*)/2)/ln 2.5) steps x - H^-1 g", lambda i, R: accuracy(i),
            lambda i: distances(i, Logits.repaired),
        ),
        remark="line 9 adds the Newton step; with the right sign the Euclidean norm (see RH-5.5) is left",
        counterexample=_small_counterexample,
    )  # fmt: skip
    return bound


def _small_counterexample() -> Regression:
    """Five rows of two columns at the bounds, |A| = |b| = R = 4."""
    A = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0], [0.5, 2.0]])
    b = np.array([1.0, 2.0, -1.0, 0.5, 1.0])
    return Regression(
        4.0 * A / np.linalg.norm(A, 2), 4.0 * b / np.linalg.norm(b), [0.0, 0.0], [0.3, 0.4], R=4.0
    )


# ---- two layers


def _log_M(i: TwoLayer, R: float) -> float:
    return float(log_printed_lipschitz(i, R))


def _double(i: TwoLayer, R: float) -> str | None:
    M = _log_M(_everywhere(i), R)
    return None if M < 600.0 else f"M = e^{M:.4g} leaves double precision"


def _at_zero(i: TwoLayer) -> Layers:
    zero = np.zeros(i.A1.shape[1])
    return replace(i, x=zero, y=zero).start


def _everywhere(i: TwoLayer) -> TwoLayer:
    """Return the instance with an R_h that holds near zero too, where the minimum is, unless it is given."""
    at = _at_zero(i)
    found = max(float(np.linalg.norm(v)) for v in (at.h, at.dh))
    return i if i.R_h is not None else replace(i, R_h=max(i.size, found) * (1 + 1e-6))


def _near_zero(i: TwoLayer, R: float) -> str | None:
    at = _at_zero(i)
    found = max(float(np.linalg.norm(v)) for v in (at.h, at.dh))
    size = _everywhere(i).size
    return None if found <= size * (1 + 1e-9) else f"|h| or |h'| = {found:.6g} at 0 exceeds R_h = {size:.6g}"


def _layered(given: TwoLayer, R: float) -> Logits:
    i = _everywhere(given)
    Q, S = np.linalg.qr(i.A1)
    r0 = float(np.linalg.norm(_offset(i.x, i.y)))
    l = max(i.l, 10 * np.exp(_log_M(i, R)) * r0)  # noqa: E741
    w2 = float(np.exp(two_layer.printed_size(i, R))) + l / np.linalg.svd(S, compute_uv=False)[-1] ** 2

    def slopes(z: Array) -> tuple[Array, Array]:
        at = _layers(i, Q, z)
        return at.a, at.between(Q)

    return Logits(Q, S, w2, slopes)


def _layers(i: TwoLayer, Q: Array, z: Array) -> Layers:
    """Return the layers at some logits in the range of Q."""
    y = Q.T @ z
    return replace(i, A1=Q, x=y, y=y).start


def printed_gradient(i: TwoLayer, Q: Array, z: Array) -> Array:
    """Return ``-(f <q, f> + diag(f) q)``, line 7 of Algorithm 1 in the logits."""
    at = _layers(i, Q, z)
    return np.asarray(-(at.f * at.fq + at.f * at.q))


def _two_layer() -> Bound[TwoLayer]:
    def run(i: TwoLayer, of: Callable[[Logits], float]) -> Array:
        R = bound.radius(i)
        possible = _double(i, R) is None and two_layer.FULL_RANK.violation(i, R) is None
        return log(of(_layered(i, R)) if possible else np.nan)

    def printed(i: TwoLayer, loss: Logits) -> float:
        def step(y: Array) -> Array:
            return loss.newton(y, lambda z: printed_gradient(i, loss.Q, z))

        return min(loss.distances(step, _offset(i.x, i.y), MOST)[1:])

    def accuracy(i: TwoLayer) -> Array:
        return product(SHRINKAGE, np.linalg.norm(_offset(i.x, i.y)))

    bound = Bound(
        "TL-7.1",
        "Algorithm 1 with w^2 = 12 R_h L_h R (R + R_h) + l/sigma_min^2, l = 10 M r0, M of Lemma 5.2, eps = "
        "1e-6 r0: the smallest distance after any T = O(log(r0/eps)) steps, up to 4 ln(r0/eps)",
        "|x_T - x*| <= eps", TwoLayer, lambda i: run(i, lambda loss: printed(i, loss)),
        lambda i, R: accuracy(i),
        (*two_layer.ASSUMED, two_layer.FULL_RANK, Condition("R_h >= |h|, |h'| at 0", _near_zero),
         Condition("M in double precision", _double)),
        status="fails", worst="r0/eps", floor=4.0,
        sharp=Sharp(
            "T = ceil((ln(r0/eps) + ln(cond H*)/2)/ln 2.5) steps x - H^-1 grad L_tot",
            lambda i, R: accuracy(i),
            lambda i: run(i, lambda loss: loss.repaired(_offset(i.x, i.y))),
        ),
        remark="x* is no fixed point of Algorithm 1: line 7 has a wrong sign in the gradient, and lacks that "
        "of the regulariser",
        counterexample=_tanh_counterexample,
    )  # fmt: skip
    return bound


def _tanh_counterexample() -> TwoLayer:
    """Six shares of three unknowns, four outputs, h = tanh."""
    rng = np.random.default_rng(0)
    A1, A2 = rng.standard_normal((6, 3)), rng.standard_normal((4, 6))
    return TwoLayer(A1, A2, rng.random(4), [0.1, 0.2, -0.1], [0.2, 0.1, 0.3], "tanh", R=4.0)


BOUNDS: list[Bound[Regression] | Bound[TwoLayer]] = [
    _rescaled("RH-11.1", 100.0, 0.0, "w^2 = 100 + l/sigma_min^2", (EXP,)),
    _rescaled("RH-1.5", 0.0, 100.0, "w^2 = 100 M + l/sigma_min^2"),
    _two_layer(),
]

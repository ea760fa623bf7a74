"""Newton-Kantorovich certificates of layered problems, and of the inversion of an attention layer, with a
local constant in whitened variables.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import norm as sparse_norm

from attnfit.certificates.kantorovich import Certificate, combined, newton_kantorovich, refused, shaped
from attnfit.data.gram import centre_rows
from attnfit.data.inputs import as_point
from attnfit.losses.vector_activations import AnyActivation, VectorActivation
from attnfit.objectives.inverse import LayerInversion
from attnfit.objectives.layer_curvature import LayeredEvaluation, Layers, outer_rows, weighted_outputs
from attnfit.objectives.layer_inputs import LinearMap
from attnfit.objectives.layered import LayeredProblem
from attnfit.objectives.objective import MAX_DENSE, Offer
from attnfit.objectives.token_problem import TokenEvaluation, TokenProblem

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)


def certify_layers(problem: LayeredProblem, x: Any) -> Certificate:
    """Certify x for every right-hand side: radii add up as norms of columns do, value gaps as values do.

    Parameters
    ----------
    problem : TwoLayer, ReluSoftmax or ThreeLayer
    x : array_like, in the problem's natural shape

    Returns
    -------
    Certificate

    Notes
    -----
    ReLU problems are certified within the region of x in which no entry of ``A1 x`` changes sign.
    """
    missing = _missing_bounds(problem.activation)
    if missing is not None:
        return refused(missing)
    problem = _centred(problem)
    X = as_point(x, problem.shape).reshape(-1, problem.n_columns)
    proofs = [_certify_column(problem.columns(np.array([j])), X[:, j]) for j in range(problem.n_columns)]
    return combined(proofs)


def _missing_bounds(h: AnyActivation) -> str | None:
    """Return which bounds of an activation's derivatives are not known."""
    if h.kink is not None:
        # Linear on both sides of its kink.
        return None
    if isinstance(h, VectorActivation) and h.bend is None:
        return (
            "the second derivatives of h are not given; pass (h, Jh, K) with bounds slope, curvature and jerk"
        )
    bounds = (("|h'|", h.slope), ("|h''|", h.curvature), ("|h'''|", h.jerk))
    unknown = [name for name, bound in bounds if not np.isfinite(bound)]
    if not unknown:
        return None
    return (
        f"the activation {h.name!r} states no bound of {', '.join(unknown)}; take one of the built-in "
        "activations, or pass an attnfit.losses.activations.Activation with slope, curvature and jerk"
    )


def _centred(problem: LayeredProblem) -> LayeredProblem:
    """Return the problem with the first row of A1 subtracted from all, which no softmax can tell."""
    first = problem.logit_map
    if not isinstance(first, LinearMap) or first.matrix is None or problem.penalty is not None:
        return problem
    other = copy(problem)
    other.logit_map = LinearMap(centre_rows(first.matrix, np.zeros(1, dtype=np.intp)), first.shape[0])
    return other


def _certify_column(problem: LayeredProblem, x: Array) -> Certificate:
    at = problem.evaluate(x)
    # The Hessian is that of one side, and says nothing of x.
    on = [kink for kink in problem.kinks(x) if kink.side == "on"] if Offer.KINKS in problem.offers else []
    if on:
        return refused(
            f"output {on[0].output} lies on the kink of {problem.activation.name}: no ball about x has one "
            "Hessian that changes little"
        )
    return newton_kantorovich(problem, at, partial(LayerBall, problem, at))


@dataclass(frozen=True)
class LayerBall:
    """What is known of one right-hand side on balls around x, in the variables ``x + T y``.

    With ``C`` the centred rows of the logits' matrix, ``rho = ||C T||``, ``A_w = diag(w)^(1/2) A_out``,
    ``K = A_out J_f C T`` the derivative of the outputs and ``L1, L2, L3`` the bounds of h', h'', h''':

        M = (3 L1 L2 + |c| L3) max_j ||K_j|| ||w^(1/2) K||^2
            + 3 (L1^2 + |c| L2) ||w^(1/2) K|| s2 rho^2 ||A_w|| + L1 s3 rho^3 ||A_w|| ||w^(1/2) c||

    where ``s1, s2, s3`` bound the first three derivatives of the softmax (1/2, 1/sqrt(2) and 2.5, or less
    where no output is large on the ball), and K and the residuals c are bounded on the ball. The paper's
    form, with ``||K|| <= s1 rho ||A_w||`` put in, is larger wherever small eigenvalues make rho large.

    Parameters
    ----------
    problem : LayeredProblem
        With one column.
    at : LayeredEvaluation
    whitener : ndarray, shape (d, k)
    """

    problem: LayeredProblem
    at: LayeredEvaluation
    whitener: Array

    @cached_property
    def layers(self) -> Layers:
        """The layers at x."""
        return self.problem.layers_of(self.at)

    @cached_property
    def rows(self) -> Array:
        """Whitened rows of the logits' matrix, centred, shape (n, k)."""
        first, pattern = self.problem.logit_map, self.layers.pattern
        rows = np.stack([first.forward(pattern, column[:, None])[:, 0] for column in self.whitener.T], axis=1)
        return rows - self.layers.f[:, 0] @ rows

    @cached_property
    def outer_norms(self) -> tuple[float, float]:
        """``||A_w||`` and the largest norm of a row of A_out with positive weight."""
        outer, w = self.problem.outer, self._row_weights
        if outer is None:
            return float(np.sqrt(w.max())), 1.0
        if sparse.issparse(outer):
            rows = sparse_norm(outer, axis=1)
            gram = (outer.T @ outer.multiply(w[:, None])).toarray()
            weighted = float(np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0))) * (1.0 + 1e-6)
        else:
            rows = np.linalg.norm(outer, axis=1)
            weighted = float(np.linalg.norm(np.sqrt(w)[:, None] * outer, 2))
        return weighted, float(rows[w > 0.0].max())

    @property
    def _row_weights(self) -> Array:
        w = self.problem.weights
        return np.ones(len(self.problem.b)) if w is None else w[:, 0]

    def lipschitz(self, radius: float) -> float:
        """Return a Lipschitz constant of the whitened Hessian on the ball of this radius."""
        h, w = self.problem.activation, self._row_weights
        rho = float(np.linalg.norm(self.rows, 2))
        reach = 2.0 * radius * float(np.linalg.norm(self.rows, axis=1).max())
        top = min(1.0, float(self.layers.f.max()) * np.exp(min(reach, 700.0)))
        s1, s2 = min(0.5, top), min(np.sqrt(0.5), 2.0 * top)
        s3 = min(2.5, np.sqrt(2.0) * top + 3.0 * top**2 + np.sqrt(2.0) * top**1.5)
        weighted, longest = self.outer_norms
        # The derivative of the outputs is known at x, and changes by at most its own derivative on the ball.
        bend = s2 * rho**2 * radius
        positive = w > 0.0
        K = outer_rows(self.problem, self.layers, 0)[positive] @ self.whitener
        row = min(float(np.linalg.norm(K, axis=1).max()) + longest * bend, longest * s1 * rho)
        norm = float(np.linalg.norm(np.sqrt(w[positive])[:, None] * K, 2))
        norm = min(norm + weighted * bend, weighted * s1 * rho)
        c = self.layers.residual[positive, 0]
        largest = float(np.abs(c).max()) + h.slope * row * radius
        length = float(np.linalg.norm(np.sqrt(w[positive]) * c)) + h.slope * norm * radius
        if isinstance(h, VectorActivation):
            return self._of_vectors(h, float(np.linalg.norm(K, 2)), radius, rho, (s1, s2, s3))
        curvature, jerk = (0.0, 0.0) if h.kink is not None else (h.curvature, h.jerk)
        third = (3.0 * h.slope * curvature + largest * jerk) * row * norm**2
        second = 3.0 * (h.slope**2 + largest * curvature) * norm * s2 * rho**2 * weighted
        first = h.slope * s3 * rho**3 * weighted * length
        return float(third + second + first)

    def _of_vectors(
        self, h: VectorActivation, norm: float, radius: float, rho: float, s: tuple[float, float, float]
    ) -> float:
        """Return the constant where h takes all outputs together.

        With K and c the unweighted derivative of the outputs and the residuals it is ``max w`` times

            3 (L1 |K|) (L1 b2 + L2 |K|^2) + |c| (L1 b3 + 3 L2 |K| b2 + L3 |K|^3),

        ``b2 = s2 rho^2 ||A||`` and ``b3 = s3 rho^3 ||A||`` bounds of the derivatives of the outputs.
        """
        problem, w = self.problem, self._row_weights
        outer = problem.outer
        size = 1.0 if outer is None else float(np.linalg.norm(_dense(outer), 2))
        b2, b3 = s[1] * rho**2 * size, s[2] * rho**3 * size
        if not (w > 0.0).all():
            norm = s[0] * rho * size
        norm = min(norm + b2 * radius, s[0] * rho * size)
        c = float(np.linalg.norm(self.layers.residual[:, 0])) + h.slope * norm * radius
        first = 3.0 * h.slope * norm * (h.slope * b2 + h.curvature * norm**2)
        second = c * (h.slope * b3 + 3.0 * h.curvature * norm * b2 + h.jerk * norm**3)
        return float(w.max() * (first + second))

    def _kink_within(self, radius: float) -> str | None:
        """Return which output may cross the kink of the activation on the ball, None if none."""
        h, layers, outer = self.problem.activation, self.layers, self.problem.outer
        if h.kink is None:
            return None
        y = layers.f[:, 0] if outer is None else np.asarray(outer @ layers.f[:, 0])
        sizes = np.ones(len(y)) if outer is None else np.linalg.norm(_dense(outer), axis=1)
        rho = float(np.linalg.norm(self.rows, 2))
        own = np.linalg.norm(outer_rows(self.problem, layers, 0) @ self.whitener, axis=1)
        # An output moves by its derivative and half its second one, or by its largest derivative.
        bend = 0.5 * np.sqrt(0.5) * rho**2 * radius**2 * sizes
        reach = np.minimum(radius * own + bend, 0.5 * rho * radius * sizes)
        crossed = np.flatnonzero((np.abs(y) <= reach) & (self._row_weights > 0.0))
        if not len(crossed):
            return None
        k = int(crossed[np.argmin(np.abs(y[crossed]))])
        return (
            f"the kink of {h.name} at output {k}, where A2 f = {y[k]:.3g}, lies within the ball, where the "
            "Hessian jumps; tighten tol or fit from another start"
        )

    def obstacle(self, radius: float) -> str | None:
        """Return why the ball is too large for a kink, None otherwise."""
        if self.layers.pattern is None:
            return self._kink_within(radius)
        first: Any = self.problem.logit_map.first  # type: ignore[union-attr]
        hidden = np.asarray(first @ self.at.x)
        reach = radius * np.linalg.norm(np.asarray(first @ self.whitener), axis=1)
        crossed = np.flatnonzero(np.abs(hidden) <= reach)
        if not len(crossed):
            return self._kink_within(radius)
        i = int(crossed[np.argmin(np.abs(hidden[crossed]))])
        return (
            f"the kink of relu at row {i} of A1 lies within the ball, where the Hessian jumps; tighten "
            "tol or fit from "
            "another start"
        )

    def seen(self, directions: Array) -> float:
        """Return the largest change of a logit, less that of the first row, relative to its terms."""
        first, problem = self.problem.logit_map, self.problem
        if not isinstance(first, LinearMap) or problem.penalty is not None or problem.ridge > 0.0:
            return np.inf
        along = first.forward(None, directions)
        if first.matrix is None:
            along = along - along[0]
        size = first.magnitudes(np.abs(directions))
        return float(np.max(np.abs(along) / np.where(size > 0.0, size, 1.0), initial=0.0))

    def glance(self, radius: float) -> tuple[float, float]:
        """Return what `rounding` does; no constant is cheaper than that of `lipschitz`."""
        return self.rounding(), np.inf

    def rounding(self) -> float:
        """Bound the effect of rounding on the whitened gradient, to first order."""
        problem, layers = self.problem, self.layers
        x = np.abs(self.at.x).reshape(-1, 1)
        logits = 1.0 + np.sqrt(len(x)) * problem.logit_map.magnitudes(x)
        f, logits = layers.f, logits if problem.offset is None else logits + np.abs(problem.offset)
        size = None if problem.outer is None else abs(problem.outer)
        dy = f * logits if size is None else np.asarray(size @ (f * logits))
        dslope = np.abs(layers.slope) + weighted_outputs(np.abs(layers.curvature), dy)
        dq = dslope if size is None else np.asarray(size.T @ dslope)
        spread = np.abs(layers.q - np.sum(f * layers.q, axis=0))
        da = f * (dq + np.sum(f * dq, axis=0) + spread * (logits + np.sum(f * logits, axis=0)))
        norms = np.linalg.norm(self.rows, axis=1)
        total = float(da[:, 0] @ norms) + float(
            problem.ridge * np.linalg.norm(np.abs(self.whitener).T @ np.abs(self.at.x))
        )
        if problem.penalty is not None:
            total += float((problem.penalty * logits)[:, 0] @ norms)
        return 4.0 * EPS * total


def _dense(matrix: Any) -> Array:
    return np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix)


def certify_layer(problem: TokenProblem, x: Any) -> Certificate:
    """Certify an inverted layer: find a ball around x with exactly one stationary point.

    An input that gives B exactly is a stationary point: if it lies in the ball, it is the one.
    """
    if not isinstance(problem, LayerInversion):
        why = "none is known for transformer blocks; radius of a recovery says how far an input can be"
        return shaped(refused(why), problem.shape)
    if problem.n_unknowns > MAX_DENSE:
        why = (
            f"a certificate takes all eigenvalues of a matrix of {problem.n_unknowns:,} unknowns, more than "
            f"{MAX_DENSE:,}; give known tokens"
        )
        return shaped(refused(why), problem.shape)
    at = problem.evaluate(as_point(x, problem.shape).copy())
    return shaped(newton_kantorovich(problem, at, partial(InverseBall, problem, at)), problem.shape)


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


class InverseBall:
    """What is known on balls ``x + whitener y``, ``||y|| <= radius``.

    With residuals r, ``D^3 L(u, u, u) = 3 <r', r''> + <r, r'''>`` along u, and a symmetric trilinear form is
    largest where its arguments agree. Along u, attention p with logit rates z (less their mean) has
    ``p' = p z``, ``p'' = p (z^2 - E z^2 + s'' - E s'')`` and
    ``p''' = p (z^3 - 3 z E z^2 - E z^3 + 3 (z (s'' - E s'') - E z s''))``; each factor is bounded for every
    query and key, at the centre exactly and on the ball by its own rate. See `attnfit.certificates.lipschitz`
    for the same with rows.
    """

    def __init__(self, problem: LayerInversion, at: TokenEvaluation, whitener: Array) -> None:
        self.problem, self.at = problem, at
        d, u = problem.shape
        n = problem.n
        self.W = np.zeros((n, d, whitener.shape[1]))
        self.W[problem.unknown] = whitener.reshape(d, u, -1).swapaxes(0, 1)
        self.moves = np.linalg.norm(self.W, ord=2, axis=(1, 2))
        self.bounds = list[Bounds]()
        for s in at.forward.heads:
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
            self.bounds.append(Bounds(np.where(s.P > 0.0, logits, 0.0), bend, values, gaps))
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

    def glance(self, radius: float) -> tuple[float, float]:
        """Return what `rounding` does; no constant is cheaper than that of `lipschitz`."""
        return self.rounding(), np.inf

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

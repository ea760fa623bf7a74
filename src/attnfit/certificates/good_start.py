"""The papers' conditions on a start, with the printed and with local constants side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import logsumexp

from attnfit.certificates.certification import DENSE_ENTRIES
from attnfit.certificates.layers import InverseBall, LayerBall
from attnfit.certificates.lipschitz import (
    ChunkRows,
    Stages,
    largest_eigenvalue,
    lipschitz_constant,
    sums_on_ball,
)
from attnfit.data.inputs import as_point
from attnfit.losses.activations import Activation
from attnfit.losses.vector_activations import VectorActivation
from attnfit.objectives.attention import Attention
from attnfit.objectives.inverse import LayerInversion
from attnfit.objectives.layered import LayeredProblem
from attnfit.objectives.layers import TwoLayer
from attnfit.objectives.objective import MAX_DENSE
from attnfit.objectives.rows import RowProblem

Array = NDArray[np.float64]
LOG10 = float(np.log(10.0))

# The two-layer paper wants beta below 0.1.
LARGEST_BETA = 0.0999


@dataclass(frozen=True)
class GoodStart:
    """Whether ``x0`` is an (l, M)-good start for Newton's method towards ``x_ref``; prints as a table.

    Attributes
    ----------
    gradient_norm : float
        ``||gradient(x_ref)||_2``: condition (i) wants zero.
    lambda_min : float
        l, the smallest eigenvalue of the Hessian at x_ref: condition (i) wants it positive.
    distance, scaled_distance : float
        ``||x0 - x_ref||_2`` and ``||H^(1/2)(x0 - x_ref)||_2``.
    log10_printed_constant : float
        Of the printed M, which overflows float64.
    local_constant, scaled_constant : float
        Lipschitz constants of the Hessian on the ball around x_ref that reaches x0, in the user's and in the
        affine-scaled variables; infinite where there is none.
    printed, local, scaled : bool
        Condition (iii): ``M ||x0 - x_ref|| <= 0.1 l`` with the printed and with the local M, and the
        corrected affine-scaled form
        ``M_s ||H^(1/2)(x0 - x_ref)|| <= 0.1``, which alone implies the contraction of the sampled Newton
        method. For an inverted layer the printed limit is not 0.1 l but ``n d R^8``.
    definition, formula : str
        Where the condition is printed, and the printed M.
    """

    gradient_norm: float
    lambda_min: float
    distance: float
    scaled_distance: float
    log10_printed_constant: float
    local_constant: float
    scaled_constant: float
    printed: bool
    local: bool
    scaled: bool
    definition: str
    formula: str

    def __str__(self) -> str:
        def verdict(ok: bool) -> str:
            return "holds" if ok else "fails"

        lines = [
            f"{self.definition}, M = {self.formula}",
            f"(i)   gradient at x_ref {self.gradient_norm:.3g}, smallest eigenvalue l = "
            f"{self.lambda_min:.3g}",
            "(iii) constant          M              M |x0 - x_ref| against 0.1 l",
            f"      printed           1e{self.log10_printed_constant:<10.1f}   {verdict(self.printed)}",
            f"      local             {self.local_constant:<12.4g}   {verdict(self.local)}",
            f"      affine-scaled     {self.scaled_constant:<12.4g}   {verdict(self.scaled)}   (M "
            f"|H^(1/2)(x0 - x_ref)| against 0.1)",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Condition:
    """What one problem, or one of its right-hand sides, brings to the conditions.

    Attributes
    ----------
    definition, formula : str
    gradient, hessian, difference : ndarray
        At x_ref, and ``x0 - x_ref``.
    lipschitz : callable
        (T, radius) -> Lipschitz constant of the Hessian on the ball ``x_ref + T y``.
    log10_constant : float
        Of the printed M.
    log10_limit : float, optional
        Of the printed bound of ``M |x0 - x_ref|`` where it is not 0.1 l.
    """

    definition: str
    formula: str
    gradient: Array
    hessian: Array
    difference: Array
    lipschitz: Callable[[Array, float], float]
    log10_constant: float
    log10_limit: float | None = None

    def judge(self) -> GoodStart:
        """Return the verdicts."""
        values, vectors = np.linalg.eigh(self.hessian)
        lowest, distance = float(values[0]), float(np.linalg.norm(self.difference))
        local = self.lipschitz(np.eye(len(values)), distance)
        positive = lowest > 0.0
        scaled_distance, scaled = np.inf, np.inf
        if positive:
            scaled_distance = float(np.sqrt(self.difference @ self.hessian @ self.difference))
            scaled = self.lipschitz(vectors / np.sqrt(values), scaled_distance)
        limit = self.log10_limit
        if limit is None:
            limit = np.log10(0.1 * lowest) if positive else -np.inf
        printed = distance == 0.0 or self.log10_constant + np.log10(distance) <= limit
        return GoodStart(
            gradient_norm=float(np.linalg.norm(self.gradient)),
            lambda_min=lowest,
            distance=distance,
            scaled_distance=scaled_distance,
            log10_printed_constant=self.log10_constant,
            local_constant=local,
            scaled_constant=scaled,
            printed=bool(positive and printed),
            local=bool(positive and np.isfinite(local) and local * distance <= 0.1 * lowest),
            scaled=bool(positive and np.isfinite(scaled) and scaled * scaled_distance <= 0.1),
            definition=self.definition,
            formula=self.formula,
        )


def good_start(problem: Any, x0: Any, x_ref: Any) -> GoodStart:
    """Evaluate the (l, M)-good conditions for a start x0 and a reference point x_ref, usually ``result.x``.

    Parameters
    ----------
    problem : Softmax, Exponential, Rescaled, Attention (without rank), TwoLayer or LayerInversion
    x0, x_ref : array_like, in the problem's natural shape
        Of several right-hand sides each is judged by itself, and the worst is returned.

    Returns
    -------
    GoodStart

    Raises
    ------
    ValueError
        If the papers have no condition for this problem, its loss overflows at x_ref, or it is too large for
        a dense Hessian.

    Notes
    -----
    Sources: "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression", Definition 5.1 and Lemma
    9.1 (losses of rows, ``M = n^4 e^{20 R^2}``); "Local Convergence of Approximate Newton Method for Two
    Layer Nonlinear Regression", Definition 6.1 and Theorem 7.1; "Unmasking Transformers: A Theoretical
    Approach to Data Recovery via Attention Weights", Theorem 4.4, ``M |X0 - X*|_F <= n d R^8`` with
    ``M = n^3 d^3 R^10``, the constants of O(.) taken as 1, of a loss that is twice the one here. R is the
    smallest that the assumptions allow. The affine-scaled condition corrects Lemmas 5.5 and 6.6 of the first
    two, which are false in the Euclidean norm. Local constants are those of `attnfit.certificates.certify`.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import certificates, minimize, problems
    >>> problem = problems.TwoLayer(np.eye(3), [[1.0, 0.0, -1.0]], [0.2], "tanh", ridge=0.1)
    >>> x = minimize(problem).x
    >>> start = certificates.good_start(problem, x + 1e-3, x)
    >>> start.printed, start.local, start.scaled
    (False, True, True)
    """
    start, reference = as_point(x0, problem.shape, "x0"), as_point(x_ref, problem.shape, "x_ref")
    found = [condition.judge() for condition in conditions(problem, start, reference)]
    return max(found, key=lambda g: (not g.scaled, not g.local, g.scaled_constant * g.scaled_distance))


def conditions(problem: Any, start: Array, reference: Array) -> Iterator[Condition]:
    """Yield what each right-hand side of a problem brings to the conditions; points in the natural shape.

    Raises
    ------
    ValueError
        Like `good_start`.
    """
    if isinstance(problem, Attention):
        if problem.n_rows * problem.n_unknowns > DENSE_ENTRIES:
            raise ValueError(
                f"the local constants take the {problem.n_rows:,} x {problem.n_unknowns:,} matrix of all "
                f"pairs, more than {DENSE_ENTRIES:,} numbers; pass fewer queries"
            )
        problem = problem.dense()
    if isinstance(problem, RowProblem):
        yield _of_rows(problem, start.reshape(-1), reference.reshape(-1))
    elif isinstance(problem, TwoLayer):
        yield from _of_layers(problem, start, reference)
    elif isinstance(problem, LayerInversion):
        yield _of_inversion(problem, start.reshape(-1), reference.reshape(-1))
    else:
        raise ValueError(
            f"the papers state no condition for {type(problem).__name__}; pass Softmax, Exponential, "
            "Rescaled, Attention (without rank), TwoLayer or LayerInversion"
        )


def _hessian(problem: Any, at: Any) -> Array:
    """Return the Hessian at an evaluation, refused where it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        hessian = problem.hessian_at(at)
    if not (np.isfinite(at.value) and np.isfinite(hessian).all()):
        raise ValueError("x_ref: the loss overflows there; pass a minimiser, such as result.x")
    return np.asarray(hessian)


def _of_rows(problem: RowProblem, start: Array, reference: Array) -> Condition:
    at = problem.evaluate(reference)
    hessian = _hessian(problem, at)
    identity = np.eye(len(reference))
    gram, targets = row_sizes(problem, at)
    R = max(
        4.0,
        float(np.sqrt(largest_eigenvalue(gram, identity))),
        float(np.linalg.norm(start)),
        float(np.linalg.norm(reference)),
        targets,
    )
    return Condition(
        "Definition 5.1 (rescaled hyperbolic functions)",
        "n^4 e^{20 R^2}",
        at.gradient,
        hessian,
        start - reference,
        partial(lipschitz_constant, problem, at),
        float(4.0 * np.log10(problem.n_rows) + 20.0 * R**2 / LOG10),
    )


def row_sizes(problem: RowProblem, at: Any) -> tuple[Any, float]:
    """Return ``A^T A``, accumulated, and ``|b|``: one pass, wherever the rows are."""
    data = sums_on_ball(problem, at, np.eye(len(at.x)), _data, 0.0)
    return data["rows"], float(np.sqrt(data["targets"]))


def _data(rows: ChunkRows, radius: float) -> Stages:
    rows.add_gram("rows", np.ones(len(rows.z)), centred=False)
    rows.add("targets", rows.b**2)
    yield from ()


# ---- a softmax and a layer after it


def _of_layers(problem: TwoLayer, start: Array, reference: Array) -> Iterator[Condition]:
    if isinstance(problem.activation, VectorActivation) or not problem.activation.bounds_known:
        raise ValueError(
            "bounds of the activation's derivatives are not known, and M is built from them; use one of the "
            "built-in activations"
        )
    starts, references = (v.reshape(-1, problem.n_columns) for v in (start, reference))
    norms = tuple(map(spectral_norm, (problem.logit_map.matrix, problem.outer)))
    for j in range(problem.n_columns):
        one = problem.columns(np.array([j]))
        x0, x = starts[:, j], references[:, j]
        at = one.evaluate(x)
        yield Condition(
            "Definition 6.1 (two layers)",
            "59 (R + R_h) n^2 e^{4R^2} beta^-4 R^5 R_h^2 R_f L_h",
            at.gradient,
            _hessian(one, at),
            x0 - x,
            partial(_on_ball, LayerBall, one, at),
            two_layer_sizes(one, norms, x0, x).log10_lipschitz(one.logit_map.shape[0]),
        )


def _on_ball(kind: Any, problem: Any, at: Any, whitener: Array, radius: float) -> float:
    return float(kind(problem, at, whitener).lipschitz(radius))


@dataclass(frozen=True)
class TwoLayerSizes:
    """The tightest constants of Theorem 7.1 at some points."""

    R: float
    R_h: float
    L_h: float
    log_beta: float

    def log10_lipschitz(self, n: int) -> float:
        """Return ``log10 M`` of Lemma 5.2, for n rows."""
        R, R_h = self.R, self.R_h
        log_R_f = np.log(2.0 * n * R) + 2.0 * R**2 - 2.0 * self.log_beta
        powers = np.log(59.0 * (R + R_h) * n**2 * R**5) + 2.0 * np.log(R_h) + np.log(self.L_h)
        return float((powers + 4.0 * R**2 - 4.0 * self.log_beta + log_R_f) / LOG10)


def two_layer_sizes(problem: LayeredProblem, norms: tuple[float, ...], *points: Array) -> TwoLayerSizes:
    """Return the constants of one right-hand side, given ``(|A1|, |A2|)``, at points of shape (d,)."""
    h = problem.activation
    assert isinstance(h, Activation)
    b = problem.b[:, 0]
    R = max(4.0, *norms, float(np.linalg.norm(b)), *(float(np.linalg.norm(x)) for x in points))
    sizes: list[float] = [float(np.finfo(float).tiny)]
    log_beta = float(np.log(LARGEST_BETA))
    for x in points:
        z = problem.logit_map.logits(x[:, None])[0]
        z = z if problem.offset is None else z + problem.offset
        log_beta = min(log_beta, float(logsumexp(z)))
        f = np.exp(z - logsumexp(z))
        value, slope, _ = h.jet(f if problem.outer is None else np.asarray(problem.outer @ f))
        sizes += [float(np.linalg.norm(value)), float(np.linalg.norm(slope))]
    return TwoLayerSizes(R, max(sizes), max(h.slope, h.curvature), log_beta)


def spectral_norm(matrix: Any) -> float:
    """Return the spectral norm of a matrix, dense or sparse; None is the identity."""
    if matrix is None:
        return 1.0
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    gram = gram.toarray() if sparse.issparse(gram) else gram
    return float(np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0)))


# ---- the input of an attention layer


def _of_inversion(problem: LayerInversion, start: Array, reference: Array) -> Condition:
    if problem.n_unknowns > MAX_DENSE:
        raise ValueError(
            f"l takes all eigenvalues of a matrix of {problem.n_unknowns:,} unknowns, more than "
            f"{MAX_DENSE:,}; give known tokens"
        )
    at = problem.evaluate(reference.copy())
    heads = problem.layer.heads
    tokens = [float(np.linalg.norm(problem.token_rows(x))) for x in (start, reference)]
    weights = [float(np.linalg.norm(matrix)) for head in heads for matrix in (head.M, head.V)]
    R = max(1.0, *tokens, *weights, float(np.abs(problem.B).max()))
    n, d = problem.n, max(problem.d, problem.m)
    # The paper's loss is the sum of squares, twice the one here.
    return Condition(
        "Theorem 4.4 (inversion of a layer; limit n d R^8 / 2)",
        "n^3 d^3 R^10 / 2",
        at.gradient,
        _hessian(problem, at),
        start - reference,
        partial(_on_ball, InverseBall, problem, at),
        float(3.0 * np.log10(n * d) + 10.0 * np.log10(R) - np.log10(2.0)),
        float(np.log10(n * d) + 8.0 * np.log10(R) - np.log10(2.0)),
    )

"""Layered regression: an activation of a linear map of a softmax, with a ReLU layer before it or without."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from attnfit.data.inputs import as_point, as_ridge
from attnfit.losses.activations import ACTIVATIONS
from attnfit.losses.vector_activations import AnyActivation, read_activation
from attnfit.objectives.layer_curvature import Layers, outer_rows
from attnfit.objectives.layer_inputs import (
    LinearMap,
    ReluMap,
    as_columns,
    as_matrix,
    as_penalty,
    as_weights,
    is_identity,
)
from attnfit.objectives.layered import LayeredProblem
from attnfit.objectives.objective import Evaluation, Offer

Array = NDArray[np.float64]

# A factor whose pivots differ by more is no basis for a low-rank correction.
PIVOTS = 1e-7
# Random starts give logits of this size: outputs near uniform, yet away from the kink at zero.
START_SIZE = 0.3
N_STARTS = 4


class NewtonStep(NamedTuple):
    """A Newton step ``-H^-1 g`` in the natural shape, and how it was solved for: "woodbury" or "dense"."""

    step: Array
    form: str


class TwoLayer(LayeredProblem):
    """Two-layer regression, and mixtures: ``0.5 sum_j w_j (h(A2 softmax(A1 x + offset)) - b)_j^2 +
    penalties``.

    The penalties are ``0.5 ||diag(row_penalty) A1 x||^2 + 0.5 ridge ||x||^2``. With ``A1`` the identity,
    ``h`` the identity and no offset or penalty the problem is a *mixture*: ``0.5 sum w (A2 f - b)^2`` over
    proportions f >= 0 that sum to one, which is convex and solved exactly.

    Parameters
    ----------
    A1 : array or sparse matrix, shape (n, d), or None
        None is the identity.
    A2 : array or sparse matrix, shape (m, n)
        In a mixture: one row a band, one column a signature.
    b : array_like, shape (m,) or (m, k)
        k right-hand sides share A1 and A2; the unknown then has shape (d, k) and its columns are independent.
    activation : str or tuple of callables
        "tanh", "identity", "sigmoid", "softplus", "gelu", "silu", "relu", "leaky_relu" or
        `attnfit.losses.leaky_relu` with another slope; a tuple ``(h, h', h'')``, perhaps with bounds: see
        `attnfit.losses.as_activation`; or, of all outputs together, ``(h, Jh, K)`` or ``(h, Jh)``: see
        `attnfit.losses.VectorActivation`.
    weights : array_like, shape (m,) or the shape of b, optional
    offset : array_like, shape (n,) or (n, k), optional
        Added to the logits.
    row_penalty : float or array_like of shape (n,)
        The paper's regulariser w.
    ridge : float

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape or sign; the message names argument and index.

    Notes
    -----
    With ``f = softmax(A1 x)``, ``y = A2 f``, ``c = h(y) - b``, ``q = A2^T (w h' c)``, ``a = f (q - <f, q>)``,
    ``delta = w (h'^2 + c h'')``, ``C = A1 - 1 (A1^T f)^T`` and ``K = A2 diag(f) C``: gradient ``A1^T a``,
    Hessian ``C^T diag(a) C + K^T diag(delta) K``. Source: "Local Convergence of Approximate Newton Method
    for Two Layer Nonlinear Regression", whose loss has no factor 0.5; sign of the step and constants
    corrected.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> signatures = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> problem = problems.TwoLayer(None, signatures, [0.75, 0.25, 1.0], activation="identity")
    >>> problem.proportions(minimize(problem).x).round(6)
    array([0.75, 0.25])
    """

    logit_map: LinearMap

    def __init__(
        self,
        A1: Any,
        A2: Any,
        b: Any,
        activation: Any = "tanh",
        *,
        weights: Any = None,
        offset: Any = None,
        row_penalty: Any = 0.0,
        ridge: float = 0.0,
    ) -> None:
        outer = as_matrix(A2, "A2")
        m, n = outer.shape
        first = None if A1 is None else as_matrix(A1, "A1")
        if first is not None and first.shape[0] != n:
            raise ValueError(
                f"A1 has {first.shape[0]} rows but A2 has {n} columns; each row of A1 gives the logit of "
                "one column "
                "of A2, so transpose or cut one of them"
            )
        targets = as_columns(b, m, "b", "A2")
        k = targets.shape[1]
        super().__init__(
            LinearMap(None if first is None or is_identity(first) else first, n),
            outer,
            targets,
            read_activation(activation, m),
            batch=np.ndim(b) == 2,
            weights=as_weights(weights, m, "A2", k),
            offset=None if offset is None else as_columns(offset, n, "offset", "A1", n_columns=k),
            penalty=as_penalty(row_penalty, n),
            ridge=as_ridge(ridge),
        )

    @property
    def offers(self) -> frozenset[Offer]:  # type: ignore[override]
        """Rows of the layer too, for one right-hand side."""
        return super().offers | ({Offer.LAYER_ROWS} if self.n_columns == 1 else set())

    @property
    def is_mixture(self) -> bool:
        """Whether the problem is convex in the proportions: identity A1 and activation, no offset, no
        penalty.
        """
        return (
            self.logit_map.matrix is None
            and self.activation is ACTIVATIONS["identity"]
            and self.offset is None
            and self.penalty is None
            and self.ridge == 0.0
        )

    def data_gradient(self, x: Any) -> dict[str, Array]:
        """Return the gradient of L with respect to the data, ``{"A1": (n, d), "A2": (m, n)}``, both dense."""
        at = self._evaluate_checked(x)
        layers = self.layers_of(at)
        return {"A1": self.logit_slope(layers) @ self._matrix(at.x).T, "A2": layers.slope @ layers.f.T}

    def newton_step(self, x: Any) -> NewtonStep:
        """Return the Newton step at x by the Woodbury formula on ``H0 = A1^T diag(a + row_penalty^2) A1 +
        ridge``.

        ``H = H0 + U S U^T`` with ``U = [K^T, A1^T a, A1^T f]`` of rank m + 2 and ``S`` block diagonal with
        delta and ``[[0, -1], [-1, 0]]``: with m + 2 << d this saves forming H. Where H0 is not positive
        definite (a is negative somewhere, and the penalties too small) the dense Hessian is solved instead,
        least norm.

        Returns
        -------
        NewtonStep
            Its ``form`` is "woodbury" only if every column was solved by the formula.
        """
        at = self._evaluate_checked(x)
        layers = self.layers_of(at)
        gradient = self._matrix(at.gradient)
        steps = np.empty_like(gradient)
        forms: set[str] = set()
        for j in range(self.n_columns):
            solved = self._woodbury(layers, gradient[:, j], j)
            forms.add("dense" if solved is None else "woodbury")
            if solved is None:
                one = self.columns(slice(j, j + 1))
                hessian = one.hessian_at(one.evaluate(self._matrix(at.x)[:, j]))
                solved = np.asarray(linalg.lstsq(hessian, -gradient[:, j], cond=1e-13)[0])
            steps[:, j] = solved
        return NewtonStep(steps.reshape(self.shape), "dense" if "dense" in forms else "woodbury")

    def _woodbury(self, layers: Layers, g: Array, j: int) -> Array | None:
        """Return one column's step, None where H0 is not positive definite."""
        a, f = layers.a[:, j], layers.f[:, j]
        diagonal = a if self.penalty is None else a + self.penalty[:, 0]
        H0 = self.weighted_gram(diagonal)
        H0[np.diag_indices(len(g))] += self.ridge
        try:
            factor = linalg.cholesky(H0, lower=True, check_finite=False)
        except linalg.LinAlgError:
            return None
        pivots = np.diag(factor)
        if not pivots.min() > PIVOTS * pivots.max():
            return None
        first = self.logit_map
        ends = first.adjoint(None, np.column_stack([a, f]))
        U = np.column_stack([outer_rows(self, layers, j).T, ends])
        SU = np.vstack([_between(layers, j) @ U[:, :-2].T, -U[:, -1], -U[:, -2]])
        solved = linalg.cho_solve((factor, True), np.column_stack([g, U]), check_finite=False)
        inner = np.eye(U.shape[1]) + SU @ solved[:, 1:]
        correction = solved[:, 1:] @ np.linalg.solve(inner, SU @ solved[:, 0])
        return np.asarray(correction - solved[:, 0])

    def weighted_gram(self, weights: Array, rows: NDArray[np.intp] | None = None) -> Array:
        """Return ``A1^T diag(weights) A1``, dense, of all rows or some, shape (d, d)."""
        A = self.logit_map.matrix
        self._reads[0] += 1.0 if rows is None else len(rows) / self.logit_map.shape[0]
        if A is None:
            full = weights if rows is None else np.bincount(rows, weights, self.logit_map.shape[0])
            return np.diag(full)
        A = A if rows is None else A[rows]
        if sparse.issparse(A):
            return np.asarray((A.T @ A.multiply(weights[:, None]).tocsr()).toarray())
        return np.asarray(A.T @ (weights[:, None] * A))

    def sampled_hessian(self, at: Evaluation, rows: NDArray[np.intp], scale: Array) -> Array:
        """Return the Hessian with its diagonal part from some rows and its rank-(m + 2) part exact.

        Parameters
        ----------
        at : Evaluation
        rows, scale : ndarray
            Rows of A1 and what their terms are multiplied by: inverse probabilities.

        Returns
        -------
        ndarray, shape (d, d)
        """
        layers = self.layers_of(at)
        diagonal = self.diagonal_weights(layers)[rows] * scale
        out = self.weighted_gram(diagonal, rows)
        K = outer_rows(self, layers, 0)
        ends = self.logit_map.adjoint(None, np.column_stack([layers.a[:, 0], layers.f[:, 0]]))
        mixed = np.multiply.outer(ends[:, 0], ends[:, 1])
        out += K.T @ (_between(layers, 0) @ K) - mixed - mixed.T
        out[np.diag_indices(len(out))] += self.ridge
        return out

    def diagonal_weights(self, layers: Layers) -> Array:
        """Return ``a + row_penalty^2`` of the first column, shape (n,): the diagonal part of the Hessian."""
        a = layers.a[:, 0]
        return a if self.penalty is None else a + self.penalty[:, 0]

    def point(self, x: Any) -> Array:
        """Return unknowns as columns, shape (d, k)."""
        return self._matrix(as_point(x, self.shape))


def _between(layers: Layers, j: int) -> Any:
    """Return what stands between K^T and K in the Hessian of a column, shape (m, m)."""
    return layers.curvature[j] if layers.curvature.ndim == 3 else sparse.diags_array(layers.curvature[:, j])


class ReluProblem(LayeredProblem):
    """What the problems share whose logits are ``A2 relu(A1 x)``."""

    linear = False
    logit_map: ReluMap

    def __init__(
        self,
        A1: Any,
        A2: Any,
        outer: Any,
        b: Any,
        activation: AnyActivation,
        weights: Any,
        offset: Array | None,
        penalty: Array | None,
        ridge: float,
    ) -> None:
        first, second = as_matrix(A1, "A1"), as_matrix(A2, "A2")
        if second.shape[1] != first.shape[0]:
            raise ValueError(
                f"A2 has {second.shape[1]} columns but A1 has {first.shape[0]} rows; A2 multiplies "
                "relu(A1 x), so "
                "transpose or cut one of them"
            )
        last, name = (second, "A2") if outer is None else (outer, "A3")
        if np.ndim(b) == 2 and np.shape(b)[1] != 1:
            raise ValueError(f"b has shape {np.shape(b)}; pass one right-hand side, shape ({last.shape[0]},)")
        targets = as_columns(b, last.shape[0], "b", name)
        super().__init__(
            ReluMap(first, second),
            outer,
            targets,
            activation,
            batch=False,
            weights=as_weights(weights, last.shape[0], name, 1),
            offset=offset,
            penalty=penalty,
            ridge=as_ridge(ridge),
        )

    @property
    def zero_is_stationary(self) -> bool:  # type: ignore[override]
        """True: at zero no row is active, and the gradient vanishes whatever the data."""
        return True

    def initial_point(self, random_state: Any = None) -> Array:
        """Return a small random point: zero is a kink."""
        rng = np.random.default_rng(random_state)
        first = self.logit_map.first
        squares = np.asarray((first**2).sum(axis=0), dtype=np.float64).reshape(-1)
        x = rng.standard_normal(len(squares)) / np.sqrt(np.where(squares > 0.0, squares, 1.0))
        linear, _ = self.logit_map.logits(x[:, None])
        size = float(np.abs(linear).max())
        return x * (START_SIZE / size) if size > 0.0 else x

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return several random points: sign patterns differ, and each has a minimum of its own."""
        return {f"random {k + 1}": self.initial_point(rng) for k in range(N_STARTS)}


class ReluSoftmax(ReluProblem):
    """Softmax of a ReLU layer: ``0.5 sum w (softmax(A2 relu(A1 x)) - b)^2 + 0.5 ridge ||x||^2``.

    Parameters
    ----------
    A1 : array or sparse matrix, shape (n, d)
    A2 : array or sparse matrix, shape (m, n)
    b : array_like, shape (m,)
    weights : array_like, shape (m,), optional
    ridge : float

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape or sign; the message names argument and index.

    Notes
    -----
    As long as no entry of ``A1 x`` changes sign this is softmax regression with the matrix ``A2 diag(s) A1``,
    ``s = 1[A1 x > 0]``: derivatives hold within such a region. Source: the two-layer problem that "Local
    Convergence of Approximate Newton Method for Two Layer Nonlinear Regression" starts from, without the
    factor 0.5 there.
    """

    def __init__(self, A1: Any, A2: Any, b: Any, *, weights: Any = None, ridge: float = 0.0) -> None:
        super().__init__(A1, A2, None, b, ACTIVATIONS["identity"], weights, None, None, ridge)


class ThreeLayer(ReluProblem):
    """Three layers: ``0.5 sum w (h(A3 softmax(A2 relu(A1 x) + offset)) - b)^2 + penalties``.

    The penalties are ``0.5 ||diag(row_penalty) A2 relu(A1 x)||^2 + 0.5 ridge ||x||^2``.

    Parameters
    ----------
    A1 : array or sparse matrix, shape (n, d)
    A2 : array or sparse matrix, shape (k, n)
    A3 : array or sparse matrix, shape (m, k)
    b : array_like, shape (m,)
    activation : str or tuple of callables
        As of `TwoLayer`.
    weights : array_like, shape (m,), optional
    offset : array_like, shape (k,), optional
        Added to the logits.
    row_penalty : float or array_like of shape (k,)
    ridge : float

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape or sign; the message names argument and index.

    Notes
    -----
    `TwoLayer` with ``A2 diag(s) A1``, ``s = 1[A1 x > 0]``, in place of A1 and A3 in place of A2; derivatives
    hold where no entry of ``A1 x`` is zero. Source: "Local Convergence of Approximate Newton Method for Two
    Layer Nonlinear Regression", without the factor 0.5 there.
    """

    def __init__(
        self,
        A1: Any,
        A2: Any,
        A3: Any,
        b: Any,
        activation: Any = "tanh",
        *,
        weights: Any = None,
        offset: Any = None,
        row_penalty: Any = 0.0,
        ridge: float = 0.0,
    ) -> None:
        second, outer = as_matrix(A2, "A2"), as_matrix(A3, "A3")
        n_logits = second.shape[0]
        if outer.shape[1] != n_logits:
            raise ValueError(
                f"A3 has {outer.shape[1]} columns but A2 has {n_logits} rows; A3 multiplies the softmax "
                "of A2's "
                "rows, so transpose or cut one of them"
            )
        super().__init__(
            A1,
            second,
            outer,
            b,
            read_activation(activation, outer.shape[0]),
            weights,
            None if offset is None else as_columns(offset, n_logits, "offset", "A2", n_columns=1),
            as_penalty(row_penalty, n_logits),
            ridge,
        )

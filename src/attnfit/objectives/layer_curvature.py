"""What the layers of a problem hold at a point, and Hessians, all columns of a chunk at once.

With ``f`` the softmax, ``C = A - 1 (A^T f)^T`` the centred rows and ``K = A_out diag(f) C``, the Hessian of a
column is ``C^T diag(a) C + K^T diag(delta) K`` plus the penalties: centring makes every rank-one correction
vanish, and the cancellation with it. A sparse A cannot be centred: there the Hessian is a diagonal plus rank
m + 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data.gram import majorant
from attnfit.objectives.objective import Evaluation

if TYPE_CHECKING:
    from attnfit.objectives.layered import LayeredProblem

Array = NDArray[np.float64]
# Rows are centred in blocks of this many numbers.
BLOCK_ENTRIES = 2**20


@dataclass(frozen=True)
class Layers:
    """What the layers hold at a point, one column a right-hand side.

    Attributes
    ----------
    pattern : ndarray of bool or None
        Which entries of ``A1 x`` are positive, where a ReLU comes first.
    linear, f : ndarray, shape (n, k)
        Logits without offset, and their softmax.
    q : ndarray, shape (n, k)
        Gradient of the loss with respect to f.
    a : ndarray, shape (n, k)
        ``f (q - <f, q>)``: gradient with respect to the logits.
    residual, slope, curvature, gauss : ndarray, shape (m, k)
        ``h(y) - b``; derivatives of the loss by y, ``w h' c`` and ``w (h'^2 + c h'')``; ``w h'^2``. Of an
        activation of all outputs together the last two are matrices, shape (k, m, m).
    """

    pattern: Any
    linear: Array
    f: Array
    q: Array
    a: Array
    residual: Array
    slope: Array
    curvature: Array
    gauss: Array


@dataclass(frozen=True)
class LayeredEvaluation(Evaluation):
    """An evaluation with the values of the columns, and the layers where they are small enough to keep."""

    column_values: Array = field(default_factory=lambda: np.zeros(0))
    layers: Layers | None = field(default=None, repr=False)


class Escape(NamedTuple):
    """An output of the softmax that was left out, and a point where it is raised and the loss is lower."""

    output: int
    x: Array


def column_hessians(problem: LayeredProblem, layers: Layers, kind: str) -> Array:
    """Return the Hessian of each column, shape (k, d, d); `LayeredProblem.column_hessians` names the
    kinds.
    """
    problem._reads[0] += problem._share
    d = problem.logit_map.shape[1]
    if problem.logit_map.sparse:
        out = np.stack([_uncentred(problem, layers, j, kind) for j in range(problem.n_columns)])
    else:
        inner, outer = _weights(layers, kind)
        out = np.zeros((problem.n_columns, d, d))
        K = np.zeros((len(problem.b), problem.n_columns, d))
        for block, rows, centred in _blocks(problem, layers):
            out += _gram(centred, inner[block])
            if problem.penalty is not None:
                out += _gram(np.broadcast_to(rows, centred.shape), problem.penalty[block])
            _add_outer(problem, K, block, layers.f[block, :, None] * centred)
        out += _outer_gram(K, outer)
    out[:, np.arange(d), np.arange(d)] += problem.ridge
    return out


def column_diagonals(problem: LayeredProblem, layers: Layers) -> Array:
    """Return the diagonal of the majorant with absolute weights, shape (d, k)."""
    problem._reads[0] += problem._share
    k, d = problem.n_columns, problem.logit_map.shape[1]
    inner, outer = _weights(layers, "absolute")
    if problem.logit_map.sparse:
        return np.stack([_uncentred_diagonal(problem, layers, j) for j in range(k)], axis=1) + problem.ridge
    if layers.pattern is not None and not layers.pattern.any():
        # No row is active at zero: sizes come from the mean over signs, weights from uniform outputs.
        squares = problem.logit_map.typical_squares()
        return np.asarray(squares.T @ (inner + layers.f**2)) + problem.ridge
    out = np.zeros((d, k))
    K = np.zeros((len(problem.b), k, d))
    for block, rows, centred in _blocks(problem, layers):
        out += np.einsum("nk,nkd->dk", inner[block], centred**2)
        if problem.penalty is not None:
            out += np.sum(problem.penalty[block, :, None] * rows**2, axis=0).T
        _add_outer(problem, K, block, layers.f[block, :, None] * centred)
    if outer.ndim == 2:
        return np.asarray(out + np.einsum("mk,mkd->dk", outer, K**2) + problem.ridge)
    return np.asarray(out + np.einsum("mkd,kml,lkd->dk", K, outer, K) + problem.ridge)


def weighted_outputs(weights: Array, V: Array) -> Array:
    """Return the outputs V, shape (m, k), times the weights of `Layers`: numbers or matrices."""
    return weights * V if weights.ndim == 2 else np.einsum("kml,lk->mk", weights, V)


def outer_rows(problem: LayeredProblem, layers: Layers, column: int) -> Array:
    """Return ``K = A_out J_f A`` of one column, shape (m, d)."""
    if problem.logit_map.sparse:
        f, A = layers.f[:, column], problem.logit_map.matrix  # type: ignore[union-attr]
        weighted = A.multiply(f[:, None]).tocsr()
        product = _dense(weighted if problem.outer is None else problem.outer @ weighted)
        y = f if problem.outer is None else np.asarray(problem.outer @ f)
        return np.asarray(product - np.multiply.outer(y, A.T @ f))
    K = np.zeros((len(problem.b), 1, problem.logit_map.shape[1]))
    one = problem.columns(slice(column, column + 1))
    part = _column(layers, column)
    for block, _, centred in _blocks(one, part):
        _add_outer(one, K, block, part.f[block, :, None] * centred)
    return K[:, 0]


def _weights(layers: Layers, kind: str) -> tuple[Array, Array]:
    """Return the diagonals between the centred rows and between the rows of K."""
    if kind == "gauss_newton":
        return np.zeros_like(layers.a), layers.gauss
    if kind == "absolute":
        if layers.curvature.ndim == 3:
            return np.abs(layers.a), np.stack([majorant(matrix) for matrix in layers.curvature])
        return np.abs(layers.a), np.abs(layers.curvature)
    return layers.a, layers.curvature


def _blocks(problem: LayeredProblem, layers: Layers) -> Iterator[tuple[slice, Array, Array]]:
    """Yield blocks of rows of A, shape (rows, 1 or k, d), and the same centred for each column."""
    n, d = problem.logit_map.shape
    k = problem.n_columns
    mean = problem.logit_map.adjoint(layers.pattern, layers.f).T
    step = max(1, BLOCK_ENTRIES // (k * d))
    for first in range(0, n, step):
        block = slice(first, min(first + step, n))
        rows = problem.logit_map.rows(layers.pattern, block)
        yield block, rows, rows - mean


def _gram(rows: Array, weights: Array) -> Array:
    """Return ``sum_i weights_ij rows_ij rows_ij^T`` of each column j, shape (k, d, d)."""
    weighted = weights[:, :, None] * rows
    return np.asarray(np.matmul(rows.transpose(1, 2, 0), weighted.transpose(1, 0, 2)))


def _outer_gram(K: Array, weights: Array) -> Array:
    """Return ``K_j^T diag(weights_j) K_j`` of each column j, or with matrices between, shape (k, d, d)."""
    if weights.ndim == 2:
        return _gram(K, weights)
    return np.asarray(np.einsum("mkd,kml,lke->kde", K, weights, K, optimize=True))


def _add_outer(problem: LayeredProblem, K: Array, block: slice, rows: Array) -> None:
    if problem.outer is None:
        K[block] += rows
        return
    flat = problem.outer[:, block] @ rows.reshape(len(rows), -1)
    K += np.asarray(flat).reshape(K.shape)


def _uncentred(problem: LayeredProblem, layers: Layers, j: int, kind: str) -> Array:
    """Return a column's Hessian for a sparse A, without ridge: diagonal plus rank m + 2."""
    A: Any = problem.logit_map.matrix  # type: ignore[union-attr]
    inner, outer = _column_weights(layers, j, kind)
    total = inner if problem.penalty is None else inner + problem.penalty[:, 0]
    K = outer_rows(problem, layers, j)
    out = _dense(A.T @ A.multiply(total[:, None]).tocsr()) + K.T @ _applied(outer, K)
    mean, cross = A.T @ layers.f[:, j], A.T @ inner
    mixed = np.multiply.outer(cross, mean)
    # Absolute weights do not sum to zero.
    return np.asarray(out - mixed - mixed.T + inner.sum() * np.multiply.outer(mean, mean))


def _uncentred_diagonal(problem: LayeredProblem, layers: Layers, j: int) -> Array:
    """Return the diagonal of a column's majorant for a sparse A, without ridge and without a d x d array."""
    A: Any = problem.logit_map.matrix  # type: ignore[union-attr]
    inner, outer = _column_weights(layers, j, "absolute")
    total = inner if problem.penalty is None else inner + problem.penalty[:, 0]
    mean, cross = A.T @ layers.f[:, j], A.T @ inner
    K = outer_rows(problem, layers, j)
    squares = A.multiply(A).T @ total + np.sum(K * _applied(outer, K), axis=0)
    return np.asarray(np.maximum(squares - 2.0 * mean * cross + inner.sum() * mean**2, 0.0))


def _column_weights(layers: Layers, j: int, kind: str) -> tuple[Array, Array]:
    """Return one column's diagonal between the centred rows, and its weights between the rows of K."""
    inner, outer = _weights(layers, kind)
    return inner[:, j], outer[:, j] if outer.ndim == 2 else outer[j]


def _applied(weights: Array, K: Array) -> Array:
    return weights[:, None] * K if weights.ndim == 1 else weights @ K


def _column(layers: Layers, j: int) -> Layers:
    parts: dict[str, Any] = {
        name: value if value is None else value[j : j + 1] if np.ndim(value) == 3 else value[:, j : j + 1]
        for name, value in vars(layers).items()
    }
    return type(layers)(**parts)


def _dense(matrix: Any) -> Array:
    return np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix)

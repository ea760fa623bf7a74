"""Points without gradient that are no minima, as the softmax has left out what would lower the loss; and how
far the proportions of a mixture are from optimal.

Where an output f_i of a softmax underflows, so does its part ``f_i (q_i - <f, q>)`` of the gradient, although
``q_i < <f, q>`` says that more of it would help. Whether it would is decided by trying.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import logsumexp

from attnfit.objectives.layer_curvature import Escape, Layers
from attnfit.objectives.layered import LayeredProblem

Array = NDArray[np.float64]

# Relative to 0.5 sum w b^2: what a right-hand side is certified to.
GAP_TOLERANCE = 1e-9
# Outputs below this count as left out; of many outputs, below a tenth of the equal share.
LEFT_OUT = 1e-5
# A direction is sought that raises an output against so many others, the largest: more than that costs more
# than a read of the data, and the mean of all is tried besides.
N_AGAINST = 256
# Shares to which one that is left out is raised on trial.
SHARES = np.array([1e-4, 1e-3, 1e-2, 0.1, 0.5])
N_CANDIDATES = 8
# A fall of the loss counts from this share of ``max(value, 0.5 sum w b^2)``.
FALL = 1e-9
Index = NDArray[np.intp]


def column_norms(problem: LayeredProblem) -> Array:
    """Return ``||w^(1/2) A2_i||`` of each signature, shape (n, 1) or (n, k)."""
    squares = problem.outer.multiply(problem.outer) if sparse.issparse(problem.outer) else problem.outer**2
    if problem.weights is None:
        return np.asarray(np.sqrt(squares.sum(axis=0)), dtype=np.float64).reshape(-1, 1)
    return np.asarray(np.sqrt(squares.T @ problem.weights))


def target_sizes(problem: LayeredProblem) -> Array:
    """Return ``0.5 sum w b^2`` of each right-hand side, shape (k,)."""
    squares = problem.b**2 if problem.weights is None else problem.weights * problem.b**2
    return np.asarray(0.5 * squares.sum(axis=0))


def duality_gaps(problem: LayeredProblem, layers: Layers) -> Array:
    """Return ``<q, f> - min_i q_i`` plus a bound of its rounding, shape (k,).

    In a mixture the loss is convex in f, so this bounds its excess over the optimum.
    """
    gaps = np.sum(layers.q * layers.f, axis=0) - layers.q.min(axis=0)
    norms = column_norms(problem)
    fitted = np.sum(norms * layers.f, axis=0) + np.sqrt(2.0 * target_sizes(problem))
    terms = len(problem.b) + len(layers.f) + 4
    rounding = 0.5 * np.finfo(np.float64).eps * terms * norms.max(axis=0) * fitted
    return np.asarray(np.maximum(gaps, 0.0) + rounding)


def false_optima(problem: LayeredProblem, X: Array, values: Array, layers: Layers) -> dict[int, Escape]:
    """Return the columns at a false optimum, each with a way out.

    Parameters
    ----------
    problem : LayeredProblem
    X : ndarray, shape (d, k)
    values : ndarray, shape (k,)
    layers : Layers
        At X.
    """
    sizes = FALL * np.maximum(values, target_sizes(problem))
    promise = np.sum(layers.f * layers.q, axis=0) - layers.q
    promise = np.where((layers.f < _threshold(layers)) & (promise > sizes), promise, 0.0)
    found = {}
    for j in np.flatnonzero(promise.any(axis=0)):
        for i in _largest(promise[:, j], N_CANDIDATES):
            if promise[i, j] <= 0.0:
                break
            lower = _lower_point(problem, X[:, j], layers, int(i), int(j), values[j] - sizes[j])
            if lower is not None:
                found[int(j)] = Escape(int(i), lower)
                break
    return found


def _threshold(layers: Layers) -> float:
    return min(LEFT_OUT, 0.1 / len(layers.f))


def _largest(values: Array, count: int) -> Index:
    """Return where the largest values are, in falling order."""
    some = np.argpartition(-values, count - 1)[:count] if len(values) > count else np.arange(len(values))
    return np.asarray(some[np.argsort(-values[some], kind="stable")])


def _lower_point(
    problem: LayeredProblem, x: Array, layers: Layers, i: int, j: int, below: float
) -> Array | None:
    """Return where the loss of column j is least when its output i is raised, None if not below a value."""
    one = problem.columns(np.array([j]))
    many = problem.columns(np.full(len(SHARES), j))
    z = layers.linear[:, j] if one.offset is None else layers.linear[:, j] + one.offset[:, 0]
    # Against the sum of all others, of which there may be many.
    steps = logsumexp(z) - z[i] + np.log(SHARES / (1.0 - SHARES))
    lowest = None
    for direction in _directions(problem, layers, i, j):
        trials = x[:, None] + direction[:, None] * steps
        values = many.evaluate(trials.reshape(-1)).column_values
        best = int(np.argmin(np.where(np.isnan(values), np.inf, values)))
        if values[best] < below:
            below, lowest = float(values[best]), np.array(trials[:, best])
    return lowest


def _directions(problem: LayeredProblem, layers: Layers, i: int, j: int) -> list[Array]:
    """Return directions of x that raise logit i by one: if possible against all that are not left out."""
    first: Any = problem.logit_map
    unit = np.zeros((first.shape[0], 1))
    unit[i] = 1.0
    if layers.pattern is None and first.matrix is None:
        return [unit[:, 0]]
    pattern = None if layers.pattern is None else layers.pattern[:, [j]]
    f = layers.f[:, j]
    kept = np.flatnonzero(f >= _threshold(layers))
    against = kept[_largest(f[kept], N_AGAINST)]
    picks = np.zeros((first.shape[0], 1))
    picks[kept] = -1.0 / len(kept)
    picks[i] += 1.0
    # Row i against the mean of the kept ones, and against each of the largest.
    against_mean = first.adjoint(pattern, picks)[:, 0]
    differences = _rows(first, pattern, [i]) - _rows(first, pattern, against)
    out = []
    against_all, *_ = np.linalg.lstsq(differences, np.ones(len(against)), rcond=1e-10)
    for direction in (against_all, against_mean):
        rise = float(against_mean @ direction)
        if rise > 1e-10 * float(np.linalg.norm(against_mean) * np.linalg.norm(direction)):
            out.append(np.asarray(direction / rise, dtype=np.float64))
    return out


def _rows(first: Any, pattern: Any, rows: Any) -> Array:
    """Return some rows of the map, dense, shape (n_rows, d)."""
    found = first.matrix[rows] if pattern is None else first.rows(pattern, rows)[:, 0]
    return np.asarray(found.toarray() if sparse.issparse(found) else found)

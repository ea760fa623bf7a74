"""How far the proportions of a mixture are from optimal."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.problems.layers.evaluation import Layers
from attnfit.problems.layers.layered import LayeredProblem

Array = NDArray[np.float64]

# Relative to 0.5 sum w b^2: what a right-hand side is certified to.
GAP_TOLERANCE = 1e-9


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

"""A start for layer inversion from the first two moments of the output."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.inversion.layer import AttentionLayer

Array = NDArray[np.float64]

# The fixed point halves its distance in every round.
ROUNDS = 60
# Share of the mean variance that is added in every direction, so that few tokens leave no direction empty.
FLOOR = 1e-9


def moment_tokens(layer: AttentionLayer, B: Array) -> Array | None:
    """Return the tokens, shape (n, d), that explain B if keys were normally distributed; None where the
    values of the heads cannot be told apart, or a mask hides keys.

    Softmax attention over keys with mean t and covariance X tilts their distribution: for normal keys the
    query t_i meets the mean ``y_i = t + X (M^T t_i + c)``. The covariance of the y_i is then
    ``S = X M^T X M X``, which has one positive solution X: the fixed point of ``X -> (M^T X M)^-1 # S``, with
    # the geometric mean of matrices, contracts by one half in Thompson's metric. X gives t, and t and X give
    every token. Of the true tokens it misses what the finite number of keys adds: about 0.3 of their size at
    logits of deviation 0.3, and 0.6 at deviation 1, for 16 tokens in 8 dimensions.

    Parameters
    ----------
    layer : AttentionLayer
    B : ndarray, shape (n, m)

    Notes
    -----
    Pusz and Woronowicz, "Functional calculus for sesquilinear forms and the purification map" (1975), for
    the mean; its contraction is that of Thompson, "On certain contraction mappings in a partially ordered
    vector space" (1963).
    """
    heads = layer.heads
    d = len(heads[0].M)
    values = np.vstack([head.V for head in heads])
    if layer.mask is not None or len(B) < 3 or np.linalg.matrix_rank(values) < len(values):
        return None
    seen = (B @ np.linalg.pinv(values)).reshape(len(B), len(heads), d).swapaxes(0, 1)
    means = seen.mean(axis=1)
    spread = seen - means[:, None]
    X = np.eye(d)
    try:
        for _ in range(ROUNDS):
            parts = [
                _riccati(_lifted(h.M.T @ X @ h.M), _lifted(y.T @ y / len(B)))
                for h, y in zip(heads, spread, strict=True)
            ]
            X = _lifted(np.mean(parts, axis=0))
    except np.linalg.LinAlgError:
        return None
    tilts = np.vstack([X @ head.M.T for head in heads])
    ahead = (means - np.stack([X @ head.c for head in heads])).reshape(-1)
    mean = np.linalg.lstsq(tilts + np.tile(np.eye(d), (len(heads), 1)), ahead, rcond=None)[0]
    apart = np.linalg.lstsq(tilts, spread.swapaxes(1, 2).reshape(-1, len(B)), rcond=1e-6)[0]
    tokens = mean + apart.T
    return tokens if np.isfinite(tokens).all() else None


def _riccati(G: Array, S: Array) -> Array:
    """Return the positive X with ``X G X = S``: the geometric mean of the inverse of G and S."""
    L = np.linalg.cholesky(G)
    values, vectors = np.linalg.eigh(L.T @ S @ L)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    half = np.linalg.solve(L.T, root)
    return np.asarray(np.linalg.solve(L.T, half.T).T)


def _lifted(X: Array) -> Array:
    """Return X, symmetric to the last bit, with a floor under its eigenvalues."""
    return np.asarray(0.5 * (X + X.T) + FLOOR * np.trace(X) / len(X) * np.eye(len(X)))

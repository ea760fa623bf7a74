"""The query, key, value and output projections of a layer in the form of one bilinear map and one value map a
head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.inputs import as_vector
from attnfit.problems.inversion.reading import read_matrix, split_heads

Array = NDArray[np.float64]


def heads_of_projections(
    W_Q: Any, W_K: Any, W_V: Any, W_O: Any, n_heads: int, b_Q: Any, b_V: Any, b_O: Any
) -> tuple[list[Array], list[Array], Array, Array]:
    """Return W and V of each head, the key biases, shape (heads, d), and what the biases add to every output,
    shape (m,).

    With ``q = W_Q^T x + b_Q`` the logit is ``(x_i^T W_Q W_K^T x_k + b_Q^T W_K^T x_k) / sqrt(d_head)`` up to
    what is constant in a row, which the softmax ignores: a key bias is.
    """
    if not isinstance(n_heads, int | np.integer) or n_heads < 1:
        raise ValueError(f"n_heads must be a positive integer, not {n_heads!r}")
    Q, K = split_heads(W_Q, "W_Q", n_heads, 1), split_heads(W_K, "W_K", n_heads, 1)
    values = split_heads(W_V, "W_V", n_heads, 1)
    widths = [V.shape[1] for V in values]
    if W_O is None:
        outputs = np.split(np.eye(sum(widths)), np.cumsum(widths)[:-1])
    else:
        outputs = split_heads(W_O, "W_O", n_heads, 0)
    d = len(Q[0])
    for name, other, expected in (
        ("W_K", K, [q.shape for q in Q]),
        ("W_V", values, [(d, w) for w in widths]),
    ):
        for h, (matrix, shape) in enumerate(zip(other, expected, strict=True)):
            if matrix.shape != shape:
                raise ValueError(
                    f"{name} has shape {matrix.shape} in head {h}; expected {shape}, as W_Q has {d} rows and "
                    f"{Q[h].shape[1]} columns there"
                )
    for h, (matrix, width) in enumerate(zip(outputs, widths, strict=True)):
        if matrix.shape != (width, outputs[0].shape[1]):
            raise ValueError(
                f"W_O has shape {matrix.shape} in head {h}; expected ({width}, {outputs[0].shape[1]}): one "
                "row a column of W_V"
            )
    queries = _split(b_Q, [q.shape[1] for q in Q], "b_Q")
    mixed = _split(b_V, widths, "b_V")
    scales = [1.0 / np.sqrt(q.shape[1]) for q in Q]
    W = [t * q @ k.T for t, q, k in zip(scales, Q, K, strict=True)]
    V = [v @ o for v, o in zip(values, outputs, strict=True)]
    bias = np.stack([t * (k @ b) for t, k, b in zip(scales, K, queries, strict=True)])
    shift = np.sum([b @ o for b, o in zip(mixed, outputs, strict=True)], axis=0)
    if b_O is not None:
        shift = shift + as_vector(b_O, len(shift), "b_O", rows_of="the output")
    return W, V, read_matrix(bias, "b_Q"), np.asarray(shift)


def _split(bias: Any, widths: list[int], name: str) -> list[Array]:
    """Return the part of each head of a bias, zero where none is given."""
    size = sum(widths)
    if bias is None:
        return [np.zeros(width) for width in widths]
    flat = as_vector(np.reshape(bias, -1), size, name, rows_of="the projection")
    return np.split(flat, np.cumsum(widths)[:-1])

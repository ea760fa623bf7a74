"""Check and convert the weights, the output and the known tokens of an attention layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.inputs import choose, require_finite_matrix
from attnfit.problems.inversion.layer import Head, Mask

Array = NDArray[np.float64]

CONVENTIONS = ("rows", "columns")


def read_matrix(values: Any, name: str) -> Array:
    """Return a matrix as float64, checked."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as a matrix: {error}; pass rows of equal length") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {array.dtype}; convert it to real numbers")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; pass a matrix with at least one row and column")
    require_finite_matrix(array, name)
    return array.astype(np.float64)


def read_matrices(values: Any, name: str) -> list[Array]:
    """Return one matrix a head, from a matrix, a list of them or an array of shape (heads, ., .)."""
    several = isinstance(values, list | tuple) and len(values) > 0 and np.ndim(values[0]) == 2
    if several or (isinstance(values, np.ndarray) and values.ndim == 3 and len(values)):
        return [read_matrix(matrix, f"{name}[{h}]") for h, matrix in enumerate(values)]
    return [read_matrix(values, name)]


def read_heads(W: Any, V: Any, key_bias: Any, convention: str) -> list[Head]:
    """Return the heads of W, V and the key biases."""
    choose(convention, dict.fromkeys(CONVENTIONS), "convention")
    Ws, Vs = read_matrices(W, "W"), read_matrices(V, "V")
    if len(Ws) != len(Vs):
        raise ValueError(f"W has {len(Ws)} heads but V has {len(Vs)}; pass one matrix of each a head")
    d, m = len(Ws[0]), Vs[0].shape[1]
    for h, (one, other) in enumerate(zip(Ws, Vs, strict=True)):
        if one.shape != (d, d):
            raise ValueError(
                f"W has shape {one.shape} in head {h}; expected ({d}, {d}): it is square, one row and column "
                "a coordinate of a token"
            )
        if other.shape != (d, m):
            raise ValueError(
                f"V has shape {other.shape} in head {h}; expected ({d}, {m}): one row a coordinate of a "
                "token, one column an output"
            )
    biases = np.zeros((len(Ws), d))
    if key_bias is not None:
        biases = read_matrix(np.atleast_2d(key_bias), "key_bias")
        if biases.shape != (len(Ws), d):
            raise ValueError(f"key_bias has shape {biases.shape}; expected (heads, d) = ({len(Ws)}, {d})")
    logits = Ws if convention == "rows" else [np.ascontiguousarray(one.T) for one in Ws]
    return [Head(M, other, c) for M, other, c in zip(logits, Vs, biases, strict=True)]


def read_output(B: Any, m: int) -> Array:
    """Return the output, shape (n, m)."""
    output = read_matrix(B, "B")
    if output.shape[1] != m:
        raise ValueError(
            f"B has {output.shape[1]} columns but V has {m}; pass one row a token and one column an output"
        )
    return output


def read_mask(mask: Any, n: int) -> Mask | None:
    """Return the mask, shape (n, n): True where the query (row) sees the key (column)."""
    if mask is None:
        return None
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask must be 'causal', an array of shape ({n}, {n}) or None, not {mask!r}")
        return np.tri(n, dtype=bool)
    seen = np.asarray(mask)
    if seen.shape != (n, n):
        raise ValueError(f"mask has shape {seen.shape}; expected ({n}, {n}), one row a query")
    if not np.isin(seen, (0, 1)).all():
        raise ValueError("mask must hold only True (seen) and False (hidden)")
    seen = seen.astype(bool)
    blind = np.flatnonzero(~seen.any(axis=1))
    if len(blind):
        raise ValueError(f"mask hides every key from query {blind[0]}; let each query see at least one")
    return None if seen.all() else seen


def read_known(known: Any, d: int, n: int) -> Array:
    """Return the known tokens as columns, shape (d, n), with NaN where a token is unknown."""
    tokens = np.full((d, n), np.nan)
    if isinstance(known, Mapping):
        for position, token in known.items():
            if not isinstance(position, int | np.integer) or not 0 <= position < n:
                raise ValueError(f"known has token {position!r}; use positions 0 to {n - 1}")
            vector = np.asarray(token, dtype=np.float64)
            if vector.shape != (d,) or not np.isfinite(vector).all():
                raise ValueError(f"known[{position}] must hold {d} finite numbers, shape ({d},)")
            tokens[:, position] = vector
    elif known is not None:
        tokens = np.array(known, dtype=np.float64)
        if tokens.shape != (d, n):
            raise ValueError(
                f"known has shape {tokens.shape}; expected (d, n) = ({d}, {n}), with NaN in the columns of "
                "unknown tokens, or a mapping from positions to tokens"
            )
        if np.isinf(tokens).any():
            raise ValueError(
                f"known is infinite in column {int(np.argwhere(np.isinf(tokens))[0][1])}; use NaN for unknown"
            )
        missing = np.isnan(tokens)
        partial = np.flatnonzero(missing.any(axis=0) & ~missing.all(axis=0))
        if len(partial):
            raise ValueError(
                f"known holds part of column {partial[0]}; give all of a token or NaN in all its coordinates"
            )
    if not np.isnan(tokens).any():
        raise ValueError("known holds every token: nothing is left to recover; put NaN in unknown columns")
    return tokens


def split_heads(values: Any, name: str, n_heads: int, axis: int) -> list[Array]:
    """Return one matrix a head from a list of them, or from one matrix with the heads side by side on an
    axis.
    """
    matrices = read_matrices(values, name)
    if len(matrices) == n_heads:
        return matrices
    width = matrices[0].shape[axis]
    if len(matrices) != 1 or width % n_heads:
        raise ValueError(
            f"{name} has {len(matrices)} matrices, the first of shape {matrices[0].shape}, which does not "
            f"make n_heads={n_heads} heads; pass one matrix a head, or one whose axis {axis} is a multiple"
        )
    return [np.ascontiguousarray(part) for part in np.split(matrices[0], n_heads, axis=axis)]

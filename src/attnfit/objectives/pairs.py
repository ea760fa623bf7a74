"""Check and arrange what a user passes as queries, keys and maps: one sequence, or a list of several; and
what the entries of maps tell about how they were stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data.inputs import (
    as_design,
    as_vector,
    from_tensor,
    pieces,
    require_finite_matrix,
    require_finite_rows,
)
from attnfit.data.on_disk import Column, stored_source
from attnfit.data.pairs import Block, KroneckerDesign, PairColumn
from attnfit.data.sources import Source

# Entries of a map on disk that are checked at a time.
CHECKED = 1 << 22
Array = NDArray[np.float64]


def smallest_normal(b: NDArray[Any] | Column) -> float:
    """Return the smallest normal number of the narrowest format that holds every entry."""
    dtype = b.stored_dtype if isinstance(b, Column) else b.dtype
    for kind in (np.float16, np.float32):
        with np.errstate(over="ignore", under="ignore"):
            if dtype.itemsize <= np.dtype(kind).itemsize or all(
                (v.astype(kind) == v).all() for _, v in pieces(b)
            ):
                return float(np.finfo(kind).tiny)
    return float(np.finfo(np.float64).tiny)


class Signs(NamedTuple):
    """The smallest positive entry, infinite without one, and whether there are zeros and negative entries."""

    smallest: float
    zeros: bool
    negative: bool


def signs(b: NDArray[Any] | Column) -> Signs:
    """Return what the signs of the entries are."""
    smallest, zeros, negative = np.inf, False, False
    for _, values in pieces(b):
        smallest = min(smallest, float(values.min(initial=np.inf, where=values > 0)))
        zeros, negative = zeros or bool((values == 0).any()), negative or bool((values < 0).any())
    return Signs(smallest, zeros, negative)


def first_negative(b: NDArray[Any] | Column) -> tuple[int, float]:
    """Return the first negative entry and where it is, -1 if there is none."""
    for rows, values in pieces(b):
        if (values < 0).any():
            k = int(np.argmax(values < 0))
            return rows.start + k, float(values[k])
    return -1, 0.0


def per_sequence(values: Any, n: int | None, name: str) -> list[Any]:
    """Return one entry a sequence: ``values`` itself is the entry of a single one.

    A list or tuple of matrices means several sequences; ``n`` is the number expected, None for any.
    """
    several = isinstance(values, list | tuple) and len(values) > 0 and _ndim(values[0]) == 2
    entries = [from_tensor(entry) for entry in values] if several else [from_tensor(values)]
    if n is not None and len(entries) != n:
        raise ValueError(f"{name} has {len(entries)} sequences but A1 has {n}; pass one matrix a sequence")
    return entries


def _ndim(matrix: Any) -> int:
    return len(matrix.shape) if hasattr(matrix, "shape") else np.ndim(matrix)


@dataclass(frozen=True)
class Pairs:
    """What is known of each pair of a query and a key, in the design's order of rows.

    ``target``, ``weights``, ``offset`` and ``penalty`` have shape (n_pairs,) or are None; targets and offsets
    keep the precision in which they were given.
    """

    design: KroneckerDesign
    target: Any
    weights: Array | None
    offset: Any
    penalty: Array | None


def read_pairs(
    A1: Any, A2: Any, B: Any, mask: Any, weights: Any, offset: Any, pair_features: Any, row_penalty: Any
) -> Pairs:
    """Check every argument of an attention problem and arrange it by pairs.

    Raises
    ------
    ValueError
        If anything is not finite, of the wrong shape or sign, or a query is left without keys; the message
        names the argument, the sequence and the index.
    """
    queries = [read_factor(a, name) for a, name in _named(per_sequence(A1, None, "A1"), "A1")]
    n = len(queries)
    keys = [read_factor(a, name) for a, name in _named(per_sequence(A2, n, "A2"), "A2")]
    for name, factors in (("A1", queries), ("A2", keys)):
        widths = [f.shape[1] for f in factors]
        if len(set(widths)) > 1:
            s = next(s for s, width in enumerate(widths) if width != widths[0])
            raise ValueError(
                f"{name}[{s}] has {widths[s]} features but {name}[0] has {widths[0]}; all sequences share "
                "one X, so give each the same features"
            )
    shapes = [(len(q), len(k)) for q, k in zip(queries, keys, strict=True)]
    masks = [expand_mask(m, shape, name) for (m, name), shape in _with(mask, shapes, "mask")]
    features = _features(pair_features, shapes)
    parts = zip(queries, keys, masks, features, strict=True)
    design = KroneckerDesign([Block(q, k, m, f) for q, k, m, f in parts])

    def by_pair(values: Any, name: str, **options: Any) -> Any:
        if values is None:
            return None
        entries = zip(_with(values, shapes, name), masks, strict=True)
        read = [_cells(without_masked(v, m), shape, label, **options) for ((v, label), shape), m in entries]
        if any(isinstance(v, Source) for v in read):
            return PairColumn(design, read)
        flat = [v.reshape(-1) if m is None else v[m] for v, m in zip(read, masks, strict=True)]
        return flat[0] if n == 1 else np.concatenate(flat)

    penalty = None
    if not isinstance(row_penalty, list | tuple) and np.ndim(row_penalty) == 0:
        scalar = float(as_vector(row_penalty, 1, "row_penalty", scalar=True)) ** 2
        penalty = np.full(design.shape[0], scalar) if scalar else None
    else:
        entries = by_pair(row_penalty, "row_penalty")
        penalty = None if entries is None else np.asarray(entries, dtype=np.float64) ** 2
    return Pairs(
        design, by_pair(B, "B"), _weights(weights, shapes, masks), by_pair(offset, "offset"), penalty
    )


def _named(entries: list[Any], name: str) -> list[tuple[Any, str]]:
    return [(e, name if len(entries) == 1 else f"{name}[{s}]") for s, e in enumerate(entries)]


def _with(
    values: Any, shapes: list[tuple[int, int]], name: str
) -> list[tuple[tuple[Any, str], tuple[int, int]]]:
    """Pair each sequence's entry and its name with the sequence's shape; a word or None serves all."""
    shared = values is None or isinstance(values, str)
    entries = [values] * len(shapes) if shared else per_sequence(values, len(shapes), name)
    return list(zip(_named(entries, name), shapes, strict=True))


def read_factor(values: Any, name: str) -> Array:
    """Return a matrix of finite numbers, dense and in float64."""
    design = as_design(values, name)
    block = design.block(slice(0, int(design.shape[0])))
    return np.asarray(block.toarray() if sparse.issparse(block) else block)


def expand_mask(mask: Any, shape: tuple[int, int], name: str) -> NDArray[np.bool_] | None:
    """Return a mask as booleans; None where it hides nothing."""
    if mask is None:
        return None
    n1, n2 = shape
    if isinstance(mask, str):
        kind, _, width = mask.partition(":")
        if mask != "causal" and not (kind in ("causal", "window") and width.isdigit()):
            raise ValueError(
                f"{name} must be 'causal', 'causal:W' (the last W keys, its own included), 'window:W' (keys "
                f"at distances up to W) or an array of booleans, not {mask!r}"
            )
        if n1 > n2:
            raise ValueError(
                f"mask={mask!r} needs at least as many keys as queries, not {n2} for {n1}; pass an array"
            )
        # The last query sees every key, as where earlier keys are cached.
        seen = np.tri(n1, n2, n2 - n1, dtype=np.bool_)
        if kind == "window":
            seen = np.tri(n1, n2, n2 - n1 + int(width), dtype=np.bool_)
        if width:
            if kind == "causal" and int(width) == 0:
                raise ValueError(f"{name}={mask!r} leaves every query without a key; use at least causal:1")
            seen &= ~np.tri(n1, n2, n2 - n1 - int(width) - (kind == "window"), dtype=np.bool_)
        return None if seen.all() else seen
    array = np.asarray(mask)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}, True where a key is attended to")
    if array.dtype != np.bool_:
        if array.dtype.kind not in "iuf" or not np.isin(array, (0, 1)).all():
            raise ValueError(f"{name} must hold booleans, True where a key is attended to, not {array.dtype}")
        array = array.astype(np.bool_)
    empty = np.flatnonzero(~array.any(axis=1))
    if len(empty):
        raise ValueError(f"{name} leaves query {empty[0]} without a key; drop that row of A1, B and mask")
    return None if array.all() else array


def _cells(values: Any, shape: tuple[int, int], name: str) -> Any:
    """Return an (n1, n2) matrix of finite real numbers in its own floating precision, or on disk."""
    source = stored_source(values, name)
    if source is not None:
        _require_cells(source, shape, name)
        step = max(1, CHECKED // shape[1])
        for first in range(0, shape[0], step):
            rows = source.read(first, min(first + step, shape[0]))
            require_finite_rows(rows, slice(first, first + len(rows)), name, source.locate)
        return source
    try:
        array = values if isinstance(values, np.ndarray) else np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as a matrix: {error}; pass shape {shape}") from error
    _require_cells(array, shape, name)
    if array.dtype.kind == "f":
        _require_finite(array, name)
        return array
    return array.astype(np.float64)


def _require_cells(matrix: Any, shape: tuple[int, int], name: str) -> None:
    if matrix.shape != shape:
        raise ValueError(
            f"{name} has shape {matrix.shape}; expected (queries, keys) = {shape}, the rows of A1 and of A2"
        )
    if matrix.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {matrix.dtype}; convert it to real numbers")


def _require_finite(array: NDArray[Any], name: str) -> None:
    # A sum of half-precision numbers overflows long before any of them does.
    if array.dtype.itemsize < 4:
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            require_finite_matrix(array[bad[0][0] :][:1].astype(np.float32), name, int(bad[0][0]))
        return
    require_finite_matrix(array, name)


def without_masked(values: Any, mask: NDArray[np.bool_] | None) -> Any:
    """Return cells with zeros behind the mask, where anything may stand, even NaN."""
    if mask is None or not isinstance(values, np.ndarray) or values.shape != mask.shape:
        return values
    return values if values.dtype.kind != "f" else np.where(mask, values, values.dtype.type(0))


def _features(pair_features: Any, shapes: list[tuple[int, int]]) -> list[list[NDArray[Any]]]:
    """Return the features of each sequence, each of the sequence's shape."""
    features = [] if pair_features is None else list(pair_features)
    if len(shapes) == 1:
        features = [features]
    elif not features:
        features = [[] for _ in shapes]
    elif len(features) != len(shapes):
        raise ValueError(
            f"pair_features has {len(features)} entries but there are {len(shapes)} sequences; pass "
            "a list of matrices for each sequence"
        )
    if len({len(f) for f in features}) > 1:
        raise ValueError("pair_features must hold equally many matrices for every sequence")
    several = len(shapes) > 1
    return [
        [_cells(f, shape, f"pair_features{f'[{s}]' if several else ''}[{p}]") for p, f in enumerate(own)]
        for s, (own, shape) in enumerate(zip(features, shapes, strict=True))
    ]


def _weights(
    weights: Any, shapes: list[tuple[int, int]], masks: list[NDArray[np.bool_] | None]
) -> Array | None:
    """Return one weight a pair, from one a query or one a pair."""
    if weights is None:
        return None
    if len(shapes) == 1:
        entries = [weights]
    elif isinstance(weights, list | tuple) and len(weights) == len(shapes):
        entries = list(weights)
    else:
        raise ValueError(f"weights must be a list with an entry for each of the {len(shapes)} sequences")
    flat = []
    for (entry, name), shape, mask in zip(_named(entries, "weights"), shapes, masks, strict=True):
        if np.ndim(entry) == 2:
            cells = np.asarray(_cells(entry, shape, name), dtype=np.float64)
        else:
            rows = as_vector(entry, shape[0], name, rows_of="A1")
            cells = np.broadcast_to(rows[:, None], shape)
        if (cells < 0).any():
            where = ", ".join(map(str, np.argwhere(cells < 0)[0][: np.ndim(entry)]))
            raise ValueError(f"{name} is negative at index {where}; use values >= 0, with 0 to leave it out")
        flat.append(cells.reshape(-1) if mask is None else cells[mask])
    out = np.concatenate(flat)
    if not out.any():
        raise ValueError("weights are all zero; give at least one query a positive weight")
    return out

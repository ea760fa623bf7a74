"""How many independent numbers of an output there are for the unknown tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import maximum_flow

from attnfit.objectives.token_problem import TokenProblem

Seen = NDArray[np.bool_]

# Capacities of scipy's maximum flow are of 32 bits.
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Count:
    """Equations against unknowns.

    Attributes
    ----------
    n_equations : int
        Output rows that an unknown token reaches, each distinct one once, times the rank of the value maps
        below one another.
    n_unknowns : int
    excess : {-1, 0, 1}
        Sign of the least ``equations - unknowns`` over all sets of unknown tokens, the others taken as given:
        a mask may leave too few rows for some while there are enough in all.
    """

    n_equations: int
    n_unknowns: int
    excess: int


def count(layer: TokenProblem, x: Any = None, precision: float = 0.0) -> Count:
    """Count the equations of a layer; given a point and the relative error of the output, those that depend
    on a token there by more than such errors can hide.

    Masks tell which rows may depend on a token. Where attention is sharp fewer do: a row with a weight of
    1e-12 on a token says nothing of it. A row that moves by less than the root of the error is not counted:
    at another token weights can be squared, and where a second token makes up for the first, what moves is
    the product of two such shares.
    """
    rank, d, u = layer.rank, layer.d, len(layer.unknown)
    seen = _seen(layer, None if x is None else _moved(layer, x, precision))
    total = rank * len(seen)
    excess = int(np.sign(total - d * u))
    if not seen.all() and excess >= 0:
        if not _enough(seen, rank, d, strictly=False):
            excess = -1
        elif not _enough(seen, rank, d, strictly=True):
            excess = 0
    return Count(total, layer.n_unknowns, excess)


def _moved(layer: TokenProblem, x: Any, precision: float) -> Seen:
    """Return which rows move with which unknown tokens, shape (n, n_unknown), along a random direction as
    long as the token, to first order.
    """
    at = layer.layer.forward(layer.token_rows(np.asarray(x).reshape(-1)))
    directions = np.random.default_rng(0).standard_normal((len(layer.unknown), layer.d))
    sizes = np.linalg.norm(at.T[layer.unknown], axis=1) / np.sqrt(layer.d)
    enough = np.sqrt(precision / layer.n) * float(np.linalg.norm(layer.B))
    moved = np.empty((layer.n, len(layer.unknown)), dtype=bool)
    for k, position in enumerate(layer.unknown):
        D = np.zeros_like(at.T)
        D[position] = sizes[k] * directions[k]
        moved[:, k] = np.linalg.norm(layer.layer.push_forward(at, D), axis=1) > enough
    return moved


def _seen(layer: TokenProblem, moved: Seen | None) -> Seen:
    """Return which unknown tokens each output row depends on, shape (rows, n_unknown).

    A row depends on its keys, and on its query where that has more than one key to choose from. Rows of equal
    known queries with equal keys say the same.
    """
    n = layer.n
    mask = np.ones((n, n), dtype=bool) if layer.layer.mask is None else layer.layer.mask
    seen = mask.copy()
    own = np.arange(n)
    seen[own, own] |= mask.sum(axis=1) > 1
    if moved is not None:
        seen[:, layer.unknown] &= moved
    known = np.delete(own, layer.unknown)
    alike = np.column_stack([layer.known.T[known], mask[known]])
    first = np.unique(alike, axis=0, return_index=True)[1] if len(known) else known
    kept = np.sort(np.concatenate([layer.unknown, known[first]]))
    rows = seen[np.ix_(kept, layer.unknown)]
    return np.asarray(rows[rows.any(axis=1)])


def _enough(seen: Seen, rank: int, d: int, *, strictly: bool) -> bool:
    """Return whether every set of tokens is reached by at least (or by more than) as many equations as it has
    unknowns: by Hall's theorem, whether a flow from tokens through the rows they reach meets all demands.

    More than as many is as many with a demand raised by less than one in all. With capacities scaled by k
    that is one a token, and k need only exceed their number; a smaller k asks for more.
    """
    n_rows, u = seen.shape
    k = min(u + 1, (LARGEST // u - 1) // max(d, rank)) if strictly else 1
    demand = k * d + strictly
    source, sink = 0, 1 + u + n_rows
    token, row = 1 + np.arange(u), 1 + u + np.arange(n_rows)
    at, to = np.nonzero(seen)
    # SciPy 1.14 takes 32-bit numbers only.
    tails = np.concatenate([np.zeros(u, dtype=int), token[to], row]).astype(np.int32)
    heads = np.concatenate([token, row[at], np.full(n_rows, sink)]).astype(np.int32)
    room = np.concatenate([np.full(u, demand), np.full(len(at), demand), np.full(n_rows, k * rank)])
    size = sink + 1
    graph = sparse.csr_array((room.astype(np.int32), (tails, heads)), shape=(size, size))
    return bool(maximum_flow(graph, source, sink).flow_value == demand * u)

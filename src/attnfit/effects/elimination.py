"""Compiled loops of approximate elimination: see `attnfit.effects.laplacian`. Importing it imports Numba."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from attnfit.data.kernels import OPTIONS, Compiled
from attnfit.effects.levels import Index

# Cliques of at most so many members are kept whole; members of larger ones are joined to so many others.
WHOLE, DRAWS = 6, 2
# Edges of the largest clique that is kept whole, and some.
SPARE = 36


def count_edges(sizes: Index) -> int:
    """Return how many edges cliques of these sizes become."""
    small = sizes <= WHOLE
    return int(np.sum(np.where(small, sizes * (sizes - 1) // 2, DRAWS * np.maximum(sizes - 1, 0))))


@numba.njit(**OPTIONS)
def _next_random(state):  # type: ignore[no-untyped-def]
    # The generator of Knuth's MMIX; its upper bits are a number between 0 and 1.
    state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
    return state, np.float64(state >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@numba.njit(**OPTIONS)
def _draw_clique(members, weights, count, total, ends, out, used, state):  # type: ignore[no-untyped-def]
    # Edges of the clique that eliminating a vertex of so much weight in total leaves between its neighbours.
    if count <= WHOLE:
        for a in range(count):
            for b in range(a + 1, count):
                ends[used, 0], ends[used, 1] = members[a], members[b]
                out[used] = weights[a] * weights[b] / total
                used += 1
        return used, state
    order = np.argsort(weights[:count])
    after = np.zeros(count + 1)
    for k in range(count - 1, -1, -1):
        after[k] = after[k + 1] + weights[order[k]]
    for k in range(count - 1):
        a = order[k]
        for _ in range(DRAWS):
            state, u = _next_random(state)
            goal = u * after[k + 1]
            # The last place from k + 1 on behind which more than the goal is left.
            low, high = k + 1, count - 1
            while low < high:
                middle = (low + high + 1) // 2
                if after[middle] > goal:
                    low = middle
                else:
                    high = middle - 1
            ends[used, 0], ends[used, 1] = members[a], members[order[low]]
            out[used] = weights[a] * after[k + 1] / (DRAWS * total)
            used += 1
    return used, state


def _cliques(level_starts, rest, W, ends, out, seed):  # type: ignore[no-untyped-def]
    state, used = np.uint64(seed), 0
    for i in range(len(level_starts) - 1):
        first, last = level_starts[i], level_starts[i + 1]
        total = 0.0
        for c in range(first, last):
            total += W[c]
        if total > 0.0:
            used, state = _draw_clique(
                rest[first:last], W[first:last], last - first, total, ends, out, used, state
            )
    for k in range(used, len(out)):
        ends[k, 0], ends[k, 1], out[k] = 0, 0, 0.0


@cache
def cliques() -> Any:
    """Compile the elimination of set 0."""
    return Compiled(_cliques, **OPTIONS)


def _eliminate(  # type: ignore[no-untyped-def]
    indptr, indices, data, order, rank, ground, limit, starts, neighbours, shares, pivots, seed
):
    # Lists of edges to vertices that are eliminated later, linked through a pool.
    n = len(order)
    head, pool = np.full(n, -1), len(data) + 2 * limit
    behind, other, weight = np.empty(pool, np.int64), np.empty(pool, np.int64), np.empty(pool)
    used_pool, used, state = 0, 0, np.uint64(seed)
    for v in range(n):
        for e in range(indptr[v], indptr[v + 1]):
            w = indices[e]
            if rank[w] > rank[v] and data[e] > 0.0:
                behind[used_pool], other[used_pool], weight[used_pool] = head[v], w, data[e]
                head[v] = used_pool
                used_pool += 1
    total_of = np.zeros(n)
    members, sizes = np.empty(n, np.int64), np.empty(n)
    ends, drawn = np.empty((SPARE + DRAWS * n, 2), np.int64), np.empty(SPARE + DRAWS * n)
    for k in range(n):
        v = order[k]
        count, e = 0, head[v]
        while e >= 0:
            if total_of[other[e]] == 0.0:
                members[count] = other[e]
                count += 1
            total_of[other[e]] += weight[e]
            e = behind[e]
        total = ground[v]
        for j in range(count):
            sizes[j] = total_of[members[j]]
            total_of[members[j]] = 0.0
            total += sizes[j]
        pivots[k] = total
        if used + count > limit or used_pool + DRAWS * count + SPARE > pool:
            return -1
        for j in range(count):
            neighbours[used], shares[used] = members[j], sizes[j] / total
            used += 1
        starts[k + 1] = used
        made, state = _draw_clique(members, sizes, count, total, ends, drawn, 0, state)
        for j in range(made):
            a, b = ends[j, 0], ends[j, 1]
            if rank[a] > rank[b]:
                a, b = b, a
            behind[used_pool], other[used_pool], weight[used_pool] = head[a], b, drawn[j]
            head[a] = used_pool
            used_pool += 1
    return used


@cache
def eliminate() -> Any:
    """Compile the elimination of the levels of the other set."""
    return Compiled(_eliminate, **OPTIONS)


def _substitute(order, starts, neighbours, shares, pivots, out):  # type: ignore[no-untyped-def]
    n, m = len(order), out.shape[1]
    for k in range(n):
        v = order[k]
        for e in range(starts[k], starts[k + 1]):
            for j in range(m):
                out[neighbours[e], j] += shares[e] * out[v, j]
    for k in range(n):
        inverse = 1.0 / pivots[k] if pivots[k] > 0.0 else 0.0
        for j in range(m):
            out[order[k], j] *= inverse
    for k in range(n - 1, -1, -1):
        v = order[k]
        for e in range(starts[k], starts[k + 1]):
            for j in range(m):
                out[v, j] += shares[e] * out[neighbours[e], j]


@cache
def substitute() -> Any:
    """Compile the solution of systems with a factor."""
    return Compiled(_substitute, **OPTIONS)

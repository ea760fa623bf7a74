"""Approximate Cholesky factors of the curvature of one set of effects, the other eliminated: of a graph
Laplacian.

With two sets ``A = R'WR - R'W D_0 d^-1 D_0'WR`` is the Laplacian of a graph on the levels of the second: each
level of set 0, with cells of weight u_1 .. u_k, is a clique of weights ``u_a u_b / sum u``. Eliminating a
vertex makes a clique of its neighbours, by the same rule; here large cliques are replaced by a few edges
drawn so that their expectation is the clique. Source: Gao, Kyng and Spielman, "Robust and practical solution
of Laplacian equations by approximate elimination" (2023), arXiv:2303.00709.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.effects.levels import Cells, Index

Array = NDArray[np.float64]
# Share of the weight of a level that ties it to the ground: a Laplacian is singular.
GROUND = 1e-9
# Edges drawn in the elimination, for each edge before it, beyond which it is given up.
MOST_EDGES = 40
SEED = 20230300709


@dataclass(frozen=True)
class LaplacianFactor:
    """``A ~ L D L'`` with a unit lower triangle in the order of elimination.

    Attributes
    ----------
    order : ndarray of int, shape (M,)
        Vertices as they were eliminated.
    starts, neighbours, shares
        The columns of ``1 - L'`` in that order.
    pivots : ndarray, shape (M,)
    """

    order: Index
    starts: Index
    neighbours: Index
    shares: Array
    pivots: Array

    def solve(self, R: Array) -> Array:
        """Return ``(L D L')^-1 R``, shape (M, m)."""
        out = R.copy()
        from attnfit.effects import elimination

        elimination.substitute()(self.order, self.starts, self.neighbours, self.shares, self.pivots, out)
        return out


@dataclass(frozen=True)
class BlockFactor:
    """A factor for each set of effects, the first set eliminated and the others held: for three sets and
    more.
    """

    blocks: tuple[LaplacianFactor, ...]
    offsets: tuple[int, ...]

    def solve(self, R: Array) -> Array:
        """Return ``P^-1 R``, shape (M, m)."""
        out = np.empty_like(R)
        for k, block in enumerate(self.blocks):
            mine = slice(self.offsets[k], self.offsets[k + 1])
            out[mine] = block.solve(R[mine])
        return out


def factorise_blocks(cells: Cells, W: Array, d: Array) -> BlockFactor | None:
    """Return a factor for each set but the first; None where one would take too much memory."""
    owner = np.repeat(np.arange(cells.n_first), np.diff(cells.level_starts))
    blocks = []
    for s in range(cells.rest.shape[1]):
        size = cells.offsets[s + 1] - cells.offsets[s]
        ends = (owner, cells.rest[:, s] - cells.offsets[s])
        pairs = sparse.coo_array((W, ends), shape=(cells.n_first, size)).tocsr()
        rest = pairs.indices.astype(np.int32)[:, None]
        n = len(rest)
        two = Cells(np.arange(n), np.arange(n + 1), pairs.indptr.astype(np.intp), rest, (0, size))
        factor = factorise(two, pairs.data, d)
        if factor is None:
            return None
        blocks.append(factor)
    return BlockFactor(tuple(blocks), cells.offsets)


def factorise(cells: Cells, W: Array, d: Array) -> LaplacianFactor | None:
    """Return an approximate factor for two sets; None where it would take too much memory."""
    from attnfit.effects import elimination

    M, n_edges = cells.n_rest, elimination.count_edges(np.diff(cells.level_starts))
    ends, weights = np.empty((n_edges, 2), dtype=np.intp), np.empty(n_edges)
    elimination.cliques()(cells.level_starts, cells.rest[:, 0], W, ends, weights, SEED)
    both = np.concatenate([ends, ends[:, ::-1]])
    kept = np.concatenate([weights, weights])
    graph = sparse.coo_array((kept, (both[:, 0], both[:, 1])), shape=(M, M)).tocsr()
    degree = np.diff(graph.indptr)
    order = np.lexsort((np.random.default_rng(SEED).random(M), degree)).astype(np.intp)
    mass = np.zeros(M)
    np.add.at(mass, cells.rest[:, 0], W)
    limit = MOST_EDGES * max(graph.nnz // 2, 1)
    rank = np.empty(M, dtype=np.intp)
    rank[order] = np.arange(M)
    starts = np.zeros(M + 1, dtype=np.intp)
    neighbours, shares, pivots = np.empty(limit, dtype=np.intp), np.empty(limit), np.empty(M)
    used = elimination.eliminate()(
        graph.indptr.astype(np.intp), graph.indices.astype(np.intp), graph.data, order, rank, GROUND * mass,
        limit, starts, neighbours, shares, pivots, SEED,
    )  # fmt: skip
    if used < 0:
        return None
    return LaplacianFactor(order, starts, neighbours[:used].copy(), shares[:used].copy(), pivots)

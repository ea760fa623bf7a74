"""Rows ``a1_i (x) a2_k``, one for each pair of a query and a key, that are never formed.

A product with such rows is two matrix products, ``(A1 (x) A2) vec(X) = vec(A1 X A2^T)``; a weighted Gram is a
row-wise Khatri-Rao product on each side:

    sum_ik t_ik (a1_i (x) a2_k)(a1_i (x) a2_k)^T = rearranged KR(A1)^T T KR(A2),  KR(M)_i = vec(m_i m_i^T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

from attnfit.data.matrix import Array, Design, Rows
from attnfit.data.on_disk import Column
from attnfit.data.parallel import Recent

# Pairs worked on at a time: a few arrays of this size fit the shared cache.
BLOCK_PAIRS = 1 << 17
# Squares of the keys are kept up to this many numbers, else made piece by piece.
KEPT_SQUARES = 1 << 25


@dataclass(frozen=True)
class PairRows:
    """Rows of a Kronecker product, by its factors.

    Attributes
    ----------
    queries : ndarray, shape (q, d1)
    keys : ndarray, shape (n2, d2)
    mask : ndarray of bool, shape (q, n2), or None
        The pairs that exist; rows are those in C order.
    features : list of ndarray, shape (n_rows,)
        Further columns, one number a pair.
    """

    queries: Array
    keys: Array
    mask: NDArray[np.bool_] | None
    features: list[Array]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of pairs and of columns."""
        q, n2 = len(self.queries), len(self.keys)
        n_rows = q * n2 if self.mask is None else int(np.count_nonzero(self.mask))
        return n_rows, self.queries.shape[1] * self.keys.shape[1] + len(self.features)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the entries."""
        return self.queries.dtype

    def __abs__(self) -> PairRows:
        """Return the rows with entries by size: a product's size is the product of the sizes."""
        features = [np.abs(column) for column in self.features]
        return PairRows(np.abs(self.queries), np.abs(self.keys), self.mask, features)

    def __matmul__(self, x: Array) -> Array:
        """Return the product with a vector, shape (n_rows,), or with the columns of a matrix."""
        if x.ndim == 2:
            return np.column_stack([self @ column for column in x.T])
        d1, d2 = self.queries.shape[1], self.keys.shape[1]
        z = (self.queries @ x[: d1 * d2].reshape(d1, d2)) @ self.keys.T
        flat = z.reshape(-1) if self.mask is None else z[self.mask]
        for column, coefficient in zip(self.features, x[d1 * d2 :], strict=True):
            flat += coefficient * column
        return flat

    def matrix(self, values: Array) -> Array:
        """Return one value a row as a matrix, shape (q, n2), zero where no pair exists."""
        if self.mask is None:
            return values.reshape(len(self.queries), len(self.keys))
        out = np.zeros(self.mask.shape)
        out[self.mask] = values
        return out

    def combine(self, values: Array) -> Array:
        """Return ``values @ rows``, shape (d,)."""
        bilinear = self.queries.T @ (self.matrix(values) @ self.keys)
        return np.concatenate([bilinear.reshape(-1), [float(values @ f) for f in self.features]])


@dataclass(frozen=True)
class PairMeans:
    """Weighted sums of the rows of each query, ``a1_i (x) m_i``, by their factors.

    ``keys`` holds the m_i, ``mass`` the sums of the weights.
    """

    keys: Array
    mass: Array
    features: list[Array]


@dataclass(frozen=True)
class Block:
    """The pairs of one sequence: queries (n1, d1), keys (n2, d2), mask and features (n1, n2)."""

    queries: Array
    keys: Array
    mask: NDArray[np.bool_] | None
    features: list[NDArray[Any]]

    @property
    def pairs_per_query(self) -> NDArray[np.intp]:
        """Number of pairs of each query."""
        if self.mask is None:
            return np.full(len(self.queries), len(self.keys), dtype=np.intp)
        return np.asarray(self.mask.sum(axis=1), dtype=np.intp)


class KroneckerDesign(Design):
    """All pairs of several sequences that share one unknown matrix, sequence by sequence, query by query.

    Attributes
    ----------
    starts : ndarray of int, shape (n_queries + 1,)
        The first row of each query over all sequences, and the number of rows.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self.sequences = blocks
        self.starts = np.concatenate([[0], np.cumsum(np.concatenate([b.pairs_per_query for b in blocks]))])
        self.first_query = np.concatenate([[0], np.cumsum([len(b.queries) for b in blocks])])
        self.d1, self.d2 = blocks[0].queries.shape[1], blocks[0].keys.shape[1]
        self.n_features = len(blocks[0].features)
        super().__init__((int(self.starts[-1]), self.d1 * self.d2 + self.n_features))

    def with_factors(self, factors: list[tuple[Array, Array]]) -> KroneckerDesign:
        """Return the same pairs with other queries and keys."""
        pairs = zip(self.sequences, factors, strict=True)
        return KroneckerDesign([Block(q, k, b.mask, b.features) for b, (q, k) in pairs])

    @property
    def block_rows(self) -> int:
        return BLOCK_PAIRS

    @property
    def run_rows(self) -> int:
        # Targets of so many pairs are read from disk at a time.
        return 8 * BLOCK_PAIRS

    @property
    def gram_cost(self) -> float:
        return float(self.d1 * self.d2)

    @property
    def storage(self) -> None:
        return None

    def parts(self, rows: Rows) -> tuple[Any, int]:
        raise TypeError("rows of a Kronecker product are not stored")

    def query_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (first, last + 1) of the queries to be read together; never across sequences."""
        for s, block in enumerate(self.sequences):
            begin, end = int(self.first_query[s]), int(self.first_query[s + 1])
            step = max(8, BLOCK_PAIRS // len(block.keys))
            for first in range(begin, end, step):
                yield first, min(first + step, end)

    def blocks(self) -> Iterator[tuple[slice, PairRows]]:
        """Yield (rows, block) over all pairs."""
        for first, last in self.query_ranges():
            rows = slice(int(self.starts[first]), int(self.starts[last]))
            yield rows, self.block(rows)

    def find_queries(self, rows: slice) -> tuple[int, slice]:
        """Return the sequence of these rows and their queries within it."""
        first, last = np.searchsorted(self.starts, [rows.start, rows.stop])
        s = int(np.searchsorted(self.first_query, first, side="right")) - 1
        return s, slice(int(first - self.first_query[s]), int(last - self.first_query[s]))

    def _fetch(self, rows: Rows) -> PairRows:
        assert isinstance(rows, slice)
        s, queries = self.find_queries(rows)
        block = self.sequences[s]
        mask = None if block.mask is None else block.mask[queries]
        features = []
        for feature in block.features:
            values = np.asarray(feature[queries], dtype=np.float64)
            features.append(values.reshape(-1) if mask is None else values[mask])
        return PairRows(block.queries[queries], block.keys, mask, features)

    def combine(self, weights: Array, block: PairRows) -> Array:
        return np.stack([block.combine(row) for row in weights])

    def group_rows(self, block: PairRows, weights: Array, starts: NDArray[np.intp]) -> PairMeans:
        sums = [np.add.reduceat(weights * f, starts) for f in block.features]
        matrix = block.matrix(weights)
        return PairMeans(matrix @ block.keys, matrix.sum(axis=1), sums)

    def squares(self, block: PairRows) -> PairRows:
        features = [f * f for f in block.features]
        return PairRows(block.queries**2, block.keys**2, block.mask, features)

    def gram(self) -> PairGram:
        return PairGram(self)


class PairGram:
    """Accumulate ``sum_i t_i (r_i a_i - q_i mu_g)(r_i a_i - q_i mu_g)^T`` over rows ``a1 (x) a2``.

    Only products of columns j <= l are kept on each side, a quarter of the work. The part of the centres has
    low rank in each query and is folded in before the queries are combined: it costs n1 d2^2 in all.
    """

    def __init__(self, design: KroneckerDesign) -> None:
        self.design = design
        self._pairs1, self._pairs2 = np.triu_indices(design.d1), np.triu_indices(design.d2)
        # Fortran order: BLAS then adds each block's part in place.
        self._total = np.zeros((len(self._pairs1[0]), len(self._pairs2[0])), order="F")
        p = design.n_features
        self._border, self._corner = np.zeros((p, design.d1 * design.d2)), np.zeros((p, p))
        self._keys, self._keys_squared = np.zeros((0, 0)), np.zeros((0, 0))

    def add(self, block: PairRows, t: Array, r: Array | None = None) -> None:
        """Add rows ``r_i a_i`` that are not centred."""
        weights = t if r is None else t * r * r
        self._add(block.queries, self._weighted_squares(block, block.matrix(weights)))
        for p, f in enumerate(block.features):
            self._border[p] += block.combine(weights * f)[: self._border.shape[1]]
            self._corner[p] += [float(np.sum(weights * f * g)) for g in block.features]

    def add_centred(
        self,
        block: PairRows,
        t: Array,
        r: Array | None,
        q: Array | float,
        mu: PairMeans,
        starts: NDArray[np.intp],
    ) -> None:
        """Add the rows of whole queries; ``mu`` as from `KroneckerDesign.group_rows`."""
        keys, means = block.keys, mu.keys
        if r is None and not isinstance(q, np.ndarray) and q == 1.0:
            # The same differences, of numbers without a common part: nothing cancels. Where logits are large
            # the rounded weights of a centre do not sum to one, and their own sum is what belongs to it.
            common = keys.mean(axis=0)
            keys, means = keys - common, means - np.multiply.outer(mu.mass, common)
            block = PairRows(block.queries, keys, block.mask, block.features)
        tr = t if r is None else t * r
        g = block.matrix(tr * q) @ keys
        kappa = np.add.reduceat(t * q * q, starts)
        inner = self._weighted_squares(block, block.matrix(tr if r is None else tr * r))
        j, k = self._pairs2
        half = 0.5 * kappa[:, None] * means - g
        inner += means[:, j] * half[:, k]
        inner += half[:, j] * means[:, k]
        self._add(block.queries, inner)
        sizes = np.diff(starts, append=len(t))
        centred = [
            (f if r is None else r * f) - q * np.repeat(m, sizes)
            for f, m in zip(block.features, mu.features, strict=True)
        ]
        for p, f in enumerate(centred):
            row = block.matrix(f * tr) @ keys - np.add.reduceat(f * t * q, starts)[:, None] * means
            self._border[p] += (block.queries.T @ row).reshape(-1)
            self._corner[p] += [float(np.sum(t * f * other)) for other in centred]

    def result(self) -> Array:
        """Return the accumulated matrix, shape (d, d)."""
        d1, d2 = self.design.d1, self.design.d2
        size = d1 * d2
        out = np.empty((size + len(self._corner),) * 2)
        where1, where2 = _positions(d1, self._pairs1), _positions(d2, self._pairs2)
        for j in range(d1):
            rows = self._total[where1[j]][:, where2].transpose(1, 0, 2)
            out[j * d2 : (j + 1) * d2, :size] = rows.reshape(d2, size)
        out[size:, :size], out[:size, size:], out[size:, size:] = self._border, self._border.T, self._corner
        return out

    def _add(self, queries: Array, inner: Array) -> None:
        squares = _squares(queries, self._pairs1)
        self._total = blas.dgemm(
            1.0, squares.T, inner.T, beta=1.0, c=self._total, trans_b=True, overwrite_c=True
        )

    def _weighted_squares(self, block: PairRows, weights: Array) -> Array:
        """Return ``sum_k weights_ik vec(a2_k a2_k^T)`` for each query, upper half only."""
        keys, n = block.keys, len(self._pairs2[0])
        if len(keys) * n <= KEPT_SQUARES:
            # Blocks of one sequence share their keys; centring makes a new array, but of equal values.
            if not np.array_equal(self._keys, keys):
                self._keys, self._keys_squared = keys, _squares(keys, self._pairs2)
            return np.asarray(weights @ self._keys_squared)
        out = np.zeros((len(weights), n))
        step = max(1, KEPT_SQUARES // n)
        for first in range(0, len(keys), step):
            part = slice(first, first + step)
            out += weights[:, part] @ _squares(keys[part], self._pairs2)
        return out


def _squares(rows: Array, pairs: tuple[NDArray[np.intp], NDArray[np.intp]]) -> Array:
    return rows[:, pairs[0]] * rows[:, pairs[1]]


def _positions(d: int, pairs: tuple[NDArray[np.intp], NDArray[np.intp]]) -> NDArray[np.intp]:
    """Return where the product of columns j and l stands among those with j <= l, shape (d, d)."""
    where = np.empty((d, d), dtype=np.intp)
    where[pairs] = where[pairs[1], pairs[0]] = np.arange(len(pairs[0]))
    return where


class PairColumn(Column):
    """One number a pair of a query and a key, from matrices (n1, n2) of which some are on disk.

    Indexing takes slices that begin and end between queries.

    Parameters
    ----------
    design : KroneckerDesign
        Tells which pairs there are.
    matrices : list of ndarray or Source, shapes (n1, n2)
        One a sequence.
    function : callable, optional
        Applied to what is read.
    """

    def __init__(
        self,
        design: KroneckerDesign,
        matrices: list[Any],
        function: Callable[[Array], Array] | None = None,
    ) -> None:
        self._design, self._matrices, self._function = design, matrices, function
        self.shape = (int(design.shape[0]),)
        self.recent = Recent()

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return np.result_type(*[matrix.dtype for matrix in self._matrices])

    def spans(self) -> Iterator[slice]:
        starts = self._design.starts
        for first, last in self._design.query_ranges():
            yield slice(int(starts[first]), int(starts[last]))

    def mapped(self, function: Callable[[Array], Array]) -> Column:
        inner = self._function
        return PairColumn(
            self._design, self._matrices, function if inner is None else lambda v: function(inner(v))
        )

    def __getitem__(self, rows: Rows) -> Array:
        assert isinstance(rows, slice)
        start, stop, _ = rows.indices(len(self))
        known = self.recent.find(slice(start, stop))
        return self._read(start, stop) if known is None else known[1][start - known[0] : stop - known[0]]

    def load(self, rows: slice) -> None:
        if not self.recent.renew(rows):
            self.recent.make_room()
            self.recent.keep(rows.start, rows.stop, self._read(rows.start, rows.stop))

    def _read(self, start: int, stop: int) -> Array:
        design, parts = self._design, []
        for s, block in enumerate(design.sequences):
            first, last = design.starts[design.first_query[[s, s + 1]]]
            if last <= start or first >= stop:
                continue
            _, queries = design.find_queries(slice(max(start, int(first)), min(stop, int(last))))
            matrix = self._matrices[s]
            found = (
                matrix[queries]
                if isinstance(matrix, np.ndarray)
                else matrix.read(queries.start, queries.stop)
            )
            parts.append(found.reshape(-1) if block.mask is None else found[block.mask[queries]])
        return self._numbers(parts[0] if len(parts) == 1 else np.concatenate(parts))

"""Outside goods: one row of zeros a group that the user need not add."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data import DenseDesign, Design, SparseDesign
from attnfit.estimators.reading import ROUNDING
from attnfit.segments import Groups

Array = NDArray[np.float64]
Rows = slice | NDArray[np.intp]


class ZeroRowsBelow(Design):
    """A dense design followed by rows of zeros, without a copy of the data."""

    # Name of the compiled loops that read the rows above.
    storage: str | None = None

    def __init__(self, inner: Design, n_zero_rows: int) -> None:
        super().__init__((inner.shape[0] + n_zero_rows, inner.shape[1]))
        self._inner = inner
        self.storage = inner.storage
        self.is_shared_out = self.storage is not None

    @property
    def block_rows(self) -> int:
        """Number of rows of a block."""
        return self._inner.block_rows

    @property
    def gram_cost(self) -> float:
        """Time of a weighted Gram over that of a value and gradient, roughly."""
        return self._inner.gram_cost

    def product(self, block: Array, x: Array) -> Array:
        """Return ``block @ x``, shape (n_rows,)."""
        return self._inner.product(block, x)

    def combine(self, weights: Array, block: Array) -> Array:
        """Return ``weights @ block``, shape (k, d)."""
        return self._inner.combine(weights, block)

    def parts(self, rows: Rows) -> tuple[Any, int]:
        """Return what the compiled loops read these rows from, and where the first of them is."""
        n = int(self._inner.shape[0])
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            if stop <= n:
                return self._inner.parts(slice(start, stop))
            rows = np.arange(start, stop)
        outside = rows >= n
        # A copy, since these rows are not neighbours.
        block, first = self._inner.parts(np.where(outside, 0, rows))
        block[outside] = 0.0
        return block, first

    def column_sizes(self, n_rows: int | None = None) -> Array | None:
        """Return the largest size of an entry of each column; None where the rows are not in memory."""
        return None if self._inner.on_disk else self._inner.column_sizes(n_rows)

    def peek(self, rows: Rows) -> Array | None:
        """Return some rows; None where they are not in memory."""
        return None if self._inner.peek(slice(0, 0)) is None else self._fetch(rows)

    def scaled(self, factors: Array) -> ZeroRowsBelow:
        """Return the matrix with its columns multiplied."""
        return ZeroRowsBelow(self._inner.scaled(factors), int(self.shape[0] - self._inner.shape[0]))

    def take(self, rows: Rows) -> Design:
        """Return the matrix of some rows."""
        return DenseDesign(self._fetch(rows))

    def _fetch(self, rows: Rows) -> Array:
        n = int(self._inner.shape[0])
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            above = self._inner._fetch(slice(min(start, n), min(stop, n)))
            n_below = max(stop, n) - max(start, n)
            return np.vstack([above, np.zeros((n_below, self.shape[1]))]) if n_below else above
        outside = rows >= n
        block = self._inner._fetch(np.where(outside, 0, rows))
        if outside.any():
            block[outside] = 0.0
        return np.asarray(block)


def add_zero_rows(design: Design, n_zero_rows: int) -> Design:
    """Return the design with rows of zeros below it."""
    if not isinstance(design, SparseDesign):
        return ZeroRowsBelow(design, n_zero_rows)
    matrix = design.matrix
    ends = np.full(n_zero_rows, matrix.indptr[-1], dtype=matrix.indptr.dtype)
    shape = (matrix.shape[0] + n_zero_rows, matrix.shape[1])
    indptr = np.concatenate([matrix.indptr, ends])
    return SparseDesign(sparse.csr_array((matrix.data, matrix.indices, indptr), shape=shape))


def outside_shares(shares: Array, groups: Groups, numbers: NDArray[np.intp]) -> Array:
    """Return ``1 - sum of shares`` of each group, shape (n_groups,).

    Raises
    ------
    ValueError
        Naming the group, if its shares sum to more than one.
    """
    rest = 1.0 - np.bincount(numbers, weights=shares, minlength=len(groups))
    bad = np.flatnonzero(rest < -ROUNDING)
    if len(bad):
        g = int(bad[0])
        raise ValueError(
            f"y sums to {1.0 - rest[g]:.6g} in group {groups.labels[g]}: with outside_good=True the shares "
            "of a group may sum to at most 1; divide them by the market's size, or set outside_good=False"
        )
    return np.asarray(np.maximum(rest, 0.0))

"""A CSR matrix whose blocks are views, never copies of the index arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from attnfit.designs.base import Array, Design, Rows
from attnfit.designs.gram import transposed_view

# Large enough that the fixed cost of a scipy call vanishes, small enough to stay in the shared cache.
BLOCK_ENTRIES = 1 << 18
# From this many entries on the compiled loops repay their loading: they save a second read in scipy.
COMPILED_ENTRIES = 1 << 22


def row_view(matrix: Any, start: int, stop: int) -> Any:
    """Return rows start to stop of a CSR matrix without copying its data."""
    first, last = matrix.indptr[start], matrix.indptr[stop]
    view = sparse.csr_array((stop - start, matrix.shape[1]), dtype=matrix.dtype)
    view.data = matrix.data[first:last]
    view.indices = matrix.indices[first:last]
    view.indptr = matrix.indptr[start : stop + 1] - first
    return view


class SparseDesign(Design):
    """Rows of a CSR array; CSC and other formats are converted once."""

    def __init__(self, matrix: Any) -> None:
        super().__init__(matrix.shape)
        self.matrix = sparse.csr_array(matrix)

    def column_sizes(self, n_rows: int | None = None) -> Array | None:
        """Return the largest size of an entry of each column."""
        rows = self.matrix if n_rows is None else row_view(self.matrix, 0, min(n_rows, self.shape[0]))
        sizes = np.zeros(int(self.shape[1]))
        np.maximum.at(sizes, rows.indices, np.abs(rows.data.astype(np.float64)))
        return sizes

    def scaled(self, factors: Array) -> SparseDesign:
        """Return the matrix with its columns multiplied."""
        matrix = self.matrix.astype(np.float64)
        matrix.data = matrix.data * factors[matrix.indices]
        return SparseDesign(matrix)

    def peek(self, rows: Rows) -> Any:
        """Return some rows; None on disk."""
        return None if self.on_disk else self.matrix[rows].astype(np.float64)

    def take(self, rows: Rows) -> SparseDesign:
        """Return the matrix of some rows."""
        return SparseDesign(self.matrix[rows])

    @property
    def block_rows(self) -> int:
        return max(64, int(BLOCK_ENTRIES / max(1.0, self.matrix.nnz / max(1, self.shape[0]))))

    @property
    def gram_cost(self) -> float:
        """Time of a weighted Gram over that of a value and gradient (measured for 5 to 50 entries a row)."""
        return float((self.matrix.nnz / max(1, self.shape[0]) / 4.0) ** 2)

    def combine(self, weights: Array, block: Any) -> Array:
        """Return ``weights @ block``, shape (k, d)."""
        return np.asarray((transposed_view(block) @ weights.T).T)

    @property
    def storage(self) -> str | None:
        """Name of the compiled loops that read this matrix; None where it is small or of an unusual type."""
        large = self.matrix.nnz >= COMPILED_ENTRIES
        return "csr" if large and self.matrix.dtype in (np.float64, np.float32) else None

    def parts(self, rows: Rows) -> tuple[Any, int]:
        """Return what the compiled loops read these rows from, and where the first of them is."""
        matrix, first = (self.matrix, rows.start) if isinstance(rows, slice) else (self.matrix[rows], 0)
        return (matrix.indptr, matrix.indices, matrix.data), first

    def _fetch(self, rows: Rows) -> Any:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            block = row_view(self.matrix, start, stop)
        else:
            block = self.matrix[rows]
        return block if block.dtype == np.float64 else block.astype(np.float64)

"""A dense matrix in any order, precision or memory map."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.base import BLOCK_BYTES, Array, Design, Rows
from attnfit.designs.kernels import block_times_vector

# From this many entries on the compiled products repay their loading.
COMPILED_ENTRIES = 1 << 24


class DenseDesign(Design):
    """Rows of a two-dimensional array: C or Fortran order, any real dtype, read-only, memory-mapped."""

    def __init__(self, array: NDArray[Any]) -> None:
        super().__init__(array.shape)
        self.array = array
        self._compiled = array.size >= COMPILED_ENTRIES

    @property
    def block_rows(self) -> int:
        return max(64, BLOCK_BYTES // (8 * max(1, int(self.shape[1]))))

    @property
    def gram_cost(self) -> float:
        """Time of a weighted Gram over that of a value and gradient (measured for d = 16 to 256)."""
        return int(self.shape[1]) / 25.0

    def column_sizes(self, n_rows: int | None = None) -> Array | None:
        """Return the largest size of an entry of each column."""
        rows = np.asarray(self.array[:n_rows], dtype=np.float64)
        return np.asarray(np.maximum(rows.max(axis=0), -rows.min(axis=0)))

    def peek(self, rows: Rows) -> Array | None:
        """Return some rows."""
        return None if self.on_disk else np.asarray(self.array[rows], dtype=np.float64)

    def scaled(self, factors: Array) -> DenseDesign:
        """Return the matrix with its columns multiplied."""
        return DenseDesign(np.asarray(self.array, dtype=np.float64) * factors)

    def take(self, rows: Rows) -> DenseDesign:
        """Return the matrix of some rows."""
        return DenseDesign(np.asarray(self.array)[rows])

    def product(self, block: Array, x: Array) -> Array:
        """Return ``block @ x``, shape (n_rows,)."""
        if not (self._compiled and block.flags.c_contiguous):
            return block @ x
        z = np.empty(len(block))
        block_times_vector()(block, 0, len(block), np.ascontiguousarray(x), z)
        return z

    def combine(self, weights: Array, block: Array) -> Array:
        """Return ``weights @ block``, shape (k, d)."""
        return weights @ block

    @property
    def storage(self) -> str | None:
        """Name of the compiled loops that read this array; None where it is small or of an unusual type."""
        if not self._compiled or self.array.dtype not in (np.float64, np.float32):
            return None
        return "rows" if self.array.strides[0] >= self.array.strides[1] else "columns"

    def parts(self, rows: Rows) -> tuple[Any, int]:
        """Return what the compiled loops read these rows from, and where the first of them is."""
        if isinstance(rows, slice):
            return np.asarray(self.array), rows.start
        # Indexing keeps the memory order; np.take would copy the whole of a Fortran-ordered array.
        return np.asarray(self.array)[rows], 0

    def _fetch(self, rows: Rows) -> Array:
        if isinstance(rows, slice) or not self.array.flags.c_contiguous:
            # np.take would copy the whole of an array in another order.
            return np.asarray(self.array[rows], dtype=np.float64)
        return np.asarray(np.take(self.array, rows, axis=0), dtype=np.float64)

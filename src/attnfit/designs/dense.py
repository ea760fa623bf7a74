"""A dense matrix in any order, precision or memory map."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.base import BLOCK_BYTES, Array, Design, Rows
from attnfit.designs.kernels import block_times_vector, weights_times_block

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

    def product(self, block: Array, x: Array) -> Array:
        """Return ``block @ x``, shape (n_rows,)."""
        if not (self._compiled and block.flags.c_contiguous):
            return block @ x
        z = np.empty(len(block))
        block_times_vector()(block, np.ascontiguousarray(x), z)
        return z

    def combine(self, weights: Array, block: Array) -> Array:
        """Return ``weights @ block``, shape (k, d)."""
        if not (self._compiled and block.flags.c_contiguous):
            return weights @ block
        out = np.zeros((len(weights), block.shape[1]))
        weights_times_block()(np.ascontiguousarray(weights), block, out)
        return out

    def _fetch(self, rows: Rows) -> Array:
        block = self.array[rows] if isinstance(rows, slice) else np.take(self.array, rows, axis=0)
        return np.asarray(block, dtype=np.float64)

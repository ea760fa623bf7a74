"""A dense matrix in any order, precision or memory map."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.base import BLOCK_BYTES, Array, Design, Rows


class DenseDesign(Design):
    """Rows of a two-dimensional array: C or Fortran order, any real dtype, read-only, memory-mapped."""

    def __init__(self, array: NDArray[Any]) -> None:
        super().__init__(array.shape)
        self.array = array

    @property
    def block_rows(self) -> int:
        return max(64, BLOCK_BYTES // (8 * max(1, int(self.shape[1]))))

    @property
    def gram_cost(self) -> float:
        """Time of a weighted Gram over that of a value and gradient (measured for d = 16 to 256)."""
        return int(self.shape[1]) / 25.0

    def _fetch(self, rows: Rows) -> Array:
        block = self.array[rows] if isinstance(rows, slice) else np.take(self.array, rows, axis=0)
        return np.asarray(block, dtype=np.float64)

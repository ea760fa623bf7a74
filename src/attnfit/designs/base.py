"""How the data matrix is stored and read: one block of rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from attnfit.data.gram import Gram, group_rows

Array = NDArray[np.float64]
Rows = slice | NDArray[np.intp]

# A dense block of this size stays in the second-level cache between the product that reads it and the
# transposed one.
BLOCK_BYTES = 1 << 20
# An exact Gram is the remedy for a coarse model if it costs no more evaluations than this.
GRAM_PAYS = 4.0
# Blocks that one call runs over: few enough that Ctrl-C is heard.
RUN_BLOCKS = 64


class Design(LinearOperator, ABC):
    """An n x d matrix that is read in blocks of rows and counts what is read.

    ``rows_read`` is the number of rows fetched so far. Every block is float64 whatever the storage, so that
    float32 or integer data are fitted in full precision without a copy of the whole matrix.
    """

    rows_read: int
    # Whether rows are read from disk, a run of neighbouring blocks at a time.
    on_disk: bool = False

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(np.float64, shape)
        self.rows_read = 0

    @abstractmethod
    def _fetch(self, rows: Rows) -> Any:
        """Return the rows as a float64 ndarray or CSR array."""

    @property
    @abstractmethod
    def block_rows(self) -> int:
        """Number of rows a block should have."""

    @property
    @abstractmethod
    def gram_cost(self) -> float:
        """Time of a weighted Gram over that of a value and gradient, roughly."""

    @property
    def gram_pays(self) -> bool:
        """Whether an exact Gram costs no more evaluations than a model too coarse would."""
        return self.gram_cost < GRAM_PAYS

    @property
    @abstractmethod
    def storage(self) -> str | None:
        """Which of `kernels.STORAGES` reads this matrix; None where compiled loops do not pay."""

    @abstractmethod
    def parts(self, rows: Rows) -> tuple[Any, int]:
        """Return what those loops read these rows from, and where the first of them is; counts nothing."""

    def column_sizes(self, n_rows: int | None = None) -> Array | None:
        """Return the largest size of an entry of each column in the first rows, shape (d,); None where the
        rows are not in memory.
        """
        return None

    def peek(self, rows: Rows) -> Any:
        """Return some rows as they are in memory, counted as no read; None where they are elsewhere."""
        return None

    def scaled(self, factors: Array) -> Design:
        """Return the matrix with its columns multiplied, shape (d,), in memory."""
        raise ValueError("these rows are not in memory; scale the columns where they are")

    def take(self, rows: Rows) -> Design:
        """Return the matrix of some rows, in memory.

        Raises
        ------
        ValueError
            If the rows are not in memory.
        """
        raise ValueError("these rows are not in memory; load them to leave some out")

    def product(self, block: Any, x: Array) -> Array:
        """Return ``block @ x`` for a block of this design, shape (n_rows,)."""
        return np.asarray(block @ x)

    @abstractmethod
    def combine(self, weights: Array, block: Any) -> Array:
        """Return ``weights @ block``, shape (k, d) for weights (k, n_rows)."""

    def group_rows(self, block: Any, weights: Array, starts: NDArray[np.intp]) -> Any:
        """Return ``sum_{i in g} weights_i a_i`` for the groups of a block, in the form that `gram` takes."""
        return group_rows(block, weights, starts)

    def squares(self, block: Any) -> Any:
        """Return a block with every entry squared."""
        return block * block

    def gram(self) -> Any:
        """Return an empty accumulator of weighted Grams over blocks of this design."""
        return Gram(int(self.shape[1]))

    @property
    def run_rows(self) -> int:
        """Number of rows to read ahead of their use."""
        return RUN_BLOCKS * self.block_rows

    @property
    def thread_rows(self) -> int:
        """Number of rows that a thread goes over in one call."""
        return self.run_rows

    def load(self, rows: slice) -> None:
        """Read these rows and keep them for a while: of use on disk."""

    def apart(self) -> Self:
        """Return the same matrix for another thread: what that reads from disk is its own."""
        return self

    def locate(self, row: int) -> str:
        """Return where a row is stored, for messages; nothing in memory."""
        return ""

    def block(self, rows: Rows) -> Any:
        """Return these rows as a float64 ndarray or CSR array, shape (n_rows, d)."""
        matrix = self._fetch(rows)
        self.rows_read += matrix.shape[0]
        return matrix

    def blocks(self) -> Any:
        """Yield (rows, block) over the whole matrix in storage order."""
        n = self.shape[0]
        for start in range(0, n, self.block_rows):
            rows = slice(start, min(start + self.block_rows, n))
            yield rows, self.block(rows)

    def _matmat(self, X: Array) -> Array:
        return np.concatenate([block @ X for _, block in self.blocks()])

    def _matvec(self, x: Array) -> Array:
        return self._matmat(x.reshape(-1, 1))

    def _rmatmat(self, Y: Array) -> Array:
        total = np.zeros((self.shape[1], Y.shape[1]))
        for rows, block in self.blocks():
            total += block.T @ Y[rows]
        return total

    def _rmatvec(self, y: Array) -> Array:
        return self._rmatmat(y.reshape(-1, 1))

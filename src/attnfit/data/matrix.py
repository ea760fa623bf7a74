"""How a matrix of features is stored and read in blocks: dense and sparse, in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import LinearOperator

from attnfit.data.gram import Gram, group_rows, group_rows_compiled, squared_rows, transposed_view
from attnfit.data.kernels import block_times_vector

Array = NDArray[np.float64]
Rows = slice | NDArray[np.intp]

# A dense block of this size stays in the second-level cache between the product that reads it and the
# transposed one.
BLOCK_BYTES = 1 << 20
# An exact Gram is the remedy for a coarse model if it costs no more evaluations than this.
GRAM_PAYS = 4.0
# Blocks that one call runs over: few enough that Ctrl-C is heard.
RUN_BLOCKS = 64
# Columns up to which threads share out the rows that a Gram is made of: its products are then too small for
# BLAS to share out well. Blocks of such a run: calls of numpy then cost nothing. Sparse rows are shared out
# whatever their width, in runs of so many operations for each number of the sum.
NARROW, BLOCKS_A_RUN, WORK_A_NUMBER = 256, 8, 8
# From this many entries on the compiled products repay their loading.
DENSE_ENTRIES = 1 << 24
# Large enough that the fixed cost of a scipy call vanishes, small enough to stay in the shared cache.
BLOCK_ENTRIES = 1 << 18
# From this many entries on the compiled loops repay their loading: they save a second read in scipy.
SPARSE_ENTRIES = 1 << 22


class Design(LinearOperator, ABC):
    """An n x d matrix that is read in blocks of rows and counts what is read.

    ``rows_read`` is the number of rows fetched so far. Every block is float64 whatever the storage, so that
    float32 or integer data are fitted in full precision without a copy of the whole matrix.
    """

    rows_read: int
    # Whether rows are read from disk, a run of neighbouring blocks at a time.
    on_disk: bool = False
    # Whether threads may share out the rows: they are in memory, and many.
    is_shared_out: bool = False

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

    @property
    def shared_rows(self) -> int | None:
        """Number of rows that a thread takes at a time where a Gram may be summed up; None where threads do
        not share them out.
        """
        narrow = self.is_shared_out and self.shape[1] <= NARROW
        return BLOCKS_A_RUN * self.block_rows if narrow else None

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
        return squared_rows(block) if sparse.issparse(block) else block * block

    def gram(self) -> Any:
        """Return an empty accumulator of weighted Grams over blocks of this design."""
        # Rows that are centred as they are read are shared out, and stored nowhere.
        return Gram(int(self.shape[1]), compiled=self.storage is not None or self.is_shared_out)

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

    def thread_copy(self) -> Self:
        """Return the same matrix for another thread: what that reads from disk, and counts, is its own."""
        return copy(self)

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


class DenseDesign(Design):
    """Rows of a two-dimensional array: C or Fortran order, any real dtype, read-only, memory-mapped.

    Parameters
    ----------
    array : ndarray, shape (n, d)
    compiled : bool
        Whether compiled loops read it however small it is: where they are at hand anyway.
    """

    # Name of the compiled loops that read this array; None where it is small or of an unusual type.
    storage: str | None = None

    def __init__(self, array: NDArray[Any], *, compiled: bool = False) -> None:
        super().__init__(array.shape)
        self.array = array
        self._compiled = compiled or array.size >= DENSE_ENTRIES
        if self._compiled and array.dtype in (np.float64, np.float32):
            self.storage = "rows" if array.strides[0] >= array.strides[1] else "columns"
        self.is_shared_out = self.storage is not None

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

    def group_rows(self, block: Array, weights: Array, starts: NDArray[np.intp]) -> Array:
        """Return ``sum_{i in g} weights_i a_i`` for the groups of a block, shape (n_groups, d)."""
        if self.storage is None or not block.flags.c_contiguous:
            return np.asarray(group_rows(block, weights, starts))
        return group_rows_compiled(block, weights, starts)

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

    # Name of the compiled loops that read this matrix; None where it is small or of an unusual type.
    storage: str | None = None

    def __init__(self, matrix: Any) -> None:
        super().__init__(matrix.shape)
        self.matrix = sparse.csr_array(matrix)
        large = self.matrix.nnz >= SPARSE_ENTRIES
        self.storage = "csr" if large and self.matrix.dtype in (np.float64, np.float32) else None
        self.is_shared_out = self.storage is not None

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
        return max(64, int(BLOCK_ENTRIES / max(1.0, self.row_entries)))

    @property
    def row_entries(self) -> float:
        """Mean number of entries in a row."""
        return float(self.matrix.nnz / max(1, int(self.shape[0])))

    @property
    def thread_rows(self) -> int:
        return BLOCKS_A_RUN * self.block_rows

    @property
    def shared_rows(self) -> int | None:
        if not self.is_shared_out:
            return None
        work = max(1.0, 0.5 * self.row_entries**2)
        return max(self.thread_rows, int(WORK_A_NUMBER * self.shape[1] ** 2 / work))

    @property
    def gram_cost(self) -> float:
        """Time of a weighted Gram over that of a value and gradient (measured for 5 to 50 entries a row and
        100 to 3,000 columns: the sums of many columns leave the cache).
        """
        return float(2.0 + 0.15 * self.row_entries * (1.0 + (self.shape[1] / 1000.0) ** 2))

    def combine(self, weights: Array, block: Any) -> Array:
        """Return ``weights @ block``, shape (k, d)."""
        return np.asarray((transposed_view(block) @ weights.T).T)

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

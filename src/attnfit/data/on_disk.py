"""Matrices and columns on disk, dense or sparse: read in runs of rows, a run ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from os import PathLike
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from attnfit.data import matrix
from attnfit.data.matrix import BLOCK_ENTRIES, Array, DenseDesign, Design, Rows, SparseDesign, row_view
from attnfit.data.parallel import Recent
from attnfit.data.sources import Source, open_source
from attnfit.data.sources.opening import SomeRows

if TYPE_CHECKING:
    from attnfit.data.sources.base import Source

PIECE_ROWS = 1 << 20
# Large enough that a disk reads at full speed and threads seldom hand over, small enough that three of them
# are nothing.
RUN_BYTES = 1 << 25
# A thread that computes with what it reads finds so small a part of a run still in its cache.
PARTS_OF_A_RUN = 8
# Objects of other libraries that are no more than a place on disk.
STORED = {("zarr", "Array"), ("pyarrow", "FileSystemDataset")}
# Rows from which the number of entries a row is estimated.
PROBED_ROWS = 1000
D = TypeVar("D", "DenseOnDisk", "SparseOnDisk")


class Column:
    """A vector of shape (n,) that is read piece by piece; indexing it with rows gives float64.

    Parameters
    ----------
    source : Source, of shape (n,) or (n, 1) or with all its entries taken in C order
    function : callable, optional
        Applied to what is read.
    """

    ndim = 1
    dtype = np.dtype(np.float64)

    def __init__(self, source: Source, function: Callable[[Array], Array] | None = None) -> None:
        self.source = source
        self.shape = (int(source.shape[0]),)
        self._function = function
        self.recent = Recent()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows) -> Array:
        if not isinstance(rows, slice):
            return self._numbers(self.source.take(rows))
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self._numbers(self.source.take(np.arange(start, stop, step)))
        known = self.recent.find(slice(start, stop))
        if known is None:
            return self._numbers(self.source.read(start, stop))
        first, piece = known
        return np.asarray(piece[start - first : stop - first])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[0 : len(self)], dtype=dtype)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Type of the numbers on disk."""
        return self.source.dtype

    def spans(self) -> Iterator[slice]:
        """Yield the rows in runs that can be read at a time."""
        for start in range(0, len(self), PIECE_ROWS):
            yield slice(start, min(start + PIECE_ROWS, len(self)))

    def load(self, rows: slice) -> None:
        """Read these rows and keep them for a while."""
        if not self.recent.renew(rows):
            self.recent.make_room()
            self.recent.keep(rows.start, rows.stop, self._numbers(self.source.read(rows.start, rows.stop)))

    def thread_copy(self) -> Self:
        """Return the same vector for another thread: what that reads is its own."""
        other = copy(self)
        other.source, other.recent = self.source.thread_copy(), Recent(1)
        return other

    def take(self, rows: NDArray[np.intp]) -> Column:
        """Return some entries, in increasing order, which stay on disk."""
        from attnfit.data.sources.opening import SomeRows

        return Column(SomeRows(self.source, rows), self._function)

    def mapped(self, function: Callable[[Array], Array]) -> Column:
        """Return the column whose entries are a function of this one's."""
        inner = self._function
        return Column(self.source, function if inner is None else lambda v: function(inner(v)))

    def _numbers(self, values: Any) -> Array:
        numbers = np.asarray(values, dtype=np.float64).reshape(-1)
        return numbers if self._function is None else self._function(numbers)


def open_design(source: Source) -> Design:
    """Return the design of a source of shape (n, d)."""
    return SparseOnDisk(source) if source.sparse else DenseOnDisk(source)


def stored_source(values: Any, name: str) -> Source | None:
    """Return the source of what is stored on disk; None of what is in memory."""
    if isinstance(values, Source):
        return values
    if isinstance(values, str | PathLike):
        raise ValueError(f"{name} is a path; pass attnfit.data.open_source({str(values)!r})")
    if isinstance(values, np.memmap):
        try:
            return open_source(values)
        except (TypeError, OSError):
            # A map of something else than a plain region of a file that still exists.
            return None
    kind = type(values)
    if (kind.__module__.partition(".")[0], kind.__name__) in STORED:
        return open_source(values)
    return None


def _rows_of(design: DenseOnDisk | SparseOnDisk, size: int) -> int:
    """Return the number of rows, in whole blocks, that take so many bytes."""
    return max(1, size // (design.row_bytes * design.block_rows)) * design.block_rows


def _some_rows(design: D, rows: Rows) -> D:
    numbers = np.arange(int(design.shape[0]), dtype=np.intp)[rows]
    other = type(design)(SomeRows(design.source, numbers))
    other.run_bytes = design.run_bytes
    return other


class DenseOnDisk(DenseDesign):
    """Rows of a dense matrix on disk."""

    on_disk = True

    def __init__(self, source: Source) -> None:
        Design.__init__(self, (int(source.shape[0]), int(source.shape[1])))
        self.source = source
        self.run_bytes = RUN_BYTES
        self._compiled = int(self.shape[0]) * int(self.shape[1]) >= matrix.DENSE_ENTRIES
        native = source.dtype in (np.float64, np.float32) and source.dtype.isnative
        self.storage = "rows" if self._compiled and native else None
        self.recent = Recent()

    @property
    def block_rows(self) -> int:
        # Whole blocks of the source are compared with earlier reads.
        step, fitting = int(self.source.edges[1]), super().block_rows
        return max(1, fitting // step) * step if step <= fitting else fitting

    @property
    def row_bytes(self) -> int:
        """Size of a row as it is stored."""
        return int(self.shape[1]) * self.source.dtype.itemsize

    @property
    def run_rows(self) -> int:
        return _rows_of(self, self.run_bytes)

    @property
    def thread_rows(self) -> int:
        # What is decoded together is read together.
        return _rows_of(self, self.run_bytes // (PARTS_OF_A_RUN if self.source.stored_rows == 1 else 1))

    def locate(self, row: int) -> str:
        return self.source.locate(row)

    def take(self, rows: Rows) -> DenseOnDisk:
        """Return the matrix of some rows, in increasing order, which stay on disk."""
        return _some_rows(self, rows)

    def thread_copy(self) -> Self:
        other = copy(self)
        other.source, other.recent = self.source.thread_copy(), Recent(1)
        return other

    def load(self, rows: slice) -> None:
        if self.recent.renew(rows):
            return
        # Fresh memory costs as much as the read: the oldest piece makes room.
        oldest = self.recent.make_room()
        size = (rows.stop - rows.start) * self.row_bytes
        memory = np.empty(size, dtype=np.uint8) if oldest is None or len(oldest[1]) < size else oldest[1]
        self.recent.keep(rows.start, rows.stop, (self.source.read(rows.start, rows.stop, memory), memory))

    def parts(self, rows: Rows) -> tuple[Any, int]:
        if not isinstance(rows, slice):
            return self.source.take(rows), 0
        self.load(rows)
        known = self.recent.find(rows)
        assert known is not None
        first, (piece, _) = known
        return piece, rows.start - first

    def _fetch(self, rows: Rows) -> Array:
        if not isinstance(rows, slice):
            return np.asarray(self.source.take(rows), dtype=np.float64)
        start, stop, _ = rows.indices(int(self.shape[0]))
        if start >= stop:
            return np.empty((0, int(self.shape[1])))
        known = self.recent.find(slice(start, stop))
        if known is None:
            return np.asarray(self.source.read(start, stop), dtype=np.float64)
        first, (piece, _) = known
        return np.asarray(piece[start - first : stop - first], dtype=np.float64)


class SparseOnDisk(SparseDesign):
    """Rows of a CSR matrix on disk."""

    on_disk = True

    def __init__(self, source: Source) -> None:
        Design.__init__(self, (int(source.shape[0]), int(source.shape[1])))
        self.source = source
        self.run_bytes = RUN_BYTES
        probed = min(PROBED_ROWS, int(source.shape[0]))
        self._entries_per_row = max(1.0, source.read(0, probed).nnz / probed)
        large = self._entries_per_row * self.shape[0] >= matrix.SPARSE_ENTRIES
        self.storage = "csr" if large and source.dtype in (np.float64, np.float32) else None
        self.recent = Recent()

    @property
    def block_rows(self) -> int:
        return max(64, int(BLOCK_ENTRIES / self._entries_per_row))

    @property
    def row_bytes(self) -> int:
        """Size of a row as it is stored, on average."""
        return int(self._entries_per_row * (4 + self.source.dtype.itemsize)) + 4

    @property
    def run_rows(self) -> int:
        return _rows_of(self, self.run_bytes)

    @property
    def gram_cost(self) -> float:
        return float((self._entries_per_row / 4.0) ** 2)

    def locate(self, row: int) -> str:
        return self.source.locate(row)

    def take(self, rows: Rows) -> SparseOnDisk:
        """Return the matrix of some rows, in increasing order, which stay on disk."""
        return _some_rows(self, rows)

    def thread_copy(self) -> Self:
        other = copy(self)
        other.source, other.recent = self.source.thread_copy(), Recent(1)
        return other

    def load(self, rows: slice) -> None:
        if not self.recent.renew(rows):
            self.recent.make_room()
            self.recent.keep(rows.start, rows.stop, self.source.read(rows.start, rows.stop))

    def parts(self, rows: Rows) -> tuple[Any, int]:
        first = 0
        if isinstance(rows, slice):
            self.load(rows)
            known = self.recent.find(rows)
            assert known is not None
            first, matrix = rows.start - known[0], known[1]
        else:
            matrix = self.source.take(rows)
        return (matrix.indptr, matrix.indices, matrix.data), first

    def _fetch(self, rows: Rows) -> Any:
        if not isinstance(rows, slice):
            block = self.source.take(rows)
        else:
            start, stop, _ = rows.indices(int(self.shape[0]))
            known = self.recent.find(slice(start, stop))
            if known is None:
                block = self.source.read(start, stop)
            else:
                block = row_view(known[1], start - known[0], stop - known[0])
        return block if block.dtype == np.float64 else block.astype(np.float64)

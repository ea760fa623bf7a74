"""Which rows belong together: groups, runs of rows that share a normaliser with the reductions over them, and
the chunks in which rows are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Rows = slice | Index

# Runs of one length up to this are reduced entry by entry, all runs at a time: with five entries seven times
# as fast as NumPy's reductions along an axis, which begin anew with every run.
SHORT = 16


@dataclass(frozen=True)
class Groups:
    """Rows in group order.

    Attributes
    ----------
    starts : ndarray of int, shape (n_groups,)
        First row of each group in the sorted order.
    order : ndarray of int, shape (n,), or None
        ``sorted = original[order]``; None when the groups are already consecutive.
    labels : ndarray, shape (n_groups,)
        The label of each group, in order of first appearance.
    """

    starts: Index
    order: Index | None
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.starts)

    def sort(self, rows: Any) -> Any:
        """Bring one value a row, in memory or on disk, into group order."""
        return rows if self.order is None else np.asarray(rows)[self.order]

    def unsort(self, rows: Array) -> Array:
        """Undo `sort`."""
        if self.order is None:
            return rows
        out = np.empty_like(rows)
        out[self.order] = rows
        return out


class Segments:
    """Split ``n_rows`` rows into consecutive runs that begin at ``starts``.

    Parameters
    ----------
    starts : ndarray of int, shape (n_segments,)
        First row of each run; increasing, ``starts[0] == 0``, no run is empty.
    n_rows : int
        Total number of rows.
    """

    def __init__(self, starts: Index, n_rows: int) -> None:
        self.starts = starts
        self.n_rows = n_rows
        self.sizes: Index = np.diff(starts, append=n_rows)
        # Runs of one length, as in a full matrix of queries and keys, are rows of an array.
        self._length = int(self.sizes[0]) if (self.sizes == self.sizes[0]).all() else 0

    def __len__(self) -> int:
        return len(self.starts)

    def sum(self, rows: Array) -> Array:
        """Sum of each run, shape (n_segments,); of each column of rows of shape (n_rows, k)."""
        if not self._length:
            return np.asarray(np.add.reduceat(rows, self.starts, axis=0))
        if rows.ndim == 1 and self._length > SHORT:
            # In pairs, as NumPy adds along an axis whose entries are neighbours.
            return np.asarray(rows.reshape(-1, self._length).sum(axis=1))
        first, *others = self._entries(rows)
        total: Array = first.copy()
        for other in others:
            total += other
        return total

    def max(self, rows: Array) -> Array:
        """Largest entry of each run, shape (n_segments,); of each column of rows of shape (n_rows, k)."""
        if not self._length or (rows.ndim == 1 and self._length > SHORT):
            return np.asarray(np.maximum.reduceat(rows, self.starts, axis=0))
        first, *others = self._entries(rows)
        largest: Array = first.copy()
        for other in others:
            np.maximum(largest, other, out=largest)
        return largest

    def spread(self, values: Array) -> Array:
        """Repeat one value a run on all its rows; broadcastable against (n_rows,) or (n_rows, k)."""
        return values if len(self.starts) == 1 else values.repeat(self._length or self.sizes, axis=0)

    def _entries(self, rows: Array) -> Array:
        """Return the first entries of all runs, the second, and so on."""
        return np.moveaxis(rows.reshape(-1, self._length, *rows.shape[1:]), 1, 0)


@dataclass(frozen=True)
class Chunk:
    """Rows that are read and worked on together: several whole groups, or a piece of one long group.

    Attributes
    ----------
    rows : slice or ndarray of int
        Position of the rows in group order.
    index : slice or ndarray of int
        Position of the rows in the design.
    segments : Segments
        The groups within the chunk (one segment for a piece of a long group).
    groups : slice or ndarray of int
        The groups' numbers.
    long : int
        Number of the long group this is a piece of, or -1.
    matrix : ndarray or csr_array, optional
        The rows themselves where they were sampled and are kept in memory.
    multiplier : ndarray, optional
        Inverse inclusion probability of each sampled row.
    """

    rows: Rows
    index: Rows
    segments: Segments
    groups: Rows
    long: int = -1
    matrix: Any = None
    multiplier: Array | None = None

    def __sizeof__(self) -> int:
        return 0 if self.matrix is None else 8 * int(np.prod(self.matrix.shape))

"""Runs of consecutive rows that share one normaliser, and the reductions over them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.intp]


# Runs of one length up to this are reduced entry by entry, all runs at a time: with five entries seven times
# as fast as NumPy's reductions along an axis, which begin anew with every run.
SHORT = 16


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

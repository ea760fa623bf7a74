"""One number a row, stored on disk: a target, weights, an offset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.base import Array, Rows
from attnfit.designs.read_ahead import Recent

if TYPE_CHECKING:
    from attnfit.designs.sources.base import Source

PIECE_ROWS = 1 << 20


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

    def apart(self) -> Self:
        """Return the same vector for another thread: what that reads is its own."""
        other = copy(self)
        other.source, other.recent = self.source.apart(), Recent(1)
        return other

    def take(self, rows: NDArray[np.intp]) -> Column:
        """Return some entries, in increasing order, which stay on disk."""
        from attnfit.designs.sources.some_rows import SomeRows

        return Column(SomeRows(self.source, rows), self._function)

    def mapped(self, function: Callable[[Array], Array]) -> Column:
        """Return the column whose entries are a function of this one's."""
        inner = self._function
        return Column(self.source, function if inner is None else lambda v: function(inner(v)))

    def _numbers(self, values: Any) -> Array:
        numbers = np.asarray(values, dtype=np.float64).reshape(-1)
        return numbers if self._function is None else self._function(numbers)


def pieces(values: Any) -> Iterator[tuple[slice, Array]]:
    """Yield (rows, values) of a vector in memory or on disk."""
    for rows in values.spans() if isinstance(values, Column) else [slice(0, len(values))]:
        yield rows, np.asarray(values[rows])

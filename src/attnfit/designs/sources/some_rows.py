"""Some rows of a source, in their order: what is left of stored data once others are left out."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.sources.base import Source
from attnfit.designs.sources.checksum import checksum


class SomeRows(Source):
    """The rows of another source that are kept, read where they are.

    Parameters
    ----------
    inner : Source, shape (n, ...)
    kept : ndarray of intp, shape (n_kept,)
        Their numbers, in increasing order.
    """

    def __init__(self, inner: Source, kept: NDArray[np.intp]) -> None:
        self._inner, self._rows = inner, kept
        edges = np.unique(np.searchsorted(kept, inner.edges)).astype(np.intp)
        shape = (len(kept), *inner.shape[1:])
        self.kind, self.sparse = inner.kind, inner.sparse
        super().__init__(
            (inner, kept), inner.name, shape, inner.dtype, edges, (), np.zeros(len(edges) - 1, dtype=np.intp)
        )

    @property
    def stored_rows(self) -> int:
        """Number of rows that are decoded together."""
        return self._inner.stored_rows

    def apart(self) -> Self:
        """Return the source that another thread should read."""
        return type(self)(self._inner.apart(), self._rows)

    def locate(self, row: int) -> str:
        """Return file and block of a row, for messages."""
        return self._inner.locate(int(self._rows[row]))

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these data from others, as JSON has it."""
        return self._inner.fingerprint() | {"rows": str(checksum(self._rows))}

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        self._inner.close()

    def _read(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> Any:
        rows = self._rows[start:stop]
        first, last = int(rows[0]), int(rows[-1]) + 1
        found = self._inner.read(first, last)[rows - first]
        if out is None or self.sparse:
            return found
        room = self._room(stop - start, out)
        room[:] = found
        return room

    def _take(self, rows: NDArray[np.intp]) -> Any:
        return self._inner.take(self._rows[rows])

    def _place(self, block: int) -> tuple[str, str]:
        row = int(self._rows[self.edges[block]])
        return self._inner.locate(row), f"row {row}"

"""Stored rows with a one in front of each."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from attnfit.data.sources.base import Source


class WithConstant(Source):
    """The matrix ``[1, A]`` of a dense source A, of which the ones are stored nowhere.

    Parameters
    ----------
    inner : Source, shape (n, d)
        Dense.
    """

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        dtype = inner.dtype if inner.dtype.kind == "f" else np.dtype(np.float64)
        shape = (inner.shape[0], inner.shape[1] + 1)
        self.kind = inner.kind
        files = np.zeros(len(inner.edges) - 1, dtype=np.intp)
        super().__init__((inner,), inner.name, shape, dtype, inner.edges, (), files)

    @property
    def stored_rows(self) -> int:
        """Number of rows that are decoded together."""
        return self._inner.stored_rows

    def thread_copy(self) -> Self:
        """Return the source that another thread should read."""
        return type(self)(self._inner.thread_copy())

    def locate(self, row: int) -> str:
        """Return file and block of a row, for messages."""
        return self._inner.locate(row)

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these data from others, as JSON has it."""
        return self._inner.fingerprint() | {"constant": True}

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        self._inner.close()

    def _read(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> Any:
        room = self._room(stop - start, out)
        room[:, 0], room[:, 1:] = 1.0, self._inner.read(start, stop)
        return room

    def _take(self, rows: NDArray[np.intp]) -> Any:
        found = self._inner.take(rows)
        return np.column_stack([np.ones(len(found), dtype=self.dtype), found]).astype(self.dtype)

    def _place(self, block: int) -> tuple[str, str]:
        row = int(self.edges[block])
        return self._inner.locate(row), f"row {row}"

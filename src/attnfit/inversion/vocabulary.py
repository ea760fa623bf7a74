"""The finite table that tokens come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import require_finite_matrix
from attnfit.objectives.inverse_layer import read_matrix

Array = NDArray[np.float64]


class Vocabulary:
    """Rows that a token may be.

    Parameters
    ----------
    table : array_like, shape (N, d) or (n, N, d), or callable
        The same rows at every position; or those of each position, as an array or as a function of the
        position that returns (N, d): token plus position embeddings, say.
    d, n : int
        Width and number of the tokens.

    Raises
    ------
    ValueError
        If the table does not hold finite rows of width d for each of n positions.
    """

    def __init__(self, table: Any, d: int, n: int) -> None:
        self._rows: Callable[[int], Array]
        if callable(table):
            self._rows = lambda position: _checked(table(position), d, f"vocabulary({position})")
        elif np.ndim(table) == 3:
            if len(table) != n:
                raise ValueError(f"vocabulary has rows of {len(table)} positions, but the output has {n}")
            several = [_checked(rows, d, f"vocabulary[{i}]") for i, rows in enumerate(table)]
            self._rows = lambda position: several[position]
        else:
            same = _checked(table, d, "vocabulary")
            self._rows = lambda position: same

    def rows(self, position: int) -> Array:
        """Return the rows that the token at a position may be, shape (N, d)."""
        return self._rows(position)

    def tokens(self, positions: NDArray[np.intp], which: NDArray[np.intp]) -> Array:
        """Return the rows chosen at some positions, shape (len(positions), d)."""
        return np.stack([self.rows(int(p))[w] for p, w in zip(positions, which, strict=True)])


def _checked(table: Any, d: int, name: str) -> Array:
    """Return a table as float64, uncopied where it is: tables are large."""
    rows = np.asarray(table)
    if rows.ndim == 2 and rows.dtype == np.float64:
        require_finite_matrix(rows, name)
    else:
        rows = read_matrix(table, name)
    if rows.shape[1] != d:
        raise ValueError(f"{name} has rows of {rows.shape[1]} numbers, but tokens have {d}: one row a token")
    if not len(rows):
        raise ValueError(f"{name} has no rows; pass one row a token")
    return rows

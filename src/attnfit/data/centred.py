"""Rows less a row of their group: what a softmax cannot tell from the rows themselves.

A loss of a softmax ignores what all rows of a group share, so ``a_i - a_ref(g)`` gives the same loss,
gradient and Hessian in x as ``a_i``. In floating point it does not: columns with a large common part
(years, ids, time stamps, 1e7 + 3) lose the digits that tell the rows apart. The difference of two numbers
within a factor of two of each other is exact (Sterbenz, "Floating-Point Computation" (1974), Theorem
4.3.1); where they differ by more it is rounded once, like any datum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data.gram import centre_rows, without_duplicates
from attnfit.data.matrix import Array, Design, Rows

Index = NDArray[np.intp]


@dataclass(frozen=True)
class GroupReference:
    """What is subtracted from the rows of a group whose rows are not in one block; pieces merge.

    Attributes
    ----------
    first : ndarray, shape (d,)
        A row of the group.
    stored : ndarray of int, shape (d,)
        How many rows store an entry of each column.
    n_rows : int
    """

    first: Array
    stored: NDArray[np.int64]
    n_rows: int

    @classmethod
    def of(cls, piece: Any) -> Self:
        """Return the reference of a piece of one group."""
        n = piece.shape[0]
        if not sparse.issparse(piece):
            return cls(np.array(piece[0]), np.full(piece.shape[1], n), n)
        piece = without_duplicates(piece)
        stored = np.bincount(piece.indices, minlength=piece.shape[1])
        return cls(piece[[0]].toarray()[0], stored, n)

    def merge(self, other: GroupReference) -> GroupReference:
        """Return the reference of both pieces."""
        return GroupReference(self.first, self.stored + other.stored, self.n_rows + other.n_rows)

    @property
    def row(self) -> Array:
        """The row to subtract: zero in columns that some row of the group does not store."""
        return np.where(self.stored == self.n_rows, self.first, 0.0)


class CentredDesign(Design):
    """The rows of another design less a row of their group, centred as they are read.

    Parameters
    ----------
    inner : Design
        Dense or sparse, in memory or on disk; it counts the rows read.
    starts : ndarray of int, shape (n_groups,)
        First row of each group, in group order.
    order : ndarray of int, shape (n,), or None
        Position in the design of each row in group order; None where they are the same.
    known : dict of ndarray, shape (d,)
        What is subtracted from groups that are read in pieces, by number of the group; all other groups are
        read whole.
    """

    def __init__(self, inner: Design, starts: Index, order: Index | None, known: Mapping[int, Array]) -> None:
        self.inner = inner
        super().__init__(inner.shape)
        self.on_disk, self.is_shared_out = inner.on_disk, inner.is_shared_out
        self._starts, self._known = starts, known
        self._rank = None
        if order is not None:
            self._rank = np.empty(len(order), dtype=np.intp)
            self._rank[order] = np.arange(len(order))

    def __getattr__(self, name: str) -> Any:
        # What belongs to the storage: source, recent, row_bytes.
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def rows_read(self) -> int:
        """Number of rows fetched from the inner design."""
        return self.inner.rows_read

    @rows_read.setter
    def rows_read(self, count: int) -> None:
        # The base class starts at zero; the inner design goes on counting.
        if count:
            self.inner.rows_read = count

    @property
    def block_rows(self) -> int:
        return self.inner.block_rows

    @property
    def run_rows(self) -> int:
        return self.inner.run_rows

    @property
    def thread_rows(self) -> int:
        return self.inner.thread_rows

    @property
    def gram_cost(self) -> float:
        return self.inner.gram_cost

    @property
    def storage(self) -> None:
        """None: compiled loops read rows as they are stored."""
        return None

    @property
    def shared_rows(self) -> int | None:
        return self.inner.shared_rows

    def parts(self, rows: Rows) -> tuple[Any, int]:
        raise TypeError("centred rows are made block by block and stored nowhere")

    def load(self, rows: slice) -> None:
        self.inner.load(rows)

    def locate(self, row: int) -> str:
        return self.inner.locate(row)

    def thread_copy(self) -> CentredDesign:
        other = CentredDesign(self.inner.thread_copy(), self._starts, None, self._known)
        other._rank = self._rank
        return other

    def take(self, rows: Rows) -> CentredDesign:
        """Return some rows, given in group order, less a row of what is left of their group."""
        positions = np.arange(int(self.shape[0]))[rows]
        groups = self._groups(positions)
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        known = {k: self._known[g] for k, g in enumerate(groups[starts].tolist()) if g in self._known}
        return CentredDesign(self.inner.take(rows), starts, None, known)

    def _groups(self, positions: Index) -> Index:
        ranks = positions if self._rank is None else self._rank[positions]
        return np.asarray(np.searchsorted(self._starts, ranks, side="right") - 1)

    def product(self, block: Any, x: Array) -> Array:
        return self.inner.product(block, x)

    def combine(self, weights: Array, block: Any) -> Array:
        return self.inner.combine(weights, block)

    def group_rows(self, block: Any, weights: Array, starts: Index) -> Any:
        return self.inner.group_rows(block, weights, starts)

    def _fetch(self, rows: Rows) -> Any:
        block = self.inner._fetch(rows)
        positions = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        groups = self._groups(positions)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1])
        known = {k: self._known[g] for k, g in enumerate(groups[starts].tolist()) if g in self._known}
        return centre_rows(block, starts, known)

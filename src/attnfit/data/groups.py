"""Which rows belong together: groups, and the blocks in which the data are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.on_disk import PIECE_ROWS, stored_source
from attnfit.data.sources import Source
from attnfit.segments import Array, Index, Segments

Rows = slice | Index


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


def parse_groups(groups: Any, n: int) -> Groups:
    """Read ``groups``: None, n labels in any order, or offsets ``0 = o_0 < o_1 < ... = n``.

    An array of length n holds labels; any other length must be offsets.

    Raises
    ------
    ValueError
        If the length fits neither reading, an offset repeats (empty group) or decreases, or a label is
        missing.
    """
    if groups is None:
        return Groups(np.zeros(1, dtype=np.intp), None, np.zeros(1, dtype=np.intp))
    source = None if type(groups) is np.ndarray else stored_source(groups, "groups")
    if source is not None:
        if source.shape == (n,):
            found = _stored_groups(source)
            if found is not None:
                return found
        groups = source.read(0, int(source.shape[0]))
    array = np.asarray(groups)
    if array.ndim != 1:
        raise ValueError(f"groups must be one-dimensional, not shape {array.shape}; pass one label a row")
    if len(array) != n:
        return Groups(_offsets(array, n), None, np.arange(len(array) - 1))
    # A whole number or a truth value is a label.
    missing = [] if array.dtype.kind in "iub" else unlabelled(array)
    if missing:
        raise ValueError(f"groups has no label at index {missing[0]}; give every row a label or drop the row")
    starts = np.concatenate([[0], np.flatnonzero(array[1:] != array[:-1]) + 1])
    try:
        labels, first, inverse = np.unique(array[starts], return_index=True, return_inverse=True)
    except TypeError:
        kinds = sorted({type(label).__name__ for label in array[starts]})
        raise ValueError(
            f"groups has labels of several types ({', '.join(kinds)}); make them one type"
        ) from None
    if len(labels) == len(starts):
        return Groups(starts.astype(np.intp), None, array[starts])
    rank = np.empty(len(labels), dtype=np.intp)
    by_appearance = np.argsort(first)
    rank[by_appearance] = np.arange(len(labels))
    ids = np.repeat(rank[inverse], np.diff(starts, append=n))
    sizes = np.bincount(ids)
    return Groups(np.cumsum(sizes) - sizes, np.argsort(ids, kind="stable"), labels[by_appearance])


def unlabelled(array: NDArray[Any]) -> list[int]:
    """Return the rows without a label."""
    if array.dtype.kind == "O":
        return [i for i, label in enumerate(array) if is_missing(label)]
    return list(np.flatnonzero(array != array).tolist())


def is_missing(label: Any) -> bool:
    """Whether a label is none: None, not a number, no time, or pandas' NA."""
    try:
        return label is None or bool(label != label)
    except TypeError:
        # Of NA it is not even known whether it differs from itself.
        return True


def _stored_groups(source: Source) -> Groups | None:
    """Read labels from disk piece by piece; None unless the rows of every group are next to each other."""
    n = int(source.shape[0])
    starts: list[Index] = [np.zeros(1, dtype=np.intp)]
    labels: list[NDArray[Any]] = [source.read(0, 1)]
    last = labels[0]
    for start in range(0, n, PIECE_ROWS):
        piece = source.read(start, min(start + PIECE_ROWS, n))
        missing = np.flatnonzero(piece != piece)
        if len(missing):
            k = start + int(missing[0])
            raise ValueError(
                f"groups has no label at index {k} ({source.locate(k)}); give every row a label or drop the "
                "row"
            )
        changes = np.flatnonzero(piece != np.concatenate([last, piece[:-1]]))
        starts.append(changes + start)
        labels.append(piece[changes])
        last = piece[-1:]
    found = np.concatenate(labels)
    if len(np.unique(found)) < len(found):
        return None
    return Groups(np.concatenate(starts).astype(np.intp), None, found)


def _offsets(array: NDArray[Any], n: int) -> Index:
    if array.dtype.kind not in "iu" or len(array) < 2 or array[0] != 0 or array[-1] != n:
        raise ValueError(
            f"groups has length {len(array)} but A has {n} rows; pass one label a row, or integer offsets "
            f"that start at 0 and end at {n}"
        )
    empty = np.flatnonzero(np.diff(array) <= 0)
    if len(empty):
        raise ValueError(
            f"groups: group {empty[0]} is empty (offsets {array[empty[0]]} to {array[empty[0] + 1]}); drop it"
        )
    return array[:-1].astype(np.intp)


def runs(chunks: list[Chunk], max_rows: int) -> Iterator[list[Chunk]]:
    """Yield runs of neighbouring chunks, all pieces of one group or all made of whole groups."""
    run: list[Chunk] = []
    n_rows = 0
    for chunk in chunks:
        size = chunk.segments.n_rows
        apart = not isinstance(chunk.index, slice)
        if run and (n_rows + size > max_rows or chunk.long != run[0].long or apart):
            yield run
            run, n_rows = [], 0
        run.append(chunk)
        n_rows += size
    if run:
        yield run


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

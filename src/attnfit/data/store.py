"""Rows and what belongs to each of them: in memory or on disk, in group order, cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from copy import copy
from typing import Any, NamedTuple, Self

import numpy as np

from attnfit.data.inputs import as_column, as_design, parse_groups, pieces, require_finite_rows
from attnfit.data.matrix import Design
from attnfit.data.on_disk import RUN_BYTES, Column, DenseOnDisk, SparseOnDisk
from attnfit.data.parallel import available_threads, read_ahead
from attnfit.segments import Array, Chunk, Groups, Index, Segments

COLUMNS = ("b", "weights", "offset", "penalty")
# Reading less at a time costs more in calls than in memory.
SMALLEST_RUN = 1 << 20


class Table(NamedTuple):
    """Checked rows: a matrix, their groups, and one number a row in group order, None where not given.

    ``penalty`` holds the squares of the row penalties.
    """

    design: Design
    groups: Groups
    b: Any
    weights: Any
    offset: Any
    penalty: Any


def read_table(A: Any, b: Any, groups: Any, weights: Any, offset: Any, row_penalty: Any) -> Table:
    """Check what a user passes and bring it into group order.

    Raises
    ------
    ValueError
        If anything is not finite, of the wrong shape or sign; the message names argument and index.
    """
    design = as_design(A)
    n = int(design.shape[0])
    sets = parse_groups(groups, n)
    target = sets.sort(as_column(b, n, "b"))
    if weights is not None:
        if np.shape(weights) == (len(sets),) and len(sets) != n:
            per_group = as_column(weights, len(sets), "weights", non_negative=True)
            weights = np.repeat(per_group, np.diff(sets.starts, append=n))
        else:
            weights = sets.sort(as_column(weights, n, "weights", non_negative=True))
        if not any(w.any() for _, w in pieces(weights)):
            raise ValueError("weights are all zero; give at least one row a positive weight")
    if offset is not None:
        offset = sets.sort(as_column(offset, n, "offset"))
    penalty: Any = as_column(row_penalty, n, "row_penalty", scalar=True)
    penalty = penalty.mapped(np.square) if isinstance(penalty, Column) else penalty**2
    if isinstance(penalty, Column) or penalty.any():
        penalty = sets.sort(penalty if len(penalty.shape) else np.broadcast_to(penalty, n))
    else:
        penalty = None
    return Table(design, sets, target, weights, offset, penalty)


class RowStore:
    """Rows in group order, in chunks that are read and worked on together.

    Parameters
    ----------
    table : Table

    Attributes
    ----------
    design : Design
    b, weights, offset, penalty : ndarray or Column, shape (n,)
        In group order; the last three may be None.
    groups : Groups
    chunks : list of Chunk
    long_groups : ndarray of int, shape (n_long,)
        The groups longer than a chunk, or of which some rows are elsewhere.
    memory_limit : int or None
        Bytes that a fit may take.
    """

    memory_limit: int | None = None
    # Whether all rows are here.
    is_whole = True
    chunks: list[Chunk]
    long_groups: Index

    def __init__(self, table: Table) -> None:
        self.design, self.groups, self.b, self.weights, self.offset, self.penalty = table
        self.n_rows = int(self.design.shape[0])
        self.n_unknowns = int(self.design.shape[1])

    def cut(self, *, grouped: bool, shared: Index | None = None) -> None:
        """Cut the rows into chunks of about a block: of whole groups, where rows of a group need one another.

        A group longer than a chunk is long: its normaliser is known only after all its pieces. So is a group
        of which other rows are stored elsewhere (``shared``).
        """
        groups, n, block_rows = self.groups, self.n_rows, self.design.block_rows
        bounds, n_groups, zero = np.append(groups.starts, n), len(groups.starts), np.zeros(1, dtype=np.intp)
        # First row, row after the last, where the groups in between begin, their numbers, the long group.
        cuts: list[tuple[int, int, Index, slice, int]] = []
        is_long = np.diff(bounds) > block_rows
        if not grouped:
            is_long[:] = False
            for a in range(0, n, block_rows):
                cuts.append((a, min(a + block_rows, n), zero, slice(0, 1), -1))
        elif shared is not None:
            is_long[shared] = True
        self.long_groups = np.flatnonzero(is_long)
        g = 0 if grouped else n_groups
        while g < n_groups:
            # Of the long groups, the first from here on.
            place = int(np.searchsorted(self.long_groups, g))
            if is_long[g]:
                last = int(bounds[g + 1])
                for a in range(int(bounds[g]), last, block_rows):
                    cuts.append((a, min(a + block_rows, last), zero, slice(g, g + 1), place))
                g += 1
                continue
            limit = int(self.long_groups[place]) if place < len(self.long_groups) else n_groups
            stop = int(np.searchsorted(bounds, bounds[g] + block_rows, side="right")) - 1
            stop = min(max(stop, g + 1), limit)
            a = int(bounds[g])
            cuts.append((a, int(bounds[stop]), groups.starts[g:stop] - a, slice(g, stop), -1))
            g = stop
        self.chunks = []
        for start, end, starts, numbers, long in cuts:
            rows = slice(start, end)
            index = rows if groups.order is None else groups.order[rows]
            self.chunks.append(Chunk(rows, index, Segments(starts, end - start), numbers, long))

    def on(self, design: Design) -> Self:
        """Return the same rows, stored in another form or other units."""
        other = copy(self)
        other.design, other.n_unknowns = design, int(design.shape[1])
        return other

    def take(self, kept: Index) -> Table:
        """Return some rows, by place in group order, without the groups left empty."""
        groups = self.groups
        places, order = kept if groups.order is None else groups.order[kept], None
        if self.design.on_disk and groups.order is not None:
            # What is stored is read in its own order.
            stored = np.sort(places)
            places, order = stored, np.searchsorted(stored, places)
        columns: list[Any] = []
        for name in COLUMNS:
            values = getattr(self, name)
            values = values.take(kept) if isinstance(values, Column) else values
            columns.append(None if values is None else values if isinstance(values, Column) else values[kept])
        numbers = np.searchsorted(groups.starts, kept, side="right") - 1
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        labels = groups.labels[numbers[starts]]
        return Table(self.design.take(places), Groups(starts.astype(np.intp), order, labels), *columns)

    # ---- chunks

    def fetch(self, chunk: Chunk) -> Any:
        """Return a chunk's rows, shape (n_rows, d), and count them as read."""
        block = self.design._fetch(chunk.index) if chunk.matrix is None else chunk.matrix
        self.design.rows_read += block.shape[0]
        return block

    def logits(self, chunk: Chunk, x: Array) -> tuple[Any, Array]:
        """Fetch a chunk; return its rows and its logits ``A x + offset``."""
        block = self.fetch(chunk)
        z = self.design.product(block, x)
        if not np.isfinite(z).all():
            require_finite_rows(block, chunk.index, "A", self.design.locate)
            raise OverflowError("A x overflows float64; scale the columns of A")
        if self.offset is not None:
            z = z + self.offset[chunk.rows]
        return block, z

    def shift(self, chunk: Chunk) -> Array | float:
        """Return the offset of the chunk's logits."""
        return 0.0 if self.offset is None else self.offset[chunk.rows]

    def group_sizes(self) -> Index:
        """Return the number of rows of each group."""
        return np.diff(self.groups.starts, append=self.n_rows)

    # ---- reading from disk

    @property
    def stored(self) -> list[Any]:
        """Columns and design that are read from disk."""
        found: list[Any] = []
        for values in (self.b, self.weights, self.offset, self.penalty):
            if isinstance(values, Column):
                found.append(values)
        return [*found, self.design] if self.design.on_disk else found

    def prefetch(self, chunks: list[Chunk]) -> Iterator[Chunk]:
        """Yield the chunks; what is stored on disk is read ahead of its use."""
        stored = self.stored
        # Drawn rows are in memory.
        if not stored or self.groups.order is not None or (chunks and chunks[0].matrix is not None):
            yield from chunks
            return
        with ExitStack() as held:
            for values in sorted(stored, key=id):
                held.enter_context(values.recent.lock)
            for run in read_ahead(self.load, runs(chunks, self.design.run_rows)):
                yield from run

    def load(self, run: list[Chunk]) -> None:
        """Read what a run of neighbouring chunks needs from disk, and keep it for a while."""
        first, last = run[0].index, run[-1].index
        if isinstance(first, slice) and isinstance(last, slice):
            for values in self.stored:
                values.load(slice(first.start, last.stop))

    def thread_copy(self) -> Self:
        """Return the same rows for another thread: what that reads from disk is its own."""
        other = self.on(self.design.thread_copy())
        for name in COLUMNS:
            values = getattr(self, name)
            setattr(other, name, values.thread_copy() if isinstance(values, Column) else values)
        return other

    def with_memory_limit(self, limit: int) -> Self:
        """Return the same rows, read in pieces that keep to a limit in bytes."""
        other = copy(self)
        other.memory_limit = limit
        if isinstance(self.design, DenseOnDisk | SparseOnDisk):
            other.design = design = copy(self.design)
            # A function of the limit alone: a resumed fit must add up in the same order.
            design.run_bytes = min(RUN_BYTES, max(SMALLEST_RUN, limit // 32))
        return other

    @property
    def row_bytes(self) -> int:
        """Size of a row and of what belongs to it, as they are read from disk."""
        design: Any = self.design
        return int(design.row_bytes) + 8 * (len(self.stored) - 1)

    @property
    def n_readers(self) -> int:
        """Number of threads that each hold a run of rows: one more than compute where one may wait for the
        disk; with a memory limit as many as there is room for, two at least.
        """
        n = available_threads() + bool(self.stored)
        if self.memory_limit is None or not self.design.on_disk:
            return n
        return min(n, max(2, self.memory_limit // (8 * self.design.thread_rows * self.row_bytes)))


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

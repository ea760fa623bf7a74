"""The data of a grouped problem: how they are checked, cut into chunks and gone over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import copy
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from attnfit.data.groups import Chunk, Groups, parse_groups, partition, runs
from attnfit.data.inputs import as_column, as_design, as_ridge, negative_target
from attnfit.data.on_disk import Column, pieces
from attnfit.data.parallel import available_threads, read_ahead
from attnfit.losses.loss import Loss
from attnfit.objectives.leverage import RowSampler
from attnfit.objectives.objective import Drawn, Problem
from attnfit.segments import Array, Index

COLUMNS = ("b", "weights", "offset", "penalty")
# What is computed from the loss and the target, and not kept where these are replaced; and where rows are.
DERIVED = ("rows_per_short_group", "origin_states")
OF_ROWS = (*DERIVED, "_unseen")


class RowData(Problem):
    """Data, loss and regulariser, and who goes over them.

    Attributes
    ----------
    b, weights, offset, penalty : ndarray or Column, shape (n,)
        In group order; the last three may be None.
    chunks : list of Chunk
    long_groups : ndarray of int, shape (n_long,)
        The groups longer than a chunk.
    """

    def __init__(
        self,
        A: Any,
        b: Any,
        *,
        loss: Loss,
        groups: Any = None,
        weights: Any = None,
        offset: Any = None,
        row_penalty: Any = 0.0,
        ridge: Any = 0.0,
    ) -> None:
        self.loss = loss
        self.ridge: float | Array = as_ridge(ridge)
        self._store(A, b, groups, weights, offset, row_penalty)

    def _store(self, A: Any, b: Any, groups: Any, weights: Any, offset: Any, row_penalty: Any) -> None:
        """Check the data, bring them into group order and cut them into chunks."""
        self.design = as_design(A)
        n = int(self.design.shape[0])
        self.groups = parse_groups(groups, n)
        sort = self.groups.sort
        self.b: Any = sort(as_column(b, n, "b"))
        self._refuse_negative_targets()
        self.weights = None if weights is None else sort(self._row_weights(weights, n))
        self.offset = None if offset is None else sort(as_column(offset, n, "offset"))
        penalty: Any = as_column(row_penalty, n, "row_penalty", scalar=True)
        penalty = penalty.mapped(np.square) if isinstance(penalty, Column) else penalty**2
        self.penalty = None
        if isinstance(penalty, Column) or penalty.any():
            self.penalty = sort(penalty if len(penalty.shape) else np.broadcast_to(penalty, n))
        self._cut()

    def _cut(self, shared: Any = None) -> None:
        """Cut the rows into chunks and sum up what the loss needs of every group's target."""
        n, loss = self.n_rows, self.loss
        self.chunks, self.long_groups = partition(
            self.groups, n, self.design.block_rows, coupled=loss.coupled, shared=shared
        )
        self.constants = np.zeros(len(self.groups) if loss.coupled else 1)
        for chunk in self.chunks if loss.coupled else []:
            w = np.ones(1) if self.weights is None else self.weights[chunk.rows]
            self.constants[chunk.groups] += loss.constants(self.b[chunk.rows], w, chunk.segments)

    def with_loss(self, loss: Loss, b: Array, weights: Array | None) -> Self:
        """Return a problem on the same data with another loss; ``b``, ``weights`` in group order."""
        other = copy(self)
        for name in DERIVED:
            other.__dict__.pop(name, None)
        other.loss, other.b, other.weights = loss, b, weights
        other._cut()
        return other

    def _refuse_negative_targets(self) -> None:
        """Refuse negative targets where the loss takes none."""
        if not self.loss.nonnegative_target:
            return
        for chunk_rows, b in pieces(self.b):
            if (b < 0).any():
                row = chunk_rows.start + int(np.flatnonzero(b < 0)[0])
                k = row if self.groups.order is None else int(self.groups.order[row])
                raise negative_target(k, self.loss.nonnegative_target)

    def _row_weights(self, weights: Any, n: int) -> Any:
        n_groups = len(self.groups)
        if np.shape(weights) == (n_groups,) and n_groups != n:
            per_group = as_column(weights, n_groups, "weights", non_negative=True)
            rows: Any = self.groups.unsort(np.repeat(per_group, np.diff(self.groups.starts, append=n)))
        else:
            rows = as_column(weights, n, "weights", non_negative=True)
        if not any(w.any() for _, w in pieces(rows)):
            raise ValueError("weights are all zero; give at least one row a positive weight")
        return rows

    def without_rows(self, dropped: NDArray[np.bool_]) -> Self:
        """Return the problem without some rows, shape (n,) in group order, and without groups left empty."""
        kept = np.flatnonzero(~dropped)
        other = copy(self)
        for name in OF_ROWS:
            other.__dict__.pop(name, None)
        places, order = kept if self.groups.order is None else self.groups.order[kept], None
        if self.design.on_disk and self.groups.order is not None:
            # What is stored is read in its own order.
            stored = np.sort(places)
            places, order = stored, np.searchsorted(stored, places)
        other.design = self.design.take(places)
        for name in COLUMNS:
            column = getattr(self, name)
            some = column.take(kept) if isinstance(column, Column) else column
            setattr(other, name, some[kept] if some is column and column is not None else some)
        numbers = np.searchsorted(self.groups.starts, kept, side="right") - 1
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        other.groups = Groups(starts.astype(np.intp), order, self.groups.labels[numbers[starts]])
        other._cut()
        return other

    # ---- who iterates over the data

    def reduce(self, work: Callable[..., Any], *args: Any, drawn: Drawn | None = None) -> Any:
        """Return ``work(part, chunks, *args)`` over all the data, or over rows drawn from them.

        Work returns what `merged` adds up: on data in several places it runs where they are, and only its
        sums travel.
        """
        return work(self, self.chunks if drawn is None else drawn.chunks, *args)

    def reduce_and_draw(self, work: Callable[..., Any], *args: Any) -> tuple[Any, Drawn]:
        """Return the first result of ``work``, and the chunks that it drew, which stay where they are."""
        sums, chunks = work(self, self.chunks, *args)
        return sums, Drawn(chunks, sum(chunk.matrix.shape[0] for chunk in chunks))

    def share_out(self, source: RowSampler | np.random.Generator) -> Any:
        """Return the sampler or generator, or one for each part of the data."""
        return source

    def collect(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Return ``work(part, chunks, *args)`` of each part of the data, in order."""
        return [work(self, self.chunks, *args)]

    def ahead(self, chunks: list[Chunk]) -> Iterator[Chunk]:
        """Yield the chunks; what is stored on disk is read ahead of their use."""
        # Drawn rows are in memory.
        if not self.stored or self.groups.order is not None or any(c.matrix is not None for c in chunks[:1]):
            yield from chunks
            return
        with ExitStack() as held:
            for values in sorted(self.stored, key=id):
                held.enter_context(values.recent.lock)
            for run in read_ahead(self.load, runs(chunks, self.design.run_rows)):
                yield from run

    def load(self, run: list[Chunk]) -> None:
        """Read what a run of neighbouring chunks needs from disk, and keep it for a while."""
        first, last = run[0].index, run[-1].index
        if isinstance(first, slice) and isinstance(last, slice):
            for values in self.stored:
                values.load(slice(first.start, last.stop))

    @property
    def stored(self) -> list[Any]:
        """Columns and design that are read from disk."""
        columns = [getattr(self, name) for name in COLUMNS]
        found: list[Any] = [column for column in columns if isinstance(column, Column)]
        return [*found, self.design] if self.design.on_disk else found

    def apart(self) -> Self:
        """Return the same problem for another thread: what that reads from disk is its own."""
        other = copy(self)
        other.design = self.design.apart()
        for name in COLUMNS:
            column = getattr(self, name)
            setattr(other, name, column.apart() if isinstance(column, Column) else column)
        return other

    @property
    def n_readers(self) -> int:
        """Number of threads that each hold a run of rows: one more than compute where one may wait for the
        disk.
        """
        return available_threads() + bool(self.stored)

    @property
    def is_whole(self) -> bool:
        """Whether all rows are here."""
        return True

    @property
    def long_numbers(self) -> Index:
        """The number by which each of the long groups here is known."""
        return np.arange(len(self.long_groups))

    @property
    def group_labels(self) -> Index:
        """The label of each group in a sample of the data."""
        return np.arange(len(self.groups))

    @property
    def long_labels(self) -> Index:
        """The label of each long group in a sample of the data."""
        return self.long_groups

    @property
    def largest_group(self) -> int:
        """Size of the largest group that is no long one."""
        sizes = np.delete(np.diff(self.groups.starts, append=self.n_rows), self.long_groups)
        return int(sizes.max(initial=0))

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.groups)

    @property
    def n_long(self) -> int:
        """Number of long groups."""
        return len(self.long_groups)

    @property
    def long_constants(self) -> Array:
        """Constants of the long groups, shape (n_long,)."""
        return self.constants[self.long_groups]

    @property
    def shape(self) -> tuple[int, ...]:
        """Natural shape of the unknown, (d,)."""
        return (self.n_unknowns,)

    @property
    def n_unknowns(self) -> int:
        """Number d of unknowns."""
        return int(self.design.shape[1])

    @property
    def n_rows(self) -> int:
        """Number n of rows."""
        return int(self.design.shape[0])

    @cached_property
    def rows_per_short_group(self) -> float:
        """Mean size of the groups that fit into a chunk."""
        sizes = np.delete(np.diff(self.groups.starts, append=self.n_rows), self.long_groups)
        return float(sizes.mean())

    @property
    def n_passes(self) -> float:
        """Reads of the data since the problem was made; sampled rows count as fractions."""
        return float(self.design.rows_read / self.n_rows)

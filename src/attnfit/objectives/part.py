"""Rows with a loss: what each chunk of them knows of values, slopes and curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import reduce, wraps
from threading import Semaphore, local
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data.inputs import negative_target, pieces
from attnfit.data.matrix import NARROW
from attnfit.data.parallel import available_threads, in_order, one_blas_thread
from attnfit.data.store import RowStore, Table, runs
from attnfit.losses.loss import GramTerm, GroupStatistics, Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.objectives.objective import Drawn, Evaluation
from attnfit.segments import Array, Chunk, Index, Rows, Segments

# Rows that are read at a time; those worked on at a time, so that what is made of them stays in cache.
PIECE_ROWS, CACHE_ROWS = 1 << 20, 1 << 13
# Entries from which on BLAS is told to use one thread: to say so costs more than small data take.
MANY = 1 << 18

# What `Loss.normalise` returns.
Normalised = tuple[Array, Array, Array]


class PerPart(list[Any]):
    """One argument a part, where all others are the same for all parts."""


def merged(one: Any, other: Any) -> Any:
    """Return the sum of two partial results: item by item for tuples and dicts, by their own ``merge`` for
    accumulators.
    """
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, tuple):
        return tuple(merged(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one | {key: merged(one.get(key), value) for key, value in other.items()}
    return one.merge(other) if hasattr(one, "merge") else one + other


def over_runs(
    part: Part, chunks: list[Chunk], n_rows: int, work: Callable[[Part, list[Chunk]], Any]
) -> Iterator[Any]:
    """Yield ``work(part, run)`` of runs of at most so many rows, in order, from as many threads as there are.

    A thread computes with what it has just read, while that is in its cache. It ignores what its caller lets
    NumPy ignore, which is each thread's own.
    """
    own, may_compute, ignored = local(), Semaphore(available_threads()), np.geterr()
    copies: list[tuple[Part, int]] = []

    def read(run: list[Chunk]) -> Any:
        if not hasattr(own, "rows"):
            own.rows = part.thread_copy()
            copies.append((own.rows, own.rows.design.rows_read))
        own.rows.load(run)
        with may_compute, np.errstate(**ignored):
            return work(own.rows, run)

    yield from in_order(read, runs(chunks, n_rows), part.n_readers)
    # Threads would lose some of what they count together.
    part.design.rows_read += sum(copy.design.rows_read - before for copy, before in copies)


def in_runs(work: Callable[..., Any]) -> Callable[..., Any]:
    """Let threads share out the rows of a function that reads each of them once and returns what `merged`
    adds up: where these are many and in memory, see `Design.shared_rows`.
    """

    @wraps(work)
    def share_out(part: Part, chunks: list[Chunk], *args: Any) -> Any:
        n_rows = part.design.shared_rows
        if n_rows is None or chunks[0].matrix is not None:
            return work(part, chunks, *args)
        return reduce(merged, over_runs(part, chunks, n_rows, lambda own, run: work(own, joined(run), *args)))

    # What `Part.reduce` runs where threads share nothing out.
    share_out.alone = work  # type: ignore[attr-defined]
    return share_out


def joined(run: list[Chunk]) -> list[Chunk]:
    """Return neighbouring chunks as one, where their rows are next to each other."""
    first, last = run[0], run[-1]
    if len(run) == 1 or not isinstance(first.rows, slice) or not isinstance(first.index, slice):
        return run
    starts, n_rows = [], 0
    for chunk in run:
        starts.append(chunk.segments.starts + n_rows)
        n_rows += chunk.segments.n_rows
    # Pieces of one group, or rows that have nothing to do with one another, are one segment.
    whole = first.groups != last.groups
    segments = Segments(np.concatenate(starts) if whole else starts[0], n_rows)
    rows, index, groups = (join(getattr(first, k), getattr(last, k)) for k in ("rows", "index", "groups"))
    return [Chunk(rows, index, segments, groups, first.long)]


def join(first: Rows, last: Rows) -> Rows:
    """Return consecutive slices as one; an index array stands alone."""
    return slice(first.start, last.stop) if isinstance(first, slice) and isinstance(last, slice) else first


class Part(RowStore):
    """The rows in one place, and the loss that is applied to them chunk by chunk.

    It runs functions ``work(part, chunks, ...)`` that sum up what a pass over the data yields; `OnDask` has
    the same methods for rows in several places.

    Parameters
    ----------
    loss : Loss
    table : Table

    Attributes
    ----------
    constants : ndarray, shape (n_groups,) or (1,)
        What the loss needs to know of every group's target.
    n_long : int
        Number of long groups, in all places.
    long_numbers : ndarray of int
        The number by which each of the long groups here is known.
    """

    def __init__(self, loss: Loss, table: Table) -> None:
        super().__init__(table)
        self.loss = loss
        if loss.nonnegative_target:
            self._refuse_negative_targets()
        self.recut()

    def recut(self, shared: Index | None = None) -> None:
        """Cut the rows into chunks and sum up what the loss needs of every group's target."""
        loss = self.loss
        self.cut(grouped=loss.coupled, shared=shared)
        self.constants = np.zeros(len(self.groups) if loss.coupled else 1)
        # Most losses need to know nothing of it.
        if loss.coupled and type(loss).constants is not Loss.constants:
            for chunk in self.chunks:
                b, w, _ = self.targets(chunk)
                self.constants[chunk.groups] += loss.constants(b, np.asarray(w), chunk.segments)
        self.n_groups, self.n_long = len(self.groups), len(self.long_groups)
        self.long_numbers: Index = np.arange(self.n_long)
        self.long_constants = self.constants[self.long_groups]
        # Whether every row plays a part in the loss, as far as that is known without looking at each.
        self.all_count = self.weights is None and not (loss.needs_mass and (self.constants <= 0.0).any())

    def with_loss(self, loss: Loss, b: Any, weights: Any) -> Self:
        """Return the same rows with another loss; ``b``, ``weights`` in group order."""
        other = copy(self)
        other.loss, other.b, other.weights = loss, b, weights
        other.recut()
        return other

    def without(self, dropped: NDArray[np.bool_]) -> Self:
        """Return the part without some rows, shape (n,) in group order."""
        other = type(self)(self.loss, self.take(np.flatnonzero(~dropped)))
        other.memory_limit = self.memory_limit
        return other

    def without_penalty(self) -> Self:
        """Return the same rows without row penalties."""
        other = copy(self)
        other.penalty = None
        return other

    def _refuse_negative_targets(self) -> None:
        """Refuse negative targets: the loss takes none."""
        for rows, b in pieces(self.b):
            if (b < 0).any():
                row = rows.start + int(np.flatnonzero(b < 0)[0])
                k = row if self.groups.order is None else int(self.groups.order[row])
                raise negative_target(k, self.loss.nonnegative_target)

    # ---- running over the rows

    def reduce(self, work: Callable[..., Any], *args: Any, drawn: Drawn | None = None) -> Any:
        """Return ``work(part, chunks, *args)`` over all the data, or over rows drawn from them.

        Work returns what `merged` adds up: on data in several places it runs where they are, and only its
        sums travel.
        """
        if self.design.shared_rows is None:
            work = getattr(work, "alone", work)
        with self.threads(drawn):
            return work(self, self.chunks if drawn is None else drawn.chunks, *args)

    def reduce_and_draw(self, work: Callable[..., Any], *args: Any) -> tuple[Any, Drawn]:
        """Return the first result of ``work``, and the chunks that it drew, which stay where they are."""
        with self.threads():
            sums, chunks = work(self, self.chunks, *args)
        return sums, Drawn(chunks, sum(chunk.matrix.shape[0] for chunk in chunks))

    def threads(self, drawn: Drawn | None = None) -> AbstractContextManager[None]:
        """Give BLAS one thread where rows are narrow and not few: with two, products of narrow blocks take as
        long, on both, or longer (measured, 16 to 200 columns); five times as long where others compute too.
        """
        n_rows = self.n_rows if drawn is None else drawn.n_rows
        many = self.n_unknowns * n_rows >= MANY
        return one_blas_thread(alone=False) if many and self.n_unknowns <= NARROW else nullcontext()

    def share_out(self, source: Any) -> Any:
        """Return a sampler or generator, or one for each part of the data."""
        return source

    def collect(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Return ``work(part, chunks, *args)`` of each part of the data, in order."""
        return [work(self, self.chunks, *args)]

    # ---- groups as the parts of all data know them

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
        return int(np.delete(self.group_sizes(), self.long_groups).max(initial=0))

    @property
    def rows_per_short_group(self) -> float:
        """Mean size of the groups that fit into a chunk."""
        return float(np.delete(self.group_sizes(), self.long_groups).mean())

    def target_totals(self) -> dict[int, Array]:
        """Return the sums of the targets of each long group, by its number: see `target_sums`."""
        ends, found = np.append(self.groups.starts, self.n_rows), dict[int, Array]()
        for g, number in zip(self.long_groups, self.long_numbers, strict=True):
            found[int(number)] = target_sums(self, int(ends[g]), int(ends[g + 1]))
        return found

    # ---- the loss on a chunk

    def targets(self, chunk: Chunk) -> tuple[Array, Any, Array]:
        """Return target and weight of each row, and the constant of each group."""
        w = 1.0 if self.weights is None else self.weights[chunk.rows]
        return self.b[chunk.rows], w, self.constants[chunk.groups]

    def row_penalties(self, chunk: Chunk) -> Array | None:
        """Return the squared row penalties, if any."""
        return None if self.penalty is None else self.penalty[chunk.rows]

    def row_state(self, chunk: Chunk, z: Array, at: Evaluation) -> list[Array]:
        """Return the state of each row's group at the evaluated point."""
        if not self.loss.coupled:
            return []
        if chunk.long >= 0:
            return list(at.state[:, [chunk.long]])
        normalised = self.loss.normalise(z, chunk.segments)
        found, _ = group_sums(self.loss, normalised, chunk.segments, *self.targets(chunk))
        return list(map(chunk.segments.spread, found.state))

    def slope_at_zero(self, chunk: Chunk, long_states: Array) -> Array:
        """Return the gradient in the logits at x = 0, for which A is not needed."""
        b, w, constant = self.targets(chunk)
        z = np.zeros(chunk.segments.n_rows) + self.shift(chunk)
        state: list[Array] = []
        if chunk.long >= 0:
            state = list(long_states[:, [chunk.long]])
        elif self.loss.coupled:
            normalised = self.loss.normalise(z, chunk.segments)
            found, _ = group_sums(self.loss, normalised, chunk.segments, b, w, constant)
            state = list(map(chunk.segments.spread, found.state))
        return self.loss.slope(z, b, w, state)

    def group_summary(self, g: int, at: Evaluation) -> tuple[Array, Array]:
        """Return state and centre ``A_g^T centre`` of one group at an evaluated point, shapes (n_states,) and
        (d,).
        """
        number = np.flatnonzero(self.long_groups == g)
        if len(number):
            return at.state[:, number[0]], at.centre[number[0]]
        chunk = next(c for c in self.chunks if c.long < 0 and c.groups.start <= g < c.groups.stop)  # type: ignore[union-attr]
        first = int(chunk.segments.starts[g - chunk.groups.start])  # type: ignore[union-attr]
        block, z = self.logits(chunk, at.x)
        row_state = self.row_state(chunk, z, at)
        b, w, _ = self.targets(chunk)
        weights = self.loss.gram_terms(z, b, w, row_state)[1]
        assert weights is not None
        state = np.array([s[first] if len(s) > 1 else s[0] for s in row_state])
        mu = self.design.group_rows(block, weights, chunk.segments.starts)[[g - chunk.groups.start]]  # type: ignore[union-attr]
        return state, np.asarray(mu.toarray() if sparse.issparse(mu) else mu)[0]

    def by_row(self, at: Evaluation, formula: Callable[[Part, Chunk, Array, list[Array]], Array]) -> Array:
        """Apply a formula to the logits and states of every row; return shape (n,) in the user's order."""
        return np.concatenate(self.collect(row_values, at, formula))

    # ---- curvature of a chunk

    def gram_rows(
        self, chunk: Chunk, z: Array, state: list[Array], *, gauss_newton: bool = False
    ) -> tuple[list[GramTerm], Array | None]:
        """Return the Hessian's terms for a chunk, row penalty and sampling weights included, and the centre's
        weights.
        """
        b, w, _ = self.targets(chunk)
        terms, weights = self.loss.gram_terms(z, b, w, state)
        if gauss_newton:
            terms = self.loss.gauss_newton_terms(z, b, w, state)
        if self.penalty is not None:
            terms = [*terms, GramTerm(self.penalty[chunk.rows], None, None)]
        if chunk.multiplier is not None:
            terms = [GramTerm(t * chunk.multiplier, r, q) for t, r, q in terms]
        return terms, weights

    def add_to_gram(
        self,
        gram: Any,
        chunk: Chunk,
        block: Any,
        terms: list[GramTerm],
        weights: Array | None,
        centres: Array | None,
        *,
        absolute: bool = False,
    ) -> float:
        """Add terms of a chunk, such as `gram_rows`; return the sum of their absolute row weights.

        ``weights`` make a group's centre, ``centres`` are the long groups'.
        """
        total = 0.0
        for t, r, q in terms:
            size = np.abs(t)
            total += float(size.sum())
            if absolute:
                t = size
            if q is None:
                gram.add(block, t, r)
            elif chunk.long >= 0:
                assert centres is not None
                gram.add_piece(block, t, r, q, centres[chunk.long], chunk.long)
            else:
                assert weights is not None
                starts = chunk.segments.starts
                gram.add_centred(block, t, r, q, self.design.group_rows(block, weights, starts), starts)
        return total


def group_sums(
    loss: Loss, normalised: Normalised, segments: Segments, b: Array, w: Any, constant: Array
) -> tuple[GroupStatistics, tuple[Array, ...]]:
    """Return what whole groups sum to at their exact normalisers, ``loss.normalise(z, segments)``, and their
    columns.
    """
    normaliser, y, v = normalised
    columns, extras = loss.accumulate(y, v, b, w, segments.spread(normaliser), segments.spread(constant))
    sums = [np.ones(())] * len(columns)
    for j in loss.exact_sums:
        sums[j] = segments.sum(columns[j])
    return loss.finalize(sums, list(map(segments.sum, extras)), normaliser, constant), columns


def group_slopes(statistics: GroupStatistics, columns: tuple[Array, ...], segments: Segments) -> Array:
    """Return the gradient in the logits of whole groups, shape (n_rows,)."""
    slope: Array | None = None
    for coefficient, column in zip(map(np.asarray, statistics.coefficients), columns, strict=True):
        # At an exact normaliser some coefficients are zero, and what they multiply need not be finite.
        if coefficient.any():
            term = (segments.spread(coefficient) if coefficient.ndim else coefficient) * column
            slope = term if slope is None else np.add(slope, term, out=slope)
    return np.zeros_like(columns[0]) if slope is None else slope


def row_values(part: Part, chunks: list[Chunk], at: Evaluation, formula: Any) -> Array:
    """Return a formula of the logits and states of every row of a part, in the user's order."""
    out = np.empty(part.n_rows)
    for chunk in part.prefetch(chunks):
        _, z = part.logits(chunk, at.x)
        out[chunk.rows] = formula(part, chunk, z, part.row_state(chunk, z, at))
    return part.groups.unsort(out)


def fitted_rows(part: Part, chunk: Chunk, z: Array, state: list[Array]) -> Array:
    """Return the outputs of a chunk: see `RowProblem.predict`."""
    if isinstance(part.loss, SquaredRescaled) and (state[0] == 0.0).any():
        row = int(np.flatnonzero(np.broadcast_to(state[0], z.shape) == 0.0)[0])
        group = int(np.searchsorted(chunk.segments.starts, row, side="right")) - 1
        label = part.groups.labels[chunk.groups][group]
        raise ValueError(f"the normaliser of group {label!r} is zero at this x: its shares are not defined")
    return part.loss.fitted(z, state)


def slope_rows(part: Part, chunk: Chunk, z: Array, state: list[Array]) -> Array:
    """Return the gradient in the logits of a chunk, row penalties included."""
    b, w, _ = part.targets(chunk)
    s = part.loss.slope(z, b, w, state)
    penalty = part.row_penalties(chunk)
    return s if penalty is None else s + penalty * (z - part.shift(chunk))


def largest_product(part: Part, chunks: list[Chunk], x: Array) -> float:
    """Return the largest ``|A x|``."""
    return max(float(np.abs(part.design.product(part.fetch(c), x)).max()) for c in part.prefetch(chunks))


def squares_of_some(part: Part, chunks: list[Chunk]) -> tuple[Array, int]:
    """Return the sum of squares of a thousand rows at equal distances, shape (d,), and their number."""
    rows = part.design.block(np.arange(0, part.n_rows, max(1, part.n_rows // 1000)))
    return np.asarray((rows * rows).sum(axis=0)).reshape(-1), rows.shape[0]


def target_pieces(part: Part, first: int, last: int) -> Iterator[tuple[int, Array]]:
    """Yield the number of the first row and ``|w b|`` of pieces of these rows."""
    for start in range(first, last, PIECE_ROWS):
        rows = slice(start, min(start + PIECE_ROWS, last))
        b, w = part.b[rows], None if part.weights is None else part.weights[rows]
        for k in range(0, len(b), CACHE_ROWS):
            target: Array = np.abs(b[k : k + CACHE_ROWS])
            yield start + k, target if w is None else target * w[k : k + CACHE_ROWS]


def target_sums(part: Part, first: int, last: int) -> Array:
    """Return the number of these rows, and the sums of ``|w b|`` and of its square."""
    total = np.zeros(2)
    for _, target in target_pieces(part, first, last):
        total += target.sum(), target @ target
    return np.array([last - first, *total])

"""The data of a grouped problem, and what each chunk of it knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import copy
from functools import cached_property
from typing import Any, Self

import numpy as np
from scipy import sparse

from attnfit.designs.column import Column, pieces
from attnfit.designs.read_ahead import read_ahead
from attnfit.designs.threads import available_threads
from attnfit.losses.base import Closed, GramTerm, Loss
from attnfit.losses.segments import Array, Index
from attnfit.problems.base import Problem
from attnfit.problems.evaluation import Drawn, Evaluation
from attnfit.problems.inputs import as_column, as_design, as_ridge, negative_target, require_finite_rows
from attnfit.problems.rows.masses import target_sums
from attnfit.problems.rows.origin import origin_states
from attnfit.problems.rows.partition import Chunk, parse_groups, partition, runs
from attnfit.sketching import RowSampler

COLUMNS = ("b", "weights", "offset", "penalty")
# What is computed from the loss and the target, and not kept where these are replaced.
DERIVED = ("rows_per_short_group", "origin_states")


class StoredProblem(Problem):
    """Data, loss and regulariser; reads them chunk by chunk.

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
        if not self.loss.shares:
            return
        for chunk_rows, b in pieces(self.b):
            if (b < 0).any():
                row = chunk_rows.start + int(np.flatnonzero(b < 0)[0])
                k = row if self.groups.order is None else int(self.groups.order[row])
                raise negative_target(k, self.loss.shares)

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

    def long_masses(self) -> dict[int, Array]:
        """Return the sums of the targets of each long group, by its number: see `target_sums`."""
        ends = np.append(self.groups.starts, self.n_rows)
        return {
            int(number): target_sums(self, int(ends[g]), int(ends[g + 1]))
            for g, number in zip(self.long_groups, self.long_numbers, strict=True)
        }

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

    def initial_point(self, random_state: Any = None) -> Array:
        """Return a point to start from, shape (d,): zero, or logits of size 0.1 where zero is stationary by
        symmetry.
        """
        if not self.zero_is_stationary:
            return np.zeros(self.n_unknowns)
        total, n = self.reduce(_squares_of_some)
        squares = total / n
        rng = np.random.default_rng(random_state)
        direction = rng.standard_normal(self.n_unknowns)
        return np.asarray(0.1 * direction / np.sqrt(np.where(squares > 0, squares, 1.0) * self.n_unknowns))

    def fetch(self, chunk: Chunk) -> Any:
        """Return a chunk's rows, shape (n_rows, d), and count them as read."""
        if chunk.matrix is None:
            return self.design.block(chunk.index)
        self.design.rows_read += chunk.matrix.shape[0]
        return chunk.matrix

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
        b, w, constant = self.targets(chunk)
        spread = chunk.segments.spread
        return [spread(s) for s in self.close_groups(chunk, z, b, w, constant)[0].state]

    def close_groups(
        self, chunk: Chunk, z: Array, b: Array, w: Any, constant: Array
    ) -> tuple[Closed, tuple[Array, ...]]:
        """Return what a chunk of whole groups sums to at their exact normalisers, and its columns."""
        segments, loss = chunk.segments, self.loss
        normaliser, y, v = loss.normalise(z, segments)
        columns, extras = loss.moments(y, v, b, w, segments.spread(normaliser), segments.spread(constant))
        one = np.ones(len(segments))
        sums = [segments.sum(c) if j in loss.exact_sums else one for j, c in enumerate(columns)]
        return loss.close(sums, [segments.sum(e) for e in extras], normaliser, constant), columns

    @cached_property
    def origin_states(self) -> Array:
        """States of the long groups at x = 0, for which A is not needed, shape (n_states, n_long)."""
        return origin_states(self)

    def origin_logits(self, chunk: Chunk) -> Array:
        """Return the logits at x = 0."""
        return np.zeros(chunk.segments.n_rows) + self.shift(chunk)

    def origin_slope(self, chunk: Chunk, b: Array, w: Any, long_states: Array) -> Array:
        """Return the gradient in the logits at x = 0."""
        z = self.origin_logits(chunk)
        if chunk.long >= 0:
            return self.loss.slope(z, b, w, list(long_states[:, [chunk.long]]))
        return self.loss.slope(z, b, w, self.row_state(chunk, z, _NOWHERE))

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

    def by_row(
        self, at: Evaluation, formula: Callable[[StoredProblem, Chunk, Array, list[Array]], Array]
    ) -> Array:
        """Apply a formula to the logits and states of every row; return shape (n,) in the user's order."""
        return np.concatenate(self.collect(_row_values, at.bare(), formula))

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
        penalty = self.row_penalties(chunk)
        if penalty is not None:
            terms = [*terms, GramTerm(penalty, None, None)]
        if chunk.multiplier is not None:
            terms = [GramTerm(t * chunk.multiplier, r, q) for t, r, q in terms]
        return terms, weights

    def add_to_gram(
        self,
        gram: Any,
        chunk: Chunk,
        block: Any,
        z: Array,
        state: list[Array],
        centres: Array | None,
        *,
        absolute: bool = False,
        gauss_newton: bool = False,
    ) -> float:
        """Add a chunk's part of the Hessian; return the sum of the absolute row weights."""
        terms, weights = self.gram_rows(chunk, z, state, gauss_newton=gauss_newton)
        mass = 0.0
        for t, r, q in terms:
            size = np.abs(t)
            mass += float(size.sum())
            self.add_term(gram, chunk, block, GramTerm(size if absolute else t, r, q), weights, centres)
        return mass

    def add_term(
        self,
        gram: Any,
        chunk: Chunk,
        block: Any,
        term: GramTerm,
        weights: Array | None,
        centres: Array | None,
    ) -> None:
        """Add one term of a chunk; ``weights`` make a group's centre, ``centres`` are the long groups'."""
        t, r, q = term
        if q is None:
            gram.add(block, t, r)
        elif chunk.long >= 0:
            assert centres is not None
            gram.add_piece(block, t, r, q, centres[chunk.long], chunk.long)
        else:
            assert weights is not None
            starts = chunk.segments.starts
            gram.add_centred(block, t, r, q, self.design.group_rows(block, weights, starts), starts)


def _squares_of_some(part: StoredProblem, chunks: list[Chunk]) -> tuple[Array, int]:
    """Return the sum of squares of a thousand rows at equal distances, shape (d,), and their number."""
    rows = part.design.block(np.arange(0, part.n_rows, max(1, part.n_rows // 1000)))
    return np.asarray((rows * rows).sum(axis=0)).reshape(-1), rows.shape[0]


def _row_values(part: StoredProblem, chunks: list[Chunk], at: Evaluation, formula: Any) -> Array:
    out = np.empty(part.n_rows)
    for chunk in part.ahead(chunks):
        _, z = part.logits(chunk, at.x)
        out[chunk.rows] = formula(part, chunk, z, part.row_state(chunk, z, at))
    return part.groups.unsort(out)


_NOWHERE = Evaluation(np.zeros(0), np.nan, np.zeros(0), np.zeros((2, 0)), np.zeros((0, 0)))

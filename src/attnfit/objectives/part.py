"""Partial results of parts of the data, and their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from attnfit.data.groups import Chunk
from attnfit.losses.loss import Closed, GramTerm, Loss
from attnfit.objectives.inputs import require_finite_rows
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.store import RowData
from attnfit.segments import Array, Segments


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


@dataclass
class LongSums:
    """Sums over the pieces of one long group; pieces merge by addition."""

    products: Array
    columns: Array
    extras: Array

    def merge(self, other: LongSums) -> LongSums:
        """Return the sums over both pieces."""
        return LongSums(
            self.products + other.products, self.columns + other.columns, self.extras + other.extras
        )


@dataclass
class Totals:
    """Value and gradients but for the long groups, whose sums are closed at the end.

    Attributes
    ----------
    origin_gradient : ndarray, shape (d,)
        The gradient at zero, where asked for.
    long : dict of LongSums
        By number of the long group.
    """

    value: float
    gradient: Array
    origin_gradient: Array
    long: dict[int, LongSums] = field(default_factory=dict)

    @classmethod
    def zero(cls, n_unknowns: int) -> Totals:
        """Nothing read yet."""
        return cls(0.0, np.zeros(n_unknowns), np.zeros(n_unknowns))

    def add_piece(self, number: int, products: Array, columns: Array, extras: Array) -> None:
        """Add a piece of a long group."""
        self.long[number] = merged(self.long.get(number), LongSums(products, columns, extras))

    def merge(self, other: Totals) -> Totals:
        """Return the sums over both parts of the data."""
        return Totals(
            self.value + other.value,
            self.gradient + other.gradient,
            self.origin_gradient + other.origin_gradient,
            merged(self.long, other.long),
        )

    def close(self, loss: Loss, reference: Array, constants: Array) -> tuple[Array, Array]:
        """Add the long groups; return their states and centres."""
        states = np.zeros((2 if loss.coupled else 0, len(constants)))
        centres = np.zeros((len(constants), len(self.gradient)))
        for number, sums in self.long.items():
            closed = loss.close(list(sums.columns), list(sums.extras), reference[number], constants[number])
            self.value += float(closed.value)
            self.gradient += np.array(closed.coefficients) @ sums.products
            states[:, number] = closed.state
            centres[number] = closed.centre * sums.products[-1]
        return states, centres


# Rows that are read at a time; those worked on at a time, so that what is made of them stays in cache.
PIECE_ROWS, CACHE_ROWS = 1 << 20, 1 << 13


def target_pieces(problem: StoredProblem, first: int, last: int) -> Iterator[tuple[int, Array]]:
    """Yield the number of the first row and ``|w b|`` of pieces of these rows."""
    for start in range(first, last, PIECE_ROWS):
        rows = slice(start, min(start + PIECE_ROWS, last))
        b, w = problem.b[rows], None if problem.weights is None else problem.weights[rows]
        for k in range(0, len(b), CACHE_ROWS):
            target: Array = np.abs(b[k : k + CACHE_ROWS])
            yield start + k, target if w is None else target * w[k : k + CACHE_ROWS]


def target_sums(problem: StoredProblem, first: int, last: int) -> Array:
    """Return the number of these rows, and the sums of ``|w b|`` and of its square."""
    total = np.zeros(2)
    for _, target in target_pieces(problem, first, last):
        total += target.sum(), target @ target
    return np.array([last - first, *total])


# Rows of a group that predict its normaliser to a few per cent.
GUESS_ROWS = 1000


@dataclass
class Normalisers:
    """Normalisers of long groups by number, over the rows seen so far."""

    loss: Loss
    found: dict[int, Array] = field(default_factory=dict)

    def add(self, number: int, part: Array) -> None:
        """Add rows of a group."""
        known = self.found.get(number)
        self.found[number] = part if known is None else self.loss.merge_references(known, part)

    def merge(self, other: Normalisers) -> Normalisers:
        """Return the normalisers over the rows of both."""
        both = Normalisers(self.loss, dict(self.found))
        for number, part in other.found.items():
            both.add(number, part)
        return both

    def in_order(self) -> Array:
        """Return them, shape (n_long,)."""
        return np.array([self.found[number][0] for number in range(len(self.found))])


def normaliser_sums(part: StoredProblem, chunks: list[Chunk], x: Array | None) -> Normalisers:
    """Return the normalisers at x; at zero, where A is not needed, for None."""
    sums = Normalisers(part.loss)
    long = [chunk for chunk in chunks if chunk.long >= 0]
    for chunk in long if x is None else part.ahead(long):
        z = part.origin_logits(chunk) if x is None else part.logits(chunk, x)[1]
        sums.add(chunk.long, part.loss.reference(z, chunk.segments))
    return sums


def guess_normalisers(problem: StoredProblem, x: Array) -> Array | None:
    """Predict the normalisers of the long groups from rows at equal distances; None where the groups are too
    short for that to save much.

    An error of a few per cent costs no accuracy: it multiplies what cancels by those per cent.
    """
    starts, order = problem.groups.starts, problem.groups.order
    sizes = np.diff(starts, append=problem.n_rows)
    if sizes[problem.long_groups].min() < 10 * GUESS_ROWS:
        return None
    guesses = []
    for g in problem.long_groups:
        step = sizes[g] // GUESS_ROWS
        at = np.arange(starts[g] + step // 2, starts[g] + sizes[g], step)
        segments = Segments(np.zeros(1, dtype=np.intp), len(at))
        chunk = Chunk(at, at if order is None else order[at], segments, slice(g, g + 1))
        part = problem.loss.reference(problem.logits(chunk, x)[1], segments)
        guesses.append(problem.loss.extrapolate(part, sizes[g] / len(at))[0])
    return np.array(guesses)


def origin_states(problem: StoredProblem) -> Array:
    """Return them, shape (n_states, n_long)."""
    if not problem.n_long:
        return np.zeros((2 if problem.loss.coupled else 0, 0))
    reference = problem.reduce(normaliser_sums, None).in_order()
    totals: Totals = problem.reduce(_moment_sums, reference)
    return totals.close(problem.loss, reference, problem.long_constants)[0]


def _moment_sums(part: StoredProblem, chunks: list[Chunk], reference: Array) -> Totals:
    totals = Totals.zero(0)
    for chunk in chunks:
        if chunk.long < 0:
            continue
        b, w, constant = part.targets(chunk)
        y, v = part.loss.link(part.origin_logits(chunk), reference[chunk.long])
        columns, extras = part.loss.moments(y, v, b, w, reference[chunk.long], constant)
        sums = np.array([column.sum() for column in columns])
        totals.add_piece(chunk.long, np.zeros((len(sums), 0)), sums, np.array([e.sum() for e in extras]))
    return totals


class StoredProblem(RowData):
    """Applies the loss to the data chunk by chunk."""

    def long_masses(self) -> dict[int, Array]:
        """Return the sums of the targets of each long group, by its number: see `target_sums`."""
        ends = np.append(self.groups.starts, self.n_rows)
        return {
            int(number): target_sums(self, int(ends[g]), int(ends[g + 1]))
            for g, number in zip(self.long_groups, self.long_numbers, strict=True)
        }

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

"""What each chunk of a grouped problem knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from attnfit.losses.base import Closed, GramTerm
from attnfit.losses.segments import Array
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.inputs import require_finite_rows
from attnfit.problems.rows.data import RowData
from attnfit.problems.rows.masses import target_sums
from attnfit.problems.rows.origin import origin_states
from attnfit.problems.rows.partition import Chunk


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

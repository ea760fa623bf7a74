"""The data of a grouped problem, and what each chunk of it knows."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import Any, Self

import numpy as np
from scipy import sparse

from attnfit.losses.base import Closed, GramTerm, Loss
from attnfit.losses.segments import Array, Segments
from attnfit.problems.base import Problem
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.inputs import as_design, as_ridge, as_vector, require_finite_rows
from attnfit.problems.rows.partition import Chunk, parse_groups, partition


class StoredProblem(Problem):
    """Data, loss and regulariser; reads them chunk by chunk."""

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
        self.design = as_design(A)
        n = int(self.design.shape[0])
        self.loss = loss
        self.groups = parse_groups(groups, n)
        sort = self.groups.sort
        self.b = sort(as_vector(b, n, "b"))
        self.weights = None if weights is None else sort(self._row_weights(weights, n))
        self.offset = None if offset is None else sort(as_vector(offset, n, "offset"))
        penalty = as_vector(row_penalty, n, "row_penalty", scalar=True) ** 2
        self.penalty = None if not penalty.any() else sort(np.broadcast_to(penalty, n))
        self.ridge: float | Array = as_ridge(ridge)
        self.chunks, self.long_groups = partition(
            self.groups, n, self.design.block_rows, coupled=loss.coupled
        )
        self.constants = np.zeros(1)
        if loss.coupled:
            weight = np.ones(1) if self.weights is None else self.weights
            self.constants = loss.constants(self.b, weight, Segments(self.groups.starts, n))

    def with_loss(self, loss: Loss, b: Array, weights: Array | None) -> Self:
        """Return a problem on the same data with another loss; ``b``, ``weights`` in group order."""
        other = copy(self)
        other.loss, other.b, other.weights = loss, b, weights
        if loss.coupled != self.loss.coupled:
            other.chunks, other.long_groups = partition(
                self.groups, self.n_rows, self.design.block_rows, coupled=loss.coupled
            )
            other.constants = np.zeros(1)
        if loss.coupled:
            weight = np.ones(1) if weights is None else weights
            other.constants = loss.constants(b, weight, Segments(self.groups.starts, self.n_rows))
        return other

    def _row_weights(self, weights: Any, n: int) -> Array:
        n_groups = len(self.groups)
        if np.shape(weights) == (n_groups,) and n_groups != n:
            per_group = as_vector(weights, n_groups, "weights", non_negative=True)
            rows = self.groups.unsort(np.repeat(per_group, np.diff(self.groups.starts, append=n)))
        else:
            rows = as_vector(weights, n, "weights", non_negative=True)
        if not rows.any():
            raise ValueError("weights are all zero; give at least one row a positive weight")
        return rows

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
        rows = self.design.block(np.arange(0, self.n_rows, max(1, self.n_rows // 1000)))
        squares = np.asarray((rows * rows).mean(axis=0)).reshape(-1)
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
            require_finite_rows(block, chunk.index, "A")
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

    def long_states_without_data(self) -> Array:
        """Return the states of the long groups at x = 0, for which A is not needed."""
        states = np.zeros((2 if self.loss.coupled else 0, len(self.long_groups)))
        bounds = np.append(self.groups.starts, self.n_rows)
        for number, g in enumerate(self.long_groups):
            rows = slice(bounds[g], bounds[g + 1])
            segments = Segments(np.zeros(1, dtype=np.intp), bounds[g + 1] - bounds[g])
            group = Chunk(rows, rows, segments, slice(g, g + 1))
            states[:, number] = [s[0] for s in self.row_state(group, self.origin_logits(group), _NOWHERE)]
        return states

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

    def by_row(self, at: Evaluation, formula: Callable[[Chunk, Array, list[Array]], Array]) -> Array:
        """Apply a formula to the logits and states of every row; return shape (n,) in the user's order."""
        out = np.empty(self.n_rows)
        for chunk in self.chunks:
            _, z = self.logits(chunk, at.x)
            out[chunk.rows] = formula(chunk, z, self.row_state(chunk, z, at))
        return self.groups.unsort(out)

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


_NOWHERE = Evaluation(np.zeros(0), np.nan, np.zeros(0), np.zeros((2, 0)), np.zeros((0, 0)))

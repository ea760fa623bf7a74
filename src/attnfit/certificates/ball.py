"""What is known of every row on a ball around x: whitened row norms and intervals of the model's outputs.

A formula goes over the rows of one chunk. Where it needs sums over whole groups it yields those over its own
rows, and is sent those over the groups: at once where the groups are in the chunk, after a read of the data
where they are longer. So nothing is kept of a row, and the rows may be anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.problems.evaluation import Evaluation
from attnfit.problems.rows.grouped import GroupedProblem
from attnfit.problems.rows.merging import merged
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.stored import StoredProblem

Array = NDArray[np.float64]

WHITENED_ROWS = 4096


@dataclass(frozen=True)
class Interval:
    """Entrywise bounds ``low <= . <= high``."""

    low: Array
    high: Array

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.high - other.low)

    def __mul__(self, other: Interval) -> Interval:
        products = [x * y for x in (self.low, self.high) for y in (other.low, other.high)]
        return Interval(np.minimum.reduce(products), np.maximum.reduce(products))

    @property
    def magnitude(self) -> Array:
        """Largest absolute value."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def deviation(self, centre: Array) -> Array:
        """Largest distance from a value inside."""
        return np.maximum(np.abs(self.high - centre), np.abs(self.low - centre))


class ChunkRows:
    """The rows of a chunk, in group order, and the sums that they add to.

    Parameters
    ----------
    part : StoredProblem
    chunk : Chunk
    at : Evaluation
        The centre of the ball.
    whitener : ndarray, shape (d, k)
        T with ``T^T H T = 1``: the ball is ``|y| <= r`` in the variables ``x + T y``.
    sums : dict
        Grams and numbers by name.
    """

    def __init__(
        self, part: StoredProblem, chunk: Chunk, at: Evaluation, whitener: Array, sums: dict[str, Any]
    ) -> None:
        self.part, self.chunk, self.at, self.whitener, self.sums = part, chunk, at, whitener, sums
        self.block, self.z = part.logits(chunk, at.x)
        self.b, w, self.constant = part.targets(chunk)
        self.w = w + np.zeros(len(self.z))
        self.state = part.row_state(chunk, self.z, at)

    def sum(self, values: Array) -> Array:
        """Sum over the rows of each group here, shape (n_groups,)."""
        return self.chunk.segments.sum(values)

    def spread(self, totals: Array) -> Array:
        """Repeat one value a group on its rows, shape (n_rows,)."""
        return self.chunk.segments.spread(totals) + np.zeros(len(self.z))

    def group_rows(self, weights: Array) -> Array:
        """Return ``A_g^T weights`` over the rows of each group here, shape (n_groups, d)."""
        found = self.part.design.group_rows(self.block, weights, self.chunk.segments.starts)
        return np.asarray(found.toarray() if sparse.issparse(found) else found)

    def norms(self, *, centred: bool) -> Array:
        """Return the norm of each whitened row, ``|T^T a_i|`` or ``|T^T (a_i - mu_g)|``, shape (n_rows,)."""
        out = np.empty(len(self.z))
        group = np.repeat(np.arange(len(self.chunk.segments)), self.chunk.segments.sizes)
        centres = self._centres() @ self.whitener if centred else None
        for first in range(0, len(out), WHITENED_ROWS):
            part = slice(first, first + WHITENED_ROWS)
            rows = self.block[part] @ self.whitener
            if centres is not None:
                rows = rows - centres[group[part]]
            out[part] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        return out

    def add(self, name: str, values: Array) -> None:
        """Add up a number a row."""
        self.sums[name] = self.sums.get(name, 0.0) + float(np.sum(values))

    def add_columns(self, name: str, values: Array) -> None:
        """Add up ``values |a|``, shape (d,)."""
        columns = self.part.design.combine(values[None, :], abs(self.block))[0]
        self.sums[name] = self.sums.get(name, 0.0) + np.asarray(columns).reshape(-1)

    def add_gram(self, name: str, weights: Array, *, centred: bool) -> None:
        """Add the rows to a Gram with non-negative row weights."""
        gram = self._gram(name)
        if not centred:
            gram.add(self.block, weights)
        else:
            self._add_about(gram, weights, None, 1.0, self._centres())

    def add_deflated(self, name: str, v: Array, totals: Array) -> None:
        """Add the rows ``sqrt(w_i) (v_i a_i - b_i t_g)`` to a Gram; ``totals`` has one row t_g a group."""
        self._add_about(self._gram(name), self.w, v, self.b, totals)

    def _gram(self, name: str) -> Any:
        return self.sums.setdefault(name, self.part.design.gram())

    def _add_about(self, gram: Any, t: Array, r: Array | None, q: Array | float, about: Array) -> None:
        if self.chunk.long >= 0:
            gram.add_piece(self.block, t, r, q, about[0], self.chunk.long)
        else:
            mu = sparse.csr_array(about) if sparse.issparse(self.block) else about
            gram.add_centred(self.block, t, r, q, mu, self.chunk.segments.starts)

    def _centres(self) -> Array:
        if self.chunk.long >= 0:
            return self.at.centre[[self.chunk.long]]
        weights = self.part.loss.gram_terms(self.z, self.b, self.w, self.state)[1]
        assert weights is not None
        return self.group_rows(weights)


# Yields arrays with one row a group, is sent their sums over whole groups, and then adds to the rows' sums:
# what comes before the last exchange is done again with every read.
Stages = Generator[tuple[Array, ...], tuple[Array, ...], None]
Formula = Callable[[ChunkRows, float], Stages]


def sums_on_ball(
    problem: GroupedProblem, at: Evaluation, whitener: Array, formula: Formula, radius: float
) -> dict[str, Any]:
    """Return what a formula adds up over all rows: one read, and one more for each time that it asks for sums
    over groups longer than a chunk.
    """
    known: dict[int, list[tuple[Array, ...]]] = {}
    sums: dict[str, Any] = {}
    while True:
        asked, found = problem.reduce(_read, at.bare(), whitener, formula, radius, known)
        sums = merged(sums, found)
        if not asked:
            return sums
        for number, totals in asked.items():
            known.setdefault(number, []).append(totals)


def _read(
    part: StoredProblem,
    chunks: list[Chunk],
    at: Evaluation,
    whitener: Array,
    formula: Formula,
    radius: float,
    known: dict[int, list[tuple[Array, ...]]],
) -> tuple[dict[int, tuple[Array, ...]], dict[str, Any]]:
    """Return the sums that the formula asks for of each long group, and those it added up."""
    asked: dict[int, tuple[Array, ...]] = {}
    sums: dict[str, Any] = {}
    # Whole groups were done with the first read.
    wanted = [chunk for chunk in chunks if chunk.long >= 0] if known else chunks
    with np.errstate(over="ignore", invalid="ignore"):
        for chunk in part.ahead(wanted):
            stages = formula(ChunkRows(part, chunk, at, whitener, sums), radius)
            answers = iter(known.get(chunk.long, []))
            own = next(stages, None)
            while own is not None:
                totals = own if chunk.long < 0 else next(answers, None)
                if totals is None:
                    asked = merged(asked, {chunk.long: own})
                    break
                try:
                    own = stages.send(totals)
                except StopIteration:
                    break
    return asked, sums

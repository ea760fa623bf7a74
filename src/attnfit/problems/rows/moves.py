"""By how much steps change the fitted logits: the measure of every stopping rule.

Exponential and rescaled losses: ``max_i |a_i p|``, the relative change of ``exp(z_i)``. Losses of a softmax:
``max_g (max_i a_i p - min_i a_i p) / 2``, half the largest change of a log-odds. Rows of weight zero do not
count, unless their group has others, whose normaliser they share; nor do groups without a target where the
loss needs one. The measure does not depend on the units of the target, of the weights or of the unknowns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attnfit.losses.segments import Array
from attnfit.problems.base import Moved
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.row_kinds import Kind, counting_rows, kind_of, rows_of
from attnfit.problems.rows.stored import StoredProblem

# Rows that are kept to look at steps between the reads.
PROBE_ROWS = 2_000


@dataclass
class Moves:
    """The largest move along each step, over the rows seen so far.

    Attributes
    ----------
    largest : ndarray, shape (k,)
    least : float
        The smallest output, relative to the largest of its group, of a row that the loss lets fall; infinite
        where the loss always has a minimum.
    long : dict of ndarray, shape (2, k)
        By number, the largest ``a p`` and ``-a p`` in groups of which only a part was seen.
    """

    largest: Array
    least: float = np.inf
    long: dict[int, Array] = field(default_factory=dict)

    def merge(self, other: Moves) -> Moves:
        """Return the moves over both parts of the data."""
        long = dict(self.long)
        for number, extent in other.long.items():
            long[number] = np.maximum(long[number], extent) if number in long else extent
        return Moves(np.maximum(self.largest, other.largest), min(self.least, other.least), long)

    def close(self) -> Moved:
        """Return what all rows say."""
        found = self.largest
        for extent in self.long.values():
            found = np.maximum(found, 0.5 * extent.sum(axis=0))
        return Moved(found, self.least)

    def add(self, part: StoredProblem, chunk: Chunk, block: Any, at: Evaluation, steps: Array) -> None:
        """Add the rows of a chunk."""
        if kind_of(part.loss) is Kind.EXACT and part.penalty is None:
            rows = rows_of(part, chunk, block, at)
            self.least = min(self.least, float(rows.size[rows.free].min(initial=np.inf)))
        along = np.asarray(block @ steps)
        counts = counting_rows(part, chunk)
        if not (part.loss.shift_invariant and part.penalty is None):
            size = np.abs(along[counts]).max(axis=0, initial=0.0)
            self.largest = np.maximum(self.largest, size)
            return
        starts = chunk.segments.starts
        extents = [
            np.maximum.reduceat(np.where(counts[:, None], sign * along, -np.inf), starts) for sign in (1, -1)
        ]
        if chunk.long >= 0:
            self.long = self.merge(Moves(self.largest, long={chunk.long: np.concatenate(extents)})).long
        else:
            half_ranges = 0.5 * (extents[0] + extents[1])
            self.largest = np.maximum(self.largest, half_ranges.max(axis=0, initial=0.0))


def move_sum(part: StoredProblem, chunks: list[Chunk], at: Evaluation, steps: Array) -> Moves:
    """Return the moves along the columns of ``steps``, shape (d, k)."""
    moves = Moves(np.zeros(steps.shape[1]))
    for chunk in part.ahead(chunks):
        moves.add(part, chunk, part.fetch(chunk), at, steps)
    return moves


class Probe:
    """Some rows of a problem, kept: a lower bound of the move of a step that costs no read.

    Parameters
    ----------
    problem : StoredProblem
        All of whose rows are here.

    Attributes
    ----------
    exact : bool
        Whether these are all rows.
    """

    def __init__(self, problem: StoredProblem) -> None:
        self._part = problem
        self._kept: list[tuple[Chunk, Any]] = []
        n_rows = 0
        for chunk in problem.chunks:
            if n_rows and n_rows + chunk.segments.n_rows > PROBE_ROWS:
                break
            self._kept.append((chunk, problem.fetch(chunk)))
            n_rows += chunk.segments.n_rows
        self.exact = n_rows == problem.n_rows

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return what the rows kept say; ``steps`` has shape (d, k)."""
        moves = Moves(np.zeros(steps.shape[1]))
        for chunk, block in self._kept:
            moves.add(self._part, chunk, block, at, steps)
        return moves.close()

    def column_sizes(self) -> Array:
        """Return the root mean square of each column, centred by group where the loss ignores a constant
        there, shape (d,).
        """
        squares, before = np.zeros((2, self._part.n_unknowns))
        n_rows = 0
        for chunk, block in self._kept:
            rows = np.asarray(block @ np.eye(self._part.n_unknowns))
            before += np.sum(rows * rows, axis=0)
            if self._part.loss.shift_invariant:
                segments = chunk.segments
                means = np.add.reduceat(rows, segments.starts) / segments.sizes[:, None]
                rows = rows - np.repeat(means, segments.sizes, axis=0)
            squares += np.sum(rows * rows, axis=0)
            n_rows += len(rows)
        # What centring leaves of a constant is rounding.
        return np.sqrt(np.where(squares > 1e-16 * before, squares, 0.0) / n_rows)

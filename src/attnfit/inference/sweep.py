"""One read of the data at the fit: information, scores of units, and how outputs differ from targets."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from attnfit.inference.scores import CentredRows, RowScores, row_scores
from attnfit.losses.loss import GramTerm
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.part import Part, merged
from attnfit.segments import Array, Chunk, Index

# Scores of units beyond so many bytes go to a file that is deleted when closed.
SCORES_IN_MEMORY = 1 << 30
# Shares that differ by no more than this are equal: a tie.
TIE = 1e-12
# Sums over units are added to those of all units where these are at most so many times the rows of a chunk.
DENSE_UNITS = 8


class Known:
    """A matrix in place of the accumulator that would give it."""

    def __init__(self, matrix: Array) -> None:
        self._matrix = matrix

    def result(self) -> Array:
        """Return the matrix."""
        return self._matrix


class Wanted(NamedTuple):
    """What a sweep adds up besides the information.

    Attributes
    ----------
    by_group, by_row : bool
        Outer products of the scores of groups, of rows.
    n_units : tuple of int
        Number of units of each set of labels.
    frequency : bool
        Whether weights count copies: each copy then has a score of its own.
    jacobian : bool
        The Gram of the residuals' Jacobian.
    """

    by_group: bool = False
    by_row: bool = False
    n_units: tuple[int, ...] = ()
    frequency: bool = False
    jacobian: bool = False


@dataclass
class LongFacts:
    """What is known of groups longer than a chunk from the rows seen so far, shape (..., n_long).

    Attributes
    ----------
    high, low : ndarray
        The largest and the smallest label of each set.
    top, ties, chosen : ndarray
        The largest share, how many rows have it, and the share of the chosen row.
    """

    high: NDArray[np.intp]
    low: NDArray[np.intp]
    top: Array
    ties: Array
    chosen: Array

    @classmethod
    def empty(cls, n_sets: int, n_long: int) -> LongFacts:
        """Return what is known before any row."""
        labels = np.full((n_sets, n_long), -1), np.full((n_sets, n_long), np.iinfo(np.intp).max)
        return cls(*labels, np.full(n_long, -1.0), np.zeros(n_long), np.full(n_long, -1.0))

    def see(self, number: int, f: Array, y: Array) -> None:
        """Add some rows of a group."""
        top = float(f.max())
        piece = LongFacts.empty(0, 1)
        piece.top[0], piece.ties[0] = top, np.count_nonzero(f >= top - TIE)
        piece.chosen[0] = f[np.argmax(y)] if (y > 0).any() else -1.0
        mine = slice(number, number + 1)
        known = LongFacts(piece.high, piece.low, self.top[mine], self.ties[mine], self.chosen[mine])
        both = known.merge(piece)
        self.top[mine], self.ties[mine], self.chosen[mine] = both.top, both.ties, both.chosen

    def merge(self, other: LongFacts) -> LongFacts:
        """Return what the rows of both tell."""
        top = np.maximum(self.top, other.top)
        ties = self.ties * (self.top >= top - TIE) + other.ties * (other.top >= top - TIE)
        return LongFacts(
            np.maximum(self.high, other.high),
            np.minimum(self.low, other.low),
            top,
            ties,
            np.maximum(self.chosen, other.chosen),
        )

    def hits(self) -> Array:
        """Return one for each group whose chosen row has the largest share, less where several have."""
        return np.where(self.chosen >= self.top - TIE, 1.0 / np.maximum(self.ties, 1.0), 0.0)


@dataclass
class Sums:
    """What a sweep adds up; sums of parts of the data merge by addition.

    Attributes
    ----------
    information, penalty, by_group, by_row, jacobian : Gram or None
    sizes : ndarray, shape (d,)
        The diagonal of the information before rows are centred, taken by absolute value.
    long_scores : ndarray, shape (n_long, d)
        Scores of groups longer than a chunk; ``long_weights`` their weights and rows, shape (n_long, 2).
    unit_scores : dict
        By set of labels: the scores of its units, shape (n_units, d).
    unit_rows : dict
        How many rows of each unit take part.
    totals : dict
        ``log_loss``, ``brier``, ``hits``, ``rss``, ``deviance``, ``split_k``: groups split by labels k.
    """

    information: Any
    penalty: Any
    by_group: Any
    by_row: Any
    jacobian: Any
    sizes: Array
    score: Array
    long_scores: Array
    long_weights: Array
    long_facts: LongFacts
    unit_scores: dict[int, Array] = field(default_factory=dict)
    unit_rows: dict[int, Array] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def merge(self, other: Sums) -> Sums:
        """Return the sums over both parts."""
        return Sums(*(merged(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


def sweep(
    part: Part,
    chunks: list[Chunk],
    at: Evaluation,
    wanted: Wanted,
    labels: tuple[Index, ...],
    counts: Array | None,
) -> Sums:
    """Add up what inference needs over some chunks.

    Parameters
    ----------
    at : Evaluation
        Of the fitted point; what it says of groups longer than a chunk is all that is needed of it.
    labels : tuple of ndarray of int, shape (n,) each
        The unit of each row in the user's order; negative for rows that are in none.
    counts : ndarray, shape (n,), optional
        How often each row is repeated where rows without groups are.
    """
    sums = _empty(part, wanted)
    for chunk in part.prefetch(chunks):
        block, z = part.logits(chunk, at.x)
        b, w, _ = part.targets(chunk)
        state = part.row_state(chunk, z, at)
        terms, weights = part.loss.gram_terms(z, b, w, state)
        rows = CentredRows(part, chunk, block, weights, at.centre)
        squares = part.design.squares(block)
        for term in terms:
            rows.add_to(sums.information, term)
            size = np.abs(term.t) if term.r is None else np.abs(term.t) * term.r**2
            sums.sizes += part.design.combine(size[None, :], squares)[0]
        _add_others(part, rows, sums, wanted, z, b, w, state)
        copies = w if counts is None else counts[chunk.index]
        _add_scores(part, rows, sums, wanted, labels, copies, z, b, w, state)
        _add_fit(part, chunk, sums, z, b, copies, counts is not None, state)
    return sums


def _empty(part: Part, wanted: Wanted) -> Sums:
    d, gram = part.n_unknowns, part.design.gram
    return Sums(
        gram(),
        None if part.penalty is None else gram(),
        gram() if wanted.by_group else None,
        gram() if wanted.by_row else None,
        gram() if wanted.jacobian else None,
        np.zeros(d),
        np.zeros(d),
        np.zeros((part.n_long, d)),
        np.zeros((part.n_long, 2)),
        LongFacts.empty(len(wanted.n_units), part.n_long),
        {k: _scores(n, d) for k, n in enumerate(wanted.n_units)},
        {k: np.zeros(n) for k, n in enumerate(wanted.n_units)},
    )


def _scores(n_units: int, d: int) -> Array:
    if 8 * n_units * d <= SCORES_IN_MEMORY:
        return np.zeros((n_units, d))
    with TemporaryFile() as file:
        # The map outlives the handle.
        return np.memmap(file, np.float64, "w+", shape=(n_units, d))


def _add_others(
    part: Part, rows: CentredRows, sums: Sums, wanted: Wanted, z: Array, b: Array, w: Any, state: Any
) -> None:
    """Add what does not depend on scores."""
    penalty = part.row_penalties(rows.chunk)
    if penalty is not None:
        rows.add_to(sums.penalty, GramTerm(penalty, None, None))
    if wanted.jacobian:
        for term in part.loss.gauss_newton_terms(z, b, w, state):
            rows.add_to(sums.jacobian, term)


def _add_scores(
    part: Part,
    rows: CentredRows,
    sums: Sums,
    wanted: Wanted,
    labels: tuple[Index, ...],
    copies: Any,
    z: Array,
    b: Array,
    w: Any,
    state: Any,
) -> None:
    chunk, loss = rows.chunk, part.loss
    slope = loss.slope(z, b, w, state)
    sums.score += part.design.combine(slope[None, :], rows.block)[0]
    copies = np.broadcast_to(copies, z.shape)
    if wanted.by_group:
        _add_groups(part, rows, sums, wanted, slope, copies)
    scores = row_scores(loss, z, b, w, state)
    if wanted.by_row and scores is not None:
        t = scores.e**2
        if wanted.frequency:
            t = t / np.where(copies > 0.0, copies, 1.0)
        rows.add_to(sums.by_row, GramTerm(t, scores.r, scores.q))
    if scores is None:
        # Only whole groups have scores: those of rows say nothing until they are added up.
        scores = RowScores(slope, None, None)
    for k, of_row in enumerate(labels):
        units = of_row[chunk.index]
        _note_splits(chunk, sums, k, units)
        inside = units >= 0
        place = np.where(inside, units, 0)
        found: Any = slice(None)
        if wanted.n_units[k] > DENSE_UNITS * len(place):
            # Most units have no row here.
            found, place = np.unique(place, return_inverse=True)
        n_units = wanted.n_units[k] if isinstance(found, slice) else len(found)
        e = np.where(inside, scores.e, 0.0)
        sums.unit_scores[k][found] += rows.sums(scores._replace(e=e), place, n_units)
        counted = inside & counting(part, chunk) & (copies > 0.0)
        sums.unit_rows[k][found] += np.bincount(place, weights=counted, minlength=n_units)


def _add_groups(
    part: Part, rows: CentredRows, sums: Sums, wanted: Wanted, slope: Array, copies: Array
) -> None:
    chunk = rows.chunk
    if chunk.long >= 0:
        sums.long_scores[chunk.long] += part.design.combine(slope[None, :], rows.block)[0]
        sums.long_weights[chunk.long] += copies.sum(), len(copies)
        return
    scores = part.design.group_rows(rows.block, slope, rows.starts)
    t = np.ones(len(rows.starts))
    if wanted.frequency:
        mean = chunk.segments.sum(copies) / chunk.segments.sizes
        t = 1.0 / np.where(mean > 0.0, mean, 1.0)
    sums.by_group.add(scores, t)


def _note_splits(chunk: Chunk, sums: Sums, k: int, units: Index) -> None:
    """Count the groups whose rows are in several units."""
    if chunk.long >= 0:
        facts = sums.long_facts
        facts.high[k, chunk.long] = max(facts.high[k, chunk.long], units.max())
        facts.low[k, chunk.long] = min(facts.low[k, chunk.long], units.min())
        return
    starts, name = chunk.segments.starts, f"split_{k}"
    split = np.minimum.reduceat(units, starts) != np.maximum.reduceat(units, starts)
    sums.totals[name] = sums.totals.get(name, 0.0) + float(np.count_nonzero(split))


def counting(part: Part, chunk: Chunk) -> NDArray[np.bool_]:
    """Return which rows take part: not those of groups whose targets sum to zero, where the loss needs a
    sum.
    """
    n = chunk.segments.n_rows
    if not part.loss.needs_mass:
        return np.ones(n, dtype=bool)
    mass = part.constants[chunk.groups]
    return np.broadcast_to(chunk.segments.spread(mass) > 0.0, n)


def _add_fit(
    part: Part,
    chunk: Chunk,
    sums: Sums,
    z: Array,
    b: Array,
    copies: Any,
    repeated: bool,
    state: list[Array],
) -> None:
    """Add what compares outputs with targets."""
    f = part.loss.fitted(z, state)
    y, w = (b / copies, copies) if repeated else (b, copies)
    f = f / copies if repeated else f
    found = {"brier": float(np.sum(w * (f - y) ** 2))}
    if part.loss.logarithmic:
        h = z - state[0] - (np.log(copies) if repeated else 0.0)
        found["log_loss"] = -float(np.sum(np.where(y != 0.0, w * y * h, 0.0)))
    if part.loss.coupled:
        if chunk.long >= 0:
            sums.long_facts.see(chunk.long, f, y)
        else:
            top = chunk.segments.spread(chunk.segments.max(f))
            largest = f >= top - TIE
            ties = chunk.segments.spread(chunk.segments.sum(largest.astype(np.float64)))
            found["hits"] = float(np.sum(np.where(largest & (y > 0), w / ties, 0.0)))
    elif part.loss.nonnegative_target:
        found["deviance"] = 2.0 * float(np.sum(w * (xlogy(y, y) - y * z - y + f)))
    for name, value in found.items():
        sums.totals[name] = sums.totals.get(name, 0.0) + value

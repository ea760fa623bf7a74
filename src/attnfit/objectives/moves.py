"""By how much steps change the fitted logits: the measure of every stopping rule; and which rows play a part
in a loss, which of them it holds where they are, and which it lets fall.

Exponential and rescaled losses: ``max_i |a_i p|``, the relative change of ``exp(z_i)``. Losses of a softmax:
``max_g (max_i a_i p - min_i a_i p) / 2``, half the largest change of a log-odds. Rows of weight zero do not
count, unless their group has others, whose normaliser they share; nor do groups without a target where the
loss needs one. The measure does not depend on the units of the target, of the weights or of the unknowns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.losses.elementwise import PoissonDeviance, SquaredExponential, Total
from attnfit.losses.loss import Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import CrossEntropy, SoftmaxLoss
from attnfit.losses.sums import SoftmaxSum
from attnfit.objectives.objective import Evaluation, Moved
from attnfit.objectives.part import Part, in_runs
from attnfit.segments import Array, Chunk

Mask = NDArray[np.bool_]

# Shares above this are held where they are, where the loss itself does not tell.
SHARE = 1e-4
# The logarithm of a share that is zero in float64.
LOG_OF_NOTHING = -800.0
ROUNDING = 8.0 * float(np.finfo(np.float64).eps)
# Steps that are looked at one by one; numbers that are worked on at a time where there are more.
FEW_STEPS, MOVED = 8, 1 << 17
# Rows that are kept to look at steps between the reads.
PROBE_ROWS = 2_000


def counting_rows(part: Part, chunk: Chunk) -> Mask:
    """Return which rows of a chunk play a part in the loss, shape (n_rows,)."""
    _, w, constants = part.targets(chunk)
    segments = chunk.segments
    if part.loss.needs_mass:
        counts = np.asarray(segments.spread(np.asarray(constants > 0.0, dtype=np.float64)) > 0.0)
    elif part.loss.coupled and chunk.long >= 0:
        counts = np.ones(1, dtype=bool)
    else:
        counts = np.asarray(np.asarray(w) > 0.0)
        if part.loss.coupled and not counts.all():
            counts = np.asarray(segments.spread(segments.max(np.asarray(counts, dtype=np.float64))) > 0.0)
    return np.broadcast_to(counts, segments.n_rows)


class Kind(Enum):
    """What a recession direction of a loss proves."""

    # No finite minimum exists.
    EXACT = 1
    # None exists near the point, if the gradient agrees.
    LOCAL = 2
    # All outputs of some groups can go to zero together, and the loss of these groups with them.
    SCALING = 3
    # Nothing is looked for: a finite minimum always exists, or, of a sum that the normaliser enters, no
    # linear programme is known.
    NONE = 4


def kind_of(loss: Loss) -> Kind:
    """Return what recession directions mean for a loss."""
    if isinstance(loss, SoftmaxSum):
        return Kind.EXACT if loss.is_cross_entropy else Kind.LOCAL
    if isinstance(loss, CrossEntropy | PoissonDeviance | Total):
        return Kind.EXACT
    if isinstance(loss, SquaredExponential):
        return Kind.EXACT if loss.function == "exp" else Kind.NONE
    if isinstance(loss, SquaredRescaled):
        return Kind.SCALING if loss.function == "exp" else Kind.NONE
    return Kind.LOCAL if isinstance(loss, SoftmaxLoss) else Kind.NONE


class Rows(NamedTuple):
    """The rows of a chunk: which are fixed, which are free, and how large their outputs are."""

    fixed: Mask
    free: Mask
    size: Array


def rows_of(part: Part, chunk: Chunk, block: Any, at: Evaluation, *, each: bool = True) -> Rows:
    """Tell fixed rows from free ones; where the loss is not convex, rows with a small share are free, with
    ``each`` only if the loss falls as theirs does.
    """
    loss, segments = part.loss, chunk.segments
    b, w, _ = part.targets(chunk)
    z = part.design.product(block, at.x) + part.shift(chunk)
    counts = counting_rows(part, chunk)
    if not loss.coupled:
        fixed = counts & (b > 0.0) if loss.has_target else counts & False
        return Rows(fixed, counts & ~fixed, np.exp(z - z.max()))
    if kind_of(loss) is Kind.SCALING:
        return Rows(counts & False, counts, np.ones(len(z)))
    state = part.row_state(chunk, z, at)
    f = np.broadcast_to(np.exp(z - state[0]), z.shape)
    if kind_of(loss) is Kind.EXACT:
        fixed = counts & (np.broadcast_to(np.asarray(w), b.shape) * b > 0.0)
    else:
        fixed = f > SHARE
        if each:
            fixed = fixed | ~wants_to_fall(loss, chunk, z, b, w, state)
        fixed = counts & fixed
    return Rows(fixed, counts & ~fixed, f / segments.spread(segments.max(f)))


def wants_to_fall(loss: Any, chunk: Chunk, z: Array, b: Array, w: Any, state: list[Array]) -> Mask:
    """Return for which rows of a softmax the loss would fall as their share goes to zero, to first order and
    up to rounding: ``Phi'(f)_k >= <Phi'(f), f>`` at share zero, shape (n_rows,).
    """
    gamma = np.broadcast_to(state[1], z.shape)
    zero, h = np.zeros_like(z), z - state[0]
    f = np.exp(h)
    terms = chunk.segments.spread(chunk.segments.sum(f * np.abs(loss.p(f, h, b, w))))
    p = loss.p(zero, zero + LOG_OF_NOTHING, b, w)
    return np.asarray(p - gamma >= -ROUNDING * terms - 1e-9 * (np.abs(gamma) + np.abs(p)))


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

    def finalize(self) -> Moved:
        """Return what all rows say."""
        found = self.largest
        for extent in self.long.values():
            found = np.maximum(found, 0.5 * extent.sum(axis=0))
        return Moved(found, self.least)

    def add(self, part: Part, chunk: Chunk, block: Any, at: Evaluation, steps: Array) -> None:
        """Add the rows of a chunk: the largest change of a logit along each step or, where a loss ignores
        what a group shares, ``max a p`` and ``max -a p`` of the group in which they are furthest apart.
        """
        counts, k = None if part.all_count else counting_rows(part, chunk), steps.shape[1]
        if part.penalty is None and kind_of(part.loss) is Kind.EXACT:
            self.least = min(self.least, _least_free(part, chunk, block, at, counts))
        shared = part.loss.shift_invariant and part.penalty is None
        # One step at a time where there are few: BLAS is slower at products with a few.
        many = k > FEW_STEPS and (isinstance(block, np.ndarray) or sparse.issparse(block))
        width = max(1, MOVED // chunk.segments.n_rows) if many else 1
        found = []
        for first in range(0, k, width):
            some = steps[:, first : first + width]
            moved = np.asarray(block @ some if many else part.design.product(block, some[:, 0]))
            if not shared:
                sizes = np.abs(moved if counts is None else moved[counts])
                found.append(np.reshape(sizes.max(axis=0, initial=0.0), (1, -1)))
                continue
            ends = moved, -moved
            if counts is not None:
                seen = counts if moved.ndim == 1 else counts[:, None]
                ends = np.where(seen, moved, -np.inf), np.where(seen, -moved, -np.inf)
            up, down = map(chunk.segments.max, ends)
            widest = np.argmax(up + down, axis=0)
            places = widest if moved.ndim == 1 else (widest, np.arange(moved.shape[1]))
            found.append(np.array([up[places], down[places]]).reshape(2, -1))
        extents = found[0] if len(found) == 1 else np.concatenate(found, axis=1)
        if not shared:
            self.largest = np.maximum(self.largest, extents[0])
        elif chunk.long >= 0:
            known = self.long.get(chunk.long)
            self.long[chunk.long] = extents if known is None else np.maximum(known, extents)
        else:
            self.largest = np.maximum(self.largest, 0.5 * extents.sum(axis=0))


def _least_free(part: Part, chunk: Chunk, block: Any, at: Evaluation, counts: Mask | None) -> float:
    """Return the smallest output, relative to the largest of its group, of a row that the loss lets fall:
    as `rows_of` does, without the normalisers.
    """
    b, w, _ = part.targets(chunk)
    z = part.design.product(block, at.x) + part.shift(chunk)
    if part.loss.coupled:
        fixed, top = np.broadcast_to(np.asarray(w), b.shape) * b > 0.0, chunk.segments.max(z)
        z = z - chunk.segments.spread(top)
    else:
        fixed = b > 0.0 if part.loss.has_target else np.zeros(b.shape, dtype=bool)
        z = z - z.max()
    return float(np.exp(z[~fixed if counts is None else counts & ~fixed].min(initial=np.inf)))


@in_runs
def move_sum(part: Part, chunks: list[Chunk], at: Evaluation, steps: Array) -> Moves:
    """Return the moves along the columns of ``steps``, shape (d, k)."""
    moves = Moves(np.zeros(steps.shape[1]))
    for chunk in part.prefetch(chunks):
        moves.add(part, chunk, part.fetch(chunk), at, steps)
    return moves


def varying_columns(part: Part, chunks: list[Chunk]) -> Array:
    """Return by a positive number which columns the first rows show to matter, shape (d,)."""
    seen = np.zeros(part.n_unknowns)
    for chunk in chunks[:1]:
        block, segments = part.fetch(chunk), chunk.segments
        own = np.full(segments.n_rows, 1.0)
        seen = part.design.combine(own[None, :], part.design.squares(block))[0]
        if part.loss.shift_invariant:
            mean = own / segments.spread(segments.sizes.astype(np.float64))
            centres = part.design.group_rows(block, mean, segments.starts)
            centres = np.asarray(centres.toarray() if hasattr(centres, "toarray") else centres)
            seen = np.where(seen - segments.sizes @ (centres * centres) > 1e-8 * seen, seen, 0.0)
    return np.asarray(seen > 0.0, dtype=np.float64)


class Probe:
    """Some rows of a problem, kept: a lower bound of the move of a step that costs no read.

    Parameters
    ----------
    problem : Part
        All of whose rows are here.

    Attributes
    ----------
    exact : bool
        Whether these are all rows.
    """

    def __init__(self, problem: Part) -> None:
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
        return moves.finalize()

    def column_sizes(self) -> Array:
        """Return the root mean square of each column, centred by group where the loss ignores a constant
        there, shape (d,).
        """
        squares, before = np.zeros((2, self._part.n_unknowns))
        n_rows = 0
        for chunk, block in self._kept:
            plain = block if isinstance(block, np.ndarray) else block @ np.eye(self._part.n_unknowns)
            rows = np.asarray(plain, dtype=np.float64)
            before += np.sum(rows * rows, axis=0)
            if self._part.loss.shift_invariant:
                segments = chunk.segments
                means = np.add.reduceat(rows, segments.starts) / segments.sizes[:, None]
                rows = rows - np.repeat(means, segments.sizes, axis=0)
            squares += np.sum(rows * rows, axis=0)
            n_rows += len(rows)
        # What centring leaves of a constant is rounding.
        return np.sqrt(np.where(squares > 1e-16 * before, squares, 0.0) / n_rows)

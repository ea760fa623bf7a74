"""Rows that a loss holds where they are, and rows that it lets fall: what decides whether a minimum exists.

A direction v is a *recession direction* if in every group all fixed rows share the largest ``a v``, and no
free row exceeds it; rows that fall below are *separated*. Along it the loss falls for ever. With ``a v`` held
at zero instead, the same is true of losses of an exponential. See Correia, Guimaraes and Zylkin, "Verifying
the existence of maximum likelihood estimates for generalized linear models" (arXiv:1903.01633).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnfit.losses.loss import GramTerm
from attnfit.objectives.moves import Kind, Mask, Rows, kind_of, rows_of
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.part import Part
from attnfit.segments import Array, Chunk

# Entries of a projected row below this share of its terms are rounding.
ROUNDING = 1e-9


@dataclass
class FixedSums:
    """The Gram of the fixed rows about their mean, its diagonal before that, and the sums of long groups."""

    gram: Any
    sizes: Array
    least: float = np.inf

    def merge(self, other: FixedSums) -> FixedSums:
        """Return the sums over both parts of the data."""
        return FixedSums(self.gram.merge(other.gram), self.sizes + other.sizes, min(self.least, other.least))


def long_means(part: Part, chunks: list[Chunk], at: Evaluation, each: bool) -> Array:
    """Return, for each long group, the sum of its fixed rows and their number, shape (n_long, d + 1)."""
    sums = np.zeros((part.n_long, part.n_unknowns + 1))
    for chunk in part.prefetch([c for c in chunks if c.long >= 0]):
        block = part.fetch(chunk)
        fixed = _numbers(_together(part, rows_of(part, chunk, block, at, each=each)))
        sums[chunk.long, :-1] += part.design.combine(fixed[None, :], block)[0]
        sums[chunk.long, -1] += fixed.sum()
    return sums


def fixed_sums(part: Part, chunks: list[Chunk], at: Evaluation, means: Array, each: bool) -> FixedSums:
    """Return the Gram whose null space holds every recession direction; ``means`` are the long groups'."""
    sums = FixedSums(part.design.gram(), np.zeros(part.n_unknowns))
    for chunk in part.prefetch(chunks):
        block = part.fetch(chunk)
        rows = rows_of(part, chunk, block, at, each=each)
        fixed = _numbers(_together(part, rows))
        counts = _numbers(rows.fixed | rows.free)
        sums.sizes += part.design.combine(counts[None, :], part.design.squares(block))[0]
        if rows.free.any():
            sums.least = min(sums.least, float(rows.size[rows.free].min()))
        if not part.loss.coupled:
            part.add_to_gram(sums.gram, chunk, block, [GramTerm(fixed, None, None)], None, None)
            continue
        total = chunk.segments.sum(fixed)
        mean = fixed / chunk.segments.spread(np.where(total > 0.0, total, 1.0))
        part.add_to_gram(sums.gram, chunk, block, [GramTerm(fixed, None, 1.0)], mean, means)
    return sums


def _numbers(mask: Mask) -> Array:
    return np.asarray(mask, dtype=np.float64)


def _together(part: Part, rows: Rows) -> Mask:
    """Return the rows that a recession direction keeps together: all, where it scales whole groups."""
    return rows.free if kind_of(part.loss) is Kind.SCALING else rows.fixed


@dataclass(frozen=True)
class Frame:
    """Directions that keep all fixed rows together: the columns of ``basis``, shape (d, r), in variables of
    ``scale``; ``means`` are those of the fixed rows of long groups, ``each`` is as for `rows_of`.
    """

    basis: Array
    scale: Array
    means: Array
    each: bool = True

    def relative(self, part: Part, chunk: Chunk, block: Any, at: Evaluation) -> tuple[Array, Rows]:
        """Return each row, relative to the fixed ones of its group, along the basis, zero where it is
        rounding; shape (n_rows, r).
        """
        rows = rows_of(part, chunk, block, at, each=self.each)
        V = self.basis / self.scale[:, None]
        along = np.asarray(block @ V)
        terms = np.sqrt(np.asarray(part.design.squares(block) @ (V * V)))
        if part.loss.coupled:
            if chunk.long >= 0:
                along = along - self.means[chunk.long] @ V
            else:
                segments, fixed = chunk.segments, _numbers(rows.fixed)
                total = segments.sum(fixed)
                share = fixed / segments.spread(np.where(total > 0.0, total, 1.0))
                means = np.add.reduceat(share[:, None] * along, segments.starts)
                along = along - np.repeat(means, segments.sizes, axis=0)
        return np.where(np.abs(along) > ROUNDING * terms, along, 0.0), rows

    def project(self, part: Part, chunk: Chunk, block: Any, at: Evaluation) -> tuple[Array, Rows]:
        """Return each free row as `relative` has it, scaled to a largest entry of one."""
        along, rows = self.relative(part, chunk, block, at)
        size = np.abs(along).max(axis=1, initial=0.0)
        along /= np.where(size > 0.0, size, 1.0)[:, None]
        return np.where(rows.free[:, None], along, 0.0), rows


@dataclass
class Free:
    """Projected free rows, those that run away first."""

    rows: Array
    sizes: Array
    limit: int
    n_all: int = 0

    def merge(self, other: Free) -> Free:
        """Return the rows of both, as many as are wanted."""
        rows, sizes = np.concatenate([self.rows, other.rows]), np.concatenate([self.sizes, other.sizes])
        first = np.argsort(sizes, kind="stable")[: self.limit]
        return Free(rows[first], sizes[first], self.limit, self.n_all + other.n_all)


def free_rows(
    part: Part, chunks: list[Chunk], at: Evaluation, frame: Frame, y: Array | None, limit: int
) -> Free:
    """Return projected free rows: all that can move, or those that a direction does not lower."""
    found = Free(np.zeros((0, frame.basis.shape[1])), np.zeros(0), limit)
    for chunk in part.prefetch(chunks):
        projected, rows = frame.project(part, chunk, part.fetch(chunk), at)
        wanted = projected.any(axis=1)
        if y is not None:
            wanted &= projected @ y > -0.5
        found = found.merge(Free(projected[wanted], rows.size[wanted], limit, int(wanted.sum())))
    return found


def separated_rows(part: Part, chunks: list[Chunk], at: Evaluation, frame: Frame, y: Array) -> Mask:
    """Return which rows fall along a direction, shape (n_rows,), in group order."""
    out = np.zeros(part.n_rows, dtype=bool)
    for chunk in part.prefetch(chunks):
        projected, _ = frame.project(part, chunk, part.fetch(chunk), at)
        out[chunk.rows] = projected @ y <= -0.5
    return out


def separated_sums(
    part: Part, chunks: list[Chunk], at: Evaluation, frame: Frame, y: Array
) -> tuple[Array, Array]:
    """Return the Gram and the sum of the separated rows along the basis, shapes (r, r) and (r,)."""
    gram, total = np.zeros((len(y), len(y))), np.zeros(len(y))
    for chunk in part.prefetch(chunks):
        along, rows = frame.relative(part, chunk, part.fetch(chunk), at)
        size = np.abs(along).max(axis=1, initial=0.0)
        falls = rows.free & (along @ y <= -0.5 * size) & (size > 0.0)
        gram += along[falls].T @ along[falls]
        total += along[falls].sum(axis=0)
    return gram, total


def separated_by_user(part: Part, chunks: list[Chunk], at: Evaluation, frame: Frame, y: Array) -> Mask:
    """Return the same in the user's order."""
    rows: Any = separated_rows(part, chunks, at, frame, y)
    return np.asarray(part.groups.unsort(rows), dtype=bool)


@dataclass
class Signs:
    """What all rows say of a direction.

    Attributes
    ----------
    pull : float
        By how much the loss falls, to first order, as the outputs of all separated rows go to zero; of a
        frame whose rows are free only if they fall by themselves it is not asked.
    parting : float
        How far fixed rows part at most, or a free row rises above them.
    size : float
        The largest ``|a v|``.
    drop, most : float
        The least and the largest fall of a row.
    """

    pull: float = 0.0
    parting: float = 0.0
    size: float = 0.0
    drop: float = np.inf
    most: float = 0.0

    def merge(self, other: Signs) -> Signs:
        """Return the finding over both parts of the data."""
        return Signs(
            self.pull + other.pull,
            max(self.parting, other.parting),
            max(self.size, other.size),
            min(self.drop, other.drop),
            max(self.most, other.most),
        )

    def confirm(self, frame: Frame) -> bool:
        """Whether the direction is one, to 1e-7 of the largest ``a v``, along which the loss falls."""
        falls = frame.each or self.pull > 0.0
        return falls and bool(np.isfinite(self.drop)) and self.parting <= 1e-7 * self.size


def verify(part: Part, chunks: list[Chunk], at: Evaluation, frame: Frame, v: Array) -> Signs:
    """Look at every row along a direction; where rows need not each fall, ask the gradient whether all do."""
    signs = Signs()
    for chunk in part.prefetch(chunks):
        block = part.fetch(chunk)
        rows = rows_of(part, chunk, block, at, each=frame.each)
        along = part.design.product(block, v)
        signs.size = max(signs.size, float(np.abs(along).max()))
        if chunk.long >= 0:
            along = along - float(frame.means[chunk.long] @ v)
        elif part.loss.coupled:
            segments = chunk.segments
            top = np.maximum.reduceat(np.where(rows.fixed, along, -np.inf), segments.starts)
            along = along - segments.spread(np.where(np.isfinite(top), top, 0.0))
        parts = np.where(rows.fixed, np.abs(along), np.where(rows.free, along, 0.0))
        signs.parting = max(signs.parting, float(parts.max(initial=0.0)))
        fallen = rows.free & (along < -1e-6 * signs.size)
        signs.drop = min(signs.drop, float((-along[fallen]).min(initial=np.inf)))
        signs.most = max(signs.most, float((-along[fallen]).max(initial=0.0)))
        if not frame.each and fallen.any():
            b, w, _ = part.targets(chunk)
            z = part.design.product(block, at.x) + part.shift(chunk)
            state = part.row_state(chunk, z, at)
            signs.pull -= float(part.loss.slope(z, b, w, state)[fallen] @ along[fallen])
    return signs

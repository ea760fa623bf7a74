"""The normalisers of long groups, where no evaluation nearby predicts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from attnfit.losses.base import Loss
from attnfit.losses.segments import Array, Segments
from attnfit.problems.rows.partition import Chunk

if TYPE_CHECKING:
    from attnfit.problems.rows.stored import StoredProblem

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

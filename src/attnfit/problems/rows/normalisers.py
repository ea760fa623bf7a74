"""The normalisers of long groups, where no evaluation nearby predicts them."""

from __future__ import annotations

import numpy as np

from attnfit.losses.segments import Array, Segments
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.stored import StoredProblem

# Rows of a group that predict its normaliser to a few per cent.
GUESS_ROWS = 1000


def find_normalisers(problem: StoredProblem, x: Array) -> Array:
    """Compute the normalisers of the long groups in a read of their own, shape (n_long,)."""
    found: dict[int, Array] = {}
    for chunk in problem.chunks:
        if chunk.long < 0:
            continue
        _, z = problem.logits(chunk, x)
        part = problem.loss.reference(z, chunk.segments)
        merged = problem.loss.merge_references(found[chunk.long], part) if chunk.long in found else part
        found[chunk.long] = merged
    return np.array([found[number][0] for number in range(len(problem.long_groups))])


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

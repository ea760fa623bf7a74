"""The states of the long groups at x = 0: the target and the offset tell, the matrix is not read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnfit.losses.segments import Array
from attnfit.problems.rows.normalisers import normaliser_sums
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.totals import Totals

if TYPE_CHECKING:
    from attnfit.problems.rows.stored import StoredProblem


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

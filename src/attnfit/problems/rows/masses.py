"""What the draw of rows needs to know of the targets of a group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from attnfit.losses.segments import Array

if TYPE_CHECKING:
    from attnfit.problems.rows.stored import StoredProblem

# Rows that are read at a time; those worked on at a time, so that what is made of them stays in cache.
PIECE_ROWS, CACHE_ROWS = 1 << 20, 1 << 13


def target_pieces(problem: StoredProblem, first: int, last: int) -> Iterator[tuple[int, Array]]:
    """Yield the number of the first row and ``|w b|`` of pieces of these rows."""
    for start in range(first, last, PIECE_ROWS):
        rows = slice(start, min(start + PIECE_ROWS, last))
        b, w = problem.b[rows], None if problem.weights is None else problem.weights[rows]
        for k in range(0, len(b), CACHE_ROWS):
            target: Array = np.abs(b[k : k + CACHE_ROWS])
            yield start + k, target if w is None else target * w[k : k + CACHE_ROWS]


def target_sums(problem: StoredProblem, first: int, last: int) -> Array:
    """Return the number of these rows, and the sums of ``|w b|`` and of its square."""
    total = np.zeros(2)
    for _, target in target_pieces(problem, first, last):
        total += target.sum(), target @ target
    return np.array([last - first, *total])

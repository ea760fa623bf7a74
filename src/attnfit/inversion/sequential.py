"""Decode a layer in which no query sees a later key: one token after the other, over the whole table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.vocabulary import Vocabulary
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Beginnings that are followed at once, where several rows fit.
BEAM = 16


def is_sequential(problem: TokenProblem) -> bool:
    """Return whether every query sees itself and no later key."""
    mask = problem.layer.mask
    return mask is not None and not np.triu(mask, 1).any() and bool(np.diag(mask).all())


def decode_in_order(
    problem: TokenProblem,
    vocabulary: Vocabulary,
    enough: float,
    callback: Callable[[float, int], Any],
) -> Index:
    """Return the tokens, shape (n_unknown,).

    Row i of the output depends on tokens up to i only, so given the beginning every row of the table is tried
    in its place. All that fit are followed, up to a number; where none fits, the nearest.

    Parameters
    ----------
    problem : TokenProblem
    vocabulary : Vocabulary
    enough : float
        Squared residual of the whole output at which it counts as reproduced.
    callback : callable
        Called with the positions done and their number.
    """
    beam: list[tuple[float, list[int], Array]] = [(0.0, [], np.zeros((0, problem.d)))]
    unknown = set(problem.unknown.tolist())
    for i in range(problem.n):
        given = i not in unknown
        table = problem.known.T[i : i + 1] if given else vocabulary.rows(i)
        ahead = []
        for square, chosen, T in beam:
            squares = square + np.sum((problem.layer.row_outputs(T, table, i) - problem.B[i]) ** 2, axis=1)
            near = np.argsort(squares)[:BEAM]
            fitting = near[squares[near] <= max(enough, float(squares[near[0]]))]
            ahead += [
                (float(squares[c]), [*chosen, *([] if given else [int(c)])], T, table[c]) for c in fitting
            ]
        ahead.sort(key=lambda one: one[0])
        beam = [(square, chosen, np.vstack([T, row])) for square, chosen, T, row in ahead[:BEAM]]
        callback(i + 1, problem.n)
    return np.array(beam[0][1], dtype=np.intp)

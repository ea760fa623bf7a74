"""Decode a layer in which no query sees a later key: one token after the other, over the whole table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.vocabulary import Vocabulary
from attnfit.objectives.inverse_problem import LayerProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Beginnings that are followed at once, where several rows fit.
BEAM = 16


def is_sequential(problem: LayerProblem) -> bool:
    """Return whether every query sees itself and no later key."""
    mask = problem.layer.mask
    return mask is not None and not np.triu(mask, 1).any() and bool(np.diag(mask).all())


def decode_in_order(
    problem: LayerProblem,
    vocabulary: Vocabulary,
    enough: float,
    callback: Callable[[float, int], Any],
) -> Index:
    """Return the tokens, shape (n_unknown,).

    Row i of the output depends on tokens up to i only, so given the beginning every row of the table is tried
    in its place. All that fit are followed, up to a number; where none fits, the nearest.

    Parameters
    ----------
    problem : LayerProblem
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
            squares = square + _row_squares(problem, T, table, i)
            near = np.argsort(squares)[:BEAM]
            fitting = near[squares[near] <= max(enough, float(squares[near[0]]))]
            ahead += [
                (float(squares[c]), [*chosen, *([] if given else [int(c)])], T, table[c]) for c in fitting
            ]
        ahead.sort(key=lambda one: one[0])
        beam = [(square, chosen, np.vstack([T, row])) for square, chosen, T, row in ahead[:BEAM]]
        callback(i + 1, problem.n)
    return np.array(beam[0][1], dtype=np.intp)


def _row_squares(problem: LayerProblem, T: Array, table: Array, i: int) -> Array:
    """Return the squared residual of row i for each row of the table in its place."""
    seen = np.ones(i, dtype=bool) if problem.layer.mask is None else problem.layer.mask[i, :i]
    T = T[seen]
    output = np.zeros((len(table), problem.m))
    for head in problem.layer.heads:
        query = table @ head.M + head.c
        S = np.column_stack([query @ T.T, np.sum(query * table, axis=1)])
        S -= S.max(axis=1, keepdims=True)
        P = np.exp(S)
        P /= P.sum(axis=1, keepdims=True)
        output += P[:, :-1] @ (T @ head.V) + P[:, -1:] * (table @ head.V)
    return np.asarray(np.sum((output - problem.B[i]) ** 2, axis=1))

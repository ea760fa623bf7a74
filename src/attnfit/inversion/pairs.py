"""What the output would be with two tokens exchanged at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.inverse_layer import AttentionLayer, HeadState, Pass, softmax_rows
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Numbers held at once.
BLOCK = 1 << 22
# Where less than this share of a query's attention stays, its sums are formed anew: what a subtraction leaves
# has lost as many digits.
STAYS = 1e-6
# Share of the values to which updated outputs are right then.
UPDATED = 1e-8


def pair_squares(
    problem: TokenProblem, at: Any, tables: Array, pairs: Index, put: Index, enough: float
) -> Array:
    """Return the squared residuals, shape (p,), with two tokens replaced at a time.

    All rows of the logits but two change in two columns only: of the sums of their softmax and of its values
    two terms are taken off and two put on.

    Parameters
    ----------
    problem : TokenProblem
    at : pass of the layer
        Of the tokens as they are.
    tables : ndarray, shape (n_unknown, N, d)
        Rows for each unknown token.
    pairs, put : ndarray of int, shape (p, 2)
        Two different unknown tokens, and the row of its table for each.
    enough : float
        Squares up to this come from the layer itself, not from updated sums.
    """
    if not isinstance(problem.layer, AttentionLayer):
        return problem.squares_with(at.T, problem.unknown[pairs], tables[pairs, put])
    n, m = problem.B.shape
    size = max(1, BLOCK // (n * max(n, m)))
    squares = [np.zeros(0)]
    # A row is one of many pairs: what a head makes of it is computed once.
    with np.errstate(over="ignore", invalid="ignore"):
        made = [_Made.of(s, at, tables) for s in at.heads]
    for first in range(0, len(pairs), size):
        part = slice(first, first + size)
        squares.append(_squares(problem, at, tables, made, pairs[part], put[part], enough))
    return np.concatenate(squares)


class _Made(NamedTuple):
    """What one head makes of the rows of all tables: values, logits of all queries, logits as a query."""

    values: Array
    keys: Array
    queries: Array

    @classmethod
    def of(cls, s: HeadState, at: Pass, tables: Array) -> _Made:
        centred = tables - at.T.mean(axis=0)
        return cls(centred @ s.head.V, centred @ s.R.T, tables @ s.head.M + s.head.c)


def _squares(
    problem: TokenProblem, at: Pass, tables: Array, made: list[_Made], pairs: Index, put: Index, enough: float
) -> Array:
    mean, mask, every = at.T.mean(axis=0), problem.layer.mask, np.arange(len(pairs))
    positions, rows = problem.unknown[pairs], tables[pairs, put]
    centred = rows - mean
    outputs = np.tile(mean @ np.sum([s.head.V for s in at.heads], axis=0), (len(rows), problem.n, 1))
    sound, largest = np.ones(len(rows), dtype=bool), 0.0
    for s, of in zip(at.heads, made, strict=True):
        values = of.values[pairs, put]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            part, stays = _updated(s, at.Tc, mask, positions, of.keys[pairs, put], values)
        for own in (0, 1):
            query = of.queries[pairs[:, own], put[:, own]]
            part[every, positions[:, own]] = _own(s, at.Tc, mask, positions, query, centred, values, own)
        outputs += part
        sound &= stays
        largest += max(float(np.abs(s.H).max()), float(np.abs(values).max()))
    squares = np.sum((outputs - problem.B) ** 2, axis=(1, 2))
    reach = np.sqrt(enough) + UPDATED * largest * np.sqrt(problem.B.size)
    anew = np.flatnonzero(~sound | ~(squares > reach**2))
    if len(anew):
        T = np.tile(at.T, (len(anew), 1, 1))
        T[np.arange(len(anew))[:, None], positions[anew]] = rows[anew]
        squares[anew] = np.sum((problem.layer.forward(T).output - problem.B) ** 2, axis=(1, 2))
    return np.asarray(squares)


def _updated(
    s: HeadState, Tc: Array, mask: NDArray[np.bool_] | None, positions: Index, keys: Array, values: Array
) -> tuple[Array, NDArray[np.bool_]]:
    """Return the outputs of a head, shape (p, n, m), right for the queries that stay; and where enough of the
    attention stays.
    """
    S = s.R @ Tc.T
    if mask is not None:
        S[~mask] = -np.inf
    highest = S.max(axis=1)
    E = np.exp(S - highest[:, None])
    put = np.exp(keys - highest)
    if mask is not None:
        put *= mask.T[positions]
    taken = E.T[positions]
    sums = E.sum(axis=1)
    left = sums - taken.sum(axis=1)
    changed = np.concatenate([put, -taken], axis=1)
    mixed = E @ s.H + np.swapaxes(changed, 1, 2) @ np.concatenate([values, s.H[positions]], axis=1)
    total = left + put.sum(axis=1)
    share = left / sums
    share[np.arange(len(share))[:, None], positions] = 1.0
    stays = np.all((share >= STAYS) & np.isfinite(total), axis=1)
    return mixed / total[:, :, None], stays


def _own(
    s: HeadState, Tc: Array, mask: NDArray[np.bool_] | None, positions: Index, query: Array, centred: Array,
    values: Array, own: int,
) -> Array:  # fmt: skip
    """Return the outputs of a head for one of the exchanged queries, shape (p, m)."""
    every = np.arange(len(query))
    S = query @ Tc.T
    S[every[:, None], positions] = np.einsum("pd,ped->pe", query, centred)
    if mask is not None:
        S[~mask[positions[:, own]]] = -np.inf
    P = softmax_rows(S, None)
    mixed = P @ s.H
    weights = P[every[:, None], positions]
    return np.asarray(mixed + np.einsum("pe,pem->pm", weights, values - s.H[positions]))

"""What the output would be with one token exchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.pairs import pair_squares
from attnfit.inversion.vocabulary import Vocabulary
from attnfit.objectives.inverse_layer import AttentionLayer, Pass, softmax_rows
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Numbers of attention held at once.
BLOCK = 1 << 22


def exchanged_squares(problem: TokenProblem, at: Any, position: int, rows: Array) -> Array:
    """Return the squared residuals, shape (k,), with the token at a position replaced by each of some rows.

    Parameters
    ----------
    problem : TokenProblem
    at : pass of the layer
        Of the tokens as they are.
    position : int
    rows : ndarray, shape (k, d)
    """
    if not isinstance(problem.layer, AttentionLayer):
        return problem.squares_with(at.T, np.full((len(rows), 1), position), rows[:, None])
    size = max(1, BLOCK // problem.n**2)
    squares = []
    for first in range(0, len(rows), size):
        outputs = _exchanged(problem.layer, at, position, rows[first : first + size])
        squares.append(np.sum((outputs - problem.B) ** 2, axis=(1, 2)))
    return np.concatenate(squares)


def _exchanged(layer: AttentionLayer, at: Pass, position: int, rows: Array) -> Array:
    """Return the outputs, shape (k, n, m): one row and one column of the logits and one value change."""
    mean = at.T.mean(axis=0)
    centred = rows - mean
    total = np.tile(mean @ np.sum([h.V for h in layer.heads], axis=0), (len(rows), len(at.T), 1))
    for s in at.heads:
        query = rows @ s.head.M + s.head.c
        S = np.tile(s.R @ at.Tc.T, (len(rows), 1, 1))
        S[:, position, :] = query @ at.Tc.T
        S[:, :, position] = centred @ s.R.T
        S[:, position, position] = np.sum(query * centred, axis=1)
        P = softmax_rows(S, layer.mask)
        total += P @ s.H
        total += P[:, :, position, None] * (centred @ s.head.V - s.H[position])[:, None, :]
    return total


def improve(
    problem: TokenProblem, vocabulary: Vocabulary, numbers: Index, tokens: Index, enough: float
) -> Index:
    """Return tokens that reproduce the output, or that no exchange of one of them, nor a swap of two, brings
    nearer to it.

    Parameters
    ----------
    problem : TokenProblem
    vocabulary : Vocabulary
        Of few rows.
    numbers : ndarray of int, shape (n_unknown, N)
        Which rows of different positions are of the same token.
    tokens : ndarray of int, shape (n_unknown,)
        Where to start.
    enough : float
        Squared residual at which the output counts as reproduced.
    """
    tables = np.stack([vocabulary.rows(int(position)) for position in problem.unknown])
    every = np.arange(len(tokens))
    tokens, least = _exchanged_singly(problem, tables, tokens, enough)
    while least > enough:
        # Swapped neighbours both look right by themselves: their rows differ by the position only.
        found = [np.flatnonzero(row[:, None] == numbers[every, tokens]) for row in numbers]
        places = np.full((len(every), len(every)), -1)
        for i, cells in enumerate(found):
            places[i, cells % len(every)] = cells // len(every)
        pairs = np.argwhere(np.triu((places >= 0) & (places.T >= 0), 1))
        put = np.stack([places[pairs[:, 0], pairs[:, 1]], places[pairs[:, 1], pairs[:, 0]]], axis=1)
        at = problem.layer.forward(problem.rows_with(tables[every, tokens]))
        squares = pair_squares(problem, at, tables, pairs, put, enough)
        if not len(squares) or not squares.min() < least * (1.0 - 1e-9):
            return tokens
        best = int(np.argmin(squares))
        swapped = tokens.copy()
        swapped[pairs[best]] = put[best]
        tokens, least = _exchanged_singly(problem, tables, swapped, enough)
    return tokens


def _exchanged_singly(
    problem: TokenProblem, tables: Array, tokens: Index, enough: float
) -> tuple[Index, float]:
    """Return tokens that reproduce the output or that no exchange of one of them brings nearer, and their
    squared residual.
    """
    tokens = tokens.copy()
    T = problem.rows_with(tables[np.arange(len(tokens)), tokens])
    least, idle, i = np.inf, 0, 0
    while idle < len(tokens) and least > enough:
        position = int(problem.unknown[i])
        squares = exchanged_squares(problem, problem.layer.forward(T), position, tables[i])
        best = int(np.argmin(squares))
        idle += 1
        if squares[best] < least * (1.0 - 1e-9):
            least, idle = float(squares[best]), 0
            tokens[i], T[position] = best, tables[i, best]
        i = (i + 1) % len(tokens)
    return tokens, least

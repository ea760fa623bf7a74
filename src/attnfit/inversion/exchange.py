"""What the output would be with one token exchanged."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.vocabulary import Vocabulary
from attnfit.problems.inversion.layer import AttentionLayer, Pass, softmax_rows
from attnfit.problems.inversion.layer_problem import LayerProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Rows of the table nearest to a chosen one, to first order in the change of the output, that are tried
# exactly; of few rows all are, which costs less than a Jacobian.
RIVALS = 32
# Numbers of attention held at once.
BLOCK = 1 << 22


def exchanged_squares(problem: LayerProblem, at: Pass, position: int, rows: Array) -> Array:
    """Return the squared residuals, shape (k,), with the token at a position replaced by each of some rows.

    Parameters
    ----------
    problem : LayerProblem
    at : Pass
        Of the tokens as they are.
    position : int
    rows : ndarray, shape (k, d)
    """
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
    problem: LayerProblem, vocabulary: Vocabulary, numbers: Index, tokens: Index, enough: float
) -> Index:
    """Return tokens that reproduce the output, or that no exchange of one of them, nor a swap of two, brings
    nearer to it.

    Parameters
    ----------
    problem : LayerProblem
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
        trials = []
        for i in every:
            for j in every[i + 1 :]:
                here = np.flatnonzero(numbers[i] == numbers[j, tokens[j]])
                there = np.flatnonzero(numbers[j] == numbers[i, tokens[i]])
                if len(here) and len(there):
                    swapped = tokens.copy()
                    swapped[i], swapped[j] = here[0], there[0]
                    trials.append(swapped)
        best, square = tokens, least
        for trial in trials:
            output = problem.layer.forward(problem.rows_with(tables[every, trial])).output
            there_square = float(np.sum((output - problem.B) ** 2))
            if there_square < square * (1.0 - 1e-9):
                best, square = trial, there_square
        if square >= least:
            return tokens
        tokens, least = _exchanged_singly(problem, tables, best, enough)
    return tokens


def _exchanged_singly(
    problem: LayerProblem, tables: Array, tokens: Index, enough: float
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


def rivals(problem: LayerProblem, vocabulary: Vocabulary, tokens: Index) -> tuple[Index, Array]:
    """Return for each unknown position the other row of the table that comes nearest to the output in the
    place of its token, and the squared residual with it.
    """
    T = problem.rows_with(vocabulary.tokens(problem.unknown, tokens))
    at = problem.layer.forward(T)
    seconds, squares = np.full(len(tokens), -1), np.full(len(tokens), np.inf)
    for i, position in enumerate(problem.unknown):
        table = vocabulary.rows(int(position))
        near = np.delete(np.arange(len(table)), tokens[i])
        if len(near) > 4 * RIVALS:
            J = problem.layer.jacobian(at, problem.unknown[i : i + 1])
            apart = table[near] - T[position]
            near = near[np.argsort(np.einsum("cl,cl->c", apart @ (J.T @ J), apart))[:RIVALS]]
        if len(near):
            tried = exchanged_squares(problem, at, int(position), table[near])
            seconds[i], squares[i] = near[np.argmin(tried)], tried.min()
    return seconds, squares

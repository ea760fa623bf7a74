"""Other tokens of the table that give an output as well as those found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.exchange import exchanged_squares
from attnfit.inversion.pairs import pair_squares
from attnfit.inversion.vocabulary import Vocabulary
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Rows of a large table nearest to a chosen one, to first order in the change of the output, that are tried
# exactly; of few rows all are, which costs less than a Jacobian.
NEAR = 32
# All pairs of exchanges are tried where they are no more than this; else those of the best single ones.
ALL_PAIRS = 100_000
BEST = 4
# Of other tokens that give the output, so many are returned.
LISTED = 10


@dataclass(frozen=True)
class Rivals:
    """What was tried in place of tokens.

    Attributes
    ----------
    seconds : ndarray of int, shape (n_unknown,)
        The row that comes nearest to the output in the place of each token alone; -1 without another. Rows
        equal to the token's are no others.
    second_squares : ndarray, shape (n_unknown,)
        Squared residuals with these.
    equal : list of ndarray of int
        The rows of the table that are the token at each position, its own among them.
    others, rows : list of ndarray, shapes (n_unknown,) and (n_unknown, d)
        Tokens with one or two exchanged that reproduce the output, the nearest first, and their rows; none
        where the tokens themselves do not.
    """

    seconds: Index
    second_squares: Array
    equal: list[Index]
    others: list[Index]
    rows: list[Array]

    def renumbered(self, numbers: Index) -> Rivals:
        """Return the same in other numbers of the rows at each position, shape (n_unknown, N)."""
        every = np.arange(len(numbers))
        seconds = np.where(self.seconds < 0, -1, numbers[every, self.seconds])
        equal = [np.unique(row[same]) for row, same in zip(numbers, self.equal, strict=True)]
        others = [numbers[every, other] for other in self.others]
        return Rivals(seconds, self.second_squares, equal, others, self.rows)


def rivals(
    problem: TokenProblem, vocabulary: Vocabulary, tokens: Index, enough: float, numbers: Index | None = None
) -> Rivals:
    """Try other rows in the place of one token and, where these tokens give the output, of two.

    Of pairs, all that a small table has are tried, else the best single exchanges of each position with those
    of every other; and the tokens of any two positions in each other's place.

    Parameters
    ----------
    problem : TokenProblem
    vocabulary : Vocabulary
    tokens : ndarray of int, shape (n_unknown,)
        Their rows.
    enough : float
        Squared residual at which the output counts as reproduced.
    numbers : ndarray of int, shape (n_unknown, N), optional
        Which rows of different positions are of the same token; by default those of the same number.
    """
    T = problem.rows_with(vocabulary.tokens(problem.unknown, tokens))
    at = problem.layer.forward(T)
    token = tokens if numbers is None else numbers[np.arange(len(tokens)), tokens]
    n_pairs = max(len(tokens) * (len(tokens) - 1) // 2, 1)
    best = min(BEST, max(1, int(np.sqrt(ALL_PAIRS / n_pairs))))
    seconds, second_squares = np.full(len(tokens), -1), np.full(len(tokens), np.inf)
    found, tried, same = [], [], []
    for i, position in enumerate(problem.unknown):
        table = vocabulary.rows(int(position))
        same.append(_equal_rows(table, T[position]))
        others = np.delete(np.arange(len(table)), same[-1])
        near, squares = _nearest(problem, at, int(position), table, others)
        if len(near):
            seconds[i], second_squares[i] = near[0], squares[0]
        for row, square in zip(near[:LISTED], squares[:LISTED], strict=True):
            if square <= enough:
                found.append((float(square), _with(tokens, [i], [row]), _with(T, [position], table[[row]])))
        pool = others if len(table) ** 2 * n_pairs <= ALL_PAIRS else near[:best]
        moved = token if numbers is None else _places(numbers[i], token)
        moved = np.where((moved < len(table)) & ~np.isin(moved, same[-1]), moved, -1)
        tried.append((pool, moved, table[pool], table[moved]))
    if np.sum((at.output - problem.B) ** 2) > enough:
        return Rivals(seconds, second_squares, same, [], [])
    found += _paired(problem, at, tokens, tried, enough)
    distinct = _distinct(found)
    rows = [T[problem.unknown] for _, T in distinct]
    return Rivals(seconds, second_squares, same, [other for other, _ in distinct], rows)


def _equal_rows(table: Array, row: Array) -> Index:
    """Return which rows of a table are equal to one of them."""
    # Most differ in the first number already.
    some = np.flatnonzero(table[:, 0] == row[0])
    return some[np.all(table[some] == row, axis=1)]


def _places(numbers: Index, wanted: Index) -> Index:
    """Return where some numbers are among others, -1 where they are not."""
    order = np.argsort(numbers, kind="stable")
    place = order[np.minimum(np.searchsorted(numbers[order], wanted), len(numbers) - 1)]
    return np.where(numbers[place] == wanted, place, -1)


def _nearest(
    problem: TokenProblem, at: Any, position: int, table: Array, others: Index
) -> tuple[Index, Array]:
    """Return the rows that come nearest to the output in the place of one token, in this order, and the
    squared residuals with them.
    """
    if len(others) > 4 * NEAR:
        J = problem.layer.jacobian(at, np.array([position]))
        apart = table[others] - at.T[position]
        others = others[np.argsort(np.einsum("cl,cl->c", apart @ (J.T @ J), apart))[:NEAR]]
    if not len(others):
        return others, np.zeros(0)
    squares = exchanged_squares(problem, at, position, table[others])
    order = np.argsort(squares)
    return others[order], squares[order]


def _paired(
    problem: TokenProblem,
    at: Any,
    tokens: Index,
    tried: list[tuple[Index, Index, Array, Array]],
    enough: float,
) -> list[tuple[float, Index, Array]]:
    """Return squared residuals, numbers and rows of tokens with two exchanged that reproduce the output."""
    u, widest = len(tokens), max(len(pool) for pool, *_ in tried)
    # Of each position the rows that are tried, then the tokens of all positions.
    which = np.full((u, widest + u), -1)
    tables = np.zeros((u, widest + u, problem.d))
    for i, (pool, moved, pool_rows, moved_rows) in enumerate(tried):
        which[i, : len(pool)], which[i, widest:] = pool, moved
        tables[i, : len(pool)], tables[i, widest:] = pool_rows, moved_rows
    first, second = np.triu_indices(u, 1)
    two = np.column_stack([first, second])
    pairs = np.concatenate([np.repeat(two, widest**2, axis=0), two])
    product = np.stack(np.divmod(np.arange(widest**2), max(widest, 1)), axis=1)
    put = np.concatenate([np.tile(product, (len(two), 1)), widest + two[:, ::-1]])
    real = np.all(which[pairs, put] >= 0, axis=1)
    pairs, put = pairs[real], put[real]
    squares = pair_squares(problem, at, tables, pairs, put, enough)
    fitting = np.flatnonzero(squares <= enough)
    found = []
    for k in fitting[np.argsort(squares[fitting])[:LISTED]]:
        rows = _with(at.T, problem.unknown[pairs[k]], tables[pairs[k], put[k]])
        found.append((float(squares[k]), _with(tokens, pairs[k], which[pairs[k], put[k]]), rows))
    return found


def _with(array: NDArray[Any], places: Any, values: Any) -> NDArray[Any]:
    """Return a copy with some entries replaced."""
    changed = array.copy()
    changed[places] = values
    return changed


def _distinct(found: list[tuple[float, Index, Array]]) -> list[tuple[Index, Array]]:
    """Return tokens and rows by squared residual, of equal rows the first."""
    kept: dict[bytes, tuple[Index, Array]] = {}
    for _, tokens, rows in sorted(found, key=lambda one: one[0]):
        kept.setdefault(rows.tobytes(), (tokens, rows))
    return list(kept.values())[:LISTED]

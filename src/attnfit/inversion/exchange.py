"""Outputs with one token exchanged, or two at once: tokens that come nearer, and others that do as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.vocabulary import Vocabulary
from attnfit.objectives.inverse_layer import AttentionLayer, HeadState, softmax_rows
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Numbers of attention held at once.
BLOCK = 1 << 22
# Where less than this share of a query's attention stays, its sums are formed anew: what a subtraction leaves
# has lost as many digits.
STAYS = 1e-6
# Share of the values to which updated outputs are right then.
UPDATED = 1e-8
# Rows of a large table nearest to a chosen one, to first order in the change of the output, that are tried
# exactly; of few rows all are, which costs less than a Jacobian.
NEAR = 32
# All pairs of exchanges are tried where they are no more than this; else those of the best single ones.
ALL_PAIRS = 100_000
BEST = 4
# Of other tokens that give the output, so many are returned.
LISTED = 10


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
    layer, mean = problem.layer, at.T.mean(axis=0)
    size = max(1, BLOCK // problem.n**2)
    squares = []
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        centred = some - mean
        outputs = np.tile(mean @ layer.V, (len(some), len(at.T), 1))
        # One row and one column of the logits and one value change.
        for s in at.heads:
            query = some @ s.head.M + s.head.c
            S = np.tile(s.R @ at.Tc.T, (len(some), 1, 1))
            S[:, position, :] = query @ at.Tc.T
            S[:, :, position] = centred @ s.R.T
            S[:, position, position] = np.sum(query * centred, axis=1)
            P = softmax_rows(S, layer.mask)
            outputs += P @ s.H
            outputs += P[:, :, position, None] * (centred @ s.head.V - s.H[position])[:, None, :]
        squares.append(np.sum((outputs - problem.B) ** 2, axis=(1, 2)))
    return np.concatenate(squares)


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
    mean, made = at.T.mean(axis=0), []
    centred = tables - mean
    with np.errstate(over="ignore", invalid="ignore"):
        for s in at.heads:
            made.append(_Made(centred @ s.head.V, centred @ s.R.T, tables @ s.head.M + s.head.c))
    for first in range(0, len(pairs), size):
        which, rows = pairs[first : first + size], put[first : first + size]
        positions, tokens = problem.unknown[which], tables[which, rows]
        outputs = np.tile(mean @ problem.layer.V, (len(which), n, 1))
        sound, largest = np.ones(len(which), dtype=bool), 0.0
        for s, of in zip(at.heads, made, strict=True):
            chosen = _Made(of.values[which, rows], of.keys[which, rows], of.queries[which, rows])
            part, stays = _of_pairs(s, at.Tc, problem.layer.mask, positions, tokens - mean, chosen)
            outputs += part
            sound &= stays
            largest += max(float(np.abs(s.H).max()), float(np.abs(chosen.values).max()))
        found = np.sum((outputs - problem.B) ** 2, axis=(1, 2))
        reach = np.sqrt(enough) + UPDATED * largest * np.sqrt(problem.B.size)
        anew = np.flatnonzero(~sound | ~(found > reach**2))
        if len(anew):
            found[anew] = problem.squares_with(at.T, positions[anew], tokens[anew])
        squares.append(found)
    return np.concatenate(squares)


class _Made(NamedTuple):
    """What one head makes of rows: values, logits of all queries, logits as a query."""

    values: Array
    keys: Array
    queries: Array


def _of_pairs(
    s: HeadState, Tc: Array, mask: NDArray[np.bool_] | None, positions: Index, centred: Array, made: _Made
) -> tuple[Array, NDArray[np.bool_]]:
    """Return the outputs of a head, shape (p, n, m), with two tokens replaced; and where enough of the
    attention of every other query stays.
    """
    every = np.arange(len(positions))
    S = s.R @ Tc.T
    if mask is not None:
        S[~mask] = -np.inf
    highest = S.max(axis=1)
    E = np.exp(S - highest[:, None])
    values = made.values - s.H[positions]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        put = np.exp(made.keys - highest)
        if mask is not None:
            put *= mask.T[positions]
        taken = E.T[positions]
        sums = E.sum(axis=1)
        left = sums - taken.sum(axis=1)
        changed = np.concatenate([put, -taken], axis=1)
        both = np.concatenate([made.values, s.H[positions]], axis=1)
        total = left + put.sum(axis=1)
        outputs = (E @ s.H + np.swapaxes(changed, 1, 2) @ both) / total[:, :, None]
        share = left / sums
        share[every[:, None], positions] = 1.0
        stays = np.all((share >= STAYS) & np.isfinite(total), axis=1)
    # The two exchanged queries have logits of their own.
    for own in (0, 1):
        S = made.queries[:, own] @ Tc.T
        S[every[:, None], positions] = np.einsum("pd,ped->pe", made.queries[:, own], centred)
        if mask is not None:
            S[~mask[positions[:, own]]] = -np.inf
        P = softmax_rows(S, None)
        weights = P[every[:, None], positions]
        outputs[every, positions[:, own]] = P @ s.H + np.einsum("pe,pem->pm", weights, values)
    return outputs, stays


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
        # Rows equal to the token: most differ in the first number already.
        some = np.flatnonzero(table[:, 0] == T[position, 0])
        same.append(some[np.all(table[some] == T[position], axis=1)])
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
    # By squared residual; of equal rows the first.
    distinct: dict[bytes, tuple[Index, Array]] = {}
    for _, other, rows in sorted(found, key=lambda one: one[0]):
        distinct.setdefault(rows.tobytes(), (other, rows[problem.unknown]))
    kept = list(distinct.values())[:LISTED]
    return Rivals(seconds, second_squares, same, [other for other, _ in kept], [rows for _, rows in kept])


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

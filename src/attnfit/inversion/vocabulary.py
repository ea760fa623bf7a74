"""The finite table that tokens come from, and what tells its rows apart one token at a time: the span of a
head's values, and layers in which no query sees a later key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import require_finite_matrix
from attnfit.objectives.inverse import LayerInversion
from attnfit.objectives.inverse_layer import read_matrix
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Singular values of a value map below this share of its largest are zero.
RANK_TOLERANCE = 1e-10
# Of a large table, the rows that the most regular heads find nearest are tested by all heads.
SCREENING_HEADS, SCREENED = 3, 2048
# Beginnings that are followed at once, where several rows fit.
BEAM = 16


class Vocabulary:
    """Rows that a token may be.

    Parameters
    ----------
    table : array_like, shape (N, d) or (n, N, d), or callable
        The same rows at every position; or those of each position, as an array or as a function of the
        position that returns (N, d): token plus position embeddings, say.
    d, n : int
        Width and number of the tokens.

    Raises
    ------
    ValueError
        If the table does not hold finite rows of width d for each of n positions.
    """

    def __init__(self, table: Any, d: int, n: int) -> None:
        self._d, self._table = d, table
        if callable(table):
            return
        if np.ndim(table) != 3:
            self._table = _checked(table, d, "vocabulary")
        elif len(table) != n:
            raise ValueError(f"vocabulary has rows of {len(table)} positions, but the output has {n}")
        else:
            self._table = [_checked(rows, d, f"vocabulary[{i}]") for i, rows in enumerate(table)]

    def rows(self, position: int) -> Array:
        """Return the rows that the token at a position may be, shape (N, d)."""
        if callable(self._table):
            return _checked(self._table(position), self._d, f"vocabulary({position})")
        rows: Array = self._table[position] if isinstance(self._table, list) else self._table
        return rows

    def tokens(self, positions: NDArray[np.intp], which: NDArray[np.intp]) -> Array:
        """Return the rows chosen at some positions, shape (len(positions), d)."""
        return np.stack([self.rows(int(p))[w] for p, w in zip(positions, which, strict=True)])


def _checked(table: Any, d: int, name: str) -> Array:
    """Return a table as float64, uncopied where it is: tables are large."""
    rows = np.asarray(table)
    if rows.ndim == 2 and rows.dtype == np.float64:
        require_finite_matrix(rows, name)
    else:
        rows = read_matrix(table, name)
    if rows.shape[1] != d:
        raise ValueError(f"{name} has rows of {rows.shape[1]} numbers, but tokens have {d}: one row a token")
    if not len(rows):
        raise ValueError(f"{name} has no rows; pass one row a token")
    return rows


@dataclass(frozen=True)
class SpanTest:
    """The heads of a layer whose outputs leave room beside the tokens' values.

    A head's output ``Z = P T V`` has the row space of the values ``T V`` where P is regular. With fewer
    tokens than the rank of V that space is a proper one, and a row e can be a token only if ``e V`` lies in
    it: a test of each row of a table by itself, whatever the attention.

    Attributes
    ----------
    values : list of ndarray, shape (d, rank)
        ``e -> e V`` of each of these heads, the one with the most regular attention first.
    outside : list of ndarray, shape (rank, rank)
        Projectors beside the spans.
    floors : list of float
        Share of a value that errors of the output leave outside the span.
    """

    values: list[Array]
    outside: list[Array]
    floors: list[float]

    @classmethod
    def of(cls, problem: LayerInversion, precision: float) -> SpanTest | None:
        """Return the test of an output known to a relative precision; None where no head leaves room.

        Parameters
        ----------
        problem : LayerInversion
        precision : float
            Relative error of the output. Directions of Z that are not above their error count as outside the
            span by the share of the error.
        """
        bases = [_row_basis(head.V) for head in problem.layer.heads]
        stacked = np.vstack(bases)
        if np.linalg.matrix_rank(stacked) < len(stacked):
            return None
        inverse = np.linalg.pinv(stacked)
        edges = np.cumsum([0, *map(len, bases)])
        error = precision * float(np.sqrt(np.mean(problem.B**2)))
        found = []
        for h, head in enumerate(problem.layer.heads):
            part = inverse[:, edges[h] : edges[h + 1]]
            if problem.n >= part.shape[1]:
                continue
            _, s, Wt = np.linalg.svd(problem.B @ part, full_matrices=False)
            floor = max(error * float(np.linalg.norm(part)), 1e-14 * float(s[0]))
            inside = (Wt.T * (s**2 / (s**2 + floor**2))) @ Wt
            regularity = float(s[-1]) / (float(s[0]) + floor)
            found.append((regularity, head.V @ part, np.eye(len(inside)) - inside, floor / float(s[0])))
        found.sort(key=lambda one: -one[0])
        if not found:
            return None
        _, values, outside, floors = zip(*found, strict=True)
        return cls(list(values), list(outside), list(floors))

    def scores(self, rows: Array) -> Array:
        """Return the sum over heads of the logarithm of the share of a row's value outside the span, shape
        (N,): a token is at the floor in every head whose attention is regular, wherever it is in others.
        Rows that are screened out score infinity.
        """
        if len(rows) <= 2 * SCREENED or len(self.values) <= SCREENING_HEADS:
            return self._scores(rows, len(self.values))
        kept = np.argpartition(self._scores(rows, SCREENING_HEADS), SCREENED)[:SCREENED]
        scores = np.full(len(rows), np.inf)
        scores[kept] = self._scores(rows[kept], len(self.values))
        return scores

    def _scores(self, rows: Array, n_heads: int) -> Array:
        """Return the sum over the first heads."""
        total = np.zeros(len(rows))
        heads = zip(self.values[:n_heads], self.outside, self.floors, strict=False)
        for value, outside, floor in heads:
            values = rows @ value
            sizes = np.maximum(np.linalg.norm(values, axis=1), np.finfo(float).tiny)
            total += np.log(np.linalg.norm(values @ outside, axis=1) / sizes + floor)
        return total


def _row_basis(V: Array) -> Array:
    """Return an orthonormal basis of the row space of V, as rows."""
    _, s, Wt = np.linalg.svd(V, full_matrices=False)
    return np.asarray(Wt[s > RANK_TOLERANCE * max(float(s[0]), np.finfo(float).tiny)])


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

"""Which rows of a table can be among the tokens: the test of the span of a head's values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.inverse_problem import LayerProblem

Array = NDArray[np.float64]

# Singular values of a value map below this share of its largest are zero.
RANK_TOLERANCE = 1e-10
# Of a large table, the rows that the most regular heads find nearest are tested by all heads.
SCREENING_HEADS, SCREENED = 3, 2048


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
    def of(cls, problem: LayerProblem, precision: float) -> SpanTest | None:
        """Return the test of an output known to a relative precision; None where no head leaves room.

        Parameters
        ----------
        problem : LayerProblem
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

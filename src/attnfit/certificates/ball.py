"""What is known of every row on a ball around x: whitened row norms and intervals of the model's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.losses.segments import Segments
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.rows.grouped import GroupedProblem
from attnfit.problems.rows.partition import Chunk

Array = NDArray[np.float64]

WHITENED_ROWS = 4096


@dataclass(frozen=True)
class Interval:
    """Entrywise bounds ``low <= . <= high``."""

    low: Array
    high: Array

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.high - other.low)

    def __mul__(self, other: Interval) -> Interval:
        products = [x * y for x in (self.low, self.high) for y in (other.low, other.high)]
        return Interval(np.minimum.reduce(products), np.maximum.reduce(products))

    @property
    def magnitude(self) -> Array:
        """Largest absolute value."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def deviation(self, centre: Array) -> Array:
        """Largest distance from a value inside."""
        return np.maximum(np.abs(self.high - centre), np.abs(self.low - centre))

    def sum(self, segments: Segments) -> Interval:
        """Bounds of the sum of each group, repeated on its rows."""
        return Interval(
            segments.spread(segments.sum(self.low)) + 0.0 * self.low,
            segments.spread(segments.sum(self.high)) + 0.0 * self.low,
        )


class Rows:
    """One number a row, in group order, and the reads that produce or use them.

    Parameters
    ----------
    problem : GroupedProblem
    at : Evaluation
        The centre of the ball.
    whitener : ndarray, shape (d, k)
        T with ``T^T H T = 1``: the ball is ``|y| <= r`` in the variables ``x + T y``.
    """

    def __init__(self, problem: GroupedProblem, at: Evaluation, whitener: Array) -> None:
        self.problem = problem
        self.at = at
        self.whitener = whitener
        self.segments = Segments(problem.groups.starts, problem.n_rows)
        self.z = np.empty(problem.n_rows)
        for chunk in problem.ahead(problem.chunks):
            _, self.z[chunk.rows] = problem.logits(chunk, at.x)
        self.b = np.asarray(problem.b)
        self.w = np.ones(problem.n_rows) if problem.weights is None else np.asarray(problem.weights)

    def norms(self, *, centred: bool) -> Array:
        """Return the norm of each whitened row, ``|T^T a_i|`` or ``|T^T (a_i - mu_g)|``, shape (n,)."""
        out = np.empty(self.problem.n_rows)
        for chunk, block, mu in self._chunks(centred):
            group = np.repeat(np.arange(len(chunk.segments)), chunk.segments.sizes)
            parts = []
            for first in range(0, block.shape[0], WHITENED_ROWS):
                part = slice(first, first + WHITENED_ROWS)
                rows = block[part] @ self.whitener
                if centred:
                    rows -= (mu @ self.whitener)[group[part]]
                parts.append(np.sqrt(np.einsum("ij,ij->i", rows, rows)))
            out[chunk.rows] = np.concatenate(parts)
        return out

    def group_norms(self, weights: Array) -> Array:
        """Return ``|T^T A_g^T weights|`` of each group, repeated on its rows, shape (n,)."""
        out = np.zeros(len(self.segments))
        long_sums = np.zeros((len(self.problem.long_groups), self.whitener.shape[1]))
        for chunk, block, _ in self._chunks(centred=False):
            sums = (
                _dense(self.problem.design.group_rows(block, weights[chunk.rows], chunk.segments.starts))
                @ self.whitener
            )
            if chunk.long >= 0:
                long_sums[chunk.long] += sums[0]
            else:
                out[chunk.groups] = np.linalg.norm(sums, axis=1)
        out[self.problem.long_groups] = np.linalg.norm(long_sums, axis=1)
        return self.segments.spread(out) + np.zeros(self.problem.n_rows)

    def largest_eigenvalue(self, weights: Array, *, centred: bool) -> float:
        """Return the largest eigenvalue of the whitened Gram with these non-negative row weights."""
        gram = self.problem.design.gram()
        for chunk, block, mu in self._chunks(centred):
            t = weights[chunk.rows]
            if not centred:
                gram.add(block, t)
            elif chunk.long >= 0:
                gram.add_piece(block, t, None, 1.0, mu[0], chunk.long)
            else:
                gram.add_centred(
                    block,
                    t,
                    None,
                    1.0,
                    mu if not sparse.issparse(block) else sparse.csr_array(mu),
                    chunk.segments.starts,
                )
        return self._top(gram)

    def deflated_norm(self, v: Array) -> float:
        """Return the spectral norm of the whitened rows ``sqrt(w_i) (v_i a_i - b_i A_g^T v)``."""
        gram = self.problem.design.gram()
        long_sums = np.zeros((len(self.problem.long_groups), self.problem.n_unknowns))
        for chunk, block, _ in self._chunks(centred=False):
            if chunk.long >= 0:
                long_sums[chunk.long] += self.problem.design.combine(v[None, chunk.rows], block)[0]
        for chunk, block, _ in self._chunks(centred=False):
            r, q, t = v[chunk.rows], self.b[chunk.rows], self.w[chunk.rows]
            if chunk.long >= 0:
                gram.add_piece(block, t, r, q, long_sums[chunk.long], chunk.long)
            else:
                starts = chunk.segments.starts
                gram.add_centred(block, t, r, q, self.problem.design.group_rows(block, r, starts), starts)
        return float(np.sqrt(self._top(gram)))

    def _top(self, gram: Any) -> float:
        whitened = self.whitener.T @ gram.result() @ self.whitener
        if not np.isfinite(whitened).all():
            return np.inf
        return max(0.0, float(np.linalg.eigvalsh(whitened)[-1]))

    def _chunks(self, centred: bool) -> Any:
        """Yield each chunk with its block and, if centred, the dense centres of its groups."""
        for chunk in self.problem.ahead(self.problem.chunks):
            block, z = self.problem.logits(chunk, self.at.x)
            yield chunk, block, self._centres(chunk, block, z) if centred else None

    def _centres(self, chunk: Chunk, block: Any, z: Array) -> Array:
        if chunk.long >= 0:
            return self.at.centre[[chunk.long]]
        b, w, _ = self.problem.targets(chunk)
        weights = self.problem.loss.gram_terms(z, b, w, self.problem.row_state(chunk, z, self.at))[1]
        assert weights is not None
        return _dense(self.problem.design.group_rows(block, weights, chunk.segments.starts))


def _dense(matrix: Any) -> Array:
    return np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix)

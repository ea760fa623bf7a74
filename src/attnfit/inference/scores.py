"""The score of one row, and sums of scores over the rows of a unit."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from attnfit.losses.loss import GramTerm, Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import CrossEntropy, Squared
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.part import Part
from attnfit.segments import Array, Chunk, Index


def evaluated(problem: Any, x: Array) -> Evaluation:
    """Return what a read at x needs to know beforehand: of groups longer than a block their normalisers, for
    which they are read; else nothing.
    """
    if problem.rows.n_long:
        found: Evaluation = problem.evaluate(x).bare()
        return found
    return Evaluation(x, np.nan, np.zeros(0), np.zeros((2, 0)), np.zeros((0, len(x))))


class RowScores(NamedTuple):
    """Scores ``e_i (r_i a_i - q_i mu_g)`` of rows; ``r = None`` means one, ``q = None`` not centred."""

    e: Array
    r: Array | None
    q: Array | float | None


def has_row_scores(loss: Loss) -> bool:
    """Whether a group's score is a sum of scores of its rows: each row has noise of its own."""
    return not loss.coupled or isinstance(loss, CrossEntropy | Squared | SquaredRescaled)


def row_scores(loss: Loss, z: Array, b: Array, w: Any, state: list[Array]) -> RowScores | None:
    """Return the scores of rows, whose sum over a group is the group's score; None for losses without.

    =================== ======================================== =====================================
    loss                e_i                                      the score is
    =================== ======================================== =====================================
    cross entropy, kl   ``sigma_g f_i - w_i y_i``                that of a Poisson model with one
                                                                 constant a group
    squared (softmax)   ``w_i f_i (f_i - y_i)``                  the derivative in the row's own noise
    rescaled            ``w_i (u_i - alpha_g y_i)``              the same
    uncoupled           the derivative in the row's logit        the row's own
    =================== ======================================== =====================================
    """
    if isinstance(loss, SquaredRescaled):
        u, v = loss.transform(z, 0.0)
        return RowScores(w * (u - state[0] * b), v, b)
    slope = loss.slope(z, b, w, state)
    if not loss.coupled:
        return RowScores(slope, None, None)
    if isinstance(loss, Squared):
        # The slope is f (p - gamma); gamma's part cancels over the centred rows of a group.
        return RowScores(slope + state[1] * np.exp(z - state[0]), None, 1.0)
    return RowScores(slope, None, 1.0) if isinstance(loss, CrossEntropy) else None


class CentredRows:
    """The rows of a chunk with the centres ``mu_g`` of their groups, computed once.

    Parameters
    ----------
    part, chunk, block
        The problem, the chunk and its rows.
    weights : ndarray or None
        The weights that make a centre of rows.
    centres : ndarray, shape (n_long, d)
        The centres of the groups that are longer than a chunk.
    """

    def __init__(self, part: Part, chunk: Chunk, block: Any, weights: Array | None, centres: Array) -> None:
        self.part, self.chunk, self.block = part, chunk, block
        self.starts: Index = chunk.segments.starts
        self.mu: Any = None
        if chunk.long >= 0:
            self.mu = centres[chunk.long][None, :]
        elif weights is not None:
            self.mu = part.design.group_rows(block, weights, self.starts)

    def add_to(self, gram: Any, term: GramTerm) -> None:
        """Add ``sum t_i (r_i a_i - q_i mu_g)(...)^T`` to a Gram."""
        t, r, q = term
        if q is None:
            gram.add(self.block, t, r)
        elif self.chunk.long >= 0:
            gram.add_piece(self.block, t, r, q, self.mu[0], self.chunk.long)
        else:
            gram.add_centred(self.block, t, r, q, self.mu, self.starts)

    def group_numbers(self) -> Index:
        """Return the number within the chunk of each row's group."""
        return np.repeat(np.arange(len(self.starts)), self.chunk.segments.sizes)

    def sums(self, scores: RowScores, units: Index, n_units: int) -> Array:
        """Return the sums of row scores over units, shape (n_units, d); ``units`` are numbers of rows."""
        e, r, q = scores
        n = len(e)
        where = (units, np.arange(n))
        own = sparse.csr_array((e if r is None else e * r, where), shape=(n_units, n)) @ self.block
        total = np.asarray(own.toarray() if sparse.issparse(own) else own)
        if q is None:
            return total
        shape = (n_units, len(self.starts))
        centres = sparse.csr_array((e * q, (units, self.group_numbers())), shape=shape) @ self.mu
        return np.asarray(total - (centres.toarray() if sparse.issparse(centres) else centres))

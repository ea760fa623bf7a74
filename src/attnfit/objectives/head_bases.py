"""Changes of basis that the maps of a rotary head hardly show: preconditioned apart, and followed far."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from attnfit.objectives.head_passes import HeadPoint
from attnfit.segments import Array

if TYPE_CHECKING:
    from attnfit.objectives.head_passes import Logits
    from attnfit.objectives.head_reading import ReadHead
    from attnfit.objectives.heads import HeadAttention

# Columns that turn by less than this, in radians over a text, are slow; of more than so many the slowest: a
# change of basis of m columns has m^2 numbers.
SLOW, MOST_COLUMNS = 3.0, 48
# Queries of a text from which the curvature of those numbers is formed.
AVERAGED_QUERIES = 24
# Pairs whose responses are kept at a time.
MOST_PAIRS = 1 << 12
# Least curvature of a number, as a share of its own where the others stand still: products are formed in
# single precision.
LEAST = 1e-6
# Changes of basis beyond this size are not followed: their exponential leaves the range of numbers.
LONGEST = 20.0


def slow_columns(read: ReadHead) -> NDArray[np.intp]:
    """Return the columns of both factors that the rotation hardly turns, and those that it does not turn.

    With ``W_K -> W_K G`` and ``W_Q -> W_Q G^-T`` in columns that nothing turns, no map changes; in slow ones
    maps change by the angles they turn by. Empty where all columns stand still, since what changes no map
    leaves nothing to solve, and with norms, which tell bases apart.
    """
    if not read.frequencies or read.qk_norm is not None:
        return np.zeros(0, dtype=np.intp)
    turned = np.zeros(len(read.frequencies[0]))
    for frequencies, positions in zip(read.frequencies, read.positions, strict=True):
        turned = np.maximum(turned, np.abs(frequencies) * np.ptp(positions, axis=0))
    F = len(turned)
    f = np.arange(F)
    turn = read.query_turns[0]
    half = turn is not None and turn.layout == "half"
    pairs = (f, F + f) if half else (2 * f, 2 * f + 1)
    angle = np.zeros(read.rank)
    for columns in pairs:
        angle[columns] = turned
    slow = np.flatnonzero(angle < SLOW)
    slow = np.sort(slow[np.argsort(angle[slow], kind="stable")[:MOST_COLUMNS]])
    return slow if np.any(angle[slow] > 0) else slow[:0]


class SlowBases:
    """The curvature of changes of basis G of slow columns, ``dW_K = W_K G`` and ``dW_Q = -W_Q G'``.

    By the mean curvature of the factors such a step is a long one, for which conjugate gradients take
    hundreds of products; as a second level of their preconditioner it is solved for exactly.

    Parameters
    ----------
    problem : HeadAttention
    point : HeadPoint
    """

    def __init__(self, problem: HeadAttention, point: HeadPoint) -> None:
        self.problem, self.columns = problem, problem.slow
        self.by_query = [W[:, self.columns] for W in point.W_Q]
        self.by_key = point.W_K[:, self.columns]
        m = len(self.columns)
        self.curvature = np.zeros((m * m, m * m))

    def add(self, at: Logits, u: Array, share: Array | float) -> None:
        """Add what a chunk with curvatures ``u`` in its logits, less those of their means with such shares,
        has of the queries that stand for all.
        """
        problem, columns = self.problem, self.columns
        s, queries = problem.place(at.chunk)
        text = s % len(problem.right)
        left, right = problem.left[text].turn, problem.right[text].turn
        assert left is not None and right is not None
        n = len(problem.left[text].A)
        chosen = np.unique(np.linspace(0, n - 1, AVERAGED_QUERIES).astype(int))
        own = chosen[(chosen >= queries.start) & (chosen < queries.stop)] - queries.start
        keys = right.back(at.K)[:, columns]

        def responses(i: int) -> Array:
            t = np.array([queries.start + i])
            query = left.rows(t).back(at.Q[i][None])[0, columns]
            seen = np.flatnonzero(u[i])
            # With D the distance: R_D' q, and R_D k.
            U = right.rows(seen).back(np.broadcast_to(at.Q[i], (len(seen), problem.rank)))[:, columns]
            V = left.rows(t, len(seen)).back(at.K[seen])[:, columns]
            J = keys[seen][:, :, None] * U[:, None, :] - V[:, :, None] * query
            J = J.reshape(len(seen), -1)
            if np.ndim(at.passed):
                J *= np.asarray(at.passed)[i, seen, None]
            if np.ndim(share):
                J -= np.asarray(share)[i, seen] @ J
            J *= np.sqrt(u[i, seen] * (n / len(chosen)))[:, None]
            return np.asarray(J)

        for some in np.array_split(own, -(-len(own) * len(at.K) // MOST_PAIRS)) if len(own) else ():
            J = np.concatenate([responses(int(i)) for i in some])
            # Single precision has digits enough, but not the range of weights.
            size = float(np.max(np.abs(J), initial=0.0)) or 1.0
            J = np.asarray(J / size, dtype=np.float32)
            self.curvature += (J.T @ J).astype(np.float64) * size**2

    def solver(self, by_q: Array, by_k: Array) -> Callable[[Array, Array], tuple[Array, Array]]:
        """Return what takes a gradient in the factors to a step along changes of basis: the curvature is that
        of the loss and that of damping, ``by_q`` and ``by_k`` in the columns of a row of each factor.
        """
        c, m = self.columns, len(self.columns)
        square = np.ix_(c, c)
        H = self.curvature + np.kron(self.by_key.T @ self.by_key, by_k[square])
        for M, W in zip(by_q, self.by_query, strict=True):
            H += np.kron(M[square], W.T @ W)
        size = np.sqrt(np.maximum(np.diag(H), np.finfo(np.float64).tiny))
        H /= size * size[:, None]
        factor = _factorised(H, LEAST)

        def solve(W_Q: Array, W_K: Array) -> tuple[Array, Array]:
            g = self.by_key.T @ W_K[:, c]
            for W, own in zip(W_Q, self.by_query, strict=True):
                g -= W[:, c].T @ own
            G = (scipy.linalg.cho_solve(factor, g.reshape(-1) / size) / size).reshape(m, m)
            step_q, step_k = np.zeros_like(W_Q), np.zeros_like(W_K)
            step_k[:, c] = self.by_key @ G
            for W, own in zip(step_q, self.by_query, strict=True):
                W[:, c] = -own @ G.T
            return step_q, step_k

        return solve


def followed(point: HeadPoint, step: HeadPoint, columns: NDArray[np.intp]) -> HeadPoint:
    """Return where a step leads: along the change of basis in it by its exponential, on a straight line else.

    To first order that is ``point + step``; a long change of basis, of which a map shows little, leaves it
    where a straight line would not.
    """
    W_Q, W_K, *rest = (a + b for a, b in zip(point, step, strict=True))
    if len(columns):
        own_q, own_k = np.concatenate(point.W_Q)[:, columns], point.W_K[:, columns]
        by_key = np.linalg.lstsq(own_k, step.W_K[:, columns], rcond=None)[0]
        by_query = -np.linalg.lstsq(own_q, np.concatenate(step.W_Q)[:, columns], rcond=None)[0].T
        G = 0.5 * (by_key + by_query)
        if np.linalg.norm(G, 2) <= LONGEST:
            W_K[:, columns] = (W_K[:, columns] - own_k @ G) @ scipy.linalg.expm(G)
            W_Q[:, :, columns] = (W_Q[:, :, columns] + point.W_Q[:, :, columns] @ G.T) @ scipy.linalg.expm(
                -G.T
            )
    return HeadPoint(W_Q, W_K, *rest)


def _factorised(H: Array, least: float) -> tuple[Array, bool]:
    """Return the Cholesky factor of a matrix with ones on its diagonal, which rounding may have left
    indefinite by more than ``least``.
    """
    try:
        factor: tuple[Array, bool] = scipy.linalg.cho_factor(H + least * np.eye(len(H)), lower=True)
    except np.linalg.LinAlgError:
        return _factorised(H, 10.0 * least)
    return factor

"""One attention layer as a function of its tokens: output, derivatives and their products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Head:
    """One head: ``softmax_rows((T M + 1 c^T) T^T) T V``.

    Attributes
    ----------
    M : ndarray, shape (d, d)
        Query on the left: logit of query i for key k is ``t_i^T M t_k + c^T t_k``.
    V : ndarray, shape (d, m)
    c : ndarray, shape (d,)
    """

    M: Array
    V: Array
    c: Array


@dataclass(frozen=True)
class HeadState:
    """What one head computed at T; leading axes are those of T.

    Attributes
    ----------
    head : Head
    P : ndarray, shape (..., n, n)
        Attention, one row a query.
    Q, R : ndarray, shape (..., n, d)
        ``Tc M^T`` and ``T M + 1 c^T``: derivative of the logits with respect to the query and to the key.
    H, O : ndarray, shape (..., n, m)
        Values ``Tc V`` of the centred tokens, and ``P H``.
    """

    head: Head
    P: Array
    Q: Array
    R: Array
    H: Array
    O: Array  # noqa: E741


@dataclass(frozen=True)
class Pass:
    """A forward pass.

    Attributes
    ----------
    T, Tc : ndarray, shape (..., n, d)
        Tokens as rows, and the same less their mean. A softmax and its derivative ignore what is constant in
        a row, so keys may be centred; without that a token offset of 900 costs seven digits of the Hessian.
    heads : list of HeadState
    output : ndarray, shape (..., n, m)
    """

    T: Array
    Tc: Array
    heads: list[HeadState]
    output: Array


@dataclass(frozen=True)
class AttentionLayer:
    """A sum of heads with a common mask (True where a query, the row, sees a key).

    Every method takes tokens as rows, T of shape (..., n, d): leading axes are independent inputs.
    """

    heads: list[Head]
    mask: Mask | None

    def forward(self, T: Array) -> Pass:
        """Return the layer's output and what its derivatives need."""
        mean = T.mean(axis=-2, keepdims=True)
        Tc = T - mean
        states, output = [], np.zeros(())
        for head in self.heads:
            R = T @ head.M
            R += head.c
            P = softmax_rows(R @ _t(Tc), self.mask)
            H = Tc @ head.V
            mixed = P @ H
            states.append(HeadState(head, P, Tc @ head.M.T, R, H, mixed))
            # Rows of P sum to one: what was taken off the tokens comes back as it was.
            output = output + (mixed + mean @ head.V)
        return Pass(T, Tc, states, output)

    def pull_back(self, at: Pass, G: Array) -> Array:
        """Return ``J^T G``, shape (..., n, d): the gradient of ``<G, output>`` with respect to T."""
        total = np.zeros(at.T.shape)
        for s in at.heads:
            slope = logit_slope(s, G)
            total += slope @ s.Q
            total += _t(slope) @ s.R
            total += (_t(s.P) @ G) @ s.head.V.T
        return total

    def push_forward(self, at: Pass, D: Array) -> Array:
        """Return ``J D``, shape (..., n, m): the change of the output when T moves along D."""
        return np.asarray(sum(_moved(s, at.Tc, D)[1] for s in at.heads))

    def second_product(self, at: Pass, G: Array) -> Callable[[Array], Array]:
        """Return ``D -> (J^T J + sum_ij G_ij Hessian of output_ij) D``: with ``G = output - B`` the Hessian of
        ``0.5 ||output - B||^2``.
        """
        slopes = [(logit_slope(s, G), G @ s.head.V.T) for s in at.heads]

        def product(D: Array) -> Array:
            moved = [_moved(s, at.Tc, D) for s in at.heads]
            dG = sum(dO for _, dO in moved)
            total = np.zeros(D.shape)
            for s, (slope, E), (dP, dO) in zip(at.heads, slopes, moved, strict=True):
                DM = D @ s.head.M
                weighted = G @ _t(s.H)
                weighted -= np.sum(G * s.O, axis=-1, keepdims=True)
                changed = dG @ _t(s.H)
                changed += G @ _t(D @ s.head.V)
                changed -= np.sum(dG * s.O + G * dO, axis=-1, keepdims=True)
                changed *= s.P
                weighted *= dP
                changed += weighted
                total += changed @ s.Q
                total += slope @ (D @ s.head.M.T)
                total += _t(changed) @ s.R
                total += _t(slope) @ DM
                total += _t(dP) @ E
                total += (_t(s.P) @ dG) @ s.head.V.T
            return total

        return product

    def jacobian(self, at: Pass, unknown: NDArray[np.intp]) -> Array:
        """Return the Jacobian with respect to some tokens, shape (..., n m, d u), in C order of (i, j) and of
        (coordinate l, token a).

        ``J[i, j, l, a] = P_ia ((H_aj - O_ij) R_il + V_lj) + [i = a] sum_k P_ik (H_kj - O_ij) Q_kl``.
        """
        *batch, n, d = at.T.shape
        m, u = at.output.shape[-1], len(unknown)
        J = np.zeros((*batch, n, m, d, u))
        columns = np.arange(u)
        for s in at.heads:
            gap = _t(s.H[..., unknown, :])[..., None, :, :] - s.O[..., None]
            part = gap[..., None, :] * s.R[..., :, None, :, None]
            part += s.head.V.T[:, :, None]
            part *= s.P[..., unknown][..., :, None, None, :]
            J += part
            # Advanced indices that are not adjacent come first.
            J[..., unknown, :, :, columns] += np.moveaxis(query_jacobian(s, unknown), -3, 0)
        return J.reshape(*batch, n * m, d * u)


def query_jacobian(s: HeadState, rows: NDArray[np.intp]) -> Array:
    """Return ``sum_k P_ak (H_k - O_a) Q_k^T`` of some queries a, shape (..., len(rows), m, d): how their
    outputs move with their own logits.
    """
    P = s.P[..., rows, :]
    n, m, d = s.H.shape[-2], s.H.shape[-1], s.Q.shape[-1]
    outer = (s.H[..., :, None] * s.Q[..., None, :]).reshape(*s.H.shape[:-2], n, m * d)
    mixed = (P @ outer).reshape(*P.shape[:-1], m, d)
    return np.asarray(mixed - s.O[..., rows, :, None] * (P @ s.Q)[..., None, :])


def logit_slope(s: HeadState, G: Array) -> Array:
    """Return the derivative of ``<G, output>`` in the logits, ``P o (G H^T - rowsum(G o O))``."""
    slope = G @ _t(s.H)
    slope -= np.sum(G * s.O, axis=-1, keepdims=True)
    slope *= s.P
    return np.asarray(slope)


def softmax_rows(S: Array, mask: Mask | None) -> Array:
    """Return the softmax of each row of S, which is overwritten."""
    if mask is not None:
        np.copyto(S, -np.inf, where=~mask)
    S -= S.max(axis=-1, keepdims=True)
    np.exp(S, out=S)
    S /= S.sum(axis=-1, keepdims=True)
    return S


def _moved(s: HeadState, Tc: Array, D: Array) -> tuple[Array, Array]:
    """Return the change of the attention and of the head's output along D."""
    dP = (D @ s.head.M) @ _t(Tc)
    dP += s.R @ _t(D)
    dP -= np.sum(s.P * dP, axis=-1, keepdims=True)
    dP *= s.P
    dO = dP @ s.H
    dO += s.P @ (D @ s.head.V)
    return dP, dO


def _t(matrix: Array) -> Array:
    return np.swapaxes(matrix, -1, -2)

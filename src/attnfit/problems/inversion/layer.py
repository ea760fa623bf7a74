"""One attention layer as a function of its tokens: output, derivatives and their products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Heads whose logits differ by less than this share are one.
SAME_ATTENTION = 1e-10


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

    @cached_property
    def maps(self) -> Array:
        """``[M, M^T, V]``: all products of a token in one."""
        return np.concatenate([self.M, self.M.T, self.V], axis=1)

    def mapped(self, T: Array) -> tuple[Array, Array, Array]:
        """Return ``T M``, ``T M^T`` and ``T V``."""
        d = len(self.M)
        every = T @ self.maps
        return every[..., :d], every[..., d : 2 * d], every[..., 2 * d :]


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

    def take(self, inputs: Any) -> Pass:
        """Return the pass of some of several independent inputs, numbered along the first axis."""
        heads = [HeadState(s.head, *(part[inputs] for part in (s.P, s.Q, s.R, s.H, s.O))) for s in self.heads]
        return Pass(self.T[inputs], self.Tc[inputs], heads, self.output[inputs])


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
        states = []
        # Rows of P sum to one: what is taken off the tokens comes back as it was.
        output = mean @ np.sum([head.V for head in self.heads], axis=0)
        for head in self.heads:
            R, Q, H = head.mapped(Tc)
            R = R + (mean @ head.M + head.c)
            P = softmax_rows(R @ _t(Tc), self.mask)
            mixed = P @ H
            states.append(HeadState(head, P, Q, R, H, mixed))
            output = output + mixed
        return Pass(T, Tc, states, output)

    def pull_back(self, at: Pass, G: Array) -> Array:
        """Return ``J^T G``, shape (..., n, d): the gradient of ``<G, output>`` with respect to T."""
        total = np.zeros(at.T.shape)
        for s in at.heads:
            slope = logit_slope(s, G)
            total += slope @ s.Q
            total += _t(slope) @ s.R
            total += _t(s.P) @ (G @ s.head.V.T)
        return total

    def push_forward(self, at: Pass, D: Array) -> Array:
        """Return ``J D``, shape (..., n, m): the change of the output when T moves along D."""
        return np.asarray(sum(_moved(s, at.Tc, D, s.head.mapped(D))[1] for s in at.heads))

    def second_push(self, at: Pass, D: Array) -> Array:
        """Return the second derivative of the output along D, shape (..., n, m)."""
        total = np.zeros(at.output.shape)
        for s in at.heads:
            DM = D @ s.head.M
            dS = _beside(DM, s.R) @ _t(_beside(at.Tc, D))
            dS -= np.sum(s.P * dS, axis=-1, keepdims=True)
            bent = dS * dS
            bent += 2.0 * DM @ _t(D)
            bent -= np.sum(s.P * bent, axis=-1, keepdims=True)
            bent *= s.P
            total += bent @ s.H + 2.0 * (s.P * dS) @ (D @ s.head.V)
        return total

    def second_product(self, at: Pass, G: Array) -> Callable[[Array], Array]:
        """Return ``D -> (J^T J + sum_ij G_ij Hessian of output_ij) D``: with ``G = output - B`` the Hessian
        of ``0.5 ||output - B||^2``.
        """
        # Of each head: G H^T - mu, whose product with P is the slope in the logits, that slope, and E.
        known = [(logit_gap(s, G), logit_slope(s, G), G @ s.head.V.T) for s in at.heads]

        def product(D: Array) -> Array:
            mapped = [s.head.mapped(D) for s in at.heads]
            moved = [_moved(s, at.Tc, D, its) for s, its in zip(at.heads, mapped, strict=True)]
            dG: Array = sum(dO for _, dO in moved)  # type: ignore[assignment]
            total = np.zeros(D.shape)
            for s, (gap, slope, E), (DM, DMt, DV), (dP, dO) in zip(
                at.heads, known, mapped, moved, strict=True
            ):
                changed = _beside(dG, G) @ _t(_beside(s.H, DV))
                changed -= (_row_dots(dG, s.O) + _row_dots(G, dO))[..., None]
                changed *= s.P
                total += _t(dP) @ E
                dP *= gap
                changed += dP
                total += changed @ s.Q
                total += slope @ DMt
                total += _t(changed) @ s.R
                total += _t(slope) @ DM
                total += _t(s.P) @ (dG @ s.head.V.T)
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


def merged_heads(heads: list[Head]) -> list[Head]:
    """Return the heads with those of one attention as one: ``P T V + P T V' = P T (V + V')``."""
    merged: list[Head] = []
    for head in heads:
        same = (k for k, other in enumerate(merged) if _attend_alike(head, other))
        k = next(same, None)
        if k is None:
            merged.append(head)
        else:
            merged[k] = Head(head.M, merged[k].V + head.V, head.c)
    return merged


def _attend_alike(head: Head, other: Head) -> bool:
    size = np.linalg.norm(head.M) + np.linalg.norm(head.c)
    apart = np.linalg.norm(head.M - other.M) + np.linalg.norm(head.c - other.c)
    return bool(apart <= SAME_ATTENTION * size)


def query_jacobian(s: HeadState, rows: NDArray[np.intp]) -> Array:
    """Return ``sum_k P_ak (H_k - O_a) Q_k^T`` of some queries a, shape (..., len(rows), m, d): how their
    outputs move with their own logits.
    """
    P = s.P[..., rows, :]
    n, m, d = s.H.shape[-2], s.H.shape[-1], s.Q.shape[-1]
    outer = (s.H[..., :, None] * s.Q[..., None, :]).reshape(*s.H.shape[:-2], n, m * d)
    mixed = (P @ outer).reshape(*P.shape[:-1], m, d)
    return np.asarray(mixed - s.O[..., rows, :, None] * (P @ s.Q)[..., None, :])


def logit_gap(s: HeadState, G: Array) -> Array:
    """Return ``G H^T - rowsum(G o O)``: how far each key's part in ``<G, output>`` is from the mean."""
    gap = G @ _t(s.H)
    gap -= _row_dots(G, s.O)[..., None]
    return np.asarray(gap)


def logit_slope(s: HeadState, G: Array) -> Array:
    """Return the derivative of ``<G, output>`` in the logits, ``P o (G H^T - rowsum(G o O))``."""
    slope = logit_gap(s, G)
    slope *= s.P
    return slope


def softmax_rows(S: Array, mask: Mask | None) -> Array:
    """Return the softmax of each row of S, which is overwritten."""
    if mask is not None:
        np.copyto(S, -np.inf, where=~mask)
    S -= S.max(axis=-1, keepdims=True)
    np.exp(S, out=S)
    S /= S.sum(axis=-1, keepdims=True)
    return S


def _moved(s: HeadState, Tc: Array, D: Array, mapped: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """Return the change of the attention and of the head's output along D, of which the maps are given."""
    DM, _, DV = mapped
    dP = _beside(DM, s.R) @ _t(_beside(Tc, D))
    dP -= _row_dots(s.P, dP)[..., None]
    dP *= s.P
    dO = dP @ s.H
    dO += s.P @ DV
    return dP, dO


def _beside(left: Array, right: Array) -> Array:
    """Return both side by side: one product with twice the depth is faster than two."""
    return np.concatenate([left, right], axis=-1)


def _row_dots(left: Array, right: Array) -> Array:
    return np.asarray(np.einsum("...ik,...ik->...i", left, right))


def _t(matrix: Array) -> Array:
    return np.swapaxes(matrix, -1, -2)

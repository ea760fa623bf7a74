"""The dense curvature of an attention layer, from matrix products and never from a loop over residuals.

All arrays have the unknown in C order of X (d, u): index (l, a) is coordinate l of unknown token a. Each function
returns F with ``F + F^T`` the symmetric matrix: what enters with its transpose is then formed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.attention_layer import HeadState, logit_slope, query_jacobian

Array = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass
class Terms:
    """The pieces of F of one head.

    ``F[l, a, l', b] = -sum_i Z[i, l, a] (P R)[i, l', b] + sum_r left[r][l, a, b] right[r][a, l']
    + sum_r scalar[r][a, b] block[r][a, l, l'] + [a = b] diagonal[a, l, l']``
    """

    Z: Array
    left: list[Array]
    right: list[Array]
    scalar: list[Array]
    block: list[Array]
    diagonal: Array


def layer_curvature(s: HeadState, G: Array, unknown: Index, *, gauss: bool, second: bool) -> Array:
    """Return the curvature of ``0.5 ||output - B||^2`` that one head has with itself, shape (d u, d u).

    Parameters
    ----------
    s : HeadState
        Without leading axes.
    G : ndarray, shape (n, m)
        ``output - B``.
    unknown : ndarray of int, shape (u,)
        The tokens to differentiate by.
    gauss, second : bool
        Whether to include ``J^T J``, and ``sum_ij G_ij Hessian of output_ij``.

    Notes
    -----
    The cost is that of two products of shape (d u, n)(n, d u); neither J nor a Hessian of one residual is
    formed.
    """
    PU = s.P[:, unknown]
    PR = s.R[:, :, None] * PU[:, None, :]
    n, d, u = PR.shape
    pieces = [_second_terms(s, G, unknown, PU)] if second else []
    if gauss:
        pieces.append(_gauss_terms(s, unknown, PU, PR))
    left = np.stack([x for p in pieces for x in p.left], axis=-2)
    scalar = np.stack([x for p in pieces for x in p.scalar], axis=-2)
    right = np.stack([x for p in pieces for x in p.right], axis=-1)
    block = np.stack([x for p in pieces for x in p.block], axis=-1)
    # One small product for each (l, a), summed over r, in place of a pass over the whole array for each r.
    columns = np.concatenate(
        [np.broadcast_to(right, (d, u, d, right.shape[-1])), block.transpose(1, 0, 2, 3)], axis=-1
    )
    rows = np.concatenate([left, np.broadcast_to(scalar, (d, u, scalar.shape[-2], u))], axis=-2)
    F = np.matmul(columns, rows).reshape(d * u, d * u)
    flat = PR.reshape(n, d * u)
    F -= sum(p.Z for p in pieces).reshape(n, d * u).T @ flat
    four = F.reshape(d, u, d, u)
    if gauss:
        values = s.H[unknown]
        Y = (flat.T @ flat).reshape(d, u, d, u)
        Y *= (0.5 * (values @ values.T))[:, None, :]
        four += Y
    own = np.arange(u)
    four[:, own, :, own] += sum(p.diagonal for p in pieces)
    return F


def symmetric(F: Array) -> Array:
    """Return ``F + F^T``."""
    return F + F.T


def _second_terms(s: HeadState, G: Array, unknown: Index, PU: Array) -> Terms:
    """Return the terms of ``sum_ij G_ij Hessian of output_ij``."""
    d = s.Q.shape[1]
    E = G @ s.head.V.T
    slope = logit_slope(s, G)
    seen, own = slope[:, unknown], slope[unknown]
    Z = s.R[:, :, None] * seen[:, None, :] + E[:, :, None] * PU[:, None, :]
    mean, tilt = s.P[unknown] @ s.Q, own @ s.Q
    P, a = PU[unknown], seen[unknown]
    gap = s.Q[unknown].T[:, None, :] - mean.T[:, :, None]
    QJ = gap * P
    QN = gap * a - tilt.T[:, :, None] * P
    keys = 0.5 * (s.R[:, :, None] * s.R[:, None, :]).reshape(-1, d * d)
    both = (s.R[:, :, None] * E[:, None, :]).reshape(-1, d * d)
    queries = 0.5 * (s.Q[:, :, None] * s.Q[:, None, :]).reshape(-1, d * d)
    diagonal = (seen.T @ keys + PU.T @ both + own @ queries).reshape(-1, d, d)
    diagonal -= tilt[:, :, None] * mean[:, None, :]
    M = np.broadcast_to(s.head.M, diagonal.shape)
    return Terms(Z, [QN, QJ], [s.R[unknown], E[unknown]], [a], [M], diagonal)


def _gauss_terms(s: HeadState, unknown: Index, PU: Array, PR: Array) -> Terms:
    """Return the terms of ``J^T J``, but for ``(PR^T PR) o H H^T``."""
    V, H, mixed = s.head.V, s.H[unknown], s.O
    weight = mixed @ H.T - 0.5 * np.sum(mixed * mixed, axis=1, keepdims=True)
    Z = s.R[:, :, None] * (PU * weight)[:, None, :] + (mixed @ V.T)[:, :, None] * PU[:, None, :]
    n, d, u = PR.shape
    U = query_jacobian(s, unknown)
    P, UT = PU[unknown], U.transpose(0, 2, 1)
    # sum_j U_ajl (H_bj - O_aj)
    own = (UT @ H.T - UT @ mixed[unknown][:, :, None]) * P[:, None, :]
    heard = (PR.reshape(n, d * u).T @ PU).reshape(d, u, u)
    VV = np.broadcast_to(V @ V.T, (u, d, d))
    return Terms(
        Z,
        [own.transpose(1, 0, 2), heard],
        [s.R[unknown], H @ V.T],
        [P, 0.5 * (PU.T @ PU)],
        [UT @ V.T, VV],
        0.5 * (UT @ U),
    )

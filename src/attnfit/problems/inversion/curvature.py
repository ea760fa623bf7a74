"""The dense curvature of an attention layer, from matrix products and never from a loop over residuals.

All arrays have the unknown in C order of X (d, u): index (l, a) is coordinate l of unknown token a. Functions
return F with ``F + F^T`` the symmetric matrix: what enters with its transpose is then formed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

from attnfit.problems.inversion.layer import HeadState, logit_slope, query_jacobian

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Two blocks of this size fit in cache.
BLOCK = 256


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
    flat = PR.reshape(n, d * u)
    # Everything below is added in place: at this size a temporary array costs as much as a product.
    F = flat.T @ flat if gauss else np.zeros((d * u, d * u))
    four = F.reshape(d, u, d, u)
    if gauss:
        values = s.H[unknown]
        four *= (0.5 * (values @ values.T))[:, None, :]
    for j in range(d):
        # One small product for each (l, a), summed over r.
        columns = np.concatenate([right, block[:, j]], axis=-1)
        four[j] += np.matmul(columns, np.concatenate([left[j], scalar], axis=-2))
    Z = np.sum([p.Z for p in pieces], axis=0).reshape(n, d * u)
    blas.dgemm(-1.0, flat.T, Z.T, beta=1.0, c=F.T, trans_b=True, overwrite_c=True)
    own = np.arange(u)
    four[:, own, :, own] += np.sum([p.diagonal for p in pieces], axis=0)
    return F


def symmetric(F: Array) -> Array:
    """Return ``F + F^T`` in place of F, block by block: a transposed pass over the whole is slow."""
    starts = range(0, len(F), BLOCK)
    for first in starts:
        for second in starts[first // BLOCK :]:
            rows, columns = slice(first, first + BLOCK), slice(second, second + BLOCK)
            both = F[rows, columns] + F[columns, rows].T
            F[rows, columns] = both
            F[columns, rows] = both.T
    return F


def gauss_newton_diagonal(s: HeadState, unknown: Index) -> Array:
    """Return the diagonal of one head's ``J^T J``, shape (d, u)."""
    V, H = s.head.V, s.H[unknown]
    P2 = s.P[:, unknown] ** 2
    apart = np.sum(s.O**2, axis=1)[:, None] - 2.0 * s.O @ H.T + np.sum(H * H, axis=1)
    heard = (s.R**2).T @ (P2 * apart) + 2.0 * (s.R.T @ P2) * (H @ V.T).T - 2.0 * (s.R * (s.O @ V.T)).T @ P2
    heard += np.sum(V * V, axis=1)[:, None] * P2.sum(axis=0)
    U = query_jacobian(s, unknown)
    P = s.P[unknown, unknown]
    to_itself = np.einsum("ajl,aj->la", U, H - s.O[unknown]) * s.R[unknown].T + np.einsum("ajl,lj->la", U, V)
    return np.asarray(heard + 2.0 * P * to_itself + np.einsum("ajl,ajl->la", U, U))


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

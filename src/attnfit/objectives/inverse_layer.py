"""One attention layer as a function of its tokens: output, derivatives and their products; its weights,
output and known tokens, checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import choose, require_finite_matrix

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Heads whose logits differ by less than this share are one.
SAME_ATTENTION = 1e-10
CONVENTIONS = ("rows", "columns")


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

    @cached_property
    def V(self) -> Array:
        """The sum of all V_h: what the layer makes of tokens that are all alike."""
        return np.asarray(np.sum([head.V for head in self.heads], axis=0))

    def forward(self, T: Array) -> Pass:
        """Return the layer's output and what its derivatives need."""
        mean = T.mean(axis=-2, keepdims=True)
        Tc = T - mean
        states = []
        # Rows of P sum to one: what is taken off the tokens comes back as it was.
        output = mean @ self.V
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

    def row_outputs(self, T: Array, rows: Array, i: int) -> Array:
        """Return row i of the output, shape (k, m), with each of some rows as token i after the tokens T,
        shape (i, d); no token sees a later one.
        """
        if self.mask is not None:
            T = T[self.mask[i, :i]]
        output = np.zeros((len(rows), self.heads[0].V.shape[1]))
        for head in self.heads:
            query = rows @ head.M + head.c
            S = np.column_stack([query @ T.T, np.sum(query * rows, axis=1)])
            P = softmax_rows(S, None)
            output += P[:, :-1] @ (T @ head.V) + P[:, -1:] * (rows @ head.V)
        return output

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


def read_matrix(values: Any, name: str) -> Array:
    """Return a matrix as float64, checked."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as a matrix: {error}; pass rows of equal length") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {array.dtype}; convert it to real numbers")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; pass a matrix with at least one row and column")
    require_finite_matrix(array, name)
    return array.astype(np.float64)


def read_matrices(values: Any, name: str) -> list[Array]:
    """Return one matrix a head, from a matrix, a list of them or an array of shape (heads, ., .)."""
    several = isinstance(values, list | tuple) and len(values) > 0 and np.ndim(values[0]) == 2
    if several or (isinstance(values, np.ndarray) and values.ndim == 3 and len(values)):
        return [read_matrix(matrix, f"{name}[{h}]") for h, matrix in enumerate(values)]
    return [read_matrix(values, name)]


def read_heads(W: Any, V: Any, key_bias: Any, convention: str) -> list[Head]:
    """Return the heads of W, V and the key biases."""
    choose(convention, dict.fromkeys(CONVENTIONS), "convention")
    Ws, Vs = read_matrices(W, "W"), read_matrices(V, "V")
    if len(Ws) != len(Vs):
        raise ValueError(f"W has {len(Ws)} heads but V has {len(Vs)}; pass one matrix of each a head")
    d, m = len(Ws[0]), Vs[0].shape[1]
    for h, (one, other) in enumerate(zip(Ws, Vs, strict=True)):
        if one.shape != (d, d):
            raise ValueError(
                f"W has shape {one.shape} in head {h}; expected ({d}, {d}): it is square, one row and column "
                "a coordinate of a token"
            )
        if other.shape != (d, m):
            raise ValueError(
                f"V has shape {other.shape} in head {h}; expected ({d}, {m}): one row a coordinate of a "
                "token, one column an output"
            )
    biases = np.zeros((len(Ws), d))
    if key_bias is not None:
        biases = read_matrix(np.atleast_2d(key_bias), "key_bias")
        if biases.shape != (len(Ws), d):
            raise ValueError(f"key_bias has shape {biases.shape}; expected (heads, d) = ({len(Ws)}, {d})")
    logits = Ws if convention == "rows" else [np.ascontiguousarray(one.T) for one in Ws]
    return [Head(M, other, c) for M, other, c in zip(logits, Vs, biases, strict=True)]


def read_output(B: Any, m: int) -> Array:
    """Return the output, shape (n, m)."""
    output = read_matrix(B, "B")
    if output.shape[1] != m:
        raise ValueError(
            f"B has {output.shape[1]} columns but V has {m}; pass one row a token and one column an output"
        )
    return output


def read_mask(mask: Any, n: int) -> Mask | None:
    """Return the mask, shape (n, n): True where the query (row) sees the key (column)."""
    if mask is None:
        return None
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask must be 'causal', an array of shape ({n}, {n}) or None, not {mask!r}")
        return np.tri(n, dtype=bool)
    seen = np.asarray(mask)
    if seen.shape != (n, n):
        raise ValueError(f"mask has shape {seen.shape}; expected ({n}, {n}), one row a query")
    if not np.isin(seen, (0, 1)).all():
        raise ValueError("mask must hold only True (seen) and False (hidden)")
    seen = seen.astype(bool)
    blind = np.flatnonzero(~seen.any(axis=1))
    if len(blind):
        raise ValueError(f"mask hides every key from query {blind[0]}; let each query see at least one")
    return None if seen.all() else seen


def read_known(known: Any, d: int, n: int) -> Array:
    """Return the known tokens as columns, shape (d, n), with NaN where a token is unknown."""
    tokens = np.full((d, n), np.nan)
    if isinstance(known, Mapping):
        for position, token in known.items():
            if not isinstance(position, int | np.integer) or not 0 <= position < n:
                raise ValueError(f"known has token {position!r}; use positions 0 to {n - 1}")
            vector = np.asarray(token, dtype=np.float64)
            if vector.shape != (d,) or not np.isfinite(vector).all():
                raise ValueError(f"known[{position}] must hold {d} finite numbers, shape ({d},)")
            tokens[:, position] = vector
    elif known is not None:
        tokens = np.array(known, dtype=np.float64)
        if tokens.shape != (d, n):
            raise ValueError(
                f"known has shape {tokens.shape}; expected (d, n) = ({d}, {n}), with NaN in the columns of "
                "unknown tokens, or a mapping from positions to tokens"
            )
        if np.isinf(tokens).any():
            raise ValueError(
                f"known is infinite in column {int(np.argwhere(np.isinf(tokens))[0][1])}; use NaN for unknown"
            )
        missing = np.isnan(tokens)
        partial = np.flatnonzero(missing.any(axis=0) & ~missing.all(axis=0))
        if len(partial):
            raise ValueError(
                f"known holds part of column {partial[0]}; give all of a token or NaN in all its coordinates"
            )
    if not np.isnan(tokens).any():
        raise ValueError("known holds every token: nothing is left to recover; put NaN in unknown columns")
    return tokens


def split_heads(values: Any, name: str, n_heads: int, axis: int) -> list[Array]:
    """Return one matrix a head from a list of them, or from one matrix with the heads side by side on an
    axis.
    """
    matrices = read_matrices(values, name)
    if len(matrices) == n_heads:
        return matrices
    width = matrices[0].shape[axis]
    if len(matrices) != 1 or width % n_heads:
        raise ValueError(
            f"{name} has {len(matrices)} matrices, the first of shape {matrices[0].shape}, which does not "
            f"make n_heads={n_heads} heads; pass one matrix a head, or one whose axis {axis} is a multiple"
        )
    return [np.ascontiguousarray(part) for part in np.split(matrices[0], n_heads, axis=axis)]

"""Recovery of the tokens that an attention layer turned into a given output."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.inverse_cases import residual_hessian
from attnfit.objectives.inverse_curvature import (
    gauss_newton_diagonal,
    heads_of_projections,
    layer_curvature,
    moment_tokens,
    symmetric,
)
from attnfit.objectives.inverse_layer import (
    AttentionLayer,
    Head,
    merged_heads,
    read_heads,
    read_known,
    read_mask,
    read_output,
)
from attnfit.objectives.objective import Evaluation, Offer
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]

# Singular values of the value maps below this share of the largest are zero.
RANK_TOLERANCE = 1e-10


class LayerInversion(TokenProblem):
    """``0.5 ||sum_h softmax_rows(X^T W_h X) X^T V_h - B||_F^2 + 0.5 gamma ||X||_F^2``, unknown X (d, n):
    token i is column i.

    Parameters
    ----------
    W : array_like, shape (d, d), or one a head
        ``W_Q W_K^T / sqrt(d_head)`` of each head; `from_projections` forms it.
    V : array_like, shape (d, m), or one a head
        ``W_V W_O`` of each head. Where the outputs of heads are concatenated, each V_h has the columns of the
        others zero.
    B : array_like, shape (n, m)
        The output of the layer.
    gamma : float
        Zero recovers; the papers' gamma of order n d R^8 draws X to zero.
    mask : "causal" or array_like of bool, shape (n, n), optional
        True where a query (row) sees a key (column).
    known : array_like, shape (d, n), or mapping from position to token, optional
        Tokens that are given; NaN marks the columns to recover. The unknown is then X of the others only,
        shape (d, n_unknown).
    convention : {"rows", "columns"}
        "rows": the attention of query i is the softmax of row i of ``X^T W X``, logits ``x_i^T W x_k``
        (``D^-1 exp(X^T W X)`` of the papers). "columns": that of column i, logits ``x_k^T W x_i``
        (``u(X)_i = exp(X^T W x_i)`` of the papers' derivatives). One is the other with W transposed.
    key_bias : array_like, shape (heads, d) or (d,), optional
        c of each head adds ``c^T x_k`` to the logits of key k, as query biases do.

    Raises
    ------
    ValueError
        If shapes cannot belong to one layer, anything is not finite, a query sees no key, or every token is
        known.

    Notes
    -----
    With ``T = X^T``, ``S = T W T^T``, P its row softmax, ``C = P T V - B``, ``E = C V^T`` and
    ``a = P o (E T^T - rowsum)``: the gradient in T is ``a T W^T + a^T T W + P^T E + gamma T``. Keys are
    centred throughout, so that tokens far from zero cost no digits. The Hessian comes from two products of
    (d n, n)(n, d n): see `attnfit.objectives.inverse_curvature`. Source: "Unmasking Transformers: A
    Theoretical Approach to Data Recovery via Attention Weights", whose loss has no 0.5, whose derivatives
    lack the factor 2 and mix both conventions.
    """

    offers = frozenset({Offer.RESIDUALS, Offer.INVERSION})

    layer: AttentionLayer

    def __init__(
        self,
        W: Any,
        V: Any,
        B: Any,
        gamma: float = 0.0,
        *,
        mask: Any = None,
        known: Any = None,
        convention: str = "rows",
        key_bias: Any = None,
    ) -> None:
        heads = read_heads(W, V, key_bias, convention)
        d, m = heads[0].V.shape
        output = read_output(B, m)
        layer = AttentionLayer(heads, read_mask(mask, len(output)))
        super().__init__(layer, output, read_known(known, d, len(output)), _as_gamma(gamma))
        self._shift = np.zeros(m)

    @classmethod
    def from_projections(
        cls,
        W_Q: Any,
        W_K: Any,
        W_V: Any,
        W_O: Any,
        B: Any,
        gamma: float = 0.0,
        *,
        n_heads: int = 1,
        b_Q: Any = None,
        b_V: Any = None,
        b_O: Any = None,
        mask: Any = None,
        known: Any = None,
    ) -> LayerInversion:
        """Make the problem from the projections of a layer, ``q_i = W_Q^T x_i + b_Q`` and so on.

        Parameters
        ----------
        W_Q, W_K : array_like, shape (d, d_head) a head, or (d, n_heads d_head)
            Logits are ``q_i^T k_j / sqrt(d_head)``. A key bias changes no attention and is not needed.
        W_V : array_like, shape (d, d_value) a head, or (d, n_heads d_value)
        W_O : array_like, shape (d_value, m) a head, or (n_heads d_value, m), or None
            None for the concatenated outputs of the heads.
        B, gamma, mask, known
            As in the class.
        n_heads : int
        b_Q, b_V, b_O : array_like, shapes (n_heads d_head,), (n_heads d_value,) and (m,), optional

        Raises
        ------
        ValueError
            If shapes do not agree or n_heads does not divide them.
        """
        W, V, key_bias, shift = heads_of_projections(W_Q, W_K, W_V, W_O, n_heads, b_Q, b_V, b_O)
        B = read_output(B, V[0].shape[1]) - shift
        layer = cls(W, V, B, gamma, mask=mask, known=known, key_bias=key_bias)
        layer._shift = shift
        return layer

    def with_output(self, B: Any) -> LayerInversion:
        """Return the same problem for another output B, shape (n, m), biases included."""
        output = read_output(B, self.m)
        if len(output) != self.n:
            raise ValueError(
                f"B has {len(output)} rows but the layer has {self.n} tokens; make another layer"
            )
        other = copy.copy(self)
        other.B, other._latest = output - self._shift, None
        return other

    def projected(self) -> LayerInversion:
        """Return the same problem with the rows of B projected on what the value maps produce: the part
        that no input gives only adds a constant to the loss.
        """
        other = copy.copy(self)
        other.B, other._latest = (self.B @ self.row_space.T) @ self.row_space, None
        return other

    def balanced(self, floor: float) -> LayerInversion:
        """Return the problem with output columns combined so that the value maps below one another have
        orthonormal ones; singular values below a share of the largest are scaled by that share's inverse.

        Which columns a zero residual was given in then makes no difference to a descent: combinations of
        them by a regular matrix, however scaled, become the same problem but for a rotation.
        """
        values = np.vstack([head.V for head in merged_heads(self.layer.heads)])
        _, sizes, rows = np.linalg.svd(values @ self.row_space.T, full_matrices=False)
        if not len(sizes):
            return self
        change = (rows @ self.row_space).T / np.maximum(sizes, floor * sizes[0])
        heads = [Head(head.M, head.V @ change, head.c) for head in self.layer.heads]
        other = copy.copy(self)
        other.__dict__.pop("row_space", None)
        other.layer, other.B, other._latest = AttentionLayer(heads, self.layer.mask), self.B @ change, None
        other.m, other._shift = len(sizes), np.zeros(len(sizes))
        return other

    def with_gamma(self, gamma: float) -> LayerInversion:
        """Return the same problem with another gamma."""
        other = copy.copy(self)
        other.gamma = _as_gamma(gamma)
        return other

    def initial_point(self, random_state: Any = None) -> Array:
        """Return the unknown columns of ``(B V^+)^T``: exact where each token attends to itself only."""
        return np.asarray((self.B @ np.linalg.pinv(self.layer.V)).T[:, self.unknown])

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return ``B V^+`` and, where it exists, the start from moments of the output, flat: see
        `attnfit.objectives.inverse_curvature`.
        """
        starts = {"B V^+": self.initial_point(rng).reshape(-1)}
        tokens = moment_tokens(self.layer, self.B)
        if tokens is not None:
            starts["moments"] = self.columns(tokens).reshape(-1)
        return starts

    def gaussian_starts(self, n_starts: int, rng: np.random.Generator) -> Array:
        """Return normal starts, flat, shape (n_starts, n_unknowns).

        Their size is that of the known tokens. Without any, it lies between the size s of ``B V^+`` (each
        token attends to itself) and ``s sqrt(n)`` (all attend to all alike), and the starts take turns.
        """
        known = np.delete(self.known, self.unknown, axis=1)
        if known.size:
            sizes = np.full(n_starts, np.sqrt(np.mean(known**2)))
        else:
            own = np.sqrt(np.mean(self.initial_point() ** 2))
            sizes = own * np.sqrt(self.n) ** np.resize([0.5, 1.0, 0.0], n_starts)
        return np.asarray(sizes[:, None] * rng.standard_normal((n_starts, self.n_unknowns)))

    def hessian_blocks(self, i0: int, j0: int, x: Any) -> Array:
        """Return the second derivatives of residual (i0, j0) by the papers' five cases, shape (n, n, d, d):
        block (i1, i2) is that of tokens i1 and i2, known ones included. For study: see
        `attnfit.objectives.inverse_cases`.
        """
        for name, index, size in (("i0", i0, self.n), ("j0", j0, self.m)):
            if not 0 <= index < size:
                raise ValueError(f"{name} is {index}; residuals are numbered from 0 to {size - 1} there")
        return residual_hessian(self._forward(x), i0, j0)

    @cached_property
    def row_space(self) -> Array:
        """Orthonormal rows that span what the value maps produce, shape (r, m).

        Every row of an output is ``sum_h (P_h T)_i V_h``: a combination of the rows of all V_h below one
        another. Output columns that are zero, repeated or dependent on others leave r as it is.
        """
        values = np.vstack([head.V for head in merged_heads(self.layer.heads)])
        _, s, rows = np.linalg.svd(values, full_matrices=False)
        return np.asarray(rows[s > RANK_TOLERANCE * max(float(s[0]), np.finfo(float).tiny)])

    @property
    def rank(self) -> int:
        """That of the value maps below one another."""
        return len(self.row_space)

    @property
    def value_rank(self) -> int:
        """Rank of the value maps side by side: below d, some directions of a token show in the attention
        only.
        """
        return int(np.linalg.matrix_rank(np.hstack([head.V for head in self.layer.heads])))

    def residual_curvature_at(self, at: Evaluation) -> Array:
        """Return ``sum_ij residual_ij Hessian of residual_ij + gamma`` at an evaluated point."""
        forward, C = self._known(at)
        H = np.zeros((self.n_unknowns, self.n_unknowns))
        for head in forward.heads:
            H += symmetric(layer_curvature(head, C, self.unknown, gauss=False, second=True))
        H[np.diag_indices(len(H))] += self.gamma
        return H

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the number of heads times the sum of their ``diag(J_h^T J_h)``, plus gamma."""
        forward, _ = self._known(at)
        total = np.sum([gauss_newton_diagonal(s, self.unknown) for s in forward.heads], axis=0)
        return np.asarray(len(forward.heads) * total.reshape(-1) + self.gamma)

    def _curvature(self, at: Evaluation, *, second: bool) -> Array:
        """Return ``J^T J + gamma``, on request with the residuals' own curvature."""
        forward, C = self._known(at)
        if len(forward.heads) > 1:
            # Heads meet in J^T J: one Jacobian costs less than all pairs of them.
            J = self.jacobian_at(at)
            own = self.residual_curvature_at(at) if second else self.gamma * np.eye(J.shape[1])
            return np.asarray(J.T @ J + own)
        H = symmetric(layer_curvature(forward.heads[0], C, self.unknown, gauss=True, second=second))
        H[np.diag_indices(len(H))] += self.gamma
        return H


def _as_gamma(gamma: Any) -> float:
    try:
        value = float(gamma)
    except (TypeError, ValueError):
        value = np.nan
    if not np.isfinite(value) or value < 0:
        raise ValueError(f"gamma must be a finite number >= 0, not {gamma!r}; 0 recovers X without bias")
    return value

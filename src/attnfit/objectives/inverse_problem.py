"""The output of an attention layer as a function of the unknown tokens, and what its heads tell."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.inverse_curvature import gauss_newton_diagonal, layer_curvature, symmetric
from attnfit.objectives.inverse_layer import AttentionLayer, merged_heads
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.token_problem import TokenProblem

Array = NDArray[np.float64]

# Singular values of the value maps below this share of the largest are zero.
RANK_TOLERANCE = 1e-10


class LayerProblem(TokenProblem):
    """A `TokenProblem` of one attention layer."""

    layer: AttentionLayer

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

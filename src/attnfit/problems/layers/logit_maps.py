"""What comes before the softmax: a linear map, or a linear map of a ReLU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


class LinearMap:
    """``z = A x`` for each column x; A = None is the identity.

    Parameters
    ----------
    matrix : ndarray or sparse array, shape (n, d), or None
    n_rows : int
        n, which the identity does not tell.
    """

    def __init__(self, matrix: Any, n_rows: int) -> None:
        self.matrix = matrix
        self.shape = (n_rows, n_rows) if matrix is None else tuple(matrix.shape)

    @property
    def sparse(self) -> bool:
        """Whether rows come as a sparse array."""
        return bool(sparse.issparse(self.matrix))

    def logits(self, X: Array) -> tuple[Array, None]:
        """Return ``A X``, shape (n, k), and None: the derivative is the same everywhere."""
        return self.forward(None, X), None

    def forward(self, pattern: None, V: Array) -> Array:
        """Return ``A V``, shape (n, k)."""
        return V if self.matrix is None else np.asarray(self.matrix @ V)

    def magnitudes(self, sizes: Array) -> Array:
        """Return ``|A| sizes``: what the terms of a logit add up to without their signs, shape (n, k)."""
        return sizes if self.matrix is None else np.asarray(abs(self.matrix) @ sizes)

    def adjoint(self, pattern: None, R: Array) -> Array:
        """Return ``A^T R``, shape (d, k)."""
        return R if self.matrix is None else np.asarray(self.matrix.T @ R)

    def rows(self, pattern: None, block: slice) -> Array:
        """Return rows of A, shape (rows, 1, d): the same for every column."""
        if self.matrix is None:
            return np.eye(self.shape[0])[block, None, :]
        return np.asarray(self.matrix[block, None, :])

    def typical_squares(self) -> Array:
        """Return ``A^2`` entrywise, shape (n, d)."""
        return np.eye(self.shape[0]) if self.matrix is None else np.asarray(self.matrix**2)


class ReluMap:
    """``z = A2 relu(A1 x)`` for each column x; linear as long as no entry of ``A1 x`` changes sign.

    Parameters
    ----------
    first, second : ndarray or sparse array, shapes (n, d) and (k, n)
    """

    sparse = False

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second
        self.shape = (second.shape[0], first.shape[1])

    def logits(self, X: Array) -> tuple[Array, Mask]:
        """Return ``A2 relu(A1 X)`` and which entries of ``A1 X`` are positive."""
        hidden = np.asarray(self.first @ X)
        pattern = hidden > 0.0
        return np.asarray(self.second @ np.where(pattern, hidden, 0.0)), pattern

    def forward(self, pattern: Mask, V: Array) -> Array:
        """Return ``A2 diag(s) A1 V`` with the signs s of each column."""
        return np.asarray(self.second @ (pattern * (self.first @ V)))

    def magnitudes(self, sizes: Array) -> Array:
        """Return ``|A2| |A1| sizes``, shape (k, columns)."""
        return np.asarray(abs(self.second) @ (abs(self.first) @ sizes))

    def adjoint(self, pattern: Mask, R: Array) -> Array:
        """Return ``A1^T diag(s) A2^T R``."""
        return np.asarray(self.first.T @ (pattern * (self.second.T @ R)))

    def rows(self, pattern: Mask, block: slice) -> Array:
        """Return rows of ``A2 diag(s) A1`` for each column's signs, shape (rows, columns, d)."""
        second = self.second[block]
        return np.stack([_dense(second[:, active] @ self.first[active]) for active in pattern.T], axis=1)

    def typical_squares(self) -> Array:
        """Return the mean square of ``A2 diag(s) A1`` over random signs: sizes at zero, where no row is
        active.
        """
        mean = _dense(self.second @ self.first)
        return np.asarray(0.25 * (mean**2 + _dense(self.second**2 @ self.first**2)))


def _dense(matrix: Any) -> Array:
    return np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix)

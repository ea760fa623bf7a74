"""What comes before the softmax of a layered problem: a linear map, or a linear map of a ReLU; and the checks
of its matrices and targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data import SparseDesign
from attnfit.data.inputs import as_design, as_vector, require_finite_matrix

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


def as_matrix(A: Any, name: str) -> Any:
    """Return A in float64, dense or as a sparse array by rows.

    Raises
    ------
    ValueError
        If A is empty, not two-dimensional, not numeric or not finite.
    """
    design = as_design(A, name)
    if isinstance(design, SparseDesign):
        return design.matrix.astype(np.float64)
    array = np.asarray(design.array, dtype=np.float64)
    require_finite_matrix(array, name)
    return array


def is_identity(A: Any) -> bool:
    """Whether A is the identity matrix."""
    if A.shape[0] != A.shape[1]:
        return False
    if sparse.issparse(A):
        return bool(abs(A - sparse.eye_array(A.shape[0], format="csr")).sum() == 0.0)
    return bool(np.array_equal(A, np.eye(A.shape[0])))


def as_columns(
    values: Any, n_rows: int, name: str, of: str, *, n_columns: int | None = None, non_negative: bool = False
) -> Array:
    """Return values of shape (n_rows,) or (n_rows, columns) as float64 of shape (n_rows, columns).

    Parameters
    ----------
    values : array_like
    n_rows : int
        Rows of the matrix ``of``.
    name, of : str
        For the message.
    n_columns : int, optional
        The number of columns expected; one is accepted too.
    non_negative : bool

    Raises
    ------
    ValueError
        If the shape is another, or an entry is not finite or negative; the message names its index.
    """
    array = _numbers(values, name)
    shapes = f"({n_rows},)" + ("" if n_columns == 1 else f" or ({n_rows}, {n_columns or 'columns'})")
    if array.ndim == 0:
        raise ValueError(f"{name} is a single number; pass one value for each row of {of}, shape {shapes}")
    if array.ndim == 1:
        if len(array) != n_rows:
            raise ValueError(
                f"{name} has shape {array.shape} but {of} has {n_rows} rows; pass shape {shapes}"
            )
        return as_vector(array, n_rows, name, non_negative=non_negative)[:, None]
    bad_columns = array.ndim == 2 and n_columns is not None and array.shape[1] not in (1, n_columns)
    if array.ndim != 2 or array.shape[0] != n_rows or bad_columns or array.shape[1] == 0:
        raise ValueError(f"{name} has shape {array.shape} but {of} has {n_rows} rows; pass shape {shapes}")
    array = array.astype(np.float64, copy=False)
    require_finite_matrix(array, name)
    if non_negative and (array < 0).any():
        i, j = np.argwhere(array < 0)[0]
        raise ValueError(
            f"{name} is negative at row {i}, column {j} ({array[i, j]:g}); use values >= 0, with 0 to "
            "leave a "
            "row out"
        )
    return np.ascontiguousarray(array)


def as_weights(weights: Any, n_rows: int, of: str, n_columns: int) -> Array | None:
    """Return row weights of shape (n_rows, 1) or (n_rows, n_columns); None stays None.

    Raises
    ------
    ValueError
        If one is negative or not finite, or all of a column are zero.
    """
    if weights is None:
        return None
    array = as_columns(weights, n_rows, "weights", of, n_columns=n_columns, non_negative=True)
    empty = np.flatnonzero(~array.any(axis=0))
    if len(empty):
        where = f" in column {empty[0]}" if array.shape[1] > 1 else ""
        raise ValueError(f"weights are all zero{where}; give at least one row a positive weight")
    return array


def as_penalty(row_penalty: Any, n_rows: int) -> Array | None:
    """Return the squares of the row penalty, shape (n_rows, 1); None where there is none."""
    penalty = as_vector(row_penalty, n_rows, "row_penalty", scalar=True)
    return np.broadcast_to(penalty**2, (n_rows,))[:, None] if penalty.any() else None


def _numbers(values: Any, name: str) -> NDArray[Any]:
    if sparse.issparse(values):
        raise ValueError(f"{name} is a sparse matrix; pass {name}.toarray()")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as an array of numbers: {error}") from error
    if array.dtype.kind not in "fiub":
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name} has dtype {array.dtype}; convert it to real numbers") from None
    return array

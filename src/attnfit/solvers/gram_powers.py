"""The linear problems that stand for kernel regression in the analysis of its solvers: powers of the Gram."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.data.inputs import as_ridge, as_vector
from attnfit.objectives.layer_inputs import as_matrix

Array = NDArray[np.float64]


def solve_even_power(A: Any, b: Any, power: int = 1, *, ridge: float = 0.0) -> Array:
    """Return x that minimises ``0.5 |(A^T A)^j x - b|^2 + 0.5 ridge |x|^2``.

    Parameters
    ----------
    A : array_like, shape (n, d)
    b : array_like, shape (d,)
    power : int
        j, at least 1.
    ridge : float

    Returns
    -------
    ndarray, shape (d,)

    Raises
    ------
    ValueError
        If A has dependent columns and ridge is zero, or an argument is not usable.

    Notes
    -----
    From the singular values of A. Source: Song, Yin and Zhang, "Solving Attention Kernel Regression Problem
    via Pre-conditioner" (2023), arXiv:2308.14304, where these problems stand for that of the kernel.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.solvers import solve_even_power
    >>> A = np.diag([1.0, 2.0])
    >>> solve_even_power(A, [1.0, 16.0], 2)
    array([1., 1.])
    """
    _, s, V = _factors(A, power, 1, ridge)
    target = as_vector(b, V.shape[1], "b")
    return _solved(V, s ** (2 * power), V @ target, ridge)


def solve_odd_power(A: Any, b: Any, power: int = 1, *, ridge: float = 0.0) -> Array:
    """Return x that minimises ``0.5 |A (A^T A)^j x - b|^2 + 0.5 ridge |x|^2``: see `solve_even_power`.

    Parameters
    ----------
    A : array_like, shape (n, d)
    b : array_like, shape (n,)
    power : int
        j, at least 0.
    ridge : float

    Returns
    -------
    ndarray, shape (d,)

    Raises
    ------
    ValueError
        As `solve_even_power`.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.solvers import solve_odd_power
    >>> A = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> solve_odd_power(A, [1.0, 8.0, 5.0])
    array([1., 1.])
    """
    U, s, V = _factors(A, power, 0, ridge)
    target = as_vector(b, len(U), "b")
    return _solved(V, s ** (2 * power + 1), U.T @ target, ridge)


def _factors(A: Any, power: int, least: int, ridge: float) -> tuple[Array, Array, Array]:
    """Return the singular value decomposition of A."""
    if not (isinstance(power, int | np.integer) and power >= least):
        raise ValueError(f"power must be a whole number, at least {least}, not {power!r}")
    matrix = as_matrix(A, "A")
    matrix = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix)
    U, s, V = linalg.svd(matrix, full_matrices=False, check_finite=False)
    n, d = matrix.shape
    rank = int((s > max(n, d) * np.finfo(np.float64).eps * s[0]).sum())
    if as_ridge(ridge) == 0.0 and rank < d:
        raise ValueError(f"A has {d} columns, of which only {rank} are independent; give ridge > 0")
    return np.asarray(U), np.asarray(s), np.asarray(V)


def _solved(V: Array, sizes: Array, along: Array, ridge: float) -> Array:
    with np.errstate(over="ignore", divide="ignore"):
        gains = 1.0 / (sizes + (ridge / sizes if ridge else 0.0))
    return np.asarray(V.T @ (np.where(np.isfinite(gains), gains, 0.0) * along))

"""Poisson regression with a logarithmic link, by likelihood or pseudo-likelihood (PPML)."""

from __future__ import annotations

from typing import Any

from attnfit.losses.exponential import PoissonDeviance
from attnfit.problems.rows.grouped import GroupedProblem


class Poisson(GroupedProblem):
    """``L(x) = sum w (exp(eta) - b eta) + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2`` with
    ``eta = A x + offset``.

    The negative Poisson log-likelihood up to ``sum w log b!``; for targets that are no counts the
    pseudo-likelihood whose answer is consistent whenever ``E b = exp(eta)`` (Santos Silva and Tenreyro, "The
    Log of Gravity" (2006), doi:10.1162/rest.88.4.641).

    Parameters
    ----------
    A : array, sparse matrix, memory map or data frame, shape (n, d)
    b : array_like, shape (n,)
        Counts, or any numbers that are not negative; zeros are data.
    weights, offset : array_like, shape (n,), optional
        Row weights w, and an addition to the logits: the logarithm of an exposure.
    row_penalty : float or array_like of shape (n,)
    ridge : float

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape, or negative; the message names the index.
    OverflowError
        From `value` and its kin where ``exp(eta)`` exceeds float64.

    Notes
    -----
    Gradient ``A^T (w (exp(eta) - b))``, Hessian ``A^T diag(w exp(eta)) A``: convex. Where a combination of
    columns is zero on all rows with ``b > 0`` and of one sign on the others there is no finite minimum:
    ``result.separation`` says so.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> years = np.arange(5.0)
    >>> counts = [2, 3, 6, 7, 12]
    >>> minimize(problems.Poisson(np.column_stack([np.ones(5), years]), counts)).x.round(4)
    array([0.7501, 0.4313])
    """

    def __init__(
        self,
        A: Any,
        b: Any,
        *,
        weights: Any = None,
        offset: Any = None,
        row_penalty: Any = 0.0,
        ridge: float = 0.0,
    ) -> None:
        super().__init__(
            A,
            b,
            loss=PoissonDeviance(),
            weights=weights,
            offset=offset,
            row_penalty=row_penalty,
            ridge=ridge,
        )

"""Exponential and hyperbolic regression."""

from __future__ import annotations

from typing import Any

from attnfit.losses.exponential import FUNCTIONS, SquaredExponential
from attnfit.problems.inputs import choose
from attnfit.problems.rows.grouped import GroupedProblem


class Exponential(GroupedProblem):
    """``L(x) = 0.5 sum w (u(A x + offset) - b)^2 + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``.

    Parameters
    ----------
    A : array, sparse matrix, memory map or data frame, shape (n, d)
    b : array_like, shape (n,)
    function : {"exp", "cosh", "sinh"}
        The function u.
    weights, offset : array_like, shape (n,), optional
        Row weights w and an addition to the logits.
    row_penalty : float or array_like of shape (n,)
        The papers' regulariser w.
    ridge : float

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape or sign; the message names the index.
    OverflowError
        From `value` and its kin where ``u(Ax)^2`` exceeds float64.

    Notes
    -----
    With ``v = u'`` and ``c = u - b``: gradient ``A^T (w c v)``, Hessian ``A^T diag(w (v^2 + c u)) A``.
    Source: "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression", Definition 7.5.
    """

    def __init__(
        self,
        A: Any,
        b: Any,
        function: str = "exp",
        *,
        weights: Any = None,
        offset: Any = None,
        row_penalty: Any = 0.0,
        ridge: float = 0.0,
    ) -> None:
        choose(function, FUNCTIONS, "function")
        super().__init__(
            A,
            b,
            loss=SquaredExponential(function),
            weights=weights,
            offset=offset,
            row_penalty=row_penalty,
            ridge=ridge,
        )
        self.function = function

    @property
    def zero_is_stationary(self) -> bool:
        """True for cosh without offset, an even function."""
        return self.function == "cosh" and self.offset is None

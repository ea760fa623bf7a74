"""Rescaled regression within groups."""

from __future__ import annotations

from typing import Any

from attnfit.losses.exponential import FUNCTIONS
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.problems.inputs import choose
from attnfit.problems.rows.grouped import GroupedProblem


class Rescaled(GroupedProblem):
    """``L(x) = sum_g 0.5 sum w (u(z) - <u(z), 1> b)^2 + penalties`` with ``z = A_g x + offset_g``.

    Softmax regression multiplied through by its normaliser: nothing is divided, so u = sinh, whose normaliser
    may vanish, is allowed. The penalties are ``0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``.

    Parameters
    ----------
    A : array, sparse matrix, memory map or data frame, shape (n, d)
    b : array_like, shape (n,)
        Target shares.
    function : {"exp", "cosh", "sinh"}
        The function u.
    groups : array_like, optional
        n labels in any order, or offsets; one group by default.
    weights : array_like, shape (n,) or (n_groups,), optional
    offset : array_like, shape (n,), optional
    row_penalty : float or array_like of shape (n,)
    ridge : float

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape or sign; the message names the index.
    OverflowError
        From `value` and its kin where ``u(Ax)^2`` exceeds float64.

    Notes
    -----
    The loss is not invariant to a constant added to the logits, and is small wherever u is: where the
    constant vector lies in the range of A, the infimum zero is approached as the logits go to minus infinity
    (exp). For sinh x = 0 is a minimum with value zero whatever the target: `minimize` starts elsewhere, but a
    poor fit may still end there. A ridge or row penalty makes exp and cosh well posed. Source: "An Iterative
    Algorithm for Rescaled Hyperbolic Functions Regression", Definitions 7.5 and 8.2 (corrected).
    """

    def __init__(
        self,
        A: Any,
        b: Any,
        function: str = "exp",
        groups: Any = None,
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
            loss=SquaredRescaled(function),
            groups=groups,
            weights=weights,
            offset=offset,
            row_penalty=row_penalty,
            ridge=ridge,
        )
        self.function = function

    @property
    def zero_is_stationary(self) -> bool:
        """True without offset for cosh, an even function, and for sinh, which vanishes at zero."""
        return self.function in ("cosh", "sinh") and self.offset is None

    @property
    def zero_is_trivial(self) -> bool:
        """True without offset for sinh: all outputs and the loss are zero there, whatever the target."""
        return self.function == "sinh" and self.offset is None

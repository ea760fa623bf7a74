"""The models of rows: exponential, Poisson, softmax and rescaled regression."""

from __future__ import annotations

from typing import Any

from attnfit.data.inputs import choose
from attnfit.losses.elementwise import FUNCTIONS, FunctionName, PoissonDeviance, SquaredExponential
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import LossLike, find_loss
from attnfit.objectives.convexity import convex_from_ridge
from attnfit.objectives.rows import RowProblem


class Exponential(RowProblem):
    """``L(x) = 0.5 sum w (u(A x + offset) - b)^2 + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``.

    Formulas, parameters and errors are those of `attnfit.problems.Exponential`, which makes it.
    """

    def __init__(
        self,
        A: Any,
        b: Any,
        function: FunctionName = "exp",
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
    def zero_is_stationary(self) -> bool:  # type: ignore[override]
        """True for cosh without offset, an even function."""
        return self.function == "cosh" and self.offset is None


class Poisson(RowProblem):
    """``L(x) = sum w (exp(eta) - b eta) + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2`` with
    ``eta = A x + offset``.

    The negative Poisson log-likelihood up to ``sum w log b!``; for targets that are no counts the
    pseudo-likelihood whose answer is consistent whenever ``E b = exp(eta)`` (Santos Silva and Tenreyro, "The
    Log of Gravity" (2006), doi:10.1162/rest.88.4.641).

    Parameters and errors are those of `attnfit.problems.Poisson`, which makes it.

    Notes
    -----
    Where a combination of columns is zero on all rows with ``b > 0`` and of one sign on the others there is
    no finite minimum: ``result.separation`` says so.

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


class Softmax(RowProblem):
    """Softmax regression: ``L(x) = sum_g Phi(softmax(A_g x + offset_g)) + penalties``.

    Losses, formulas, parameters and errors are those of `attnfit.problems.Softmax`, which makes it.
    """

    def __init__(
        self,
        A: Any,
        b: Any,
        groups: Any = None,
        loss: LossLike = "squared",
        *,
        weights: Any = None,
        offset: Any = None,
        row_penalty: Any = 0.0,
        ridge: float = 0.0,
    ) -> None:
        super().__init__(
            A,
            b,
            loss=find_loss(loss),
            groups=groups,
            weights=weights,
            offset=offset,
            row_penalty=row_penalty,
            ridge=ridge,
        )

    @property
    def zero_is_stationary(self) -> bool:  # type: ignore[override]
        """True for entropy without offset and weights: uniform outputs are its maximum."""
        rows = self.rows
        return (
            rows.offset is None
            and rows.weights is None
            and rows.loss.shift_invariant
            and not rows.loss.has_target
        )

    def convex_from_ridge(self) -> float:
        """Return a ridge from which on the objective is convex: zero of a convex loss, infinite where none is
        known. One pass.

        With kappa a bound of the negative curvature of a group's loss in its logits, it is
        ``lambda_max(A^T A) max_g kappa_g``: ``(max w + |w b|) / sqrt(2)`` of the squared loss, ``|w b| /
        sqrt(2)`` of linear cross entropy, ``(1 + log n_g) / 2`` of the entropy, sums of these of sums.

        Examples
        --------
        >>> import numpy as np
        >>> from attnfit import problems
        >>> A = np.random.default_rng(0).standard_normal((12, 3))
        >>> terms = [("cross_entropy", 1.0), ("entropy", 0.1)]
        >>> problem = problems.Softmax(A, np.full(12, 1 / 12), loss=terms)
        >>> ridge = problem.convex_from_ridge()
        >>> bool(ridge >= -np.linalg.eigvalsh(problem.hessian(np.ones(3)))[0])
        True
        """
        return convex_from_ridge(self)


class Rescaled(RowProblem):
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
        function: FunctionName = "exp",
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
    def zero_is_stationary(self) -> bool:  # type: ignore[override]
        """True without offset for cosh, an even function, and for sinh, which vanishes at zero."""
        return self.function in ("cosh", "sinh") and self.offset is None

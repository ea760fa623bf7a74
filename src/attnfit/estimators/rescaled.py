"""Rescaled softmax regression as an estimator."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import choose
from attnfit.estimators.base import with_options
from attnfit.estimators.reading import Rows
from attnfit.estimators.shares import ShareRegressor
from attnfit.losses.elementwise import FUNCTIONS, FunctionName
from attnfit.losses.loss import Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.problems import Rescaled

Array = NDArray[np.float64]


@with_options
class RescaledSoftmaxRegressor(ShareRegressor):
    """Shares ``u / sum u`` fitted without dividing: ``u(X coef + offset)`` against ``y sum u`` in each group.

    Minimises ``sum over groups of 0.5 sum w (u - <u, 1> y)^2 + 0.5 sum w (row_penalty * X x)^2 + 0.5 ridge
    ||x||^2``.

    Parameters
    ----------
    function : {"exp", "cosh", "sinh"}
        The function u.
    ridge : float
        The loss is small wherever u is: with "exp" and a constant column it has no minimum without a penalty.
    row_penalty : float or array_like of shape (n,)
    outside_good : bool
        Add to each group a row of zeros whose target is one minus the sum of the others.
    %(options)s

    Attributes
    ----------
    coef_ : ndarray, shape (d,)
        Coefficients in the units of X.
    covariance_, standard_errors_ : ndarray, shapes (d, d) and (d,)
        Sandwich ``H^+ S H^+`` with one score a group where there are several groups, else one a row; NaN for
        a coefficient that the data do not identify. Computed when first asked for.
    loss_value_ : float
        Without the penalties.
    normaliser_ : float
        ``sum u`` of the training rows; where these form one group.
    r2_ : float
        Of the shares; computed when first asked for.
    result_ : attnfit.solvers.Result
    n_groups_, n_unbalanced_groups_ : int
        Number of groups, and of those whose targets do not sum to one (allowed).
    n_iter_, n_rows_, n_features_in_ : int
    feature_names_in_ : ndarray of str, shape (d,)
        Where X had names.

    Notes
    -----
    Source: "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression", Definitions 7.5 and 8.2
    (corrected).

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.estimators import RescaledSoftmaxRegressor
    >>> X = np.array([[1.0], [-1.0], [0.0]])
    >>> u = np.exp(0.5 * X[:, 0])
    >>> RescaledSoftmaxRegressor().fit(X, u / u.sum()).coef_.round(6)
    array([0.5])
    """

    _normaliser_name = "normaliser_"

    def __init__(
        self,
        function: FunctionName = "exp",
        ridge: float = 0.0,
        row_penalty: Any = 0.0,
        outside_good: bool = False,
        solver: Any = None,
        tol: float = 1e-8,
        max_iter: int = 100,
        random_state: Any = None,
        n_starts: int | Literal["auto"] = "auto",
        separation: Literal["warn", "drop", "keep"] = "warn",
        covariance: Literal["auto", "classic", "robust", "row", "cluster"] = "auto",
        weight_type: Literal["sampling", "frequency"] = "sampling",
    ) -> None:
        self._remember(locals())

    def _loss(self) -> Loss:
        choose(self.function, FUNCTIONS, "function")
        return SquaredRescaled(self.function)

    def _problem(self, rows: Rows) -> Rescaled:
        if self.function != "exp" and rows.counts is not None:
            raise ValueError(
                f"sample_weight repeats rows where there are no groups, for which function={self.function!r} "
                "has no form; pass groups (np.zeros(n) for one group) to weight the loss instead"
            )
        return Rescaled(
            rows.design,
            rows.target,
            function=self.function,
            groups=rows.groups,
            weights=rows.squared_weights,
            offset=rows.logit_offset,
            row_penalty=rows.row_penalty,
            ridge=self.ridge,
        )

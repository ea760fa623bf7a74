"""Exponential and hyperbolic regression as an estimator."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import r2_score
from sklearn.utils.validation import check_is_fitted

from attnfit.estimators.base import BaseRegressor, Limits
from attnfit.estimators.callbacks import Listeners, with_callbacks
from attnfit.estimators.elsewhere import is_elsewhere, read_elsewhere
from attnfit.estimators.reading import (
    linear_predictor,
    read_features,
    read_offset,
    read_penalty,
    read_target,
    read_weights,
)
from attnfit.losses.exponential import FUNCTIONS
from attnfit.problems import Exponential

Array = NDArray[np.float64]


class ExponentialRegressor(BaseRegressor):
    """Least squares of an unnormalised exponential: ``y = u(X coef + offset) + noise``.

    Minimises ``0.5 sum w (u(X x + offset) - y)^2 + 0.5 sum w (row_penalty * X x)^2 + 0.5 ridge ||x||^2``: a
    generalised linear model with normal errors and, for u = exp, a logarithmic link.

    Parameters
    ----------
    function : {"exp", "cosh", "sinh"}
        The function u.
    ridge : float
    row_penalty : float or array_like of shape (n,)
    solver : attnfit.solvers.Newton or GradientDescent, optional
    tol : float
        Largest change of a fitted logit that the next Newton step may still make, see `attnfit.minimize`.
    max_iter : int
    random_state : int, optional
        Seed of the row samples on large data.

    Attributes
    ----------
    coef_ : ndarray, shape (d,)
        Coefficients in the units of X. There is no intercept: add a column of ones.
    covariance_, standard_errors_ : ndarray, shapes (d, d) and (d,)
        Sandwich ``H^+ S H^+`` with one score a row; computed when first asked for.
    loss_value_ : float
        ``0.5 sum w (u - y)^2``, without the penalties.
    r2_ : float
        Computed when first asked for.
    result_ : attnfit.solvers.Result
    n_iter_, n_rows_, n_features_in_ : int
    feature_names_in_ : ndarray of str, shape (d,)
        Where X had names.

    Notes
    -----
    Source: "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression", Definition 7.5.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.estimators import ExponentialRegressor
    >>> X = np.column_stack([np.ones(4), np.arange(4.0)])
    >>> model = ExponentialRegressor().fit(X, np.exp(1.0 - 0.5 * np.arange(4.0)))
    >>> model.coef_.round(6)
    array([ 1. , -0.5])
    """

    def __init__(
        self,
        function: str = "exp",
        ridge: float = 0.0,
        row_penalty: Any = 0.0,
        solver: Any = None,
        tol: float = 1e-8,
        max_iter: int = 100,
        random_state: Any = None,
    ) -> None:
        self.function = function
        self.ridge = ridge
        self.row_penalty = row_penalty
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    @with_callbacks
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        offset: Any = None,
        *,
        checkpoint: str | PathLike[str] | None = None,
        resume: bool = True,
        memory_limit: str | int | None = None,
    ) -> ExponentialRegressor:
        """Fit the coefficients.

        Parameters
        ----------
        X : array, sparse matrix, memory map or data frame, shape (n, d)
        y : array_like, shape (n,)
        sample_weight : array_like, shape (n,), optional
            A weight w is the same as the row w times.
        offset : array_like, shape (n,), optional
            Added to ``X coef``.
        checkpoint, resume, memory_limit
            As in `attnfit.minimize`: a file from which the fit goes on after a crash, whether it does, and
            the bytes that the process may hold, such as "1GB".

        Returns
        -------
        ExponentialRegressor
            The estimator itself.

        Raises
        ------
        ValueError
            On input that is not finite, of the wrong shape or sign; the message names argument and index.
        OverflowError
            If the squared output exceeds float64 at the start.

        Notes
        -----
        With a Dask array or data frame for X, or y on disk (`attnfit.designs.open_source`), the data stay
        where they are, and ``r2_`` is NaN.
        """
        listeners = Listeners(self, X, y, {"sample_weight": sample_weight, "offset": offset})
        limits = Limits(checkpoint, resume, memory_limit)
        if is_elsewhere(X, y):
            given = read_elsewhere(self, X, y, None, sample_weight, offset, grouped=False)
            there = Exponential(
                given.design,
                given.target,
                function=self.function,
                weights=given.loss_weights,
                offset=given.logit_offset,
                row_penalty=self.row_penalty,
                ridge=self.ridge,
            )
            self.n_features_in_ = there.n_unknowns
            self._solve(there, None, listeners, limits)
            listeners.finish()
            return self
        design = read_features(self, X, reset=True)
        n = int(design.shape[0])
        target = read_target(self, y, n)
        weights, shift = read_weights(sample_weight, n, None), read_offset(offset, n)
        problem = Exponential(
            design,
            target,
            function=self.function,
            weights=weights,
            offset=shift,
            row_penalty=read_penalty(self.row_penalty, n, weights),
            ridge=self.ridge,
        )
        self._solve(problem, (target, weights, None), listeners, limits)
        listeners.finish()
        return self

    def predict(self, X: Any, offset: Any = None) -> Array:
        """Return ``u(X coef_ + offset)``, shape (n,).

        Raises
        ------
        OverflowError
            Where the answer exceeds float64.
        """
        check_is_fitted(self)
        design = read_features(self, X, reset=False)
        z = linear_predictor(design, self._point, read_offset(offset, int(design.shape[0])))
        with np.errstate(over="ignore"):
            out = FUNCTIONS[self.function](z, 0.0)[0]
        if not np.isfinite(out).all():
            i = int(np.flatnonzero(~np.isfinite(out))[0])
            raise OverflowError(
                f"{self.function}({z[i]:.4g}) of row {i} overflows float64; "
                "X lies far outside the training data"
            )
        return out

    def score(self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None) -> float:
        """Return the coefficient of determination of ``predict(X, offset)``."""
        return float(r2_score(y, self.predict(X, offset=offset), sample_weight=sample_weight))

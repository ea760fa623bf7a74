"""Regressions of outcomes without a normaliser as estimators: exponential, hyperbolic, Poisson."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import d2_tweedie_score, r2_score
from sklearn.utils.validation import check_is_fitted

from attnfit.data.inputs import as_vector
from attnfit.estimators.absorbing import AbsorbingMixin, read_absorb
from attnfit.estimators.base import BaseRegressor, Limits, with_callbacks, with_options
from attnfit.estimators.formula import OutcomeFormulaMixin
from attnfit.estimators.outcome_effects import OutcomeEffectsMixin
from attnfit.estimators.reading import (
    Rows,
    linear_predictor,
    read_features,
    read_groups,
    read_offset,
    read_target,
    read_weights,
)
from attnfit.losses.elementwise import FUNCTIONS, FunctionName
from attnfit.objectives.models import Exponential, Poisson

Array = NDArray[np.float64]


class OutcomeRegressor(AbsorbingMixin, OutcomeFormulaMixin, OutcomeEffectsMixin, BaseRegressor):
    """A regression of outcomes without a normaliser on ``u(X coef + offset)``: fit and prediction."""

    row_penalty: Any
    ridge: float

    @with_callbacks
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        offset: Any = None,
        *,
        absorb: Any = None,
        clusters: Any = None,
        checkpoint: str | PathLike[str] | None = None,
        resume: bool = True,
        memory_limit: str | int | None = None,
    ) -> Self:
        """Fit the coefficients.

        Parameters
        ----------
        X : array, sparse matrix, memory map or data frame, shape (n, d)
        y : array_like, shape (n,)
        sample_weight : array_like, shape (n,), optional
            A weight w is the same as the row w times.
        offset : array_like, shape (n,), optional
            Added to ``X coef``.
        absorb : list, optional
            Labels of sets of fixed effects, which are fitted without a column each: names of columns of the
            data frame X, which are then no features, or arrays of shape (n,); a tuple is one set, of
            combinations. By default those of the constructor. See `attnfit.problems.Poisson`.
        clusters : array_like, shape (n,) or (n, 2), optional
            Labels of what was drawn independently, one set or two; or the name of a column of X, which is
            then no feature. They enter the standard errors only.
        checkpoint, resume, memory_limit
            As in `attnfit.minimize`: a file from which the fit goes on after a crash, whether it does, and
            the bytes that the process may hold, such as "1GB".

        Returns
        -------
        self

        Raises
        ------
        ValueError
            On input that is not finite, of the wrong shape or sign; the message names argument and index.
        OverflowError
            If the loss exceeds float64 at the start.
        NotImplementedError
            For ``absorb`` with data on Dask, a row penalty, a checkpoint or a memory limit.

        Notes
        -----
        With a Dask array or data frame for X, or y on disk (`attnfit.data.open_source`), the data stay
        where they are, and ``r2_`` is NaN.
        """
        rows, clusters = read_groups(X, clusters, "clusters")
        rows, labels = read_absorb(rows, self.absorb if absorb is None else absorb)
        given = {"sample_weight": sample_weight, "offset": offset}
        limits = Limits(checkpoint, resume, memory_limit)
        return self._fit(rows, y, given, limits, clusters=clusters, labels=labels)

    def _read(self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None) -> Rows:
        design = read_features(self, X, reset=True)
        n = int(design.shape[0])
        y, weights = read_target(self, y, n), read_weights(sample_weight, n, None)
        shift = read_offset(offset, n)
        penalty = as_vector(self.row_penalty, n, "row_penalty", scalar=True)
        if weights is not None and penalty.any():
            penalty = penalty * np.sqrt(weights)
        return Rows(design, y, None, weights, weights, shift, penalty, y=y, weights=weights)

    def predict(self, X: Any, offset: Any = None, absorb: Any = None) -> Array:
        """Return the outcome that the model expects, ``u(X coef_ + effects + offset)``, shape (n,).

        Parameters
        ----------
        X : array, sparse matrix, memory map or data frame, shape (n, d)
        offset : array_like, shape (n,), optional
        absorb : list, optional
            Labels of the effects as in `fit`; those that the constructor names are taken from X. Rows with a
            label that the fit has not seen, or with levels that cannot be compared, get NaN.

        Raises
        ------
        OverflowError
            Where the answer exceeds float64.
        ValueError
            If labels are missing.
        """
        check_is_fitted(self)
        X, effects = self._effects_of(X, absorb)
        design = read_features(self, self._rows_of(X), reset=False)
        z = linear_predictor(design, self._point, read_offset(offset, int(design.shape[0])))
        z = z if effects is None else z + effects
        with np.errstate(over="ignore"):
            out = FUNCTIONS[self._function](z, 0.0)[0]
        bad = ~np.isfinite(out) if effects is None else np.isinf(out)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise OverflowError(
                f"{self._function}({z[i]:.4g}) of row {i} overflows float64; "
                "X lies far outside the training data"
            )
        return out

    def score(
        self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None, absorb: Any = None
    ) -> float:
        """Return the coefficient of determination of ``predict(X, offset, absorb)``."""
        predicted = self.predict(X, offset=offset, absorb=absorb)
        return float(r2_score(y, predicted, sample_weight=sample_weight))


@with_options
class ExponentialRegressor(OutcomeRegressor):
    """Least squares of an unnormalised exponential: ``y = u(X coef + offset) + noise``.

    Minimises ``0.5 sum w (u(X x + offset) - y)^2 + 0.5 sum w (row_penalty * X x)^2 + 0.5 ridge ||x||^2``: a
    generalised linear model with normal errors and, for u = exp, a logarithmic link.

    Parameters
    ----------
    function : {"exp", "cosh", "sinh"}
        The function u.
    ridge : float
    row_penalty : float or array_like of shape (n,)
    %(options)s
    absorb : list of str, optional
        Sets of fixed effects by name of the column of X; a tuple of names is one set, of combinations. See
        `fit`.

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
        function: FunctionName = "exp",
        ridge: float = 0.0,
        row_penalty: Any = 0.0,
        solver: Any = None,
        tol: float = 1e-8,
        max_iter: int = 100,
        random_state: Any = None,
        n_starts: int | Literal["auto"] = "auto",
        separation: Literal["warn", "drop", "keep"] = "warn",
        covariance: Literal["auto", "classic", "robust", "row", "cluster"] = "auto",
        weight_type: Literal["sampling", "frequency"] = "sampling",
        absorb: Any = None,
    ) -> None:
        self._remember(locals())

    @property
    def _function(self) -> str:
        return str(self.function)

    def _problem(self, rows: Rows) -> Exponential:
        return Exponential(
            rows.design,
            rows.target,
            function=self.function,
            weights=rows.loss_weights,
            offset=rows.logit_offset,
            row_penalty=rows.row_penalty,
            ridge=self.ridge,
        )


@with_options
class PoissonRegressor(OutcomeRegressor):
    """Poisson regression, or pseudo-likelihood (PPML): ``E y = exp(X coef + offset)``.

    Minimises ``sum w (exp(eta) - y eta) + 0.5 sum w (row_penalty * X x)^2 + 0.5 ridge ||x||^2`` with
    ``eta = X x + offset``. Unlike a regression of logarithms it takes zeros, and needs nothing but the mean
    to be right.

    Parameters
    ----------
    ridge : float
    row_penalty : float or array_like of shape (n,)
    %(options)s
    absorb : list of str, optional
        Sets of fixed effects by name of the column of X; a tuple of names is one set, of combinations. See
        `fit`.

    Attributes
    ----------
    coef_ : ndarray, shape (d,)
        Coefficients in the units of X. There is no intercept: add a column of ones.
    covariance_, standard_errors_ : ndarray, shapes (d, d) and (d,)
        Sandwich ``H^+ S H^+`` with one score a row, which does not need the variance to equal the mean;
        computed when first asked for.
    loss_value_ : float
        ``sum w (exp(eta) - y eta)``, without the penalties.
    r2_ : float
        Computed when first asked for.
    result_ : attnfit.solvers.Result
    n_iter_, n_rows_, n_features_in_ : int
    feature_names_in_ : ndarray of str, shape (d,)
        Where X had names.

    Notes
    -----
    Source: Santos Silva and Tenreyro, "The Log of Gravity" (2006), doi:10.1162/rest.88.4.641.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.estimators import PoissonRegressor
    >>> X = np.column_stack([np.ones(5), np.arange(5.0)])
    >>> model = PoissonRegressor().fit(X, [2, 3, 6, 7, 12])
    >>> model.coef_.round(4)
    array([0.7501, 0.4313])
    >>> model.predict([[1.0, 5.0]]).round(2)
    array([18.3])
    """

    def __init__(
        self,
        ridge: float = 0.0,
        row_penalty: Any = 0.0,
        solver: Any = None,
        tol: float = 1e-8,
        max_iter: int = 100,
        random_state: Any = None,
        n_starts: int | Literal["auto"] = "auto",
        separation: Literal["warn", "drop", "keep"] = "warn",
        covariance: Literal["auto", "classic", "robust", "row", "cluster"] = "auto",
        weight_type: Literal["sampling", "frequency"] = "sampling",
        absorb: Any = None,
    ) -> None:
        self._remember(locals())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags

    def _problem(self, rows: Rows) -> Poisson:
        return Poisson(
            rows.design,
            rows.target,
            weights=rows.loss_weights,
            offset=rows.logit_offset,
            row_penalty=rows.row_penalty,
            ridge=self.ridge,
        )

    def score(
        self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None, absorb: Any = None
    ) -> float:
        """Return ``1 - D / D_0``, the share of the Poisson deviance of the constant that is explained."""
        # A row that was separated is predicted to be zero, exactly where it is.
        predicted = np.maximum(self.predict(X, offset=offset, absorb=absorb), np.finfo(np.float64).tiny)
        return float(d2_tweedie_score(y, predicted, sample_weight=sample_weight, power=1))

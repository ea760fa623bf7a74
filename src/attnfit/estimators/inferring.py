"""Standard errors, tests and fit statistics of the estimators: thin methods over `attnfit.inference`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from attnfit.estimators.summary import Summary, at_hand, summarise
from attnfit.inference import Covariance, Fitted
from attnfit.inference.absorbed import AbsorbedFitted
from attnfit.inference.covariance import Kind
from attnfit.inference.exact_ties import ExactFitted, ExactTies
from attnfit.inference.hypotheses import LikelihoodRatio, WaldTest, likelihood_ratio, wald
from attnfit.inference.resampling import Resampled, bootstrap, jackknife
from attnfit.inference.statistics import FitStatistics, statistics_of
from attnfit.objectives.rows import RowProblem
from attnfit.solvers import Result

Array = NDArray[np.float64]
WEIGHT_TYPES = ("sampling", "frequency")


P = ParamSpec("P")
R = TypeVar("R")


class ParameterAndMethod(Generic[P, R]):
    """A parameter of the constructor and a method of the same name: `get_params` gives the parameter, the
    attribute is the method.
    """

    def __init__(self, method: Callable[Concatenate[Any, P], R]) -> None:
        self.method, self.__doc__ = method, method.__doc__

    def __set_name__(self, owner: Any, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: Any = None) -> Callable[P, R]:
        method = self.method if model is None else MethodType(self.method, model)
        return cast("Callable[P, R]", method)

    def __set__(self, model: Any, value: Any) -> None:
        model.__dict__[self.name] = value


@dataclass(frozen=True)
class Basis:
    """What inference needs of a fit besides its result.

    Attributes
    ----------
    problem : RowProblem
        Without absorbed effects, and with several ones in a group as counts.
    counts, kept : ndarray or None
        As of `attnfit.estimators.reading.Rows`.
    n_outside : int
        Outside goods: the last rows of the design.
    weight_type : {"sampling", "frequency"}
    clusters : optional
        Labels given to the fit.
    """

    problem: RowProblem
    counts: Array | None
    kept: NDArray[np.bool_] | None
    n_outside: int
    weight_type: str
    clusters: Any


class InferenceMixin:
    """What a fit says beyond its coefficients."""

    coef_: Array
    result_: Result
    weight_type: str
    tol: float
    _basis: Basis
    _limit: Array | None

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters of the constructor by name."""
        params: dict[str, Any] = super().get_params(deep)  # type: ignore[misc]
        return params | {"covariance": self.__dict__["covariance"]}

    def _training_problem(self, wanted: str) -> RowProblem:
        raise AssertionError

    @cached_property
    def _fitted(self) -> Fitted:
        """The fit as inference sees it, made when first asked for."""
        return self._make_fitted()

    def _make_fitted(self) -> Fitted:
        basis, result = self._basis, self.result_
        separation, end = result.separation, result.absorbed
        counts = basis.counts
        if counts is not None and basis.n_outside:
            counts = np.concatenate([counts, np.ones(basis.n_outside)])
        kind: Any = ExactFitted if isinstance(result.problem, ExactTies) else Fitted
        given: tuple[Any, ...] = (result.problem if kind is ExactFitted else basis.problem,)
        n_separated = 0 if separation is None else len(separation.rows)
        point = result.x if self._limit is None else self._limit
        if end is not None:
            kind, given = AbsorbedFitted, (result.problem, end)
            n_separated = end.prepared.dropped.n_without_weight
        fitted: Fitted = kind(
            *given,
            point if separation is None else separation.point,
            finite=np.isfinite(result.x),
            n_separated=n_separated,
            determined=separation is None or separation.has_rest,
            counts=counts,
            kept=basis.kept,
            n_outside=basis.n_outside,
            weight_type=basis.weight_type,
            clusters=basis.clusters,
        )
        return fitted

    # ---- covariances

    @ParameterAndMethod
    def covariance(
        self, kind: Kind = "auto", clusters: Any = None, correction: Any = True, posterior: bool = True
    ) -> Array:
        """Return the covariance of the coefficients, shape (d, d); another kind never refits.

        Parameters
        ----------
        kind : {"auto", "classic", "robust", "row", "cluster"}
            * classic: the inverse information; of the exponential squared loss ``s^2 (J^T J)^+``. For choices
              and counts.
            * robust: the sandwich ``k B M B`` with B the inverse information and M the sum of outer products
              of scores of groups; of rows, where there is one group or none.
            * row: the same with scores of rows, taken as independent within groups.
            * cluster: with scores of clusters; of two sets of labels ``M_a + M_b - M_ab``.
            * auto: cluster where clusters are given; classic for choices (cross entropy or kl, one 1 in each
              group) without weights or with frequency weights; else robust.
        clusters : array_like, shape (n,) or (n, 2), optional
            One label a row of the training data, or two; those given to ``fit`` by default.
        correction : bool, "fixest" or float
            The factor k: ``U / (U - 1)`` with U units (of two sets: of the smaller), 1, that of fixest, or a
            number.
        posterior : bool
            With a ridge or row penalty and kind classic: the inverse curvature of the penalised loss, a
            posterior covariance, if True; the variance ``B H B`` of the penalised estimate if False.

        Raises
        ------
        ValueError
            If the kind has no meaning for the loss, the targets or the weights; the message says which does.

        Notes
        -----
        Coefficients that the data do not identify have no error; with a penalty scores lose their mean before
        they are squared. Sources: White (1982) doi:10.2307/1912526; Cameron, Gelbach and Miller (2011)
        doi:10.1198/jbes.2010.07136.
        """
        return self._find_covariance(kind, clusters, correction, posterior=posterior).matrix

    def _find_covariance(
        self,
        kind: Kind | None = None,
        clusters: Any = None,
        correction: Any = True,
        df: float | str = "units",
        *,
        posterior: bool = True,
    ) -> Covariance:
        """Return a covariance; that of the constructor's kind by default."""
        check_is_fitted(self)
        if kind is None and clusters is None and correction is True:
            found: Covariance = self._covariance
            return found.with_df(df)
        self._training_problem("covariance")
        if kind is None:
            kind = self.__dict__["covariance"] if clusters is None else "cluster"
        return self._fitted.covariance(kind, clusters, correction, posterior=posterior).with_df(df)

    @cached_property
    def _covariance(self) -> Covariance:
        self._training_problem("covariance_")
        return self._fitted.covariance(self.__dict__["covariance"])

    @property
    def covariance_(self) -> Array:
        """Covariance of the coefficients, shape (d, d); reads the data when first asked for."""
        return self._covariance.matrix

    @property
    def standard_errors_(self) -> Array:
        """Standard errors of the coefficients, shape (d,); NaN where the data do not identify one."""
        return self._covariance.standard_errors

    @property
    def covariance_kind_(self) -> str:
        """Kind of `covariance_`."""
        return self._covariance.kind

    @property
    def n_units_(self) -> float:
        """Number of independent draws behind `covariance_`; of copies with frequency weights."""
        return self._covariance.n_units

    @property
    def df_(self) -> float:
        """Degrees of freedom of the t distribution of intervals; infinite where it is normal."""
        return self._covariance.df

    def conf_int(
        self,
        level: float = 0.95,
        kind: Kind | None = None,
        clusters: Any = None,
        correction: Any = True,
        df: float | str = "units",
    ) -> Array:
        """Return intervals of the coefficients, shape (d, 2).

        Parameters
        ----------
        level : float
            Cover.
        kind, clusters, correction
            As in `covariance`; by default those of the constructor and of ``fit``.
        df : "units", "normal" or float
            Degrees of freedom: the number of units less one, none (normal distribution), or a number.
        """
        found = self._find_covariance(kind, clusters, correction, df)
        half = found.quantile(level) * found.standard_errors
        return np.column_stack([self.coef_ - half, self.coef_ + half])

    def bootstrap(self, n: int = 999, clusters: Any = None, random_state: Any = None) -> Resampled:
        """Fit samples of units drawn with replacement; all fits share the reads of the data.

        Parameters
        ----------
        n : int
            Number of fits.
        clusters : array_like, shape (n_rows,), optional
            What is drawn as one: a label a row, those given to ``fit`` by default; else groups, or rows where
            the loss has none. No cluster may split a group.
        random_state : int or numpy.random.Generator, optional

        Returns
        -------
        Resampled
            ``coefs``, ``covariance()``, ``standard_errors``, ``interval(level)``, and the status of each fit:
            samples whose loss has no finite minimum say so, and are left out of errors and intervals.

        Raises
        ------
        ValueError
            If there is one unit only, two sets of labels, or data on Dask.
        AttributeError
            Of a model that was pickled or saved: it has no training data.

        Notes
        -----
        Frequency weights are drawn copy by copy. Source: Efron (1979) doi:10.1214/aos/1176344552.

        Examples
        --------
        >>> from attnfit import SoftmaxRegressor, datasets
        >>> cars = datasets.load_car_shares()
        >>> model = SoftmaxRegressor("cross_entropy").fit(cars.A, cars.b, groups=cars.groups)
        >>> model.bootstrap(50, random_state=0)
        50 bootstrap fits of 20 units: 50 converged
        """
        self._training_problem("bootstrap")
        return bootstrap(self._fitted, n, clusters, random_state, self.tol)

    def jackknife(self, clusters: Any = None) -> Resampled:
        """Fit all data but one unit, for each unit; parameters and errors as for `bootstrap`."""
        self._training_problem("jackknife")
        return jackknife(self._fitted, clusters, self.tol)

    def summary(
        self,
        kind: Kind | None = None,
        clusters: Any = None,
        level: float = 0.95,
        df: float | str = "units",
        correction: Any = True,
    ) -> Summary:
        """Return the coefficient table: ``print`` it, or use its ``to_frame``, ``to_markdown``, ``to_latex``.

        Parameters are those of `conf_int`. The table says which kind of errors it shows, and why.

        Returns
        -------
        Summary
        """
        check_is_fitted(self)
        found = None
        plain = kind is None and clusters is None and correction is True
        if not plain or at_hand(self, "_covariance"):
            found = self._find_covariance(kind, clusters, correction, df)
        return summarise(self, found, level)

    # ---- fit statistics and tests

    @cached_property
    def _statistics(self) -> FitStatistics:
        self._training_problem("fit_statistics")
        return statistics_of(self._fitted)

    def fit_statistics(self, alternatives: Any = None) -> FitStatistics:
        """Return how well the model fits: likelihoods, their ratios, information criteria, hits, errors.

        Parameters
        ----------
        alternatives : array_like, shape (n,), optional
            The label of the alternative of each row: adds the likelihood of constants alone.
        """
        check_is_fitted(self)
        if alternatives is None:
            return self._statistics
        self._training_problem("fit_statistics")
        return statistics_of(self._fitted, alternatives)

    def wald_test(
        self,
        R: Any,
        r: Any = None,
        kind: Kind | None = None,
        clusters: Any = None,
        correction: Any = True,
        df: float | str = "units",
    ) -> WaldTest:
        """Test the linear restrictions ``R coef = r``.

        Parameters
        ----------
        R : str or array_like, shape (q, d)
            Equations between names of columns such as ``"time = 2*cost, asc_car = 0.5"`` (needs the extra
            ``formula``), or a matrix.
        r : array_like, shape (q,), optional
            Zeros by default.
        kind, clusters, correction, df
            As in `conf_int`.

        Raises
        ------
        ValueError
            If restrictions repeat one another, concern what is not identified, or outnumber the units.
        """
        found = self._find_covariance(kind, clusters, correction, df)
        return wald(self.coef_, found, R, r, [str(name) for name in self._names()])

    def likelihood_ratio_test(self, restricted: Any) -> LikelihoodRatio:
        """Compare with a model that restricts this one: ``2 (L - L_r)`` against chi-squared.

        Raises
        ------
        ValueError
            If one of them has no likelihood, the data differ, or it is no restriction.
        """
        check_is_fitted(self)
        self._training_problem("likelihood_ratio_test")
        restricted._training_problem("likelihood_ratio_test")
        return likelihood_ratio(self, restricted)

    def _names(self) -> Any:
        return getattr(self, "feature_names_in_", [f"x{j}" for j in range(len(self.coef_))])

"""How much to shrink: a ridge path by cross-validation over groups or clusters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from os import PathLike
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

from attnfit import metrics
from attnfit.data.inputs import choose, parse_groups
from attnfit.estimators import reading
from attnfit.estimators.base import with_options
from attnfit.estimators.softmax import SoftmaxRegressor
from attnfit.inference.units import read_clusters
from attnfit.solvers import minimize_many

__all__ = ["SoftmaxRegressorCV"]

Array = NDArray[np.float64]
SCORINGS = {"log_loss": metrics.log_loss, "brier": metrics.brier}
# The default path: so many ridges, the smallest of this share of the largest.
N_RIDGES, SMALLEST = 20, 1e-6
# Columns whose standard deviations differ by more than this are not shrunk alike.
UNEQUAL = 100.0


@with_options
class SoftmaxRegressorCV(SoftmaxRegressor):
    """A softmax model whose ridge is chosen by cross-validation.

    Parameters
    ----------
    ridges : array_like, optional
        Values to try, on all data; a fold's training takes ``ridge n_train / n`` with n groups, since the
        loss is a sum. By default 20 values from the largest curvature at zero down to 1e-6 of it, and 0
        unless some direction is flat.
    cv : int, splitter or iterable of (train, test)
        Folds of groups, or of clusters where these are given; arrays are numbers of rows.
    scoring : {"log_loss", "brier"}
    one_standard_error : bool
        Take the largest ridge whose loss is within one standard error of the least.
    loss : str
    outside_good : bool
    %(options)s

    Attributes
    ----------
    ridge_ : float
        The ridge chosen; all else is as of `SoftmaxRegressor` fitted with it.
    ridges_ : ndarray, shape (k,)
        Those tried, the largest first.
    scores_ : ndarray, shape (k, n_folds)
        Losses of the held-out groups: smaller is better.

    Examples
    --------
    >>> from attnfit import datasets
    >>> from attnfit.model_selection import SoftmaxRegressorCV
    >>> travel = datasets.load_travel_mode()
    >>> scaled = travel.A / travel.A.std(axis=0)
    >>> model = SoftmaxRegressorCV(ridges=[0.1, 10.0, 1000.0]).fit(scaled, travel.b, groups=travel.groups)
    >>> model.ridge_
    0.1
    >>> model.scores_.shape
    (3, 5)
    """

    row_penalty = 0.0
    n_starts = "auto"

    def __init__(
        self,
        ridges: Any = None,
        cv: Any = 5,
        scoring: Literal["log_loss", "brier"] = "log_loss",
        one_standard_error: bool = False,
        loss: str = "cross_entropy",
        outside_good: bool = False,
        solver: Any = None,
        tol: float = 1e-8,
        max_iter: int = 100,
        random_state: Any = None,
        separation: Literal["warn", "drop", "keep"] = "warn",
        covariance: Literal["auto", "classic", "robust", "row", "cluster"] = "auto",
        weight_type: Literal["sampling", "frequency"] = "sampling",
    ) -> None:
        self._remember(locals())

    @property
    def ridge(self) -> float:  # type: ignore[override]
        """The ridge chosen; zero before the fit."""
        return float(self.__dict__.get("ridge_", 0.0))

    @property
    def ties(self) -> None:
        """Several ones in a group are counts."""

    def fit(  # type: ignore[override]  # folds are made of rows in memory
        self,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        offset: Any = None,
        *,
        clusters: Any = None,
    ) -> Self:
        """Choose the ridge, and fit with it on all data; parameters as in `SoftmaxRegressor.fit`.

        Raises
        ------
        ValueError
            If there are fewer groups or clusters than folds.
        """
        score = choose(self.scoring, SCORINGS, "scoring")
        X, groups = reading.read_groups(X, groups)
        X, clusters = reading.read_groups(X, clusters, "clusters")
        design = reading.read_features(self, X, reset=True)
        n = int(design.shape[0])
        sets = parse_groups(groups, n)
        numbers = reading.group_numbers(sets, n)
        if len(sets) < 2:
            raise ValueError("cross-validation holds out groups; pass groups with at least two labels")
        units = numbers if clusters is None else read_clusters(clusters, n)[0]
        data = {
            "y": reading.read_target(self, y, n),
            "sample_weight": reading.read_weights(sample_weight, n, sets),
            "offset": reading.read_offset(offset, n),
        }
        matrix = design.block(slice(0, n))
        self._warn_of_units(matrix)
        ridges = self._ridges(matrix, data, numbers)
        self.ridges_, self.scores_ = ridges, self._held_out(score, matrix, data, numbers, ridges, units)
        mean = self.scores_.mean(axis=1)
        best = int(np.argmin(mean))
        if self.one_standard_error:
            error = self.scores_[best].std(ddof=1) / np.sqrt(self.scores_.shape[1])
            best = int(np.argmax(mean <= mean[best] + error))
        self.ridge_ = float(ridges[best])
        super().fit(X, y, groups=numbers, sample_weight=sample_weight, offset=offset, clusters=clusters)
        return self

    def _folds(self, units: NDArray[np.intp]) -> Iterable[tuple[Any, Any]]:
        n_units = len(np.unique(units))
        if isinstance(self.cv, int | np.integer):
            if not 2 <= self.cv <= n_units:
                raise ValueError(
                    f"cv={self.cv} folds need at least as many groups or clusters, not {n_units}"
                )
            return list(GroupKFold(int(self.cv)).split(units, groups=units))
        splits = self.cv.split(units, groups=units) if hasattr(self.cv, "split") else self.cv
        return [(np.asarray(train), np.asarray(test)) for train, test in splits]

    def _plain(self, ridge: float) -> SoftmaxRegressor:
        """Return the model that this one is with a given ridge."""
        own = ("ridges", "cv", "scoring", "one_standard_error")
        params = {name: value for name, value in self.get_params(deep=False).items() if name not in own}
        return SoftmaxRegressor(**params, ridge=ridge)

    def _held_out(self, score: Any, matrix: Any, data: Any, numbers: Any, ridges: Array, units: Any) -> Array:
        """Return the losses on the held-out groups, shape (n_ridges, n_folds); all fits share their reads."""
        folds = list(self._folds(units))
        problem = self._problem_of(matrix, data, numbers)
        labels = problem.rows.groups.labels
        kept, penalties = [], []
        for train, test in folds:
            split = np.intersect1d(numbers[train], numbers[test])
            if len(split):
                raise ValueError(f"cv puts rows of group {split[0]} into training and test; split by groups")
            inside = np.isin(labels, numbers[train])
            kept.append(np.repeat(inside[:, None].astype(np.float64), len(ridges), axis=1))
            penalties.append(ridges * inside.mean())
        many = minimize_many(
            problem,
            np.hstack(kept),
            ridge=np.concatenate(penalties),
            tol=self.tol,
            max_iter=self.max_iter,
            random_state=self.random_state,
            # A fold without a finite minimum has shares, and those are what is judged.
            separation="keep",
        )
        losses = []
        for k, (_, test) in enumerate(folds):
            own = {name: None if of is None else of[test] for name, of in data.items()}
            rows = self._problem_of(matrix[test], own, numbers[test])
            for x in many.x[k * len(ridges) : (k + 1) * len(ridges)]:
                shares = rows.predict(x)[: len(test)]
                args = own["y"], shares, numbers[test], own["sample_weight"]
                losses.append(score(*args, outside_good=self.outside_good))
        return np.reshape(losses, (len(folds), len(ridges))).T

    def _problem_of(self, matrix: Any, data: Any, numbers: Any) -> Any:
        """Return the problem of some rows without a ridge."""
        model = self._plain(0.0)
        return model._problem(model._read(matrix, groups=numbers, **data))

    def _ridges(self, matrix: Any, data: dict[str, Any], numbers: Any) -> Array:
        if self.ridges is not None:
            given = np.sort(np.unique(np.asarray(self.ridges, dtype=np.float64)))[::-1]
            if not len(given) or not (np.isfinite(given) & (given >= 0.0)).all():
                raise ValueError("ridges must be finite numbers >= 0, at least one")
            return np.asarray(given)
        problem = self._problem_of(matrix, data, numbers)
        at = problem.evaluate(np.zeros(problem.n_unknowns))
        largest = float(np.diag(problem.hessian_at(at, gauss_newton=True)).max())
        path = largest * np.geomspace(1.0, SMALLEST, N_RIDGES)
        return path if problem.unseen_directions(at).shape[1] else np.append(path, 0.0)

    def _warn_of_units(self, matrix: Any) -> None:
        mean = np.asarray(matrix.mean(axis=0)).reshape(-1)
        squares = np.asarray((matrix * matrix).mean(axis=0)).reshape(-1)
        spread = np.sqrt(np.maximum(squares - mean**2, 0.0))
        spread = spread[spread > 0.0]
        if len(spread) and spread.max() > UNEQUAL * spread.min():
            warnings.warn(
                "standard deviations of columns differ by more than 100: a ridge shrinks the coefficients of "
                "small columns most; bring the columns to one scale",
                UserWarning,
                stacklevel=3,
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model, as a `SoftmaxRegressor` with the ridge chosen."""
        plain = self._plain(self.ridge_)
        state = plain.__dict__
        for name, value in self.__dict__.items():
            if name not in state and name not in ("ridges", "cv", "scoring", "one_standard_error"):
                state[name] = value
        plain.save(path)

"""What all estimators share: the fit of a problem, and the report on it; scikit-learn's callback protocol,
where the installed version has one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import NotFittedError
from sklearn.metrics import r2_score

from attnfit.data import Column
from attnfit.data.inputs import choose, is_dask, library_and_index
from attnfit.data.sources import Source
from attnfit.estimators.absorbing import Absorbed
from attnfit.estimators.formula import ATTRIBUTES
from attnfit.estimators.inferring import WEIGHT_TYPES, Basis, InferenceMixin
from attnfit.estimators.reading import Rows, read_elsewhere
from attnfit.inference.covariance import KINDS
from attnfit.objectives.rows import RowProblem
from attnfit.solvers import Record, Result, minimize

if TYPE_CHECKING:
    from attnfit.certificates import Certificate

__all__ = ["CallbackSupportMixin", "Listeners", "with_callbacks"]

try:
    from sklearn.callback import CallbackSupportMixin
    from sklearn.callback import with_callbacks as _with_callbacks
except ImportError:  # scikit-learn < 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's mixin."""

    def _with_callbacks(method: Any) -> Any:
        """Return the method unchanged."""
        return method


P = ParamSpec("P")
R = TypeVar("R")


def with_callbacks(method: Callable[P, R]) -> Callable[P, R]:
    """Return a method that tells the estimator's callbacks where scikit-learn has them, with its own type."""
    managed: Callable[P, R] = _with_callbacks(method)
    return managed


LAZY = (
    *("_covariance", "r2_", "certificate_", "certified_radius_"),
    *("_statistics",),
)
OPTIONS = """solver : attnfit.solvers.Newton or GradientDescent, optional
    tol : float
        Largest change of a fitted logit that the next Newton step may still make, see `attnfit.minimize`.
    max_iter : int
    random_state : int, optional
        Seed of the row samples on large data.
    n_starts : int or "auto"
        Descents of a loss that is not convex, see `attnfit.minimize`.
    separation : {"warn", "drop", "keep"}
        What becomes of data without a finite minimum, see `attnfit.minimize`.
    covariance : {"auto", "classic", "robust", "row", "cluster"}
        Kind of the standard errors, see `covariance` below.
    weight_type : {"sampling", "frequency"}
        What weights are: inverse probabilities (also importance or decay), or numbers of copies. Coefficients
        do not depend on it."""
T = TypeVar("T")
Array = NDArray[np.float64]


def has_callbacks(estimator: Any) -> bool:
    """Whether anyone wants to be told about the estimator's fit."""
    return bool(getattr(estimator, "_skl_callbacks", None)) or hasattr(estimator, "_parent_callback_ctx")


class Listeners:
    """Tell an estimator's callbacks about the fit, every evaluation of the loss being one task.

    Parameters
    ----------
    estimator : estimator
        With callbacks.
    X, y : array_like
        The training data as the user passed them.
    metadata : dict
        Further arguments of ``fit``; those that are None are left out.
    """

    def __init__(self, estimator: Any, X: Any, y: Any, metadata: dict[str, Any]) -> None:
        self._estimator = estimator
        self._data = {
            "X": X,
            "y": y,
            "metadata": {name: value for name, value in metadata.items() if value is not None},
        }
        self._context = estimator._init_callback_context(max_subtasks=None)
        self._context.call_on_fit_task_begin(estimator=estimator, **self._data)

    def tell(self, record: Record) -> bool:
        """Tell of an evaluation; return true when a callback asks to stop."""
        task = self._context.subcontext(task_name="evaluation")
        task.call_on_fit_task_begin(estimator=self._estimator)
        return bool(task.call_on_fit_task_end(estimator=self._estimator, metadata={"record": record}))

    def finish(self) -> None:
        """Tell that the estimator is fitted."""
        # Nothing is missing: the estimator itself can predict by now.
        self._context.call_on_fit_task_end(
            estimator=self._estimator, reconstruction_attributes={}, **self._data
        )


@dataclass(frozen=True)
class Limits:
    """The options of a fit that are the same for every estimator; see `attnfit.minimize`."""

    checkpoint: str | PathLike[str] | None = None
    resume: bool = True
    memory_limit: str | int | None = None


def with_options(cls: type[T]) -> type[T]:
    """Write the parameters that all estimators share into the class's docstring."""
    cls.__doc__ = cls.__doc__ and cls.__doc__.replace("%(options)s", OPTIONS)
    return cls


class BaseRegressor(InferenceMixin, CallbackSupportMixin, RegressorMixin, BaseEstimator):
    """An estimator whose output is a function of ``X coef_ + offset``.

    A subclass reads its data (`_read`), builds a problem (`_problem`) and says what only it reports
    (`_after_fit`). What costs further reads of the data (covariance, r2) is computed when first asked for.
    """

    solver: Any
    tol: float
    max_iter: int
    random_state: Any
    row_penalty: Any
    ridge: float
    n_starts: Any
    separation: Any
    coef_: Array
    # A finite point that gives the fitted outputs, where some coefficients have no finite value.
    _limit: Array | None
    n_features_in_: int
    loss_value_: float
    n_rows_: int
    result_: Result
    _training: tuple[Array, Array | None, Array | None] | None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        # Shares sum to one, exponentials are positive: neither can follow an arbitrary target.
        tags.regressor_tags.poor_score = True
        return tags

    def _remember(self, given: dict[str, Any]) -> None:
        """Keep the arguments of the constructor."""
        for name in self._get_param_names():
            # Not by `setattr`: a method has the name of one of them.
            self.__dict__[name] = given[name]

    # ---- the fit, and what an estimator brings to it

    @abstractmethod
    def _read(self, *data: Any, **given: Any) -> Rows:
        """Return the checked rows of data in memory."""

    @abstractmethod
    def _problem(self, rows: Rows) -> RowProblem:
        """Return the problem to fit."""

    def _objective(self, problem: RowProblem, labels: Absorbed | None) -> Any:
        """Return what is minimised, where it is not the problem itself."""
        return problem

    def _note_targets(self, rows: Rows, *, grouped: bool) -> None:
        """Warn about targets that suit another loss better."""

    def _after_fit(self, rows: Rows, problem: RowProblem, y: Any, groups: Any) -> None:
        """Set what only one of the estimators reports."""

    def _fit(
        self,
        X: Any,
        y: Any,
        given: dict[str, Any],
        limits: Limits,
        *,
        clusters: Any,
        labels: Absorbed | None,
    ) -> Self:
        """Fit the problem on these data, wherever they are, and set what every estimator reports."""
        choose(self.weight_type, dict.fromkeys(WEIGHT_TYPES), "weight_type")
        choose(self.__dict__["covariance"], dict.fromkeys(KINDS), "covariance")
        listeners = Listeners(self, X, y, given) if has_callbacks(self) else None
        groups = given.get("groups")
        here = not (is_dask(X) or is_dask(y) or isinstance(y, Source | Column))
        rows = self._read(X, y, **given) if here else read_elsewhere(self, X, y, given)
        problem = self._problem(rows)
        if here:
            self._note_targets(rows, grouped=groups is not None)
        else:
            self.n_features_in_ = problem.n_unknowns
        for name in (*LAZY, *ATTRIBUTES):
            self.__dict__.pop(name, None)
        result = minimize(
            self._objective(problem, labels),
            solver=self.solver,
            tol=self.tol,
            max_iter=self.max_iter,
            callback=None if listeners is None else listeners.tell,
            random_state=self.random_state,
            n_starts=self.n_starts,
            separation=self.separation,
            checkpoint=limits.checkpoint,
            resume=limits.resume,
            memory_limit=limits.memory_limit,
        )
        self.result_ = result
        self.coef_ = result.x
        self._limit = None if result.separation is None else result.separation.point
        if result.absorbed is not None and not np.isfinite(result.x).all():
            self._limit = result.absorbed.at.x
        point = result.x if self._limit is None else self._limit
        # The first evaluation may be the last; scikit-learn counts it as an iteration.
        self.n_iter_ = max(1, result.n_iter)
        self.n_rows_ = len(rows.y) if here else problem.n_rows
        self.loss_value_ = result.value
        if problem.penalty is not None:
            # Only a read of the data tells a row penalty from the loss.
            self.loss_value_ = problem.without_penalties().value(point)
        elif np.any(problem.ridge):
            self.loss_value_ -= 0.5 * float(np.sum(problem.ridge * point * point))
        self._training = (rows.y, rows.weights, rows.counts) if here else None
        self._basis = Basis(problem, rows.counts, rows.kept, len(rows.outside), self.weight_type, clusters)
        self.__dict__.pop("_fitted", None)
        if clusters is not None:
            # At once, so that labels that do not fit the rows are refused here.
            self._fitted = self._make_fitted()
        self._library, self._index = library_and_index(X)
        self._after_fit(rows, problem, y, groups)
        if listeners is not None:
            listeners.finish()
        return self

    # ---- computed when asked for
    # ------------------------------------------------------------------------------

    def training_fit(self) -> tuple[Array, Array, Array | None]:
        """Return target, fitted values and weights of the training rows, each of shape (n,); the weights are
        None where all are one.

        Raises
        ------
        AttributeError
            If the model has no training data any more, or they are not in memory.
        """
        problem = self._training_problem("training_fit")
        if self._training is None:
            raise AttributeError(
                "training_fit needs the training rows in memory; use predict on some of them"
            )
        y, weights, counts = self._training
        fitted = problem.predict(self._point)[: len(y)]
        if weights is not None and not np.isfinite(fitted).all():
            # Rows of weight zero whose effects nothing tells.
            fitted = np.where(weights > 0.0, fitted, y)
        if counts is not None:
            # The problem gives the sum over the copies of a row.
            fitted, weights = fitted / counts, counts
        return y, fitted, weights

    @cached_property
    def r2_(self) -> float:
        """Coefficient of determination on the training rows; NaN where they are not in memory."""
        self._training_problem("r2_")
        if self._training is None:
            return float("nan")
        y, fitted, weights = self.training_fit()
        return float(r2_score(y, fitted, sample_weight=weights)) if len(y) > 1 else float("nan")

    @cached_property
    def certificate_(self) -> Certificate:
        """What is certified of ``coef_``; reads the data when first asked for."""
        self._training_problem("certificate_")
        return self.result_.certificate()

    @cached_property
    def certified_radius_(self) -> float:
        """Radius about ``coef_`` that holds the exact stationary point, rounding bounded to first order;
        infinite where `certificate_` is not valid.
        """
        if "certificate_" not in self.__dict__:
            self._training_problem("certified_radius_")
        return float(self.certificate_.radius) if self.certificate_.valid else float("inf")

    @property
    def _point(self) -> Array:
        """The coefficients, or a finite point with the same outputs."""
        return self.coef_ if self._limit is None else self._limit

    def _training_problem(self, wanted: str) -> RowProblem:
        if not hasattr(self, "result_"):
            raise NotFittedError(f"{wanted} is known after fit; call fit first")
        if self.result_.problem is None:
            raise AttributeError(
                f"{wanted} needs the training data, which neither a pickled nor a saved model carries; "
                "read it before pickling or saving"
            )
        problem: RowProblem = self.result_.problem
        return problem

    # ---- storage
    # ----------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the fitted model to a safetensors file; `attnfit.estimators.load` reads it.

        The file is replaced in one step. Covariance, r2 and certified radius are stored if they have been
        computed (`summary` does), the training data never.

        Raises
        ------
        ValueError
            If a parameter has no form in JSON (a solver of one's own, a generator as random_state), or labels
            of absorbed effects are neither numbers, text nor times.
        """
        from attnfit.estimators.files import save

        save(self, path)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled model must not carry the training data along.
        state: dict[str, Any] = dict(super().__getstate__())
        for name in ("_training", "_basis", "_fitted", "_data", "_index"):
            state.pop(name, None)
        if "result_" in state:
            state["result_"] = replace(state["result_"], problem=None, separation=None, absorbed=None)
        return state

"""Elasticities, effects, ratios and intervals of exponential models: thin methods over `inference`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from attnfit.data.inputs import library_and_index
from attnfit.estimators import reading
from attnfit.estimators.variables import covariance_for, variable_of
from attnfit.inference import Fitted
from attnfit.inference.choice_effects import Variable
from attnfit.inference.effects import Effects, effects_of, ratio_of
from attnfit.inference.outcome_effects import outcome_rows, outcome_sum
from attnfit.objectives.models import Exponential
from attnfit.objectives.objective import Evaluation

Array = NDArray[np.float64]


class OutcomeEffectsMixin:
    """What an exponential model says of responses, with delta-method errors.

    In all methods ``X, offset`` are the rows to look at, those of the training by default; ``kind, clusters,
    correction, df`` choose the covariance as in `conf_int`; ``level`` is the cover of intervals.
    """

    coef_: Array
    _fitted: Fitted
    _point: Array

    @property
    def _function(self) -> str:
        """Name of u."""
        return "exp"

    def elasticities(
        self, variable: Any, *, rows: bool = False, derivative: Any = None, **options: Any
    ) -> Effects:
        """Return by how many per cent the sum of outcomes changes for one per cent more of a variable
        everywhere: ``sum w v D u' / sum w u``.

        Parameters
        ----------
        variable : str or int
            A column by name or number.
        rows : bool
            One value a row, ``v D u'/u``.
        derivative : array_like, shape (n, d), optional
            The derivative of the rows of X in the variable, where it enters other columns than its own;
            ``variable`` is then its values, shape (n,).
        **options
            ``X, offset, kind, clusters, correction, df, level``.
        """
        return self._responses("elasticity", variable, rows, derivative, options)

    def semi_elasticities(
        self, variable: Any, *, rows: bool = False, derivative: Any = None, **options: Any
    ) -> Effects:
        """Return `elasticities` with v replaced by 1."""
        return self._responses("semi-elasticity", variable, rows, derivative, options)

    def marginal_effects(
        self, variable: Any, *, rows: bool = False, derivative: Any = None, **options: Any
    ) -> Effects:
        """Return by how much the mean outcome changes for one more of a variable: ``sum w D u' / sum w``."""
        return self._responses("marginal", variable, rows, derivative, options)

    def ratio(
        self,
        a: Any,
        b: Any,
        *,
        method: Literal["delta", "fieller", "simulation"] = "fieller",
        n_draws: int = 10_000,
        random_state: Any = None,
        name: str | None = None,
        **options: Any,
    ) -> Effects:
        """Return the ratio of the coefficients of two columns; see `SoftmaxRegressor.ratio`."""
        check_is_fitted(self)
        one, other = (variable_of(self, v, None, 0).column for v in (a, b))
        covariance, level = covariance_for(self, options)
        unit = np.eye(len(self._point))
        return ratio_of(
            (float(self._point[one]), float(self._point[other])), (unit[one], unit[other]), self._point,
            covariance, level, method, n_draws, random_state, name or f"{a}/{b}", str(b),
        )  # fmt: skip

    def predict_interval(self, X: Any = None, **options: Any) -> Effects:
        """Return the expected outcome of each row with an interval on the log scale, for the uncertainty of
        the coefficients.
        """
        problem, n, labels, options = self._look({"X": X, **options})
        found = outcome_rows(problem.rows, problem.rows.chunks, self._at(), self._function, None, "")
        scale = "log" if self._function != "sinh" else ""
        effects = self._effects(found.values, found.gradients, options, labels, ("row", range(n)), scale)
        return replace(effects, index=labels[1])

    def _responses(
        self, kind: str, variable: Any, rows: bool, derivative: Any, options: dict[str, Any]
    ) -> Effects:
        problem, n, labels, options = self._look(options)
        moved: Variable = variable_of(self, variable, derivative, n, labels[2])
        moved = moved._replace(relative=kind == "elasticity")
        if rows:
            each = outcome_rows(problem.rows, problem.rows.chunks, self._at(), self._function, moved, kind)
            effects = self._effects(each.values, each.gradients, options, labels, ("row", range(n)))
            return replace(effects, index=labels[1])
        sums = problem.rows.reduce(outcome_sum, self._at(), self._function, moved)
        if kind == "marginal":
            value, gradient = sums.change / sums.weight, sums.d_change / sums.weight
        else:
            value = sums.change / sums.total
            gradient = (sums.d_change - value * sums.d_total) / sums.total
        name = variable if isinstance(variable, str | int) else "variable"
        return self._effects([value], gradient[None, :], options, labels, ("variable", [name]))

    def _look(self, options: dict[str, Any]) -> tuple[Any, int, tuple[Any, ...], dict[str, Any]]:
        """Return the rows asked for, their number, library and index, and the options that are left."""
        check_is_fitted(self)
        self._require_no_effects("this effect")  # type: ignore[attr-defined]
        options = dict(options)
        X, offset = options.pop("X", None), options.pop("offset", None)
        if X is None:
            if offset is not None:
                raise ValueError("offset belongs to an X; pass it, or leave both out")
            problem = self._training_problem("effects of the training data")  # type: ignore[attr-defined]
            labels = (*(getattr(self, name, None) for name in ("_library", "_index", "_data")),)
            return problem, problem.n_rows, labels, options
        labels = *library_and_index(X), X
        X = self._rows_of(X)  # type: ignore[attr-defined]
        design = reading.read_features(self, X, reset=False)
        n = int(design.shape[0])
        problem = Exponential(design, np.zeros(n), offset=reading.read_offset(offset, n))
        return problem, n, labels, options

    def _at(self) -> Evaluation:
        return Evaluation(self._point, np.nan, np.zeros(0))

    def _effects(
        self,
        value: Any,
        gradients: Array,
        options: dict[str, Any],
        labels: tuple[Any, ...],
        names: tuple[str, Any],
        scale: str = "",
    ) -> Effects:
        covariance, level = covariance_for(self, options)
        return effects_of(
            value, gradients, covariance, level, scale,
            names=(names[1],), dimensions=(names[0],), library=labels[0],
        )  # fmt: skip

"""The estimators behind the names ``softmax``, ``exponential`` and ``rescaled``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from attnfit.cli.columns import numbers
from attnfit.cli.errors import InputError, suggest
from attnfit.cli.tables import Array, Table

LOSSES = ("cross_entropy", "squared", "kl", "linear_cross_entropy", "entropy")
FUNCTIONS = ("exp", "cosh", "sinh")
# Options that only some models have.
OPTIONS = {
    "softmax": ("loss", "group", "outside_good"),
    "exponential": ("function",),
    "rescaled": ("function", "group", "outside_good"),
}
# Name of the column of ones; no file has a column of this name by accident.
CONSTANT = "(constant)"


def check_options(model: str, given: dict[str, Any]) -> None:
    """Raise InputError for a model, loss or function that does not exist, or an option the model lacks."""
    if model not in OPTIONS:
        raise InputError(f"There is no model {model!r}{suggest(model, OPTIONS)}")
    for option, value in given.items():
        if value is not None and option not in OPTIONS[model]:
            others = " and ".join(other for other in OPTIONS if option in OPTIONS[other])
            raise InputError(f"--{option.replace('_', '-')} belongs to {others}; leave it out for {model}")
    for option, choices in (("loss", LOSSES), ("function", FUNCTIONS)):
        value = given[option]
        if value is not None and value not in choices:
            raise InputError(f"There is no {option} {value!r}{suggest(value, choices)}")


def new_model(model: str, parameters: dict[str, Any]) -> Any:
    """Return the unfitted estimator; softmax means conditional logit unless a loss is given."""
    from attnfit import estimators

    if model == "softmax":
        return estimators.SoftmaxRegressor(**{"loss": "cross_entropy", **parameters})
    if model == "exponential":
        return estimators.ExponentialRegressor(**parameters)
    return estimators.RescaledSoftmaxRegressor(**parameters)


def fit_named(estimator: Any, X: Array, names: list[str], inputs: dict[str, Any]) -> None:
    """Fit on an array whose columns have names, which the estimator keeps."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # The report says it with the names of the columns.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "y sums to .* and the shares of one group to 1")
        estimator.fit(X, **{name: value for name, value in inputs.items() if value is not None})
    estimator.feature_names_in_ = np.array(names, dtype=object)


def predict_named(estimator: Any, X: Array, where: dict[str, Any]) -> Any:
    """Predict from an array whose columns were picked by name: scikit-learn need not ask for names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "X does not have valid feature names")
        return estimator.predict(X, **where)


def read_model(path: Path) -> Any:
    """Load a model.

    Raises
    ------
    InputError
        If there is no such file, it is not a model, or its columns have no names.
    """
    from attnfit import estimators

    if not path.is_file():
        raise InputError(f"There is no model file {path}; write one with: attnfit fit ... --save {path}")
    try:
        estimator = estimators.load(path)
    except estimators.ModelFileError as error:
        raise InputError(f"{error}; give a file written by attnfit fit --save") from error
    if not hasattr(estimator, "feature_names_in_"):
        raise InputError(
            f"{path} has no names of columns; fit it with attnfit fit, or on a data frame, and save it again"
        )
    return estimator


def model_matrix(table: Table, estimator: Any) -> Array:
    """Return the model's columns in its order, ones for the constant that the fit added."""
    ones = np.ones(table.n_rows)
    names = [str(name) for name in estimator.feature_names_in_]
    return np.column_stack([ones if n == CONSTANT else numbers(table, n, "the model") for n in names])

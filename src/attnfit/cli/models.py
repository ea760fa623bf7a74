"""The estimators behind the names ``softmax``, ``exponential`` and ``rescaled``."""

from __future__ import annotations

import re
import warnings
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from attnfit.cli.columns import labels, numbers, require
from attnfit.cli.errors import InputError, suggest
from attnfit.cli.tables import Array, Table

LOSSES = ("cross_entropy", "squared", "kl", "linear_cross_entropy", "entropy")
FUNCTIONS = ("exp", "cosh", "sinh")
# Options that only some models have.
OPTIONS = {
    "softmax": ("loss", "group", "ties", "outside_good"),
    "exponential": ("function",),
    "poisson": (),
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
    if model == "poisson":
        return estimators.PoissonRegressor(**parameters)
    return estimators.RescaledSoftmaxRegressor(**parameters)


def fit_named(estimator: Any, rows: Any, limits: dict[str, Any]) -> None:
    """Fit on rows whose columns have names, which the estimator keeps, and the formula with them."""
    from sklearn.exceptions import ConvergenceWarning

    from attnfit.estimators.formula import keep

    with warnings.catch_warnings():
        # The report says it with the names of the columns.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "y sums to .* and the shares of one group to 1")
        inputs = {name: value for name, value in rows.inputs.items() if value is not None}
        estimator.fit(rows.X, **inputs, **limits)
    estimator.feature_names_in_ = np.array(rows.names, dtype=object)
    if rows.training is not None:
        keep(estimator, rows.training, rows.formula)


def predict_named(estimator: Any, X: Array, where: dict[str, Any]) -> Any:
    """Predict from an array whose columns were picked by name, or made by the model's formula: scikit-learn
    need not ask for names, nor the model for a data frame.
    """
    if isinstance(X, np.ndarray) and "_formula" in estimator.__dict__:
        estimator = copy(estimator)
        del estimator._formula
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "X does not have valid feature names")
        warnings.filterwarnings("ignore", ".* with labels that the fit has not seen")
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


def text_columns(estimator: Any) -> list[str]:
    """Return the columns of a model's formula that hold words."""
    design = estimator.__dict__.get("_formula")
    levels = {} if design is None else design.levels
    return [name for name, known in levels.items() if any(isinstance(level, str) for level in known)]


def level_columns(estimator: Any) -> tuple[tuple[str, ...], ...]:
    """Return the columns of the labels of a model with absorbed effects.

    Raises
    ------
    InputError
        If the model does not know them.
    """
    if estimator.result_.effects is None:
        return ()
    names = estimator.__dict__.get("_absorb_names")
    if names is None:
        raise InputError(
            "The model was fitted on labels without names of columns; fit it with attnfit fit --absorb"
        )
    return tuple((name,) if isinstance(name, str) else tuple(name) for name in names)


def levels_in(table: Table, estimator: Any) -> Any:
    """Return the labels of a file's rows in the sets of effects of a model, as the model holds them."""
    columns = level_columns(estimator)
    if not columns:
        return None
    found = []
    for parts, known in zip(columns, estimator.result_.effects, strict=True):
        cells = [labels(table, name, "the model") for name in parts]
        examples = known.labels[0] if len(parts) > 1 else known.labels[:1].tolist()
        typed = [_as(one, example) for one, example in zip(cells, examples, strict=True)]
        found.append(typed[0] if len(parts) == 1 else tuple(typed))
    return found


def _as(cells: Any, example: Any) -> Any:
    """Return labels of a file as whole numbers where those of the fit were; the others are none of it."""
    if isinstance(example, str):
        return cells
    whole = [int(cell) if re.fullmatch(r"[+-]?\d{1,18}", cell.strip()) else None for cell in cells]
    return np.array(whole, dtype=object)


def column_of(estimator: Any, part: str) -> str | None:
    """Return the column that the fit took for groups or alternatives by a formula."""
    name = estimator.__dict__.get("_names_of", {}).get(part)
    return None if name is None else str(name)


def needed(table: Table, estimator: Any, offset: str | None) -> list[str]:
    """Return the columns of the table that predictions are made of."""
    design = estimator.__dict__.get("_formula")
    own = map(str, estimator.feature_names_in_) if design is None else design.variables
    names = [*own, *([] if offset is None else [offset])]
    return [name for name in names if name in table.names]


def model_matrix(table: Table, estimator: Any) -> Any:
    """Return what the model predicts from: its columns in its order, ones for the constant that the fit
    added; a data frame where it has a formula.
    """
    design = estimator.__dict__.get("_formula")
    if design is None:
        ones = np.ones(table.n_rows)
        names = [str(name) for name in estimator.feature_names_in_]
        return np.column_stack([ones if n == CONSTANT else numbers(table, n, "the model") for n in names])
    import pandas as pd

    columns: dict[str, Any] = {}
    for name in design.variables:
        require(table, name, "the model")
        known = design.levels.get(name)
        if name in table.labels:
            values, places = table.labels[name], {str(level): level for level in known or ()}
            bad = next((k for k, value in enumerate(values) if value not in places), None)
            if bad is not None:
                raise InputError(
                    f"Column {name!r} has {values[bad]!r} in {table.where(bad)}, which the training data did "
                    f"not have{suggest(values[bad], places, 'it had')}"
                )
            columns[name] = np.array([places[value] for value in values], dtype=object)
            continue
        columns[name] = numbers(table, name, "the model")
        if known is not None:
            _require_known(table, name, known, columns[name])
            columns[name] = columns[name].astype(type(known[0]))
    return pd.DataFrame(columns, index=range(table.n_rows))


def _require_known(table: Table, name: str, known: Any, values: Array) -> None:
    bad = np.flatnonzero(~np.isin(values, np.asarray(known, dtype=np.float64)))
    if len(bad):
        raise InputError(
            f"Column {name!r} has {values[bad[0]]:g} in {table.where(bad[0])}, which the training data did "
            f"not have; it had: {', '.join(f'{level:g}' for level in known[:12])}"
        )

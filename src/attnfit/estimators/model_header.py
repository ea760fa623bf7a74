"""Check what a model file says before any of it is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnfit import solvers
from attnfit.formulas import FormulaDesign
from attnfit.inference import FitStatistics
from attnfit.inference.covariance import KINDS
from attnfit.losses.elementwise import FUNCTIONS
from attnfit.losses.named import UNNORMALISED
from attnfit.losses.softmax import LOSSES
from attnfit.solvers import Status

if TYPE_CHECKING:
    from attnfit.estimators.base import BaseRegressor

# Attributes of a fitted estimator; `_check_fit` knows which of them a class has.
FIT: dict[str, type] = {
    "loss_value_": float,
    "log_likelihood_": float,
    "log_normaliser_": float,
    "normaliser_": float,
    "n_rows_": int,
    "n_groups_": int,
    "n_unbalanced_groups_": int,
    "n_iter_": int,
    "r2_": float,
    "certified_radius_": float,
}
RESULT: dict[str, type] = {
    "value": float,
    "gradient_norm": float,
    "converged": bool,
    "status": str,
    "message": str,
    "n_iter": int,
    "n_passes": float,
    "seconds": float,
    "solver": str,
    "local_values": dict,
    "move": float,
    "decrement": float,
    "n_flat": int,
}
# What a stored covariance is; degrees of freedom are None where the reference is normal.
COVARIANCE: dict[str, type] = {
    "kind": str,
    "unit": str,
    "n_units": float,
    "df": float,
    "factor": float,
    "notes": list,
    "reason": str,
}
# Numbers that are not known for every fit.
UNKNOWN = ("gradient_norm", "move", "decrement", "n_flat")
# Classes that have files.
STORED = ("ExponentialRegressor", "PoissonRegressor", "RescaledSoftmaxRegressor", "SoftmaxRegressor")
# Parameters that older files do not have.
LATER = {"n_starts": "auto", "separation": "warn", "covariance": "auto", "weight_type": "sampling"}
# Classes that absorb effects, whose labels stand in the constructor of none that is stored.
ABSORBING = ("ExponentialRegressor", "PoissonRegressor", "SoftmaxRegressor")
# Entries of the header that older files do not have.
OPTIONAL = {"covariance", "formula", "statistics", "effects"}
SOLVERS = ("Newton", "LevenbergMarquardt", "GradientDescent")


class ModelFileError(ValueError):
    """A model file that is malformed, damaged, of another version, or contradicts itself."""


def new_model(header: dict[str, Any], arrays: dict[str, Any]) -> BaseRegressor:
    """Return an unfitted estimator of the class and parameters in the header, and check the rest of it."""
    from attnfit import estimators

    classes = {name: getattr(estimators, name) for name in STORED}
    keys = {"format_version", "class", "params", "n_features_in", "feature_names_in", "fit", "result"}
    _require(
        keys <= set(header) <= keys | OPTIONAL,
        f"the header has entries {sorted(header)}, expected {sorted(keys)}",
    )
    name = header["class"]
    _require(
        isinstance(name, str) and name in classes,
        f"unknown class {name!r}; expected one of {', '.join(classes)}",
    )
    params = header["params"]
    _require(isinstance(params, dict), "params is not an object")
    own = LATER | ({"ties": None} if name == "SoftmaxRegressor" else {})
    own |= {"absorb": None} if name in ABSORBING else {}
    params = own | params
    if "row_penalty" in arrays:
        _require("row_penalty" not in params, "row_penalty is given twice")
        params["row_penalty"] = arrays["row_penalty"]
    cls = classes[name]
    expected = set(cls._get_param_names())
    _require(set(params) == expected, f"params {sorted(params)} are not those of {name}: {sorted(expected)}")
    for key, value in params.items():
        _check_param(key, value)
    params["solver"] = _decode_solver(params["solver"])
    _check_features(header)
    _check_fields("result", header["result"], RESULT, optional=UNKNOWN)
    _require(header["result"]["status"] in set(Status), "the status of result is none that a fit has")
    _require(
        all(v is None or _is(v, float) for v in header["result"]["local_values"].values()),
        "local_values of result are not numbers",
    )
    _check_fit(header["fit"], cls)
    _check_covariance(header.get("covariance"), arrays)
    _check_statistics(header.get("statistics"))
    _check_formula(header.get("formula"), header["feature_names_in"])
    model: BaseRegressor = cls(**params)
    return model


def check_arrays(arrays: dict[str, NDArray[Any]], d: int, status: str) -> None:
    """Check names, dtypes, shapes and entries of the arrays of a model with d features; some coefficients
    have no finite value where the fit ended so.
    """
    endless = status in (Status.SEPARABLE, Status.NO_MINIMUM) or "limit" in arrays
    known = {
        *(
            "coef",
            "limit",
            "gradient",
            "covariance",
            "identified",
            "unidentified",
            "row_penalty",
            "scale",
            "null",
        ),
    }
    _require(
        {"coef", "gradient"} <= set(arrays) <= known,
        f"the arrays are {sorted(arrays)}; expected some of {sorted(known)}",
    )
    _require(
        ("covariance" in arrays) == ("identified" in arrays), "covariance and identified must come together"
    )
    shapes = {"coef": (d,), "limit": (d,), "gradient": (d,), "covariance": (d, d), "identified": (d,)}
    shapes["scale"] = (d,)
    for name, array in arrays.items():
        shape = array.shape
        if name in ("unidentified", "null"):
            fits = array.ndim == 2 and shape[0] == d and 1 <= shape[1] <= d
        elif name == "row_penalty":
            fits = array.ndim == 1
        else:
            fits = shape == shapes[name]
        _require(fits, f"array {name} has shape {shape}, which does not fit {d} features")
        _require(array.dtype == np.float64, f"array {name} has dtype {array.dtype}, expected float64")
        may_be_open = endless and name in ("coef", "covariance")
        _require(may_be_open or bool(np.isfinite(array).all()), f"array {name} contains NaN or inf")


def _check_covariance(told: Any, arrays: dict[str, Any]) -> None:
    _require((told is not None) == ("covariance" in arrays), "a covariance and what it is must come together")
    if told is None:
        return
    _check_fields("covariance", told, COVARIANCE, optional=("df", "factor"))
    _require(
        told["kind"] in KINDS and all(isinstance(note, str) for note in told["notes"]), "covariance is none"
    )
    _require("scale" in arrays and bool((arrays["scale"] > 0.0).all()), "scale is not positive")


def _check_formula(told: Any, features: Any) -> None:
    if told is None:
        return
    _require(isinstance(told, dict) and set(told) == {"text", "names", "design"}, "formula is malformed")
    names = told["names"]
    _require(
        isinstance(told["text"], str)
        and isinstance(names, dict)
        and all(isinstance(k, str) and isinstance(v, str) for k, v in names.items()),
        "the names of columns of the formula are malformed",
    )
    try:
        design = FormulaDesign.from_json(told["design"])
    except ValueError as error:
        raise ModelFileError(str(error)) from None
    _require(design.columns == features, "the columns of the formula are not the features")


def _check_statistics(told: Any) -> None:
    if told is None:
        return
    _require(isinstance(told, dict), "statistics is not an object")
    names = {f.name for f in fields(FitStatistics)}
    _require(set(told) == names, f"statistics has entries {sorted(told)}; expected {sorted(names)}")
    for name, value in told.items():
        fits = isinstance(value, list) if name == "notes" else value is None or _is(value, float)
        _require(fits, f"{name} of statistics is {value!r}")


def _check_fit(fit: Any, cls: Any) -> None:
    _require(isinstance(fit, dict), "fit is not an object")
    required = {"loss_value_", "n_rows_", "n_iter_"}
    optional = {"r2_", "certified_radius_"}
    normaliser = getattr(cls, "_normaliser_name", None)
    if normaliser is not None:
        required |= {"n_groups_", "n_unbalanced_groups_"}
        if fit.get("n_groups_") == 1:
            required.add(normaliser)
        if normaliser == "log_normaliser_":
            optional.add("log_likelihood_")
    _require(
        required <= set(fit) <= required | optional,
        f"fit has entries {sorted(fit)}; expected {sorted(required)} and perhaps {sorted(optional)}",
    )
    _check_fields("fit", fit, {name: FIT[name] for name in fit}, optional=())


def _check_fields(where: str, values: Any, types: dict[str, type], optional: tuple[str, ...]) -> None:
    _require(
        isinstance(values, dict) and set(values) == set(types), f"{where} has not the entries {sorted(types)}"
    )
    for name, kind in types.items():
        value = values[name]
        _require(_is(value, kind) or (value is None and name in optional), f"{name} of {where} is {value!r}")


def _check_param(name: str, value: Any) -> None:
    checks: dict[str, Callable[[], bool]] = {
        "loss": lambda: _is_loss(value),
        "function": lambda: isinstance(value, str) and value in FUNCTIONS,
        "ridge": lambda: _is(value, float) and value >= 0,
        "row_penalty": lambda: isinstance(value, np.ndarray) or _is(value, float),
        "outside_good": lambda: isinstance(value, bool),
        "solver": lambda: value is None or isinstance(value, dict),
        "tol": lambda: _is(value, float) and value > 0,
        "max_iter": lambda: _is(value, int) and value >= 0,
        "random_state": lambda: value is None or _is(value, int),
        "n_starts": lambda: value == "auto" or (_is(value, int) and value >= 1),
        "separation": lambda: value in ("warn", "drop", "keep"),
        "covariance": lambda: value in KINDS,
        "ties": lambda: value in (None, "counts", "exact"),
        "absorb": lambda: value is None,
        "weight_type": lambda: value in ("sampling", "frequency"),
    }
    _require(checks[name](), f"parameter {name} is {value!r}, which is not allowed")


def _is_loss(value: Any) -> bool:
    """Whether a value names a loss, or losses with their weights."""
    if not isinstance(value, list | tuple):
        return isinstance(value, str) and value in LOSSES
    names = LOSSES.keys() | UNNORMALISED.keys()
    return all(
        isinstance(term, list | tuple)
        and len(term) == 2
        and isinstance(term[0], str)
        and term[0] in names
        and _is(term[1], float)
        for term in value
    )


def _check_features(header: dict[str, Any]) -> None:
    d, names = header["n_features_in"], header["feature_names_in"]
    _require(_is(d, int) and d > 0, f"n_features_in is {d!r}")
    fits = names is None or (
        isinstance(names, list) and len(names) == d and all(isinstance(n, str) for n in names)
    )
    _require(fits, f"feature_names_in is not a list of {d} strings")


def _decode_solver(spec: Any) -> Any:
    if spec is None:
        return None
    name, params = spec.get("class"), spec.get("params")
    cls = getattr(solvers, name, None) if isinstance(name, str) and name in SOLVERS else None
    _require(cls is not None and isinstance(params, dict), f"unknown solver {name!r}")
    assert cls is not None
    try:
        return cls(**params)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"solver {name}: {error}") from None


def _is(value: Any, kind: type) -> bool:
    """Whether a JSON value has a type; integers are floats too, booleans are neither."""
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ModelFileError(message)

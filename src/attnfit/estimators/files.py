"""Model files: arrays in safetensors, the rest as JSON in its metadata; nothing in a file is executed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, is_dataclass, replace
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from attnfit import solvers
from attnfit.estimators import model_header
from attnfit.estimators.base import BaseRegressor
from attnfit.estimators.effects_file import described, restored
from attnfit.estimators.model_header import ModelFileError
from attnfit.formulas import FormulaDesign
from attnfit.inference import Covariance, FitStatistics
from attnfit.solvers import History, Result, Status
from attnfit.writing import write as write_file

# Effects came with the third; what has none is written so that older versions read it.
FORMAT_VERSION, EFFECTS_VERSION = 2, 3
HEADER, DIGEST = "attnfit", "sha256"


def save(model: Any, path: str | PathLike[str]) -> None:
    """Write a fitted estimator; see `attnfit.estimators.base.BaseRegressor.save`."""
    write_file(path, dumps(model))


def dumps(model: Any) -> bytes:
    """Return what `save` writes."""
    from sklearn.utils.validation import check_is_fitted

    check_is_fitted(model)
    arrays = {"coef": model.coef_, "gradient": model.result_.gradient}
    if model._limit is not None:
        arrays["limit"] = model._limit
    if model.result_.unidentified is not None and model.result_.unidentified.shape[1]:
        arrays["unidentified"] = model.result_.unidentified
    if "_covariance" in model.__dict__:
        known = model._covariance
        arrays |= {"covariance": known.matrix, "identified": known.known, "scale": known.scale}
        if known.null.shape[1]:
            arrays["null"] = known.null
    params = model.get_params(deep=False)
    if np.ndim(params["row_penalty"]):
        arrays["row_penalty"] = np.asarray(params.pop("row_penalty"), dtype=np.float64)
    params["solver"] = _encode_solver(params["solver"])
    effects, version = None, FORMAT_VERSION
    if model.result_.effects is not None:
        effects, more = described(model.result_.effects, model.__dict__.get("_absorb_names"))
        arrays, version = arrays | more, EFFECTS_VERSION
        params["absorb"] = None
    names = getattr(model, "feature_names_in_", None)
    header = {
        "format_version": version,
        "class": type(model).__name__,
        "params": params,
        "n_features_in": model.n_features_in_,
        "feature_names_in": None if names is None else [str(name) for name in names],
        "fit": {
            name: value for name in model_header.FIT if _finite(value := model.__dict__.get(name)) is not None
        },
        "covariance": _described(model) if "_covariance" in model.__dict__ else None,
        "formula": _formula(model) if "_formula" in model.__dict__ else None,
        "statistics": _finite(asdict(model._statistics)) if "_statistics" in model.__dict__ else None,
        "result": {name: _finite(getattr(model.result_, name)) for name in model_header.RESULT},
    } | ({} if effects is None else {"effects": effects})
    try:
        text = json.dumps(header, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a parameter or attribute cannot be stored as JSON: {error}; use set_params to replace it "
            "(random_state by an int or None)"
        ) from None
    return _packed({name: np.ascontiguousarray(a, dtype=np.float64) for name, a in arrays.items()}, text)


def write(path: str | PathLike[str], arrays: dict[str, NDArray[Any]], header: str) -> None:
    """Replace the file in one step: a reader sees the old model or the new one, never half of one."""
    write_file(path, _packed(arrays, header))


def _packed(arrays: dict[str, NDArray[Any]], header: str) -> bytes:
    packed: bytes = to_bytes(arrays, metadata={HEADER: header, DIGEST: _digest(arrays, header)})
    return packed


def load(path: str | PathLike[str]) -> BaseRegressor:
    """Read a model written by ``save``.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    SoftmaxRegressor, ExponentialRegressor, PoissonRegressor or RescaledSoftmaxRegressor
        Fitted; ``result_`` has no problem and no history, since the file has no data.

    Raises
    ------
    ModelFileError
        If the file is not a model file, is damaged, comes from another format version, or contradicts itself.
    FileNotFoundError
    """
    arrays, text = _read(path)
    try:
        header = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: the header is not a JSON object")
    version = header.get("format_version")
    if version not in (1, FORMAT_VERSION, EFFECTS_VERSION) or isinstance(version, bool):
        raise ModelFileError(
            f"{path}: format version {version!r}, this attnfit reads versions 1 to {EFFECTS_VERSION}; "
            "save the model again with this version, or install the one that wrote it"
        )
    if version == 1:
        # Its covariance does not say of what kind it is: errors of shares were those of choices.
        arrays = {name: a for name, a in arrays.items() if name not in ("covariance", "identified")}
    try:
        model = model_header.new_model(header, arrays)
        of_effects = {name: arrays.pop(name) for name in list(arrays) if name.startswith("effects ")}
        model_header.check_arrays(arrays, header["n_features_in"], header["result"]["status"])
        effects, columns = None, None
        if header.get("effects") is not None:
            effects, columns = restored(header["effects"], of_effects)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    _restore(model, header, arrays)
    if effects is not None:
        model.result_ = replace(model.result_, effects=effects)
        model._absorb_names = columns
    return model


def _restore(model: Any, header: dict[str, Any], arrays: dict[str, NDArray[np.float64]]) -> None:
    model.coef_ = arrays["coef"]
    model._limit = arrays.get("limit")
    model.n_features_in_ = header["n_features_in"]
    if header["feature_names_in"] is not None:
        model.feature_names_in_ = np.array(header["feature_names_in"], dtype=object)
    for name, value in header["fit"].items():
        setattr(model, name, value)
    told = header.get("covariance")
    if told is not None:
        told = {name: float("inf") if value is None else value for name, value in told.items()}
        model._covariance = Covariance(
            matrix=arrays["covariance"],
            known=arrays["identified"] != 0.0,
            scale=arrays["scale"],
            null=arrays.get("null", np.zeros((len(arrays["coef"]), 0))),
            **told | {"notes": tuple(told["notes"])},
        )
    if header.get("formula") is not None:
        told = header["formula"]
        model._formula = FormulaDesign.from_json(told["design"])
        model.formula_, model._names_of = told["text"], told["names"]
        model.notes_ = tuple(model._formula.notes)
    statistics = header.get("statistics")
    if statistics is not None:
        model._statistics = FitStatistics(**statistics | {"notes": tuple(statistics["notes"])})
    report = dict(header["result"])
    for name in ("gradient_norm", "move", "decrement"):
        report[name] = float("nan") if report[name] is None else report[name]
    report["status"] = Status(report["status"])
    report["local_values"] = {
        name: float("inf") if value is None else value for name, value in report["local_values"].items()
    }
    model.result_ = Result(
        x=arrays["coef"],
        gradient=arrays["gradient"],
        unidentified=arrays.get("unidentified", np.zeros((len(arrays["coef"]), 0))),
        history=History(),
        problem=None,
        **report,
    )


def _read(path: str | PathLike[str]) -> tuple[dict[str, NDArray[Any]], str]:
    """Return arrays and header of a file whose digest is right."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{path} is not a readable safetensors file: {error}") from None
    if HEADER not in metadata or DIGEST not in metadata:
        raise ModelFileError(f"{path} is a safetensors file but not a model of attnfit")
    if _digest(arrays, metadata[HEADER]) != metadata[DIGEST]:
        raise ModelFileError(
            f"{path} is damaged: its contents do not match its checksum; restore it from a copy"
        )
    return arrays, metadata[HEADER]


def _digest(arrays: dict[str, NDArray[Any]], header: str) -> str:
    """Guard against damage, not against forgery: whoever writes a file can write its digest."""
    digest = hashlib.sha256(header.encode("utf-8", "surrogatepass"))
    for name in sorted(arrays):
        digest.update(f"\n{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _formula(model: Any) -> dict[str, Any]:
    """Return the design of a model with a formula, and the names of the columns that the fit took."""
    return {"text": model.formula_, "names": model._names_of, "design": model._formula.to_json()}


def _described(model: Any) -> dict[str, Any]:
    """Return what the stored covariance is."""
    return {name: _finite(getattr(model._covariance, name)) for name in model_header.COVARIANCE}


def _encode_solver(solver: Any) -> Any:
    if solver is None:
        return None
    name = type(solver).__name__
    if (
        name not in model_header.SOLVERS
        or not is_dataclass(solver)
        or type(solver) is not getattr(solvers, name)
    ):
        raise ValueError(f"solver {name} cannot be stored; call set_params(solver=None) before saving")
    return {"class": name, "params": asdict(solver)}  # type: ignore[arg-type]


def _finite(value: Any) -> Any:
    """Return None for numbers that JSON has no form for."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")

"""How well a model predicts rows that it was not fitted on: a share left out, folds, another file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit import metrics
from attnfit.cli.console import note
from attnfit.cli.errors import InputError
from attnfit.cli.models import predict_named
from attnfit.cli.rows import Rows

Index = NDArray[np.intp]
# Entries of `Rows.inputs` that predictions take.
WHERE = ("groups", "offset", "absorb")


@dataclass(frozen=True)
class Scores:
    """How well rows were predicted that the fit had not seen.

    Attributes
    ----------
    title : str
        What they are and how they were chosen.
    values : dict of str to list of float
        One number a measure, or one a fold.
    """

    title: str
    values: dict[str, list[float]]

    def lines(self) -> list[str]:
        """Return the measures as words: a number, or the mean of folds with its standard error."""
        told = []
        for name, found in self.values.items():
            mean = f"{name} {np.mean(found):.6g}"
            # Folds that agree to rounding have no error worth a word.
            if len(found) > 1 and np.ptp(found) > 1e-12 * abs(np.mean(found)):
                mean += f" (standard error {np.std(found, ddof=1) / np.sqrt(len(found)):.2g})"
            told.append(mean)
        return told

    def sentence(self) -> str:
        """Return title and measures in one line."""
        return f"{self.title}: {', '.join(self.lines())}"


def measures(estimator: Any, X: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """Return the measures that fit the model: log loss, Brier score and hits of shares and choices;
    deviance and explained part of outcomes. Rows with a label whose effect the fit does not know are left
    out, and of shares their whole group.

    Raises
    ------
    InputError
        If no row is left.
    """
    where = {name: inputs[name] for name in WHERE if inputs.get(name) is not None}
    y, weights = inputs["y"], inputs.get("sample_weight")
    fitted: Any = predict_named(estimator, X, where)
    groups = inputs.get("groups")
    if "absorb" in where:
        known = _known(fitted, groups)
        y, fitted = y[known], fitted[known]
        weights = None if weights is None else weights[known]
        groups = None if groups is None else groups[known]
    if not hasattr(estimator, "n_groups_"):
        return _of_outcomes(estimator, y, fitted, weights)
    about: dict[str, Any] = {"groups": groups, "sample_weight": weights}
    about["outside_good"] = bool(estimator.outside_good)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            "log loss": metrics.log_loss(y, fitted, **about),
            "Brier score": metrics.brier(y, fitted, **about),
            "log loss of equal shares": metrics.log_loss(y, _equal(groups, len(y), estimator), **about),
        }
    if groups is not None and not estimator.outside_good and np.isin(y, (0.0, 1.0)).all():
        found["hit rate"] = _hits(y, fitted, groups)
    return found


def _known(fitted: Any, groups: Any) -> Any:
    """Return which rows have a prediction, of shares in a group where all have."""
    known = np.isfinite(fitted)
    if groups is not None:
        unknown = np.unique(np.asarray(groups)[~known])
        known = ~np.isin(groups, unknown)
    if not known.any():
        raise InputError("No row has labels that the fit has seen, so there is nothing to score")
    if not known.all():
        n = int(np.count_nonzero(~known))
        note(f"Not scored: {n:,} row{'s'[: n > 1]}, for labels that the fit has not seen.")
    return known


def _equal(groups: Any, n: int, estimator: Any) -> Any:
    """Return the shares that a model without features predicts."""
    numbers = np.zeros(n, dtype=np.intp) if groups is None else np.unique(groups, return_inverse=True)[1]
    return 1.0 / (np.bincount(numbers) + bool(estimator.outside_good))[numbers]


def _hits(y: Any, fitted: Any, groups: Any) -> float:
    """Return the share of groups whose chosen row has the largest share; q-fold ties count 1/q."""
    numbers = np.unique(groups, return_inverse=True)[1]
    largest = np.zeros(int(numbers.max()) + 1)
    np.maximum.at(largest, numbers, fitted)
    best = fitted == largest[numbers]
    ties = np.bincount(numbers, weights=best)
    chosen = np.bincount(numbers, weights=y) > 0
    hits = np.bincount(numbers, weights=best * (y > 0)) / ties
    return float(hits[chosen].mean()) if chosen.any() else float("nan")


def _of_outcomes(estimator: Any, y: Any, fitted: Any, weights: Any) -> dict[str, float]:
    from sklearn.metrics import d2_tweedie_score, mean_poisson_deviance, r2_score

    if type(estimator).__name__ == "PoissonRegressor":
        above = np.maximum(fitted, np.finfo(np.float64).tiny)
        return {
            "Poisson deviance a row": float(mean_poisson_deviance(y, above, sample_weight=weights)),
            "explained deviance": float(d2_tweedie_score(y, above, sample_weight=weights, power=1)),
        }
    return {
        "root mean squared error": float(np.sqrt(np.average((y - fitted) ** 2, weights=weights))),
        "r2": float(r2_score(y, fitted, sample_weight=weights)),
    }


@dataclass(frozen=True)
class Units:
    """What is held out together: clusters where there are some, else groups, else rows.

    Attributes
    ----------
    numbers : ndarray of int, shape (n,)
    name : str
        What one is called.
    """

    numbers: Index
    name: str

    @property
    def count(self) -> int:
        """Their number."""
        return int(self.numbers.max()) + 1


def units_of(rows: Rows) -> Units:
    """Return what is held out together; clusters that cut across groups leave groups whole, and effects of
    levels are known only where rows of a cluster stay.
    """
    inputs, n = rows.inputs, len(rows.inputs["y"])
    groups, clusters = inputs.get("groups"), inputs.get("clusters")
    if "absorb" not in inputs and clusters is not None and np.ndim(clusters) == 1:
        units = np.unique(np.asarray(clusters).astype(str), return_inverse=True)[1]
        if groups is None or _nested(groups, units):
            return Units(units, "clusters")
    if groups is not None:
        return Units(np.unique(np.asarray(groups).astype(str), return_inverse=True)[1], "groups")
    return Units(np.arange(n), "rows")


def _nested(groups: Any, units: Index) -> bool:
    numbers = np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
    first = np.zeros(int(numbers.max()) + 1, dtype=np.intp)
    first[numbers] = units
    return bool((first[numbers] == units).all())


def hold_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows, str]:
    """Return the rows to fit on, those to score, and how these were chosen."""
    units = units_of(rows)
    n_out = round(share * units.count)
    if not 0 < n_out < units.count:
        raise InputError(f"--holdout {share:g} of {units.count} {units.name} leaves none on one side")
    out = np.random.default_rng(seed).permutation(units.count)[:n_out]
    held = np.isin(units.numbers, out)
    title = f"Held out {n_out:,} of {units.count:,} {units.name} at random (seed {seed})"
    return take(rows, ~held), take(rows, held), title


def take(rows: Rows, keep: Any) -> Rows:
    """Return some of the rows."""
    inputs = {
        name: None if of is None else of.rows(keep) if hasattr(of, "rows") else np.asarray(of)[keep]
        for name, of in rows.inputs.items()
    }
    training = rows.training
    if training is not None:
        places = np.flatnonzero(keep) if np.asarray(keep).dtype == bool else np.asarray(keep)
        given = dict(training.given)
        if "alternatives" in given:
            given["alternatives"] = given["alternatives"][places]
        training = replace(training, frame=training.frame.iloc[places], given=given)
    return replace(rows, X=rows.X[keep], inputs=inputs, training=training)


def cross_validate(
    new: Callable[[], Any], fit: Callable[[Any, Rows], None], rows: Rows, n_folds: int
) -> Scores:
    """Fit on all folds but one and score that one, in turn.

    Parameters
    ----------
    new, fit : callable
        Return an unfitted estimator, and fit it.
    rows : Rows
    n_folds : int
    """
    from sklearn.model_selection import GroupKFold

    units = units_of(rows)
    if units.count < n_folds:
        raise InputError(f"--cv {n_folds} needs as many {units.name}; there are {units.count}")
    found: dict[str, list[float]] = {}
    for train, test in GroupKFold(n_folds).split(units.numbers, groups=units.numbers):
        estimator = new()
        with warnings.catch_warnings():
            # A fold without a finite minimum has shares, and those are what is judged.
            warnings.simplefilter("ignore")
            fit(estimator, take(rows, train))
            inside = take(rows, test)
            for name, value in measures(estimator, inside.X, inside.inputs).items():
                found.setdefault(name, []).append(value)
    return Scores(f"Cross-validated, {n_folds} folds of {units.name}", found)
